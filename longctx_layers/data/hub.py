"""The Hugging Face hub: without network, its local cache or an immediate error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

SECONDS = 1.5  # to wait for an answer; the hub's own client would retry for about 23
Loaded = TypeVar("Loaded")


def reachable() -> bool:
    """Whether the hub answers within `SECONDS`, through whatever proxy the environment names."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return False
    answers: list[bool] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
            answers.append(True)
        except Exception:
            answers.append(False)

    # In a thread, because looking up a name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return bool(answers) and answers[0]


@contextmanager
def _offline() -> Iterator[None]:
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def from_hub(load: Callable[[], Loaded], what: str, instead: str) -> Loaded:
    """Call `load`, with the hub's local cache alone if the hub does not answer.

    Args:
        load: downloads something through `datasets` or `transformers`, and returns it.
        what: it loads, for the error.
        instead: what to use without network, for the error.

    Raises:
        ConnectionError: if the hub is out of reach and the cache does not hold it.
    """
    if reachable():
        return load()
    with _offline():
        try:
            return load()
        except (OSError, ValueError) as error:
            raise ConnectionError(
                f"{what} is not on this machine and the Hugging Face hub does not answer; "
                f"without the network use {instead}"
            ) from error
