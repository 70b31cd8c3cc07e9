"""Rewards under several processes."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import gather_object

from nextscale.base.errors import RewardError


@contextmanager
def fail_together() -> Iterator[None]:
    """A reward that fails in one process fails in all: the others would wait for that one for ever.

    All processes must come here; the first one's sentence is told by all.

    Raises:
        RewardError: one was raised inside, in this process or in another.
    """
    error: RewardError | None = None
    try:
        yield
    except RewardError as caught:
        error = caught
    for sentence in gather_object([error and str(error)]):
        if sentence:
            raise RewardError(sentence) from error
