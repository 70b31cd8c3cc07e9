"""No two runs write to one folder, and what a run writes is whole or absent."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from nextscale import rollout
from nextscale.base.errors import ConfigError
from nextscale.cli.main import main
from nextscale.grpo import GRPOConfig
from nextscale.pipeline import VARPipeline
from nextscale.rewards import ClipScore, RewardSet
from nextscale.runs.config import RunConfig
from nextscale.runs.writer import RunFolder
from nextscale.trainer import GRPOTrainer

SOURCE = Path(__file__).resolve().parents[2] / "src"
IN_USE = "another run is using"
QUIET = {"eval_steps": 0, "save_steps": 0, "report_to": "none", "disable_tqdm": True, "max_steps": 1}


def brightness(images: Tensor, conditions: list) -> Tensor:
    return images.mean((1, 2, 3))


def make_trainer(pipe: VARPipeline, path: Path, **options: Any) -> GRPOTrainer:
    run = RunConfig(**QUIET | {"output_dir": str(path)} | options)
    return GRPOTrainer(pipe, brightness, GRPOConfig(num_groups=1, num_generations=2), run=run)


def opened(path: Path, config: str = "a: 1\n", *, resume: bool = False, overwrite: bool = False) -> RunFolder:
    folder = RunFolder(path)
    folder.open(config, resume=resume, overwrite=overwrite)
    return folder


# The lock


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_in_use_is_refused_untouched(tmp_path: Path, options: dict[str, bool]) -> None:
    first = opened(tmp_path / "run")
    first.append_metrics({"step": 1})
    before = {path: path.read_bytes() for path in first.path.iterdir()}
    with pytest.raises(ConfigError, match=IN_USE):
        opened(tmp_path / "run", "b: 2\n", **options)
    with pytest.raises(ConfigError, match=IN_USE):
        RunFolder(tmp_path / "run").check(**{"resume": False, "overwrite": False} | options)
    assert {path: path.read_bytes() for path in first.path.iterdir()} == before


def test_a_closed_folder_is_free(tmp_path: Path) -> None:
    first = opened(tmp_path / "run")
    first.lock()  # again is no error
    first.close()
    first.close()
    RunFolder(tmp_path / "run").check(resume=False, overwrite=False)
    second = opened(tmp_path / "run")
    with pytest.raises(ConfigError, match=IN_USE):
        first.lock()
    second.close()


def test_a_refused_run_leaves_no_lock(tmp_path: Path) -> None:
    first = opened(tmp_path / "run")
    first.append_metrics({"step": 1})
    first.close()
    with pytest.raises(ConfigError, match="already holds a run") as kept:  # with the folder in its traceback
        opened(tmp_path / "run")
    opened(tmp_path / "run", resume=True).close()
    assert kept.value is not None


def test_a_check_writes_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").check(resume=False, overwrite=False)
    assert not list(tmp_path.iterdir())


def test_a_link_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "away")
    told = r"link' is a link to '.*away', which does not exist: make"
    for path in (tmp_path / "link", tmp_path / "link" / "run"):
        with pytest.raises(ConfigError, match=told):
            RunFolder(path).check(resume=False, overwrite=False)
        with pytest.raises(ConfigError, match=told):
            opened(path)
    (tmp_path / "away").mkdir()
    opened(tmp_path / "link").close()


@pytest.mark.parametrize("name", ["", " "])
def test_a_run_does_not_write_to_the_working_directory_unasked(name: str) -> None:
    with pytest.raises(ConfigError, match=r"output_dir = '.*' cannot be used: give the folder to write to"):
        RunConfig(output_dir=name)


def test_checks_of_many_processes_do_not_refuse_each_other(tmp_path: Path) -> None:
    """Each process of a distributed run checks the folder that it is going to resume."""
    opened(tmp_path / "run").close()

    def check(_: int) -> None:
        RunFolder(tmp_path / "run").check(resume=True, overwrite=False)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(64)))


def test_only_the_main_process_locks_and_writes(tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "run", is_main=False)
    other.open("a: 1\n", resume=False, overwrite=False)
    assert not other.path.exists()
    main = opened(tmp_path / "run")
    other.open("b: 2\n", resume=True, overwrite=False)
    assert main.config.read_text() == "a: 1\n"
    main.close()


def test_a_trainer_holds_its_folder_while_it_trains(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_pipeline, tmp_path / "run")
    make_trainer(tiny_pipeline, tmp_path / "run")  # one that is only made needs no folder
    assert not (tmp_path / "run").exists()
    trainer.open()
    with pytest.raises(ConfigError, match=IN_USE):
        make_trainer(tiny_pipeline, tmp_path / "run")
    trainer.train()
    again = opened(tmp_path / "run", resume=True)
    # Whatever only reads has no need of the lock.
    final = str(again.final)
    assert (
        main(["sample", "--model", final, "--num-images", "1", "--output", str(tmp_path / "samples.png")])
        == 0
    )
    assert main(["evaluate", final, "--reward", "pixels=brightness", "--num-images", "2"]) == 0
    assert main(["report", str(again.path)]) == 0
    assert main(["export", str(again.path), "--output", str(tmp_path / "model")]) == 0
    again.close()


def test_a_trainer_that_fails_lets_go_of_its_folder(
    tiny_pipeline: VARPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ConfigError("no such device")

    trainer = make_trainer(tiny_pipeline, tmp_path / "run")
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="no such device") as training:
        patched.setattr(rollout, "draw_batches", fail)
        trainer.train()
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="no such device") as making:
        patched.setattr(VARPipeline, "to", fail)
        make_trainer(tiny_pipeline, tmp_path / "run")
    opened(tmp_path / "run").close()
    assert training.tb and making.tb  # tracebacks, which keep both trainers alive


def test_of_two_processes_started_at_once_one_runs(make_pipeline: Any, tmp_path: Path, capsys: Any) -> None:
    """And the folder of the one, when it is killed, can be resumed."""
    make_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "reward.py").write_text(
        "def bright(images, conditions):\n    return images.mean((1, 2, 3))\n"
    )
    recipe = {
        "model": str(tmp_path / "model"),
        "rewards": {"bright": {"python": f"{tmp_path}/reward.py:bright"}},
        "grpo": {"num_groups": 1, "num_generations": 2},
        "run": QUIET | {"output_dir": str(tmp_path / "run"), "save_steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ["train", str(tmp_path / "recipe.yaml")]
    metrics = tmp_path / "run" / "metrics.jsonl"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "nextscale", *words, "--run.max_steps", "100000"],
            env=os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        deadline = time.time() + 120
        while all(each.poll() is None for each in processes) or not metrics.exists():
            assert time.time() < deadline
            time.sleep(0.1)
        refused, running = sorted(processes, key=lambda each: each.poll() is None)
        assert refused.returncode == 2 and running.poll() is None
        assert refused.stderr is not None
        (sentence,) = refused.stderr.read().splitlines()
        assert sentence.startswith("nextscale: error: another run is using")
        # Beside a live run nothing can write, and everything can read.
        for change in ([], ["--run.resume", "auto"], ["--run.overwrite"]):
            assert main([*words, *change]) == 2 and IN_USE in capsys.readouterr().err
        assert main(["report", str(tmp_path / "run")]) == 0
        assert running.poll() is None
    finally:
        for each in processes:
            each.send_signal(signal.SIGKILL)
            each.communicate()
    assert main([*words, "--run.resume", "auto", "--run.max_steps", "1"]) == 0


# Whole or absent


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_what_there_was(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for path in (folder.config, folder.environment, folder.metrics):
        path.write_text('{"step": 1}\n{"step": 2}\n')
    with pytest.raises(OSError, match="No space"):
        folder.open("", resume=True, overwrite=False)
    RunFolder(tmp_path).check(resume=True, overwrite=False)  # it is not locked
    with pytest.raises(OSError, match="No space"):
        folder.write_environment({})
    with pytest.raises(OSError, match="No space"):
        folder.keep_steps(1)
    with pytest.raises(OSError, match="No space"):
        folder.save_grid(0, torch.zeros(1, 1, 3, 4, 4), ["a"])
    assert not list(folder.samples.iterdir())
    for path in (folder.config, folder.environment, folder.metrics):
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_resumed_run_keeps_the_metrics_up_to_its_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(4):
        folder.append_metrics({"step": step, "reward": step / 3})
    with folder.metrics.open("a") as file:
        file.write('{"step": 4, "rew')
    folder.keep_steps(2)
    records = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert records == [{"step": step, "reward": step / 3} for step in range(3)]
    folder.keep_steps(0)  # the first evaluation stays
    assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == records[:1]
    folder.keep_steps(None)  # it starts afresh, its first evaluation included
    assert folder.metrics.read_text() == ""


def test_overwriting_removes_the_earlier_run(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    folder.append_metrics({"step": 1})
    folder.write_environment({"device": "cpu"})
    (tmp_path / "bright.py").touch()
    sources = dict.fromkeys(("bright", "a/b", "a_b"), tmp_path / "bright.py")
    folder.keep_sources(sources)
    assert {path.name for path in folder.rewards.iterdir()} == {"bright.py", "a%2Fb.py", "a_b.py"}
    for path in (folder.checkpoints / "step-000001", folder.final, folder.samples, folder.tensorboard):
        path.mkdir(parents=True)
    folder.report.touch()
    (folder.path / "mine.txt").touch()
    folder.close()
    opened(folder.path, "b: 2\n", overwrite=True).close()
    assert {path.name for path in folder.path.iterdir()} == {"config.yaml", "mine.txt", ".lock"}
    assert folder.config.read_text() == "b: 2\n"


def test_overwriting_removes_a_run_that_ended_before_its_first_line(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    folder.write_environment({"device": "cpu"})
    folder.save_grid(0, torch.zeros(1, 1, 3, 8, 8), ["star"])
    folder.close()
    opened(folder.path, overwrite=True).close()
    assert {path.name for path in folder.path.iterdir()} == {"config.yaml", ".lock"}


# What a run keeps of how it was made


def test_a_run_keeps_the_files_of_its_rewards(make_pipeline: Any, tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path / "model")
    source = "def bright(images, conditions):\n    return images.mean((1, 2, 3))\n"
    (tmp_path / "mine.py").write_text(source)
    run = QUIET | {"output_dir": str(tmp_path / "run")}
    recipe = {"model": str(tmp_path / "model"), "run": run, "grpo": {"num_groups": 1, "num_generations": 2}}
    recipe["rewards"] = {"shiny": {"python": "mine.py:bright"}, "grey": {"pixels": "brightness"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    kept = tmp_path / "run" / "rewards"
    assert {path.name: path.read_text() for path in kept.iterdir()} == {"shiny.py": source}
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["rewards"]["shiny"]["function"] == f"{tmp_path}/mine.py:bright"


def test_a_run_from_python_records_prompts_roles_and_environment(tiny_pipeline: Any, tmp_path: Path) -> None:
    class Judge:
        question = "Is this a {label}?"
        secret = "sesame"

        def __call__(self, images: Tensor, conditions: list) -> Tensor:
            return images.mean((1, 2, 3))

    painting = ClipScore("a painting of a {label}", clip="toy", negative="a photo")
    rewards = RewardSet({"painting": painting, "judge": Judge(), "mean": brightness}, {"judge": 0.5})
    run = RunConfig(**QUIET | {"output_dir": str(tmp_path / "run")})
    trainer = GRPOTrainer(tiny_pipeline, rewards, GRPOConfig(num_groups=1, num_generations=2), run=run)
    trainer.open()
    trainer.folder.close()
    text = trainer.folder.config.read_text()
    assert yaml.safe_load(text)["rewards"] == {
        "painting": {
            "kind": "ClipScore",
            "positive": ["a painting of a {label}"],
            "negative": ["a photo"],
            "weight": 1.0,
        },
        "judge": {"kind": "Judge", "question": "Is this a {label}?", "weight": 0.5},
        "mean": {"kind": "brightness", "weight": 1.0},
    }
    assert "sesame" not in text
    told = json.loads(trainer.folder.environment.read_text())
    assert told["num_processes"] == 1 and told["command"] == ""
    assert "model_is_local" not in told  # a model that was made is at no place
    tiny_pipeline.source = str(tmp_path)
    again = GRPOTrainer(tiny_pipeline, rewards, GRPOConfig(num_groups=1, num_generations=2), run=run)
    again.open()
    again.folder.close()
    assert json.loads(again.folder.environment.read_text())["model_is_local"] is True


# ---- what is not the run's


@pytest.mark.parametrize("name", ["config.yaml", "rewards", "samples", "final", "best", "checkpoints"])
def test_a_folder_with_what_no_run_has_written_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=rf"'.*{name}' was written by no run"):
        RunFolder(tmp_path).check(resume=False, overwrite=True)
    with pytest.raises(ConfigError, match=rf"'.*{name}' was written by no run"):
        RunFolder(tmp_path).check(resume=True, overwrite=False)
    assert [each.name for each in tmp_path.iterdir()] == [name]
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    RunFolder(tmp_path).check(resume=True, overwrite=False)  # checkpoints brought along alone


def test_a_folder_that_a_run_was_killed_in_is_taken_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open("model: toy\n", resume=False, overwrite=False)
    folder.close()
    assert [each.name for each in tmp_path.iterdir() if each.suffix == ".yaml"] == ["config.yaml"]
    RunFolder(tmp_path).check(resume=False, overwrite=False)


def test_overwriting_spares_what_the_run_reads(tmp_path: Path) -> None:
    source = tmp_path / "run" / "rewards" / "mine.py"
    source.parent.mkdir(parents=True)
    source.write_text("")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for run in ("run", "link"):
        with pytest.raises(ConfigError, match=r"mine\.py' is needed, and lies in '.*', which run\.overwrite"):
            RunFolder(tmp_path / run).check(resume=False, overwrite=True, needed=[source])
    RunFolder(tmp_path / "run").check(resume=True, overwrite=False, needed=[source])
    RunFolder(tmp_path / "other").check(resume=False, overwrite=True, needed=[source])
