"""A user's reward cannot change the images that training sees, the random numbers, or what others see."""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.pipeline import VARPipeline
from test_trainer import MakePipeline, brightness, make_trainer, metrics_of, redness


def repaints(images: Tensor, conditions: list[Condition]) -> None:
    images.zero_()
    images.requires_grad_()


def reseeds(images: Tensor, conditions: list[Condition]) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.rand(100)


def rewords(images: Tensor, conditions: list[Condition]) -> None:
    for each in conditions:
        each.data["names"].clear()  # type: ignore[index]
    conditions.clear()


def records(images: Tensor, conditions: list[Condition]) -> None:
    torch.set_grad_enabled(True)


def widens(images: Tensor, conditions: list[Condition]) -> None:
    torch.set_default_dtype(torch.float64)


def wanders(images: Tensor, conditions: list[Condition]) -> None:
    os.chdir("/")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Whatever a reward does to the process, the other tests do not see."""
    folder = Path.cwd()
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    yield
    os.chdir(folder)
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(dtype)


def trained(pipe: VARPipeline, folder: Path, before: Callable[..., None] | None) -> tuple[Any, Any]:
    """Train with two rewards, of which the first does something else before it answers."""

    def first(images: Tensor, conditions: list[Condition]) -> Tensor:
        scores = redness(images, conditions).clone()
        if before is not None:
            before(images, conditions)
        return scores

    def second(images: Tensor, conditions: list[Condition]) -> Tensor:
        assert all(each.data["names"] == ["a"] for each in conditions)
        return brightness(images, conditions)

    trainer = make_trainer(pipe, folder, {"first": first, "second": second}, eval_steps=1, eval_num_images=8)
    named = [replace(each, data={"names": ["a"]}) for each in pipe.all_conditions()]
    trainer.collector.conditions = trainer.conditions = trainer.evaluator.conditions = named
    trainer.train()
    clocks = ("time/", "step_time", "images_per_second", "eval_time")
    lines = [
        {key: each for key, each in line.items() if not key.startswith(clocks)} for line in metrics_of(folder)
    ]
    return [each.detach().clone() for each in pipe.transformer.parameters()], lines


@pytest.fixture(scope="module")
def benign(make_pipeline: MakePipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What comes of a reward that does nothing else. Shared: not to be changed."""
    return trained(make_pipeline(), tmp_path_factory.mktemp("benign"), None)


@pytest.mark.parametrize("before", [repaints, reseeds, rewords, records, widens, wanders])
def test_whatever_a_reward_does_training_is_the_same(
    before: Callable[..., None], benign: tuple[Any, Any], make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    folder = Path.cwd()
    found = trained(make_pipeline(), tmp_path / "hostile", before)
    assert Path.cwd() == folder
    assert found[1] == benign[1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], benign[0], strict=True))
