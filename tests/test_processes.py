"""One process with 4 groups = two processes with 2 each: the same images, the same gradient. What stops one
process stops both."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent


def run(num_processes: int, script: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(num_processes), str(TESTS / script), *arguments]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src")]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def launch(folder: Path, num_processes: int) -> list[dict[str, torch.Tensor]]:
    run(num_processes, "two_processes.py", str(folder))
    return [torch.load(folder / f"{num_processes}-{rank}.pt") for rank in range(num_processes)]


pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    (one,) = launch(tmp_path, 1)
    first, second = launch(tmp_path, 2)
    # Process r has groups r, r + 2, ...; a group is 4 images.
    groups = one.pop("tokens").split(4)
    assert torch.equal(torch.cat(groups[0::2]), first.pop("tokens"))
    assert torch.equal(torch.cat(groups[1::2]), second.pop("tokens"))
    for scale_rewards in ("group", "batch", "none"):
        whole, *shares = (each.pop(f"{scale_rewards}/advantages") for each in (one, first, second))
        for rank, share in enumerate(shares):  # batches of other sizes round the pixels otherwise
            torch.testing.assert_close(share, whole[rank::2], rtol=0, atol=1e-4)
    for name, expected in one.items():
        largest = expected.abs().max().clamp_min(1e-8)
        assert torch.equal(first[name], second[name]), name
        difference = (first[name] - expected).abs()
        if "/trained/" in name:  # AdamW turns rounding into a step where a gradient is next to nothing
            assert difference.mean() < 1e-8, name
        else:
            assert difference.max() / largest < 1e-4, name


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path: Path, sent: signal.Signals) -> None:
    run(2, "stopped.py", str(tmp_path), str(int(sent)))
    first, second = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert first == second == f"{int(sent)} after step 2"
    assert [each.name for each in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


def test_a_reward_that_fails_in_one_process_stops_both(tmp_path: Path) -> None:
    """After a checkpoint, which both have to write."""
    run(2, "bad_reward.py", str(tmp_path))
    for name, key in (("fails_in_one", "one"), ("fails_in_evaluation", "evaluation")):
        first, second = [(tmp_path / f"{name}-{rank}.txt").read_text() for rank in range(2)]
        assert first == second
        assert first.startswith(f"reward '{name}' raised KeyError: '{key}' (")
        assert (tmp_path / name / "checkpoints" / "step-000000").is_dir()
