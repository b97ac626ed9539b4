"""Names for content: of files in the cache, and of documents."""

from __future__ import annotations

import hashlib
import json


def content_key(*parts: str) -> str:
    """A short name for what these strings describe together.

    >>> content_key("a", "b") == content_key("a", "b") != content_key("ab")
    True
    """
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


def digest(text: str) -> int:
    """64 bits that stand for a document's content; equal documents have equal digests."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
