"""A user's own reward, a function in a file."""

import re
import sys
from pathlib import Path

import pytest
import torch

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError, RewardError
from nextscale.rewards import load_function, score

SOURCE = '''
"""A reward as a user would write one."""
from __future__ import annotations
import asyncio
from dataclasses import dataclass

FACTOR = 2.0

@dataclass
class Colour:
    channel: int

def redness(images, conditions):
    return FACTOR * images[:, Colour(0).channel].mean((1, 2))

def broken(images, conditions):
    return {}[conditions[0].text]

async def awaited(images, conditions):
    await asyncio.sleep(0)
    return [None if condition.label else 1.5 for condition in conditions]

async def broken_async(images, conditions):
    await asyncio.sleep(0)
    return {}[conditions[0].text]
'''
LINE = 1 + SOURCE.splitlines().index("    return {}[conditions[0].text]")
IMAGES = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 4, 4)
CONDITIONS = [Condition(0, "star"), Condition(1, "heart")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    return path


def test_a_function_of_a_file_is_a_reward(file: Path):
    reward = load_function(f"{file}:redness")
    assert score("mine", reward, IMAGES, CONDITIONS).tolist() == [0.0, 2.0]


def test_a_relative_path_is_taken_from_here(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(file.parent)
    assert load_function("my_rewards.py:redness")(IMAGES, CONDITIONS).tolist() == [0.0, 2.0]


def test_files_of_one_name_do_not_meet(file: Path, tmp_path: Path):
    first = load_function(f"{file}:redness")
    other = tmp_path / "other" / file.name
    other.parent.mkdir()
    other.write_text(SOURCE.replace("FACTOR = 2.0", "FACTOR = 5.0"))
    second = load_function(f"{other}:redness")
    assert first(IMAGES, CONDITIONS).tolist() == [0.0, 2.0]
    assert second(IMAGES, CONDITIONS).tolist() == [0.0, 5.0]


def test_a_changed_file_is_read_anew(file: Path):
    load_function(f"{file}:redness")
    file.write_text(SOURCE.replace("FACTOR = 2.0", "FACTOR = 4.75"))
    assert load_function(f"{file}:redness")(IMAGES, CONDITIONS).tolist() == [0.0, 4.75]


def test_an_async_function_is_a_reward(file: Path):
    scores = score("mine", load_function(f"{file}:awaited"), IMAGES, CONDITIONS)
    assert scores[0] == 1.5 and scores[1].isnan()


@pytest.mark.parametrize(("name", "line"), [("broken", LINE), ("broken_async", LINE + 8)])
@pytest.mark.parametrize("timeout", [None, 60])
def test_a_function_that_raises_is_told_with_its_line(
    file: Path, name: str, line: int, timeout: float | None
):
    reward = load_function(f"{file}:{name}")
    told = rf"reward 'mine' raised KeyError: 'star' \({re.escape(str(file))}:{line}\)$"
    with pytest.raises(RewardError, match=told):
        score("mine", reward, IMAGES, CONDITIONS, timeout)


@pytest.mark.parametrize(
    "reference", ["", "redness", ":redness", "my_rewards.py", "my_rewards.py:", "a.py:f()"]
)
def test_a_reference_of_another_form_is_told(reference: str):
    with pytest.raises(ConfigError, match=r"must be of the form path/to/file\.py:function"):
        load_function(reference)


def test_a_missing_file_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no file '.*none\.py'"):
        load_function(f"{tmp_path / 'none.py'}:redness")
    with pytest.raises(ConfigError, match="no file"):
        load_function(f"{tmp_path}:redness")


def test_a_file_that_is_no_python_is_told(tmp_path: Path):
    text = tmp_path / "rewards.txt"
    text.write_text(SOURCE)
    with pytest.raises(ConfigError, match="is not a Python file"):
        load_function(f"{text}:redness")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("x = 1\nraise RuntimeError('no weights')", r"raised RuntimeError: no weights \(.*faulty\.py:2\)"),
        ("import nextscale_none", "raised ModuleNotFoundError: No module named 'nextscale_none'"),
        ("def f(:", "raised SyntaxError"),
        ("import sys\nsys.exit(0)", r"raised SystemExit: 0 \(.*faulty\.py:2\)"),
    ],
)
def test_a_file_that_raises_is_told(tmp_path: Path, source: str, told: str):
    path = tmp_path / "faulty.py"
    path.write_text(source)
    with pytest.raises(ConfigError, match=told):
        load_function(f"{path}:f")
    assert "nextscale_user_faulty" not in sys.modules


def test_a_missing_function_is_told_with_the_nearest(file: Path):
    with pytest.raises(ConfigError, match="no function 'rednes' in it; did you mean 'redness'"):
        load_function(f"{file}:rednes")
    with pytest.raises(ConfigError, match="no function 'FACTOR' in it"):
        load_function(f"{file}:FACTOR")
