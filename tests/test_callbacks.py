"""What looks on while a run goes: the events and their order, the best model, early stopping, trackers."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nextscale as ns
from nextscale.base.errors import ConfigError
from nextscale.callbacks import BestModel, ProgressBar, log_image, named
from nextscale.pipeline import VARPipeline
from test_trainer import make_trainer, metrics_of, redness

MakePipeline = Callable[..., VARPipeline]


class Recorder(ns.Callback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_begin(self, trainer: Any) -> None:
        self.seen.append(f"begin {trainer.step_done}")

    def on_step_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        assert "reward" in metrics
        self.seen.append(f"step {trainer.step_done}")

    def on_prediction_step(self, trainer: Any, num_done: int, num_images: int) -> None:
        self.seen.append(f"images {num_done} of {num_images}")

    def on_evaluate(self, trainer: Any, metrics: dict[str, float]) -> None:
        assert "eval_reward" in metrics
        metrics["mine"] = 7.0
        self.seen.append(f"evaluate {trainer.step_done}")

    def on_save(self, trainer: Any, path: Path) -> None:
        self.seen.append(f"save {path.name}")

    def on_train_end(self, trainer: Any, result: Any) -> None:
        assert (result.folder / "final" / "config.json").exists()
        self.seen.append(f"end {result.step}")


class Scores(ns.Callback):
    """Puts a value of its own into every evaluation, one after the other."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def on_evaluate(self, trainer: Any, metrics: dict[str, float]) -> None:
        metrics["eval_mine"] = self.values.pop(0)


def scored(trainer: Any, *values: float) -> Any:
    """A trainer whose best model is chosen by these values."""
    trainer.callbacks.insert(0, Scores(*values))
    return trainer


def test_the_events_come_in_order(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    recorder = Recorder()
    options: dict[str, Any] = {"eval_steps": 1, "eval_num_images": 8, "per_device_eval_batch_size": 5}
    trainer = make_trainer(make_pipeline(), tmp_path / "run", save_steps=1, **options)
    trainer.callbacks.append(recorder)
    result = trainer.train()
    drawn = ["images 5 of 8", "images 8 of 8"]
    assert recorder.seen == [
        "begin 0",
        *drawn,
        "evaluate 0",
        "step 1",
        *drawn,
        "evaluate 1",
        "save step-000001",
        "step 2",
        *drawn,
        "evaluate 2",
        "save step-000002",
        "end 2",
    ]
    assert [each["mine"] for each in metrics_of(tmp_path / "run")] == [7.0] * 3

    # What train returns: where, and from what to what.
    assert Path(result) == tmp_path / "run" and result.step == 2
    assert result.first["eval_reward"] == metrics_of(tmp_path / "run")[0]["eval_reward"]
    assert result.metrics["eval_reward"] == metrics_of(tmp_path / "run")[-1]["eval_reward"]
    change = f"{result.first['eval_reward']:.4g} -> {result.metrics['eval_reward']:.4g}"
    assert change in repr(result) and change.replace(">", "&gt;") in result._repr_html_()
    assert "eval_reward_sem" not in repr(result)


def test_a_callback_stops_a_run_as_whole_as_any(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    class Stop(ns.Callback):
        def on_step_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
            trainer.should_stop = trainer.step_done == 1

    options: dict[str, Any] = {"max_steps": 5, "eval_steps": 3, "eval_num_images": 20}
    trainer = make_trainer(make_pipeline(num_classes=20), tmp_path / "run", **options)
    trainer.callbacks.append(Stop())
    assert trainer.train().step == 1
    assert "eval_reward" in metrics_of(tmp_path / "run")[-1]  # the final model is measured
    for step in (0, 1):  # the grid has 16 rows
        with Image.open(tmp_path / "run" / "samples" / f"all-step-{step:06d}.png") as picture:
            assert picture.size == (8, 20 * 8)
    assert "The grids have the first 16 of 20 rows" in (tmp_path / "run" / "report.html").read_text("utf-8")
    assert VARPipeline.from_pretrained(tmp_path / "run" / "final").sampling == trainer.sampling


@pytest.mark.parametrize("tuning", [{}, {"use_peft": True, "ema_decay": 0.5}])
def test_the_best_model_is_kept_as_it_was_measured(
    make_pipeline: MakePipeline, tmp_path: Path, tuning: dict[str, Any]
) -> None:
    measured: dict[int, torch.Tensor] = {}

    class Look(ns.Callback):
        def on_evaluate(self, trainer: Any, metrics: dict[str, float]) -> None:
            with trainer.learner.as_evaluated():
                measured[trainer.step_done] = trainer.pipe([0, 1], seed=3).images

    options: dict[str, Any] = {
        "eval_steps": 1,
        "eval_num_images": 8,
        "max_steps": 3,
        "save_best": "eval_mine",
    }
    trainer = make_trainer(make_pipeline(), tmp_path / "run", learning_rate=1e-2, **options, **tuning)
    trainer.callbacks.append(Look())
    result = scored(trainer, 0.0, 3.0, float("nan"), 2.0).train()
    assert result.best_step == 1
    best = VARPipeline.from_pretrained(tmp_path / "run" / "best")
    assert torch.allclose(best([0, 1], seed=3).images, measured[1], atol=1e-4)
    assert not torch.allclose(measured[1], measured[3], atol=1e-3)
    assert [each["best/step"] for each in metrics_of(tmp_path / "run")] == [0, 1, 1, 1]
    assert [each["best/value"] for each in metrics_of(tmp_path / "run")] == [0, 3, 3, 3]


def test_a_run_that_gets_no_better_ends_and_stays_ended(
    make_pipeline: MakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {
        "eval_steps": 1,
        "eval_num_images": 8,
        "max_steps": 9,
        "save_best": "eval_mine",
        "greater_is_better": False,
        "early_stopping_patience": 2,
    }
    trainer = make_trainer(make_pipeline(), tmp_path / "run", **options)
    assert scored(trainer, 5.0, 4.0, 4.5, 4.2).train().step == 3
    assert "Stopped early after step 3: eval_mine was best after step 1" in capsys.readouterr().err
    # The report has the pictures of this end, though another was planned; none of those between are kept.
    for kind in ("scales", "extremes"):
        kept = sorted(each.name for each in (tmp_path / "run" / "samples").glob(f"{kind}-*"))
        assert kept == [
            f"{kind}-step-00000{step}.{kind_of}" for step in (0, 3) for kind_of in ("json", "png")
        ]
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert page.count("<figcaption>After 3 steps</figcaption>") == 3 and "After 9 steps" not in page
    again = make_trainer(make_pipeline(), tmp_path / "run", resume="auto", **options)
    assert scored(again).train().step == 3
    assert [each["step"] for each in metrics_of(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"save_best": "eval_reward"}, r"save_best has no effect with run\.eval_steps 0"),
        ({"greater_is_better": False}, r"greater_is_better has no effect without run\.save_best"),
        ({"early_stopping_patience": 3}, r"early_stopping_patience has no effect without run\.save_best"),
    ],
)
def test_options_without_effect_are_refused(
    make_pipeline: MakePipeline, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        make_trainer(make_pipeline(), tmp_path / "run", **options)


def test_an_unknown_metric_is_told_with_those_that_there_are(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"save_best": "eval_rewart", "eval_steps": 1, "eval_num_images": 8}
    with pytest.raises(ConfigError, match=r"'eval_rewart' is no metric .* use one of .*eval_reward"):
        make_trainer(make_pipeline(), tmp_path / "run", **options).train()


def test_the_time_left_counts_the_evaluations_to_come(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    trainer = make_trainer(make_pipeline(), tmp_path / "run", max_steps=10, eval_steps=4, eval_num_images=8)
    bar, trainer.progress.step = ProgressBar(), 5
    for seconds in (1.0, 3.0):
        bar.on_step_end(trainer, {"step_time": seconds})
        bar.on_evaluate(trainer, {"eval_time": 30.0})
    assert bar.seconds_left(trainer) == 5 * 2 + 2 * 30  # after the steps 8 and 10


def test_tensorboard_gets_the_samples(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    options: dict[str, Any] = {"report_to": "tensorboard", "eval_steps": 1, "eval_num_images": 8}
    make_trainer(make_pipeline(), tmp_path / "run", **options).train()
    (folder,) = {path.parent for path in (tmp_path / "run").rglob("events.out*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    images = events.Images("samples")
    assert [each.step for each in images] == [0, 1, 2] and images[0].height > images[0].width > 8


def test_a_tracker_that_takes_no_images_gets_none() -> None:
    class Silent:
        name = "mine"

    class Listing:
        name = "wandb"

        def log_images(self, values: dict[str, Any], step: int) -> None:
            self.got = values, step

    pixels = torch.zeros(4, 4, 3, dtype=torch.uint8).numpy()
    log_image(Silent(), "samples", pixels, 3)
    tracker = Listing()
    log_image(tracker, "samples", pixels, 3)
    assert tracker.got[1] == 3 and tracker.got[0]["samples"][0].shape == (4, 4, 3)


def test_a_checkpoint_calls_callbacks_by_their_class() -> None:
    first, second = BestModel("a"), BestModel("b")
    assert named([first, ProgressBar(), second]).keys() == {"BestModel", "ProgressBar", "BestModel-1"}
    second.load_state_dict(json.loads(json.dumps(second.state_dict())))
    assert second.state_dict() == BestModel("b").state_dict()
    second.load_state_dict({"by": ["a", 1], "best": 9.0, "step": 3, "num_worse": 2})
    assert second.best is None  # it was the best by another metric


def test_classes_of_one_name_are_told_apart() -> None:
    one, two = (type("Mine", (ns.Callback,), {})() for _ in range(2))
    assert named([one, two]) == {"Mine": one, "Mine-1": two}


def test_a_best_model_that_could_not_be_written_is_written_on_resuming(
    make_pipeline: MakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "eval_steps": 1,
        "eval_num_images": 8,
        "max_steps": 2,
        "save_best": "eval_reward",
        "greater_is_better": False,
        "learning_rate": 1e-2,
    }
    trainer, export = make_trainer(make_pipeline(), tmp_path / "run", **options), ns.GRPOTrainer.export

    def no_room(self: Any, folder: Path) -> None:
        if self.step_done == 1:
            raise OSError("no space left")
        export(self, folder)

    monkeypatch.setattr(ns.GRPOTrainer, "export", no_room)
    rewards = iter([0.0, -1.0])
    measure = trainer.evaluator.measure

    def measured(*args: Any) -> Any:
        result = measure(*args)
        result.metrics["reward"] = next(rewards)
        return result

    trainer.evaluator.measure = measured  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no space left"):
        trainer.train()
    assert trainer.best is not None and trainer.best.step == 0

    monkeypatch.undo()
    resumed = make_trainer(make_pipeline(), tmp_path / "run", resume="auto", **options)
    assert resumed.train().best_step != 0
    lines = metrics_of(tmp_path / "run")
    assert [each["step"] for each in lines if "eval_reward" in each] == [0, 1, 2]
    best = next(each for each in lines if each["step"] == lines[-1]["best/step"] and "eval_reward" in each)
    assert best["eval_reward"] == lines[-1]["best/value"]


def test_the_best_may_be_by_what_another_callback_adds(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    class Adds(ns.Callback):
        def on_evaluate(self, trainer: Any, metrics: dict[str, float]) -> None:
            metrics["eval_mine"] = -float(trainer.step_done)

    run = ns.RunConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        eval_steps=1,
        eval_num_images=8,
        save_best="eval_mine",
        report_to="none",
        disable_tqdm=True,
    )
    grpo = ns.GRPOConfig(num_groups=2, num_generations=2)
    trainer = ns.GRPOTrainer(make_pipeline(), redness, grpo, run=run, callbacks=[Adds()])
    assert trainer.train().best_step == 0


def test_a_run_that_goes_back_claims_no_model_of_steps_that_it_has_undone(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"eval_steps": 1, "eval_num_images": 8, "save_best": "eval_mine"}
    options |= {"max_steps": 4, "save_steps": 1, "save_total_limit": 4}
    run = tmp_path / "run"
    first = scored(make_trainer(make_pipeline(), run, **options), 0.0, 1.0, 2.0, 1.0, 5.0)
    assert first.train().best_step == 4
    back = str(run / "checkpoints" / "step-000002")
    again = scored(make_trainer(make_pipeline(), run, resume=back, **options), 1.0, 0.0)
    assert again.train().best_step == 3  # that of step 2 was replaced by that of step 4
    assert json.loads((run / "best" / "step.json").read_text()) == {"step": 3}
    VARPipeline.from_pretrained(run / "best")


def test_the_best_of_another_folder_is_not_claimed(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_steps": 1, "eval_num_images": 8, "save_best": "eval_reward"}
    make_trainer(make_pipeline(), tmp_path / "one", save_steps=1, max_steps=1, **options).train()
    resume = str(tmp_path / "one/checkpoints/step-000001")
    result = make_trainer(make_pipeline(), tmp_path / "two", resume=resume, max_steps=2, **options).train()
    assert result.best_step == 2 and (tmp_path / "two" / "best").is_dir()
