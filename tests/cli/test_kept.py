"""An evaluation that was stopped goes on, and ends as if it had not been; its images in a file."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextscale.base.files import cache_folder, with_files
from nextscale.base.images import to_bytes
from nextscale.base.seeding import mixed_order
from nextscale.base.tensors import fingerprint
from nextscale.cli.main import main
from nextscale.pipeline import VARPipeline

SOURCE = Path(__file__).resolve().parents[2] / "src"
# Called once for each batch of 64; `stop` says in which call what happens. What each call saw is in `seen`.
REWARD = """
import os, signal
from pathlib import Path

folder = Path(__file__).parent

def bright(images, conditions):
    with open(folder / "seen", "a") as file:
        print(*(each.label for each in conditions), file=file)
    call = len((folder / "seen").read_text().splitlines())
    stop = (folder / "stop").read_text().split() if (folder / "stop").exists() else ["0", ""]
    if call == int(stop[0]):
        if stop[1] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"interrupt": KeyboardInterrupt, "error": ValueError}[stop[1]]("no")
    return images.mean((1, 2, 3))

def dark(images, conditions):
    return -images.mean((1, 2, 3))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where evaluations are kept."""
    monkeypatch.setenv("NEXTSCALE_CACHE", str(tmp_path / "cache"))
    return cache_folder("evaluations")


@pytest.fixture
def words(make_pipeline: Callable[..., VARPipeline], cache: Path, tmp_path: Path) -> list[str]:
    """Evaluate 200 images of a model in batches of 64, by two rewards."""
    (tmp_path / "rewards.py").write_text(REWARD)
    make_pipeline().save_pretrained(tmp_path / "model")
    rewards = [f"--reward={name}:python={tmp_path}/rewards.py:{name}" for name in ("bright", "dark")]
    return ["evaluate", str(tmp_path / "model"), *rewards, "--num-images", "200", "--json"]


@pytest.fixture
def evaluated(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str, int]]]:
    """Runs the command, stopped in a call of the reward or not: its exit status, what it printed, told, and
    how many batches it drew."""

    def run(*more: str, stop: str = "0 no", other: tuple[str, ...] = ()) -> tuple[int, str, str, int]:
        (tmp_path / "seen").write_text("")
        (tmp_path / "stop").write_text(stop)
        status = main([*words[:2], *other, *words[2:], *more])
        captured = capsys.readouterr()
        return status, captured.out, captured.err, len((tmp_path / "seen").read_text().splitlines())

    yield run


def test_it_goes_on_where_it_was_stopped(evaluated: Callable[..., Any], cache: Path) -> None:
    whole = evaluated()
    assert (whole[0], whole[2], whole[3]) == (0, "", 4) and list(cache.iterdir()) == []
    status, out, told, drawn = evaluated(stop="3 interrupt")
    (folder,) = (each for each in cache.iterdir() if each.is_dir())
    assert (status, out, drawn) == (128 + signal.SIGINT, "", 3)
    assert told == f"stopped; what was drawn is kept in {folder}: the same command goes on from there\n"
    assert json.loads((folder / "computation.json").read_text())["seed"] == 0
    status, out, told, drawn = evaluated()
    assert told == f"Goes on with what is kept in {folder}.\n"
    assert (status, out, drawn) == (0, whole[1], 2)  # the third batch anew, and the fourth
    assert list(cache.iterdir()) == []


def test_stopped_before_anything_was_drawn(evaluated: Callable[..., Any]) -> None:
    assert evaluated(stop="1 interrupt")[2] == "stopped\n"


def test_a_reward_that_failed_is_asked_again(evaluated: Callable[..., Any]) -> None:
    status, _, told, _ = evaluated(stop="4 error")
    assert status == 2 and told.startswith("nextscale: error: reward 'bright' raised ValueError: no")
    assert evaluated()[3] == 1


def test_it_goes_on_after_a_kill_with_its_images_in_the_file(
    words: list[str], evaluated: Callable[..., Any], cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "images.npz"
    (tmp_path / "seen").write_text("")
    (tmp_path / "stop").write_text("3 kill")
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nextscale", *words, "--npz", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL and not path.exists()
    assert evaluated("--npz", str(path))[3] == 2
    assert [each.name for each in path.parent.iterdir()] == ["images.npz"] and list(cache.iterdir()) == []
    pipe = VARPipeline.from_pretrained(tmp_path / "model")
    conditions = pipe.all_conditions()
    seeds = [("evaluate", 0, each.key) for each in conditions]
    images = pipe.draw(conditions, seeds, 50, pipe.sampling, 64).images[mixed_order(200)]
    with np.load(path, allow_pickle=False) as found:
        assert np.array_equal(found["arr_0"], to_bytes(images).permute(0, 2, 3, 1).numpy())
    with path.open("rb") as file:
        before = file.read()
    assert evaluated("--npz", str(path))[3] == 4
    assert path.read_bytes() == before


def test_images_that_are_gone_are_drawn_anew(evaluated: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    assert evaluated("--npz", str(path), stop="3 interrupt")[0] == 130
    (aside,) = tmp_path.glob(".writing-*-images.npz")
    aside.unlink()
    assert evaluated("--npz", str(path))[3] == 4
    assert np.load(path)["arr_0"].shape == (200, 8, 8, 3)


@pytest.mark.parametrize("change", [["--seed", "1"], ["--mixed-precision", "bf16"], "model", "reward"])
def test_another_evaluation_begins_anew(
    change: Any, evaluated: Callable[..., Any], make_pipeline: Callable[..., VARPipeline], tmp_path: Path
) -> None:
    evaluated(stop="3 interrupt")
    if change == "model":
        make_pipeline(seed=1).save_pretrained(tmp_path / "model")
    if change == "reward":
        (tmp_path / "rewards.py").write_text(REWARD + "\n")
    status, _, told, drawn = evaluated(*(change if isinstance(change, list) else []))
    assert (status, told, drawn) == (0, "", 4)
    if change == ["--seed", "1"]:  # and the first is still there
        assert evaluated()[3] == 2


def test_several_models_are_kept_until_all_are_measured(
    evaluated: Callable[..., Any], make_pipeline: Callable[..., VARPipeline], tmp_path: Path
) -> None:
    other = (str(make_pipeline(seed=1).save_pretrained(tmp_path / "other")),)
    whole = evaluated(other=other)
    assert (whole[0], whole[3]) == (0, 8)
    assert evaluated(other=other, stop="6 interrupt")[0] == 130
    assert evaluated(other=other)[1::2] == (whole[1], 3)


def test_a_second_one_beside_it_is_made_without_being_kept(
    evaluated: Callable[..., Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nextscale.base.parts import Parts

    monkeypatch.setattr(Parts, "claim", lambda *_: False)
    status, _, told, drawn = evaluated()
    assert (status, drawn) == (0, 4)
    assert told == "This evaluation could not go on if it were stopped: another process makes the same one.\n"
    monkeypatch.undo()
    (tmp_path / "file").touch()
    monkeypatch.setenv("NEXTSCALE_CACHE", str(tmp_path / "file"))
    told = evaluated()[2]
    assert f"stopped: '{tmp_path}/file/evaluations/" in told and told.endswith("': Not a directory.\n")


def test_images_alone_need_no_rewards(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = [*words[:2], "--num-images", "4", "--npz", str(tmp_path / "images.npz")]
    assert main(plain) == 0
    assert capsys.readouterr().out.endswith("\n\n4 images of fixed seeds.\n")
    assert np.load(tmp_path / "images.npz")["arr_0"].shape == (4, 8, 8, 3)
    for more, says in (
        ([str(tmp_path / "model2")], "--npz is for one model: give each its own file"),
        (["--npz", str(tmp_path)], "is a folder: give a file to write"),
    ):
        assert main([*plain[:2], *more, *(plain[2:] if "--npz" not in more else [])]) == 2
        assert says in capsys.readouterr().err


def test_a_fingerprint_is_of_names_shapes_and_bits() -> None:
    state = {"a": torch.arange(6.0), "b": torch.tensor(1).bfloat16()}
    others = [
        {"a": torch.arange(6.0)},
        {"c": state["a"], "b": state["b"]},
        state | {"a": state["a"].view(2, 3)},
        state | {"a": state["a"].flip(0)},
        state | {"b": -state["b"]},
        state | {"b": state["b"].half()},
    ]
    found = {fingerprint(each) for each in [state, dict(state), *others]}
    assert len(found) == 1 + len(others)


def test_options_are_known_with_the_files_they_name(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    given = {"x": {"function": f"{tmp_path}/a.py:f", "clip": str(tmp_path), "weight": 1.0, "none": None}}
    before = with_files(given)
    assert json.loads(json.dumps(before)) == before and before["x"]["weight"] == 1.0
    (tmp_path / "a.py").write_text("22")
    after = with_files(given)
    assert before["x"]["function"] != after["x"]["function"] and before["x"]["clip"] != after["x"]["clip"]
    assert with_files("a prompt: " + 300 * "x") == "a prompt: " + 300 * "x"
