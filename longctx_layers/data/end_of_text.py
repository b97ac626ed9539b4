"""An end of text that no text contains: an id of its own, which only ends of documents become."""

from __future__ import annotations

import json
from typing import Any

from longctx_layers.data.errors import DataError

# The spelling of the end of text while encoding: no text contains Unicode's noncharacters.
UNWRITTEN = "\ufdd0\ufdd1\ufdd2\ufdd1\ufdd0"


def without_end_of_text(content: str, end: str) -> tuple[Any, bool]:
    """A tokenizer that never encodes text as the end of text.

    The spelling of the end of text is replaced wherever text could match it: among the added
    tokens, and in the model's vocabulary, where a word, a piece or a merge may spell it. Ids stay
    as they are.

    Args:
        content: the tokenizer, as JSON of the library tokenizers.
        end: its end of text.

    Returns:
        The tokenizer, and whether it gives the same ids as one that encodes every special token as
        ordinary text. Earlier versions did that; tokens that they stored are then still valid.
    """
    from tokenizers import Tokenizer as Fast

    changed = json.loads(content)
    model = changed["model"]
    encodes_as_text = True
    for token in changed["added_tokens"]:
        if token["content"] == end:
            token.update(content=UNWRITTEN, normalized=False)
        elif token["special"]:
            encodes_as_text = False
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {UNWRITTEN if word == end else word: i for word, i in vocabulary.items()}
    else:
        model["vocab"] = [[UNWRITTEN if word == end else word, p] for word, p in vocabulary]
    if model.get("unk_token") == end:
        model["unk_token"] = UNWRITTEN
    if model["type"] == "BPE":
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merges = [pair for pair in pairs if end not in (*pair, "".join(pair))]
        encodes_as_text &= len(merges) == len(pairs) and not model.get("ignore_merges")
        model["merges"] = merges
    elif end in dict(vocabulary):
        encodes_as_text = False
    return Fast.from_str(json.dumps(changed)), encodes_as_text


def separate_end_of_text(tokenizer: Any) -> None:
    """Give the end of text of transformers' `tokenizer` an id of its own, if it shares one.

    The library tokenizers numbers added tokens by the size of the vocabulary. If the ids have gaps,
    that is the id of another token. An id can be chosen only in the model's own vocabulary.

    Raises:
        DataError: if it cannot be chosen there, or if two other tokens share an id.
    """
    from tokenizers import Tokenizer as Fast

    end = tokenizer.eos_token
    ids: dict[str, int] = tokenizer.get_vocab()
    tokens_of_id: dict[int, list[str]] = {}
    for token, number in ids.items():
        tokens_of_id.setdefault(number, []).append(token)
    for tokens in tokens_of_id.values():
        if len(tokens) > 1 and end not in tokens:
            raise DataError(
                f"tokenizer: expected an id for each token, got one for both "
                f"{' and '.join(tokens)}; add tokens under ids that are free"
            )
    if len(tokens_of_id[ids[end]]) == 1:
        return
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if not isinstance(content["model"].get("vocab"), dict):
        others = [token for token in tokens_of_id[ids[end]] if token != end]
        raise DataError(
            f"tokenizer: expected an id of its own for the end of text {end!r}, got that of "
            f"{' and '.join(others)}; add it under another id"
        )
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != end]
    content["model"]["vocab"][end] = max(tokens_of_id) + 1
    tokenizer._tokenizer = Fast.from_str(json.dumps(content))
    tokenizer.add_special_tokens({"eos_token": end})
