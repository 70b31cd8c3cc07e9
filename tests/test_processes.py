"""Any number of processes draws the same images and trains the same model, sharded or not. What stops one
process stops all."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nextscale.base.errors import CheckpointError
from nextscale.base.processes import fail_together
from nextscale.pipeline import VARPipeline
from nextscale.runs.manifest import find_damage
from nextscale.runs.writer import RunFolder
from test_trainer import brightness, make_trainer, metrics_of, redness

BEST = ("best-1", "best-2", "best-3", "sharded-best-2")
TESTS = Path(__file__).parent


def start(num_processes: int, *words: str) -> subprocess.Popen[str]:
    """Processes under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src")]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command += [str(num_processes), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def run(num_processes: int, script: str, *arguments: str) -> None:
    started = start(num_processes, str(TESTS / script), *arguments)
    _, told = started.communicate(timeout=300)
    assert started.returncode == 0, told[-3000:]


def launch(folder: Path, num_processes: int) -> list[dict[str, Any]]:
    run(num_processes, "two_processes.py", str(folder))
    return [torch.load(folder / f"{num_processes}-{rank}.pt") for rank in range(num_processes)]


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


def test_any_number_of_processes_equals_one(make_pipeline: Callable[[], VARPipeline], tmp_path: Path) -> None:
    """Of 16 images in groups of 4, three processes have 6, 5 and 5: groups and microbatches are cut
    anywhere."""
    (one,) = launch(tmp_path, 1)
    for number in (2, 3):
        several = launch(tmp_path, number)
        for name in ("tokens", "images", *(name for name in one if name.startswith("advantages/"))):
            assert torch.equal(torch.cat([each[name] for each in several]), one[name]), name
        # The transformer's products, and they alone, round by the size of their batch.
        log_probs = torch.cat([each["log_probs"] for each in several])
        torch.testing.assert_close(log_probs, one["log_probs"], rtol=0, atol=1e-5)
        for each in several:
            assert each["evaluation"] == one["evaluation"]
            assert each["eval_time"] == several[0]["eval_time"]
            assert {"eval_diversity", "eval_spread"} <= one["evaluation"].keys()
            torch.testing.assert_close(each["coefficients"], one["coefficients"], rtol=0, atol=1e-6)
            for name, expected in one["gradient"].items():
                largest = expected.abs().max().clamp_min(1e-8)
                assert (each["gradient"][name] - expected).abs().max() / largest < 1e-5, name
            for case, expected in one["trained"].items():
                assert largest_difference(each["trained"][case], expected) < 1e-6, case

    # Sharded, the model is the same, and its checkpoints are those of any other run.
    two = torch.load(tmp_path / "2-1.pt")["trained"]
    alike = {
        "sharded": "group",
        "recomputed": "group",
        "sharded-lora": "lora",
        "sharded-freeze": "freeze",
        "sharded-conditional": "conditional",
        "sharded-best": "best",
        "sharded-costly": "costly",
        "sharded-compiled": "group",
        "sharded-refilled": "refilled",
        "sharded-stopped": "stopped",
    }
    for case, plain in alike.items():
        assert largest_difference(two[case], two[plain]) < 1e-5, case
    best = [load_file(tmp_path / name / "best" / "transformer.safetensors") for name in BEST]
    assert all(largest_difference(each, best[0]) < 1e-5 for each in best[1:])
    pair = {"red": redness, "bright": brightness}
    for name in ("group-1", "sharded-2"):
        pipe, options = make_pipeline(), {"learning_rate": 1e-5, "max_steps": 4, "resume": "auto"}
        make_trainer(pipe, tmp_path / name, pair, **options).train()
        assert metrics_of(tmp_path / name)[-1]["step"] == 4
        assert largest_difference(dict(pipe.transformer.named_parameters()), two["resumed"]) < 1e-5, name


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes were stopped in several ways. Shared: not to be changed."""
    folder = tmp_path_factory.mktemp("stopped")
    run(2, "stopped.py", str(folder))
    return folder


def told(folder: Path, name: str) -> str:
    """What stopped both processes."""
    first, second = [(folder / f"{name}-{rank}.txt").read_text() for rank in range(2)]
    assert first == second
    return first


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_one_process_stops_both_at_the_same_step(stopped: Path, sent: signal.Signals) -> None:
    assert told(stopped, sent.name) == f"{int(sent)} after step 2"
    assert [each.name for each in (stopped / sent.name / "checkpoints").iterdir()] == ["step-000002"]


def test_a_signal_that_reaches_a_process_while_both_save_stops_neither(stopped: Path) -> None:
    assert told(stopped, "late") == f"{int(signal.SIGTERM)} after step 1"
    (checkpoint,) = (stopped / "late" / "checkpoints").iterdir()
    assert checkpoint.name == "step-000001" and find_damage(checkpoint) is None


@pytest.mark.parametrize(("name", "key"), [("fails_in_one", "one"), ("fails_in_evaluation", "evaluation")])
def test_a_reward_that_fails_in_one_process_stops_both(stopped: Path, name: str, key: str) -> None:
    """After a checkpoint, which both have to write."""
    assert told(stopped, name).startswith(f"reward '{name}' raised KeyError: '{key}' (")
    assert (stopped / name / "checkpoints" / "step-000000").is_dir()


def test_a_reward_of_groups_that_fails_in_one_process_stops_both(stopped: Path) -> None:
    said = told(stopped, "fails_in_groups")
    assert said.startswith("reward 'fails_in_groups' raised KeyError: 'groups' (")
    assert [each.name for each in (stopped / "fails_in_groups" / "checkpoints").iterdir()] == ["step-000001"]


def test_a_full_disk_of_one_process_stops_both(stopped: Path) -> None:
    assert told(stopped, "full") == "No space left on device in optimizer.safetensors"
    checkpoints = {each.name for each in (stopped / "full" / "checkpoints").iterdir()}
    assert checkpoints == {"step-000001", ".writing-step-000002"}  # the next save removes what is left


def test_a_launcher_that_is_killed_takes_its_processes_with_it(tmp_path: Path) -> None:
    """They end after the same step, with a checkpoint, and nothing holds the run's folder."""
    metrics = tmp_path / "metrics.jsonl"
    launcher = start(2, str(TESTS / "endless.py"), str(tmp_path))
    while not (metrics.exists() and metrics.read_text().count("\n") > 1):
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.2)
    processes = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(processes, timeout=60)
    for each in alive:
        each.kill()
    assert len(processes) == 2 and not alive
    step = metrics_of(tmp_path)[-1]["step"]
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{step:06d}" and find_damage(checkpoint) is None
    RunFolder(tmp_path).lock()


def test_what_all_processes_fail_with_is_said_once() -> None:
    launcher = start(2, "-m", "nextscale", "train", "toy-painting", "--run.max_step", "3")
    _, told = launcher.communicate(timeout=120)
    assert launcher.returncode == 1 and told.count("nextscale: error: ") == 1
    assert "'run.max_step'" in told


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError("no decoder"), "no decoder"),
        (OSError(28, "No space left on device", "a.bin"), "[Errno 28] No space left on device: 'a.bin'"),
        (CheckpointError("it is broken"), "it is broken"),
    ],
)
def test_what_all_fail_with_says_what_the_first_did(error: Exception, text: str) -> None:
    with pytest.raises(type(error)) as caught, fail_together():
        raise error
    assert str(caught.value) == text
