"""Rewards under several processes."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import gather_object

from nextscale.base.errors import RewardError


@contextmanager
def fail_together() -> Iterator[None]:
    """Make a reward that fails in one process fail in all, which would otherwise wait for that one forever.

    All processes must enter the block; all raise the sentence of the first that failed.

    Raises:
        RewardError: one was raised inside the block, in this process or in another.
    """
    error: RewardError | None = None
    try:
        yield
    except RewardError as caught:
        error = caught
    for sentence in gather_object([error and str(error)]):
        if sentence:
            raise RewardError(sentence) from error
