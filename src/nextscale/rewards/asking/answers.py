"""Asking a reward and checking what it answers; what goes wrong is reported under the reward's name."""

import math
import os
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import NextscaleError, RewardError, in_words
from nextscale.rewards.asking.waiting import begin, call, is_async, wait_for

# Where code lies that the user did not write: this package, Python's library, installed packages.
LIBRARIES = (
    str(Path(__file__).parents[2]),
    *{sysconfig.get_path(each) for each in ("stdlib", "platstdlib", "purelib", "platlib")},
)


def ask(
    name: str,
    reward: Callable[..., Any],
    images: Tensor,
    conditions: Sequence[Condition],
    timeout: float | None,
    begun: "Future[Any] | None" = None,
) -> Any:
    """What a reward answers, unchecked.

    Args:
        timeout: seconds after which a reward that has not answered is given up.
        begun: its pending answer, where it has been asked already.

    Raises:
        RewardError: the reward raised, or timed out.
    """
    try:
        if begun is None and (timeout is not None or is_async(reward)):
            begun = begin(reward, images, conditions)
        return call(reward, images, conditions) if begun is None else wait_for(begun, timeout)
    except NextscaleError as error:
        raise RewardError(f"reward '{name}': {error}") from error
    except (Exception, SystemExit) as error:  # a run that ends by a reward's exit(0) would look finished
        raise RewardError(f"reward '{name}' raised {in_words(error)}{user_line(error)}") from error


def ask_conditions(
    name: str, check: Callable[[Sequence[Condition]], None], conditions: Sequence[Condition]
) -> None:
    """Have a reward check that it can score images of these conditions.

    Raises:
        RewardError: it raised.
    """
    ask(name, lambda _, conditions: check(conditions), torch.empty(0), conditions, None)


def check_answer(name: str, scores: Any, images: Tensor) -> Tensor:
    """An answer as (B,) float32 on the CPU.

    Raises:
        RewardError: the answer is not one number for each image, or one of them is infinite.
    """
    try:
        if isinstance(scores, (list, tuple)):
            scores = [math.nan if each is None else each for each in scores]
        if isinstance(scores, Tensor) and (scores.is_complex() or scores.layout != torch.strided):
            raise TypeError("not plain numbers")
        scores = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = type(scores).__name__
        raise RewardError(f"reward '{name}' returned {found}, expected {len(images)} numbers") from None
    if scores.shape != (len(images),):
        found = tuple(scores.shape)
        raise RewardError(
            f"reward '{name}' returned shape {found}, expected ({len(images)},), one for each image"
        )
    if scores.isinf().any():
        raise RewardError(
            f"reward '{name}' returned an infinite score; return NaN for an image it cannot score"
        )
    return scores


def user_line(error: BaseException) -> str:
    """The innermost line of the user's own code that an error passed through, as " (file.py:7)", or ""."""
    foreign = ("<", *(each + os.sep for each in LIBRARIES))
    lines = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(foreign)
    ]
    return f" ({lines[-1]})" if lines else ""
