"""Synthetic documents with something to learn at every distance, for runs without any data.

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

from longctx_layers.data.keys import content_key
from longctx_layers.data.sources.base import Request, Source, from_generator

DEFAULT_COUNT = 1000
# Names these documents, also in checkpoints: to be changed whenever the same seed gives others.
LANGUAGE = (
    "7f5b1f8e952973856750c27e7e6419caef34f4732176d06a9b3a28cf3040c4eb"
    "6c84a75ac1552fcb79bb7ffb8e1a393d3657e6a0eb5b1632e98e003bad0c857f"
)
WORDS = 400
TOPICS = 8
SUCCESSORS = 8
# Characters of a document; lengths are uniform in the logarithm.
SHORTEST = 512
LONGEST = 16384
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def check(config: str | None) -> None:
    """See `Reader`; the config is the number of documents."""
    if config is not None and not (config.isdecimal() and int(config) > 1):
        raise ValueError(
            "dataset_config: for synthetic expected a number of documents above 1, or nothing "
            f"for {DEFAULT_COUNT}, got {config!r}"
        )


def open_source(request: Request) -> Source:
    """See `Reader`."""
    count = int(request.config or DEFAULT_COUNT)
    fingerprint = content_key("synthetic", str(count), LANGUAGE)
    return Source(from_generator(documents, count=count), None, fingerprint)


def documents(count: int, seed: int = 0) -> Iterator[str]:
    """Generate `count` documents; the first n of them are the same whatever the count.

    >>> next(documents(1)) == next(documents(2))
    True
    """
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
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(draw.choices(SYLLABLES, k=draw.randint(2, 4)))] = None
    return list(words)


def _document(draw: random.Random, words: list[str], followers: list[list[int]]) -> str:
    length = round(math.exp(draw.uniform(math.log(SHORTEST), math.log(LONGEST))))
    weights = [1 / (rank + 1) for rank in range(SUCCESSORS)]
    facts: dict[str, str] = {}
    sentences: list[str] = []
    word = draw.randrange(len(words))
    size = 0
    while size < length:
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
        size += len(sentence) + 1
    return "\n".join(sentences) + "\n"
