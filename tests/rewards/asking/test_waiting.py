"""Rewards that take their time: async ones wait together, and one that hangs is given up."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import RewardError
from nextscale.rewards import RewardSet, score

SOURCE = Path(__file__).resolve().parents[3] / "src"
IMAGES = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 4, 4)
CONDITIONS = [Condition(0, "star"), Condition(1, "heart")]
RED = [0.0, 1.0]


async def red(images: Tensor, conditions: list) -> Tensor:
    return images[:, 0].mean((1, 2))


class Red:
    """An object with an async call."""

    async def __call__(self, images: Tensor, conditions: list) -> Tensor:
        return await red(images, conditions)


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """An event to wait for in vain, until the test is over."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("reward", [red, Red()])
@pytest.mark.parametrize("timeout", [None, 60])
def test_an_async_reward_is_awaited(reward: Any, timeout: float | None):
    assert score("red", reward, IMAGES, CONDITIONS, timeout).tolist() == RED


def test_async_rewards_wait_together():
    """None of the three answers before the others have been asked."""
    asked: list[str] = []
    open_gate = threading.Event()

    def waiting(name: str) -> Any:
        async def reward(images: Tensor, conditions: list) -> list[float]:
            asked.append(name)
            for _ in range(1000):
                if open_gate.is_set():
                    return RED
                await asyncio.sleep(0.01)
            raise AssertionError("asked alone")

        return reward

    def plain(images: Tensor, conditions: list) -> list[float]:
        for _ in range(1000):
            if len(asked) == 2:
                open_gate.set()
                return RED
            time.sleep(0.01)
        raise AssertionError("asked alone")

    rewards = RewardSet({"a": waiting("a"), "plain": plain, "b": waiting("b")})
    components = rewards.scores(IMAGES, CONDITIONS)
    assert list(components) == ["a", "plain", "b"]
    assert all(scores.tolist() == RED for scores in components.values())


def test_async_rewards_keep_their_loop():
    """A client that belongs to a loop, as most do, can be used call after call."""
    loops = []

    async def reward(images: Tensor, conditions: list) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return RED

    for _ in range(2):
        RewardSet({"mine": reward})(IMAGES, CONDITIONS)
    assert loops[0] is loops[1] and not loops[0].is_closed()


@pytest.mark.parametrize("is_in_task", [False, True])
def test_an_async_reward_that_exits_has_failed(is_in_task: bool):
    """And the loop lives on, for other rewards and later steps."""

    async def exits() -> None:
        await asyncio.sleep(0)
        sys.exit(0)

    async def reward(images: Tensor, conditions: list) -> None:
        await (asyncio.gather(exits(), asyncio.sleep(0.01)) if is_in_task else exits())

    for _ in range(2):
        rewards = RewardSet({"red": red, "mine": reward}, timeouts={"mine": 60})
        with pytest.raises(RewardError, match=r"^reward 'mine' raised SystemExit: 0 \(.*test_waiting\.py:"):
            rewards.scores(IMAGES, CONDITIONS)
    assert score("red", red, IMAGES, CONDITIONS, 60).tolist() == RED


def test_an_interrupt_in_an_async_reward_is_one():
    async def reward(images: Tensor, conditions: list) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score("mine", reward, IMAGES, CONDITIONS, 60)
    assert score("red", red, IMAGES, CONDITIONS, 60).tolist() == RED


def test_what_is_left_is_cancelled_when_one_fails():
    cancelled = threading.Event()

    async def slow(images: Tensor, conditions: list) -> None:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def broken(images: Tensor, conditions: list) -> None:
        time.sleep(0.05)
        raise KeyError("star")

    with pytest.raises(RewardError, match="reward 'broken' raised KeyError"):
        RewardSet({"broken": broken, "slow": slow}).scores(IMAGES, CONDITIONS)
    assert cancelled.wait(60)


def test_a_reward_that_hangs_is_given_up(never: threading.Event):
    async def hangs_async(images: Tensor, conditions: list) -> None:
        await asyncio.sleep(600)

    def hangs(images: Tensor, conditions: list) -> None:
        never.wait(600)

    for reward in (hangs, hangs_async):
        rewards = RewardSet({"quick": red, "mine": reward}, timeouts={"mine": 0.2})
        with pytest.raises(RewardError, match=r"^reward 'mine': no answer within its timeout of 0\.2 s$"):
            rewards.scores(IMAGES, CONDITIONS)


def test_a_timeout_of_the_reward_itself_is_not_ours():
    def reward(images: Tensor, conditions: list) -> None:
        raise TimeoutError("the database")

    with pytest.raises(RewardError, match="reward 'mine' raised TimeoutError: the database"):
        score("mine", reward, IMAGES, CONDITIONS, 60)


def test_a_timeout_changes_nothing_of_what_a_reward_sees():
    """Gradients are off and autocast is on in its thread, too, both of which torch keeps by thread."""
    seen = []

    def reward(images: Tensor, conditions: list) -> Tensor:
        seen.append((torch.is_grad_enabled(), (images[0, 0] @ images[0, 0]).dtype, images, conditions))
        return images[:, 0].mean((1, 2))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        for timeout in (None, 60):
            assert score("mine", reward, IMAGES, CONDITIONS, timeout).tolist() == RED
    score("mine", reward, IMAGES, CONDITIONS, 60)
    assert [each[:2] for each in seen] == [
        (False, torch.bfloat16),
        (False, torch.bfloat16),
        (False, torch.float32),
    ]
    assert all(torch.equal(each[2], IMAGES) and each[3] == CONDITIONS for each in seen)


HANGING = """
import time

import torch

from nextscale.base.errors import RewardError
from nextscale.rewards import RewardSet

def hang(images, conditions):
    time.sleep(600)

async def hang_async(images, conditions):
    time.sleep(600)  # blocks the loop, as it should not

for reward in (hang, hang_async):
    try:
        RewardSet({"slow": reward}, timeouts={"slow": 0.1})(torch.zeros(1, 3, 4, 4), [])
    except RewardError as error:
        print(error)
"""


def test_a_reward_that_hangs_does_not_keep_the_process_from_ending():
    done = subprocess.run(
        [sys.executable, "-c", HANGING],
        env=os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == 2 * "reward 'slow': no answer within its timeout of 0.1 s\n"
