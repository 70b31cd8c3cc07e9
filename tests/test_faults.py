"""What goes wrong in a run, and what is left of it then."""

import errno
import json
import os
import pickle
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import CheckpointError, ConfigError, RewardError, TrainingError
from nextscale.base.interrupt import Interrupted, StopOnSignal
from nextscale.callbacks import Callback
from nextscale.credit import Scored
from nextscale.grpo import GRPOConfig
from nextscale.losses import LOSSES, LossOutput, grpo_loss
from nextscale.pipeline import VARPipeline
from nextscale.rewards.reward_set import RewardSet
from nextscale.rewards.roles import AtLeast
from nextscale.runs import checkpoint as checkpoint_module
from nextscale.runs.config import RunConfig
from nextscale.runs.launch import asks_for_fsdp, make_accelerator, reshards_after_forward
from nextscale.runs.manifest import write_manifest
from nextscale.runs.reader import read_run
from nextscale.trainer import GRPOTrainer
from test_trainer import GUIDED, MakePipeline, brightness, make_trainer, metrics_of, redness


def weights_of(pipe: VARPipeline) -> Tensor:
    return torch.cat([each.detach().flatten() for each in pipe.transformer.parameters()])


def spoil(monkeypatch: pytest.MonkeyPatch, *updates: int) -> None:
    """Make the loss NaN in these updates, counted from 1."""
    done = 0

    def loss(q: Any, config: Any) -> LossOutput:
        nonlocal done
        done += 1
        output = grpo_loss(q, config)
        return LossOutput(output.loss * float("nan"), output.metrics) if done in updates else output

    monkeypatch.setitem(LOSSES, "spoilt", loss)


# ---- numbers that are not finite


def test_an_update_that_is_not_finite_is_skipped_and_counted(
    tiny_pipeline: VARPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 2)
    options = {"loss_type": "spoilt", "entropy_floor": 0.9, "max_steps": 3}
    trainer = make_trainer(tiny_pipeline, tmp_path / "run", **options)
    trainer.open()
    trainer.step(1)
    before = weights_of(tiny_pipeline)
    metrics = trainer.step(2)
    assert torch.equal(weights_of(tiny_pipeline), before) and metrics["skipped_updates"] == 1
    trainer.log(2, metrics)
    assert metrics_of(tmp_path / "run")[0]["grad_norm"] is None  # JSON has no NaN
    assert trainer.step(3)["skipped_updates"] == 0
    assert not torch.equal(weights_of(tiny_pipeline), before)


def test_several_in_a_row_end_the_run_with_a_checkpoint_from_before(
    tiny_pipeline: VARPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 2, 3, 4)
    options = {"loss_type": "spoilt", "max_skipped_updates": 2, "max_steps": 9}
    trainer = make_trainer(tiny_pipeline, tmp_path / "run", **options)
    with pytest.raises(TrainingError, match=r"in 3 updates in a row.*gradient 'pos_start'.*learning_rate"):
        trainer.train()
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-000003" / "model.safetensors")
    assert all(each.isfinite().all() for name, each in saved.items() if "bias_for" not in name)
    assert [each["skipped_updates"] for each in metrics_of(tmp_path / "run")] == [0, 1, 1]


def test_the_reward_at_fault_is_named(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    """Each score is finite, but not how far they lie apart."""

    def huge(images: Tensor, conditions: list) -> Tensor:
        return torch.where(torch.arange(len(images)) % 2 == 0, 3e38, -3e38)

    rewards = {"red": redness, "huge": huge}
    trainer = make_trainer(tiny_pipeline, tmp_path / "run", rewards, max_skipped_updates=1, max_steps=9)
    with pytest.raises(TrainingError, match="not finite first: reward 'huge'"):
        trainer.train()


def test_weights_that_are_not_finite_are_never_written(
    tiny_pipeline: VARPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_pipeline, tmp_path / "run", save_steps=1, max_steps=2)
    finish = trainer.finish_step

    def break_a_weight(metrics: dict[str, float]) -> None:
        if trainer.step_done == 1:
            with torch.no_grad():
                tiny_pipeline.transformer.head.bias[0] = float("nan")
        finish(metrics)

    monkeypatch.setattr(trainer, "finish_step", break_a_weight)
    with pytest.raises(CheckpointError, match=r"not saved: 'head\.bias' holds NaN"):
        trainer.train()
    assert [each.name for each in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    assert not (tmp_path / "run" / "final").exists()


# ---- what a trainer leaves behind


def test_a_trainer_leaves_nothing_behind(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    options = {"mixed_precision": "bf16", "gradient_checkpointing": True, "max_steps": 1}
    make_trainer(tiny_pipeline, tmp_path / "run", **options).train()
    fresh = VARPipeline.from_pretrained(tmp_path / "run" / "final")
    ours, theirs = (pipe([0, 1], num_images_per_label=4, seed=3) for pipe in (tiny_pipeline, fresh))
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.log_probs, theirs.log_probs)
    assert not tiny_pipeline.transformer.gradient_checkpointing
    again = make_trainer(tiny_pipeline, tmp_path / "again", max_steps=1)
    again.train()
    assert metrics_of(tmp_path / "again")[0]["sampling/sampling_logp_difference/max"] < 1e-4


def test_weights_of_16_bits_are_refused(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    tiny_pipeline.transformer.bfloat16()
    with pytest.raises(ConfigError, match=r"is bfloat16, in which most updates round to nothing.*float32"):
        make_trainer(tiny_pipeline, tmp_path / "run")


# ---- an evaluation that fails


def test_the_last_evaluation_is_made_up_for(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    failing = {"evaluations": 0}

    def held(images: Tensor, conditions: list) -> Tensor:
        failing["evaluations"] += 1
        if failing["evaluations"] == 2:
            raise OSError("gone")
        return brightness(images, conditions)

    from nextscale.rewards import RewardSet

    rewards = RewardSet({"red": redness, "held": held}, held_out=["held"])
    options: dict[str, Any] = {"eval_steps": 2, "eval_num_images": 4, "per_device_eval_batch_size": 64}
    with pytest.raises(RewardError, match="'held' raised OSError: gone"):
        make_trainer(make_pipeline(num_classes=1), tmp_path / "run", rewards, **options).train()
    assert "eval_reward" not in metrics_of(tmp_path / "run")[-1]
    make_trainer(make_pipeline(num_classes=1), tmp_path / "run", rewards, resume="auto", **options).train()
    last = metrics_of(tmp_path / "run")[-1]
    assert last["step"] == 2 and "eval_rewards/held/mean" in last


# ---- stopping, resuming


def test_ctrl_c_in_python_ends_train_after_a_checkpoint(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    def interrupts(images: Tensor, conditions: list) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return redness(images, conditions)

    with pytest.raises(
        KeyboardInterrupt, match=r'stopped after step 1;.*RunConfig\(resume="auto"'
    ) as stopped:
        make_trainer(tiny_pipeline, tmp_path / "run", interrupts, max_steps=5).train()
    assert isinstance(stopped.value, Interrupted) and stopped.value.signal_number == signal.SIGINT
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()
    assert not (tmp_path / "run" / "final").exists()


def test_one_keystroke_counts_once_and_the_second_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher passes on the Ctrl-C that its processes got from the terminal as well."""
    now = [10.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    ended: list[int] = []
    with StopOnSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.2
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == signal.SIGINT
        now[0] += 2.0
        with monkeypatch.context() as patched:
            patched.setattr(signal, "signal", lambda number, handler: ended.append(handler))
            patched.setattr(signal, "raise_signal", ended.append)
            stop._request(signal.SIGINT, None)
    assert ended == [signal.SIG_DFL, signal.SIGINT]


@pytest.mark.parametrize(("ignored", "requested"), [("SIGHUP", 0), ("SIGINT", signal.SIGINT)])
def test_under_nohup_a_terminal_may_close(ignored: str, requested: int) -> None:
    """A job in the background of a script ignores Ctrl-C as well, yet may be asked to stop by its signal."""
    number = signal.Signals[ignored]
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopOnSignal() as stop:
            signal.raise_signal(number)
        assert stop.requested == requested and signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_finished_run_says_so(
    make_pipeline: MakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(make_pipeline(), tmp_path / "run").train()
    records, final = metrics_of(tmp_path / "run"), (tmp_path / "run" / "final" / "config.json").read_bytes()
    make_trainer(make_pipeline(), tmp_path / "run", resume="auto").train()
    assert "all 2 steps are done; raise run.max_steps to go on" in capsys.readouterr().err
    assert metrics_of(tmp_path / "run") == records
    assert (tmp_path / "run" / "final" / "config.json").read_bytes() == final
    make_trainer(make_pipeline(), tmp_path / "run", resume="auto", max_steps=3).train()
    assert [each["step"] for each in metrics_of(tmp_path / "run")] == [1, 2, 3]


def test_a_finished_run_without_a_checkpoint_says_so(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    """As an earlier release left it; begun again at step 0, its metrics would be lost without a word."""
    make_trainer(make_pipeline(), tmp_path / "run").train()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    records = metrics_of(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"is finished and kept no checkpoint: train its model"):
        make_trainer(make_pipeline(), tmp_path / "run", resume="auto")
    assert metrics_of(tmp_path / "run") == records


def test_tensorboard_has_each_step_once_after_a_resume(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    options: dict[str, Any] = {"report_to": "tensorboard", "save_steps": 2, "max_steps": 4}
    trainer = make_trainer(make_pipeline(), tmp_path / "run", **options)
    finish = trainer.finish_step

    def killed_in_step_4(metrics: dict[str, float]) -> None:
        if trainer.step_done == 3:
            raise SystemError("killed")
        finish(metrics)

    trainer.finish_step = killed_in_step_4  # type: ignore[method-assign]
    with pytest.raises(SystemError):
        trainer.train()
    make_trainer(make_pipeline(), tmp_path / "run", resume="auto", **options).train()
    events = EventAccumulator(str(tmp_path / "run"))
    (folder,) = {path.parent for path in (tmp_path / "run").rglob("events.out*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [each.step for each in events.Scalars("reward")] == [1, 2, 3, 4]


def test_a_constant_reward_beside_a_constraint_that_is_missed_warns_of_nothing(
    tiny_pipeline: VARPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = {"same": lambda images, _: [1.0] * len(images), "bright": brightness}
    bounded = RewardSet(rewards, constraints={"bright": AtLeast(0.9)})
    trainer = make_trainer(tiny_pipeline, tmp_path / "run", bounded, max_steps=1, constraint_start=1.0)
    trainer.train()
    assert metrics_of(tmp_path / "run")[0]["grad_norm"] > 0
    assert "nothing to learn" not in capsys.readouterr().err


@pytest.mark.parametrize("max_resamplings", [0, 1])
def test_a_constant_reward_warns_once(
    tiny_pipeline: VARPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], max_resamplings: int
) -> None:
    options = {"max_steps": 3, "max_resamplings": max_resamplings}
    make_trainer(tiny_pipeline, tmp_path / "run", lambda images, _: [1.0] * len(images), **options).train()
    assert capsys.readouterr().err.count("the same reward, so there is nothing to learn") == 1


def test_a_run_with_any_name_and_any_seed(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    rewards, seed = {"red 🎨": redness}, 2**40 + 7
    make_trainer(tiny_pipeline, tmp_path / "run", rewards, max_steps=1, seed=seed).train()
    assert read_run(tmp_path / "run").config["rewards"] == {"red 🎨": {"kind": "redness", "weight": 1.0}}
    assert "red 🎨" in (tmp_path / "run" / "report.html").read_text()


def test_what_failed_first_is_raised_where_saving_fails_as_well(
    tiny_pipeline: VARPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(tensors: Any, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def late(images: Tensor, conditions: list) -> Tensor:
        monkeypatch.setattr(checkpoint_module, "save_tensors", full)
        raise KeyError("late")

    with pytest.raises(RewardError, match="raised KeyError: 'late'"):
        make_trainer(tiny_pipeline, tmp_path / "run", {"red": late}).train()
    assert "no checkpoint was written either: " in capsys.readouterr().err


def test_nothing_is_written_where_there_is_nothing_to_resume(
    tiny_pipeline: VARPipeline, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="is no checkpoint: expected 'auto' or a folder"):
        make_trainer(tiny_pipeline, tmp_path / "run", resume=str(tmp_path / "none"))
    assert not (tmp_path / "run").exists()


# ---- what a checkpoint may hold


@pytest.fixture
def checkpoint(make_pipeline: MakePipeline, tmp_path: Path) -> Path:
    make_trainer(make_pipeline(), tmp_path / "run").train()
    return tmp_path / "run" / "checkpoints" / "step-000002"


class Bomb:
    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))

    def __init__(self, path: Path) -> None:
        self.path = path


def test_a_checkpoint_is_tensors_and_json_alone(checkpoint: Path) -> None:
    names = {"trainer_state.json", "model.safetensors", "optimizer.safetensors", "random-0.safetensors"}
    names |= {"manifest.json"}
    assert {each.name for each in checkpoint.iterdir()} == names


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "random_states_0.pkl", "model.safetensors"])
def test_no_code_in_a_checkpoint_runs(
    name: str, checkpoint: Path, make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    write_manifest(checkpoint)  # whoever means harm makes one that fits
    trainer = make_trainer(make_pipeline(), tmp_path / "run", resume="auto", max_steps=3)
    if name == "model.safetensors":
        with pytest.raises(CheckpointError, match="cannot be read"):
            trainer.train()
    else:
        trainer.train()
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_sentence(
    checkpoint: Path, make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    (checkpoint / "optimizer.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="an earlier version of nextscale, whose files can run code"):
        make_trainer(make_pipeline(), tmp_path / "run", resume="auto", max_steps=3).train()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.safetensors", "random-0.safetensors"])
@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_damaged_file_is_told(
    has_manifest: bool, name: str, checkpoint: Path, make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:50])
    if has_manifest:  # of the damaged files: what is in them is read
        write_manifest(checkpoint)
    with pytest.raises(CheckpointError, match=r"step-000002' cannot be read: "):
        make_trainer(make_pipeline(), tmp_path / "run", resume="auto", max_steps=3).train()


def test_a_checkpoint_of_another_model_is_told(
    checkpoint: Path, make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights["head.bias"] = weights["head.bias"][:5].clone()
    save_file(weights, checkpoint / "model.safetensors")
    write_manifest(checkpoint)
    with pytest.raises(CheckpointError, match=r"'head\.bias' has shape \(5,\), expected"):
        make_trainer(make_pipeline(), tmp_path / "run", resume="auto", max_steps=3).train()


def test_a_rewards_random_numbers_go_on_where_they_stopped(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    import random

    import numpy as np

    def noisy(images: Tensor, conditions: list) -> Tensor:
        drawn.append([random.gauss(0, 1), float(np.random.rand()), torch.rand(1).item()])
        return redness(images, conditions)

    drawn: list[list[float]] = []
    options: dict[str, Any] = {"save_steps": 2, "max_steps": 4}
    make_trainer(make_pipeline(), tmp_path / "run", noisy, **options).train()
    straight = drawn[2:]
    for each in (tmp_path / "run" / "checkpoints").glob("step-000004/*"):
        each.unlink()
    drawn.clear()
    make_trainer(make_pipeline(), tmp_path / "run", noisy, resume="auto", **options).train()
    assert drawn == straight

    # The same seed gives the same numbers, from the first on.
    drawn.clear()
    random.seed(7)
    make_trainer(make_pipeline(), tmp_path / "again", noisy, **options).train()
    assert drawn[2:] == straight


# ---- launchers

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "asks for mixed precision 'fp16', the run for 'no'"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient accumulation over 4 steps"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1 is not supported: set fsdp_version 2"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is not supported"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set run.gradient_checkpointing in place of"),
        (FSDP2 | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}, "a model says itself what it is sharded by"),
        (FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "a model says itself what it is sharded by"),
        (FSDP2, "FSDP has nothing to spread over in one process"),
        ({"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"}, "starts one process alone"),
        ({"WORLD_SIZE": "2"}, "started 2 processes, but this one is connected to 0 others"),
    ],
)
def test_what_a_launcher_says_otherwise_is_refused(
    variables: dict[str, str],
    sentence: str,
    tiny_pipeline: VARPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=sentence):
        make_trainer(tiny_pipeline, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_run_and_its_launcher_agree_on_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [asks_for_fsdp(RunConfig(fsdp=each)) for each in (None, False, True)] == [False, False, True]
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    assert asks_for_fsdp(RunConfig()) and asks_for_fsdp(RunConfig(fsdp=True)) and reshards_after_forward()
    with pytest.raises(ConfigError, match="the launcher asks for FSDP, the run for none"):
        asks_for_fsdp(RunConfig(fsdp=False))
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    assert not reshards_after_forward()


def test_trackers_go_by_accelerates_names(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_pipeline, tmp_path / "run", report_to=["tensorboard"])
    assert make_accelerator(trainer.run).log_with
    with pytest.raises(ConfigError, match=r"tracker 'tensorbord' is unknown.*did you mean 'tensorboard'"):
        make_trainer(tiny_pipeline, tmp_path / "other", report_to="tensorbord")


def test_metrics_are_json_that_any_reader_takes(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    make_trainer(tiny_pipeline, tmp_path / "run").train()

    def refuse(word: str) -> None:
        raise ValueError(word)

    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


# ---- what a checkpoint after a failure holds


def test_metrics_of_ones_own_are_numbers_of_any_kind(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    class Adds(Callback):
        def __init__(self, added: Any) -> None:
            self.added = added

        def on_step_end(self, trainer: GRPOTrainer, metrics: dict[str, Any]) -> None:
            metrics["mine"] = self.added

    for i, added in enumerate((np.float32(0.5), torch.tensor(0.5), np.array([0.5])[0])):
        trainer = make_trainer(make_pipeline(), tmp_path / f"run-{i}", max_steps=1)
        trainer.callbacks.append(Adds(added))
        assert trainer.train().metrics["mine"] == 0.5
    trainer = make_trainer(make_pipeline(), tmp_path / "run", max_steps=1)
    trainer.callbacks.append(Adds([0.5, 1.0]))
    told = "the metric 'mine' is an object of type list, expected a number"
    with pytest.raises(ConfigError, match=f"^{told}$"):
        trainer.train()


def test_an_update_that_fails_in_the_middle_of_a_step_leaves_the_last_checkpoint(
    tiny_pipeline: VARPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four iterations on the images of step 2 the last two fail, when two have moved the model."""
    spoil(monkeypatch, 7, 8)
    options = {"loss_type": "spoilt", "max_skipped_updates": 1, "num_iterations": 4, "save_steps": 1}
    trainer = make_trainer(tiny_pipeline, tmp_path / "run", max_steps=3, **options)
    written: list[Tensor] = []
    monkeypatch.setattr(trainer.bar, "on_save", lambda *_: written.append(weights_of(tiny_pipeline)))
    with pytest.raises(TrainingError):
        trainer.train()
    assert len(written) == 1 and not torch.equal(written[0], weights_of(tiny_pipeline))
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == "step-000001"


def test_a_step_that_fails_moves_no_multiplier(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    rewards = RewardSet({"red": redness, "more": redness}, constraints={"more": AtLeast(2.0)})
    trainer = make_trainer(tiny_pipeline, tmp_path / "run", rewards, credit="gradient", max_steps=3)
    multipliers: list[float] = []

    def credit(scored: Scored) -> Tensor:
        multipliers.extend(trainer.constraints.multipliers)
        if len(multipliers) == 2:
            raise RewardError("no such thing")
        return scored.advantages

    trainer.crediting.credit = credit
    with pytest.raises(RewardError):
        trainer.train()
    assert multipliers[0] < multipliers[1]
    state = json.loads((tmp_path / "run/checkpoints/step-000001/trainer_state.json").read_text())
    assert state["controllers"]["constraints"]["values"] == multipliers[:1]


class Fails(Callback):
    def on_step_end(self, trainer: GRPOTrainer, metrics: Any) -> None:
        if trainer.step_done == 2:
            raise ValueError("of a callback")


def test_a_callback_that_fails_loses_no_step(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    trainer = make_trainer(make_pipeline(), tmp_path / "run", max_steps=3)
    trainer.callbacks.append(Fails())
    with pytest.raises(ValueError, match="of a callback"):
        trainer.train()
    pipe = make_pipeline()
    make_trainer(pipe, tmp_path / "run", max_steps=3, resume="auto").train()
    assert [each["step"] for each in metrics_of(tmp_path / "run")] == [1, 2, 3]
    straight = make_pipeline()
    make_trainer(straight, tmp_path / "straight", max_steps=3).train()
    assert torch.equal(weights_of(pipe), weights_of(straight))


def test_what_failed_first_is_raised_and_that_nothing_was_saved_is_said(
    tiny_pipeline: VARPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(*_: Any, **__: Any) -> Path:
        raise OSError("no space left")

    trainer = make_trainer(tiny_pipeline, tmp_path / "run", max_steps=3)
    trainer.callbacks.append(Fails())
    trainer.learner.save = no_room  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="of a callback"):
        trainer.train()
    assert "Warning: no checkpoint was written either: OSError: no space left" in capsys.readouterr().err


def test_before_the_first_step_there_is_nothing_to_save(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    options = {"eval_steps": 1, "eval_num_images": 4, "save_best": "eval_none"}
    with pytest.raises(ConfigError, match="is no metric of the evaluations"):
        make_trainer(tiny_pipeline, tmp_path / "run", **options).train()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_trainer_runs_once(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_pipeline, tmp_path / "run", overwrite=True)
    trainer.train()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="has been run: make a new one"):
        trainer.train()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before and before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"learning_rate": 1e-7},
            r"optimizer\.learning_rate is 1e-07, but checkpoint '.*' .* 0\.001",
        ),
        ({"beta": 0.5}, r"grpo\.beta is 0\.5"),
        ({"sampling": GUIDED.replace(top_k=3)}, r"sampling\.top_k is 3"),
        ({"use_peft": True}, r"tuning\.use_peft is True"),
    ],
)
def test_a_run_goes_on_with_the_options_of_its_checkpoint(
    make_pipeline: MakePipeline, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    """The optimizer and its schedule come from there: others would have no effect."""
    make_trainer(make_pipeline(), tmp_path / "run", save_steps=1).train()
    checkpoint = tmp_path / "run/checkpoints/step-000001"
    for folder, resume in (("run", "auto"), ("other", str(checkpoint))):
        make_trainer(make_pipeline(), tmp_path / folder, max_steps=3, resume=resume)  # more steps: as ever
        with pytest.raises(ConfigError, match=says):
            make_trainer(make_pipeline(), tmp_path / folder, resume=resume, **options)
    assert metrics_of(tmp_path / "run")[-1]["step"] == 2 and not (tmp_path / "other").exists()


def fails_in(step: int) -> Any:
    """A reward that fails in a step of 16 images, evaluations not counted."""
    asked = 0

    def reward(images: Tensor, conditions: list) -> Tensor:
        nonlocal asked
        asked += len(images) == 16
        if asked == step:
            raise ValueError("no more")
        return redness(images, conditions)

    return reward


def test_an_evaluation_before_training_outlives_a_failure_in_the_first_step(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"eval_steps": 2, "eval_num_images": 8, "max_steps": 2}
    with pytest.raises(RewardError, match="no more"):
        make_trainer(make_pipeline(), tmp_path / "run", {"red": fails_in(1)}, **options).train()
    (before,) = metrics_of(tmp_path / "run")
    make_trainer(make_pipeline(), tmp_path / "run", {"red": redness}, resume="auto", **options).train()
    first, *others = metrics_of(tmp_path / "run")
    assert first == before and "eval_reward" in first and [each["step"] for each in others] == [1, 2]


def test_what_goes_on_in_another_folder_has_a_checkpoint_there(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    make_trainer(make_pipeline(), tmp_path / "one", {"red": redness}, save_steps=2).train()
    resume = str(tmp_path / "one/checkpoints/step-000002")
    with pytest.raises(RewardError, match="no more"):
        make_trainer(
            make_pipeline(), tmp_path / "two", {"red": fails_in(1)}, resume=resume, max_steps=4
        ).train()
    make_trainer(make_pipeline(), tmp_path / "two", {"red": redness}, resume="auto", max_steps=4).train()
    assert [each["step"] for each in metrics_of(tmp_path / "two")] == [3, 4]

    # Nor does a run end another one that lies there.
    before = (tmp_path / "two" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"'.*two' holds a run, and checkpoint '.*' is another's"):
        make_trainer(make_pipeline(), tmp_path / "two", {"red": redness}, resume=resume, max_steps=4)
    assert (tmp_path / "two" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("rewards", "says"),
    [
        (RewardSet({"green": redness}), r"rewards\.green is \{'weight': 1\.0\}, but checkpoint '.*' .* None"),
        (RewardSet({"red": redness}, {"red": 2.0}), r"rewards\.red is \{'weight': 2\.0\}"),
        (
            RewardSet({"red": redness, "bright": brightness}, constraints={"bright": AtLeast(0.1)}),
            r"rewards\.bright is \{'at_least': 0\.1\}",
        ),
        (
            RewardSet({"red": redness, "bright": brightness}, held_out=["bright"]),
            r"rewards\.bright is \{'held_out': True\}",
        ),
    ],
)
def test_a_run_goes_on_with_its_rewards(
    make_pipeline: MakePipeline, tmp_path: Path, rewards: RewardSet, says: str
) -> None:
    options: dict[str, Any] = {"eval_steps": 1, "eval_num_images": 8}
    make_trainer(make_pipeline(), tmp_path / "run", {"red": redness}, max_steps=1, **options).train()
    with pytest.raises(ConfigError, match=says):
        make_trainer(make_pipeline(), tmp_path / "run", rewards, resume="auto", **options)


def test_a_run_goes_on_with_the_model_that_it_began_with(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    """Its reference is a copy of that, which no checkpoint holds."""
    options: dict[str, Any] = {"learning_rate": 1e-2, "beta": 0.1}
    straight = make_trainer(make_pipeline(), tmp_path / "straight", max_steps=2, **options)
    straight.train()
    pipe = make_pipeline()
    make_trainer(pipe, tmp_path / "run", max_steps=1, **options).train()
    trainer = make_trainer(pipe, tmp_path / "run", max_steps=2, resume="auto", **options)
    with pytest.raises(CheckpointError, match=r"began with other weights .*: load the model .* anew"):
        trainer.train()
    make_trainer(make_pipeline(), tmp_path / "run", max_steps=2, resume="auto", **options).train()
    logged = [metrics_of(tmp_path / name)[-1]["kl_per_image"] for name in ("straight", "run")]
    assert logged[0] == logged[1] > 0

    # Without a reference the checkpoint has all that counts.
    options = {"beta": 0.0, "measure_kl": False}
    make_trainer(pipe, tmp_path / "free", max_steps=1, **options).train()
    make_trainer(pipe, tmp_path / "free", max_steps=2, resume="auto", **options).train()


def test_a_run_goes_on_with_its_classes(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    def trainer_of(*labels: int, resume: str | None = None) -> GRPOTrainer:
        pipe = make_pipeline()
        run = RunConfig(output_dir=str(tmp_path), max_steps=1, eval_steps=0, resume=resume, report_to="none")
        grpo = GRPOConfig(num_groups=2, num_generations=2)
        return GRPOTrainer(
            pipe, redness, grpo, conditions=pipe.conditions(labels) if labels else None, run=run
        )

    trainer_of(0, 1).train()
    for others in ((3,), ()):
        with pytest.raises(ConfigError, match=r"classes is '\d classes .*was written with '2 classes"):
            trainer_of(*others, resume="auto")
    trainer_of(0, 1, resume="auto").train()


def test_a_run_goes_on_with_its_prompts(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    """Their file may have been edited in the meantime."""
    trainer = make_trainer(make_pipeline(), tmp_path / "run")
    one, two = Condition(None, "a star"), Condition(None, "a heart", {"colour": "red"})
    same, other = (trainer.options.fixed({}, each) for each in ([one, two], [one, replace(two, data={})]))
    assert same == trainer.options.fixed({}, [one, replace(two)]) and same["prompts"].startswith("2 prompts")
    assert same["prompts"] != other["prompts"] != trainer.options.fixed({}, [one])["prompts"]
    assert "prompts" not in trainer.options.fixed({}, trainer.conditions)  # of classes
    trainer.conditions, trainer.saver.options = [one, two], same
    trainer.saver.folder.path.mkdir()
    trainer.saver.save()
    folder, resumed = trainer.folder, replace(trainer.options, run=trainer.run.replace(resume="auto"))
    resumed.check_continuable(folder, {}, [one, two])
    with pytest.raises(ConfigError, match=r"^prompts is '1 prompts .*' was written with '2 prompts"):
        resumed.check_continuable(folder, {}, [one])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss_type": "grop"}, "grop"),
        ({"reward": RewardSet({"red": redness}, {"red": 0.0})}, "has the weight 0: give one another weight"),
        ({"greater_is_better": False}, r"run\.greater_is_better has no effect without run\.save_best"),
        ({"branch_scale": 4}, "leaves nothing to go on with"),
        ({"train_scales": 9}, r"grpo\.train_scales 9 is out of range"),
    ],
)
def test_a_trainer_that_cannot_be_made_leaves_the_model_alone(
    make_pipeline: MakePipeline, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    pipe = make_pipeline()
    before = list(pipe.transformer.state_dict())
    with pytest.raises(ConfigError, match=says):
        make_trainer(pipe, tmp_path / "run", use_peft=True, gradient_checkpointing=True, **options)
    assert list(pipe.transformer.state_dict()) == before and not pipe.transformer.gradient_checkpointing
    assert all(each.requires_grad for each in pipe.transformer.parameters())
