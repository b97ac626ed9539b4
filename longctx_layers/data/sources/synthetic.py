"""Made documents with something to learn at every range, for runs without any data.

One small language, the same on every machine. What a model can learn, from near to far:

- spelling: 400 words of two to four syllables;
- grammar: every word is followed by one of eight others, the first far more often than the last;
- topic: a document starts in one of eight regions of the vocabulary and seldom leaves it;
- memory: facts such as `key dakemi 7302.` are stated once and asked for later as
  `? dakemi 7302.`, at distances up to the length of the document. Their digits are random: only
  what remembers the statement can predict the answer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

WORDS, TOPICS, SUCCESSORS = 400, 8, 8
SHORTEST, LONGEST = 512, 16384  # characters of a document; lengths are uniform in the logarithm
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def documents(count: int, seed: int = 0) -> Iterator[str]:
    """`count` documents; the first n of them are the same whatever the count."""
    draw = random.Random(f"language {seed}")
    words = _new_words(draw, WORDS)
    size = WORDS // TOPICS
    followers = []
    for word in range(WORDS):
        topic = word // size * size
        near = draw.sample(range(topic, topic + size), SUCCESSORS - 1)
        followers.append([*near, draw.randrange(WORDS)])
    for number in range(count):
        yield _document(random.Random(f"document {seed} {number}"), words, followers)


def _new_words(draw: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.choices(SYLLABLES, k=draw.randint(2, 4)))] = None
    return list(found)


def _document(draw: random.Random, words: list[str], followers: list[list[int]]) -> str:
    length = round(math.exp(draw.uniform(math.log(SHORTEST), math.log(LONGEST))))
    weights = [1 / (rank + 1) for rank in range(SUCCESSORS)]
    facts: dict[str, str] = {}
    sentences: list[str] = []
    written, word = 0, draw.randrange(len(words))
    while written < length:
        kind = draw.random()
        if kind < 0.06:
            (name,) = _new_words(draw, 1)
            facts[name] = f"{draw.randrange(10_000):04d}"
            sentence = f"key {name} {facts[name]}."
        elif kind < 0.15 and facts:
            name = draw.choice(list(facts))
            sentence = f"? {name} {facts[name]}."
        else:
            chain = []
            for _ in range(draw.randint(4, 12)):
                (word,) = draw.choices(followers[word], weights)
                chain.append(words[word])
            sentence = " ".join(chain) + "."
        sentences.append(sentence)
        written += len(sentence) + 1
    return "\n".join(sentences) + "\n"
