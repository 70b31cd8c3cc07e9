"""Calling a reward in another thread: async ones wait together, and one that hangs can be given up."""

import asyncio
import concurrent.futures
import copy
import inspect
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import RewardError


def is_async(reward: Callable[..., Any]) -> bool:
    """Whether it is an `async def` function, or an object with an async `__call__`."""
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


def call(reward: Callable[..., Any], images: Tensor, conditions: Sequence[Condition]) -> Any:
    """What a reward answers, or for an async one what is to be awaited. It gets copies: whatever it does to
    them, the other rewards, the judges and training see what was drawn."""
    return reward(images.clone(), copy.deepcopy(list(conditions)))


@contextmanager
def settings_kept() -> Iterator[None]:
    """Undo what a reward did to settings of the process that training depends on: torch's default dtype,
    and the folder that relative paths start from."""
    dtype, folder = torch.get_default_dtype(), os.getcwd()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        os.chdir(folder)


def begin(reward: Callable[..., Any], images: Tensor, conditions: Sequence[Condition]) -> "Future[Any]":
    """Call a reward in another thread, with gradients off: an async one on the event loop that all of them
    share, any other one in a thread of its own, with this thread's autocast and device."""
    if is_async(reward):

        async def ask() -> Any:
            return await call(reward, images, conditions)

        return asyncio.run_coroutine_threadsafe(ask(), _event_loop())
    # Torch keeps all of these per thread.
    kind, index = images.device.type, images.device.index if images.is_cuda else -1
    is_cast, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def run() -> Any:
        with torch.no_grad(), torch.autocast(kind, dtype, enabled=is_cast), torch.cuda.device(index):
            return call(reward, images, conditions)

    return start_thread(run)


def start_thread(function: Callable[..., Any], *args: Any) -> "Future[Any]":
    """Call a function in a daemon thread, which does not keep the process alive if it never ends, as a thread
    of a ThreadPoolExecutor would."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def wait_for(future: "Future[Any]", timeout: float | None) -> Any:
    """The answer of a reward that `begin` called.

    Args:
        timeout: seconds from now; None waits forever.

    Raises:
        RewardError: there is no answer in time. An async reward is then cancelled; the thread of any other
            one is left running, for Python cannot stop it.
    """
    if not concurrent.futures.wait([future], timeout).done:
        future.cancel()
        raise RewardError(f"no answer within its timeout of {timeout:g} s")
    return future.result()


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the life of the process, so that a reward's client can keep its connections."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        torch.set_grad_enabled(False)
        while True:
            # A task that exits, or is interrupted, hands its error to who awaits it, and ends the loop as
            # well: without the loop, no answer would ever come.
            with suppress(SystemExit, KeyboardInterrupt):
                loop.run_forever()

    threading.Thread(target=run, daemon=True).start()
    return loop
