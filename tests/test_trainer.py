"""GRPO as a whole: it learns, it is invariant to how the work is cut, and it resumes to the same bits."""

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from nextscale import rollout
from nextscale.base import compiling
from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError, RewardError
from nextscale.callbacks import Callback
from nextscale.drawing import Drawn, draw_batches
from nextscale.evaluation import evaluate
from nextscale.grpo import GRPOConfig
from nextscale.losses import LOSSES, LossOutput, Quantities, regularised
from nextscale.models.lora import METADATA, TENSORS
from nextscale.models.protocol import Conditioning
from nextscale.optimizer import OptimizerConfig
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig, kept_tokens
from nextscale.rescoring import teacher_forced_logits
from nextscale.rewards import AtLeast, AtMost, RewardSet
from nextscale.runs.config import RunConfig
from nextscale.trainer import GRPOTrainer
from nextscale.tuning import TuningConfig

MakePipeline = Callable[..., VARPipeline]
GUIDED = SamplingConfig(guidance_scale=1.5)


def redness(images: Tensor, conditions: list) -> Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))


def brightness(images: Tensor, conditions: list) -> Tensor:
    return images.mean((1, 2, 3))


def make_trainer(
    pipe: VARPipeline,
    folder: Path,
    reward: Any = redness,
    sampling: SamplingConfig = GUIDED,
    **options: Any,
) -> GRPOTrainer:
    """A quiet trainer; options go to the record that has them."""
    records = {}
    for record in (GRPOConfig, TuningConfig, OptimizerConfig, RunConfig):
        own = {name: value for name, value in options.items() if name in record.model_fields}
        records[record] = own
    assert sum(map(len, records.values())) == len(options)
    quiet = {"disable_tqdm": True, "eval_steps": 0, "save_steps": 0, "report_to": "none", "max_steps": 2}
    return GRPOTrainer(
        pipe,
        reward,
        GRPOConfig(**{"num_groups": 4, "num_generations": 4} | records[GRPOConfig]),
        sampling=sampling,
        tuning=TuningConfig(**records[TuningConfig]),
        optimizer=OptimizerConfig(**{"learning_rate": 1e-3} | records[OptimizerConfig]),
        run=RunConfig(**quiet | {"output_dir": str(folder)} | records[RunConfig]),
    )


def gradient(trainer: GRPOTrainer) -> dict[str, Tensor]:
    """The gradient of the first step, taken where the optimizer would use it."""
    taken: dict[str, Tensor] = {}

    def take(*_: Any, **__: Any) -> None:
        for name, parameter in trainer.pipe.transformer.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad
            if parameter.grad is not None:
                taken[name] = parameter.grad.clone()

    trainer.learner.optimizer.step = take  # type: ignore[method-assign]
    trainer.learner.scheduler.step = lambda: None  # type: ignore[method-assign]
    trainer.step(1)
    return taken


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def watch_batches(monkeypatch: pytest.MonkeyPatch, look: Callable[[Drawn], None]) -> None:
    """Have rollouts show their batches before the rewards see them."""

    def watched(*args: Any) -> Iterator[Drawn]:
        for batch in draw_batches(*args):
            look(batch)
            yield batch

    monkeypatch.setattr(rollout, "draw_batches", watched)


def test_a_bandit_is_solved(
    make_pipeline: MakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two arms: the first scale's one token decides the reward, and must come to be drawn nearly always."""
    pipe = make_pipeline(codebook_size=2, scale_sizes=(1, 2), num_classes=2)

    def arm(images: Tensor, conditions: list) -> Tensor:
        return seen[-1]

    seen: list[Tensor] = []
    watch_batches(monkeypatch, lambda batch: seen.append((batch.tokens[:, 0] == 1).float()))
    trainer = make_trainer(
        pipe, tmp_path / "run", arm, max_steps=60, beta=0.0, learning_rate=3e-3, num_generations=8
    )
    trainer.train()
    first, last = metrics_of(tmp_path / "run")[0], metrics_of(tmp_path / "run")[-1]
    assert first["reward"] < 0.9
    assert last["reward"] > 0.97


def test_a_constraint_binds_and_holds(
    make_pipeline: MakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four arms: the best is forbidden, so the best of the others must be found."""

    def last_steps(name: str, max_steps: int, **roles: Any) -> tuple[list[float], list[float]]:
        pipe = make_pipeline(codebook_size=4, scale_sizes=(1, 2), num_classes=2)
        seen: list[Tensor] = []
        watch_batches(monkeypatch, lambda batch: seen.append(batch.tokens[:, 0]))
        rewards = {
            "gain": lambda images, conditions: torch.tensor([0.2, 0.6, 1.0, 0.0])[seen[-1]],
            "allowed": lambda images, conditions: (seen[-1] != 2).float(),
        }
        options = {"max_steps": max_steps, "beta": 0.0, "entropy_coef": 0.1, "learning_rate": 5e-4}
        options |= {"num_generations": 8, "constraint_rate": 0.5}
        make_trainer(pipe, tmp_path / name, RewardSet(rewards, **roles), **options).train()
        records = metrics_of(tmp_path / name)[-4:]
        return tuple([each[f"rewards/{key}/mean"] for each in records] for key in rewards)

    gain, allowed = last_steps("free", 12, weights={"allowed": 0.0})
    assert min(gain) > 0.9 and max(allowed) < 0.1
    gain, allowed = last_steps("bound", 25, constraints={"allowed": AtLeast(0.9)})
    assert min(gain) > 0.55 and min(allowed) > 0.9


def test_a_steps_advantages_have_the_multiplier_of_its_own_violation(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    rewards = RewardSet(
        {"red": redness, "dark": brightness, "bright": brightness},
        constraints={"dark": AtMost(-1.0), "bright": AtLeast(9.0)},
    )
    trainer = make_trainer(
        make_pipeline(), tmp_path / "a", rewards, constraint_rate=0.5, constraint_start=0.25
    )
    plain = make_trainer(make_pipeline(), tmp_path / "b", {"red": redness})
    taken: list[Tensor] = []
    compute = trainer.crediting.of_mine

    def take(scores: Any, step: int) -> Tensor:
        taken.append(compute(scores, step))
        return taken[-1]

    trainer.crediting.of_mine = take  # type: ignore[method-assign]
    metrics = trainer.step(1)
    # Each is many deviations from its bound, of which one counts: 0.25 + 0.5. The first wants darker images.
    for name in ("dark", "bright"):
        assert metrics[f"constraints/{name}/violation"] > 1
        assert metrics[f"constraints/{name}/multiplier"] == 0.75
    assert metrics["reward"] == metrics["rewards/red/mean"]
    torch.testing.assert_close(
        taken[0], plain.crediting.of_mine(plain.collector.scores(plain.collector.rollout(1)))
    )


def test_base_is_what_the_evaluation_before_training_found(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    rewards = RewardSet({"red": redness, "bright": brightness}, constraints={"bright": AtLeast("base")})
    options = {"max_steps": 1, "eval_num_images": 8}
    make_trainer(make_pipeline(), tmp_path / "measured", rewards, eval_steps=1, **options).train()
    before, first = metrics_of(tmp_path / "measured")
    assert first["constraints/bright/bound"] == before["eval_rewards/bright/mean"]
    make_trainer(make_pipeline(), tmp_path / "unmeasured", rewards, **options).train()
    (first,) = metrics_of(tmp_path / "unmeasured")
    assert first["constraints/bright/bound"] == first["rewards/bright/mean"]
    assert first["constraints/bright/violation"] == first["constraints/bright/multiplier"] == 0


def test_base_is_of_what_is_trained_on(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    """Evaluations draw other classes here, whose mean is another one though nothing has moved."""
    rewards = RewardSet({"red": redness, "bright": brightness}, constraints={"bright": AtLeast("base")})
    pipe = make_pipeline()
    trainer = GRPOTrainer(
        pipe,
        rewards,
        GRPOConfig(num_groups=2, num_generations=4),
        conditions=pipe.conditions([0]),
        eval_conditions=pipe.conditions([1]),
        run=RunConfig(
            output_dir=str(tmp_path / "run"), max_steps=1, eval_steps=1, eval_num_images=8, report_to="none"
        ),
    )
    trainer.train()
    before, first = metrics_of(tmp_path / "run")
    assert first["constraints/bright/bound"] == first["rewards/bright/mean"]
    assert first["constraints/bright/bound"] != before["eval_rewards/bright/mean"]


def test_a_held_out_reward_is_measured_in_evaluations_alone(
    make_pipeline: MakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the negative of the trained one here, so it falls as much as that rises."""
    sizes: list[int] = []

    def other(images: Tensor, conditions: list) -> Tensor:
        sizes.append(len(images))
        return -redness(images, conditions)

    rewards = RewardSet({"red": redness, "other": other}, held_out=["other"])
    options = {"max_steps": 8, "eval_steps": 4, "eval_num_images": 32, "learning_rate": 5e-3, "beta": 0.0}
    make_trainer(make_pipeline(), tmp_path / "run", rewards, **options).train()
    assert sum(sizes) == 3 * 32
    records = metrics_of(tmp_path / "run")
    evaluations = [each for each in records if "eval_reward" in each]
    assert not any("rewards/other/mean" in each for each in records)
    assert [each["step"] for each in evaluations] == [0, 4, 8]
    assert [each["eval_warnings/other"] for each in evaluations] == [0.0, 1.0, 1.0]
    assert all(each["eval_rewards/other/mean"] == -each["eval_reward"] for each in evaluations)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "held out" in line]
    assert len(warnings) == 2 and all("'other', which is held out, fell" in line for line in warnings)


def test_a_held_out_reward_without_evaluations_is_an_error(
    tiny_pipeline: VARPipeline, tmp_path: Path
) -> None:
    rewards = RewardSet({"red": redness, "bright": brightness}, held_out=["bright"])
    with pytest.raises(ConfigError, match="'bright' is held out, but with run"):
        make_trainer(tiny_pipeline, tmp_path / "run", rewards)
    assert not (tmp_path / "run").exists()


def test_equal_rewards_give_zero_advantage_and_zero_gradient(
    tiny_pipeline: VARPipeline, tmp_path: Path
) -> None:
    def equal(images: Tensor, conditions: list) -> Tensor:
        return torch.full((len(images),), 0.3)

    trainer = make_trainer(tiny_pipeline, tmp_path / "run", equal, beta=0.0)
    taken = gradient(trainer)
    assert all(each.abs().max() == 0 for each in taken.values())
    assert trainer.crediting.of_mine(trainer.collector.scores(trainer.collector.rollout(1))).abs().max() == 0


def test_on_policy_ratios_are_one_and_kl_is_zero(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_pipeline, tmp_path / "run", max_steps=1)
    trainer.train()
    metrics = metrics_of(tmp_path / "run")[0]
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
    for each in ("min", "mean", "max"):
        assert metrics[f"sampling/importance_sampling_ratio/{each}"] == pytest.approx(1, abs=1e-4)
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["clip_ratio/region_mean"] == 0


def test_accumulation_does_not_change_the_gradient(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    """16 images at once, in 8 parts of 2, and in uneven parts of 5 (5 + 5 + 5 + 1)."""
    whole, eighths, uneven = (
        gradient(make_trainer(make_pipeline(), tmp_path / str(size), per_device_train_batch_size=size))
        for size in (16, 2, 5)
    )
    for other in (eighths, uneven):
        for name, expected in whole.items():
            largest = expected.abs().max().clamp_min(1e-8)
            assert (other[name] - expected).abs().max() / largest < 1e-4, name


def test_uneven_parts_do_not_change_what_is_logged(
    make_pipeline: MakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 images at once and as 5 + 5 + 5 + 1, under a loss that measures one number a part, too."""

    def measured(q: Quantities, config: GRPOConfig) -> LossOutput:
        output = LOSSES["grpo"](q, config)
        return LossOutput(output.loss, output.metrics | {"mine": q.log_probs_BL.mean()})

    monkeypatch.setitem(LOSSES, "measured", measured)
    options = {"loss_type": "measured", "num_iterations": 2}
    whole, uneven = (
        make_trainer(make_pipeline(), tmp_path / str(size), per_device_train_batch_size=size, **options).step(
            1
        )
        for size in (16, 5)
    )
    timing = ("time/", "step_time", "images_per_second")
    assert {"loss", "mine"} <= whole.keys()
    for name in (name for name in whole if not name.startswith(timing)):
        assert uneven[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5), name


def test_gradient_checkpointing_gives_the_same_gradient(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    plain, recomputed, offloaded = (
        gradient(make_trainer(make_pipeline(), tmp_path / str(number), **options))
        for number, options in enumerate(
            (
                {},
                {"gradient_checkpointing": True},
                {"gradient_checkpointing": True, "activation_offloading": True},
            )
        )
    )
    assert all(torch.equal(recomputed[name], expected) for name, expected in plain.items())
    assert all(torch.equal(offloaded[name], expected) for name, expected in plain.items())


def test_what_recomputed_blocks_start_from_goes_to_main_memory(
    make_pipeline: MakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block's input, once a microbatch; and the model is as before after the run."""
    kept: list[tuple[int, ...]] = []

    class Told(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            assert not pin_memory  # there is no GPU
            super().__init__(
                lambda tensor: (kept.append(tuple(tensor.shape)), tensor)[1], lambda tensor: tensor
            )

    monkeypatch.setattr("nextscale.learner.save_on_cpu", Told)
    pipe = make_pipeline()
    trainer = make_trainer(
        pipe, tmp_path / "run", gradient_checkpointing=True, activation_offloading=True, max_steps=1
    )
    trainer.train()
    config, num_tokens = pipe.transformer.config, pipe.transformer.schedule.num_tokens
    streams = [shape for shape in kept if shape[1:] == (num_tokens, config.width)]
    assert sum(shape[0] for shape in streams) == 2 * 16 * config.depth  # both branches of all images
    with pytest.raises(ConfigError, match="activation_offloading has no effect without"):
        RunConfig(activation_offloading=True)
    assert pipe.transformer.keeping_inputs is nullcontext


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "mixed_precision": "bf16", "use_peft": True, "lora_r": 4},
        {"credit": "contribution", "train_scales": 3},
    ],
    ids=["lora", "contribution"],
)
def test_what_is_compiled_gives_the_same_gradient(
    make_pipeline: MakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Traced alone: the kernels that a compiler makes of it round in another way (tests/test_gpu.py)."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    gradients = []
    for flag in (False, True):
        pipe = make_pipeline()
        trainer = make_trainer(pipe, tmp_path / str(flag), torch_compile=flag, **options)
        gradients.append(gradient(trainer))
        trainer.learner.close()
        assert not any(getattr(each, "is_compiled", False) for each in pipe.transformer.modules())
    plain, compiled = gradients
    assert any(each.abs().max() > 0 for each in plain.values())
    for name, expected in plain.items():
        assert torch.allclose(compiled[name], expected, rtol=1e-4, atol=1e-6), name


def test_what_cannot_be_compiled_is_told(
    make_pipeline: MakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> Any:
        raise RuntimeError("no compiler on this machine")

    monkeypatch.setattr(compiling, "BACKEND", fail)
    trainer = make_trainer(make_pipeline(), tmp_path / "run", torch_compile=True)
    with pytest.raises(ConfigError, match=r"no compiler on this machine.*set run.torch_compile to false"):
        trainer.step(1)


def test_a_group_does_not_depend_on_who_draws_it(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    """A step's images are the same in batches of 16 and of 3, and drawn by one process or shared by two."""
    whole = make_trainer(make_pipeline(), tmp_path / "a").collector.rollout(3)
    parts = make_trainer(make_pipeline(), tmp_path / "b", per_device_eval_batch_size=3).collector.rollout(3)
    assert torch.equal(whole.tokens, parts.tokens)
    assert torch.allclose(whole.images, parts.images, atol=1e-5)


def test_resumed_is_straight_bit_for_bit(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 1}
    options |= {"num_iterations": 2, "entropy_floor": 1.0, "entropy_floor_rate": 10.0, "max_steps": 4}
    options |= {"eval_steps": 4, "eval_num_images": 16, "constraint_rate": 0.5, "constraint_start": 2.0}
    options |= {"target_kl": 1e-3, "sync_ref_model": True, "ref_model_sync_steps": 2}
    rewards = RewardSet(
        {"red": redness, "bright": brightness, "other": lambda *given: -redness(*given)},
        constraints={"bright": AtMost("base")},
        held_out=["other"],
    )
    make_trainer(make_pipeline(), tmp_path / "straight", rewards, **options).train()
    interrupted = make_trainer(make_pipeline(), tmp_path / "parts", rewards, **options)
    interrupted.open()
    interrupted.log(0, interrupted.evaluate())
    for step in (1, 2):
        metrics = interrupted.step(step)
        interrupted.log(step, metrics)
        interrupted.saver.end_step(metrics)
    interrupted.save()
    interrupted.log(3, interrupted.step(3))  # lost with the interruption: done after the checkpoint
    interrupted.folder.close()  # as the end of its process would
    make_trainer(make_pipeline(), tmp_path / "parts", rewards, resume="auto", **options).train()
    straight, parts = (
        load_file(tmp_path / name / "final" / "transformer.safetensors") for name in ("straight", "parts")
    )
    assert all(torch.equal(value, parts[key]) for key, value in straight.items())
    times = ("step_time", "images_per_second", "time/", "eval_time")
    assert metrics_of(tmp_path / "straight")[3]["constraints/bright/multiplier"] > 0
    for ours, theirs in zip(metrics_of(tmp_path / "straight"), metrics_of(tmp_path / "parts"), strict=True):
        assert [each for each in ours.items() if not each[0].startswith(times)] == [
            each for each in theirs.items() if not each[0].startswith(times)
        ]


@pytest.mark.usefixtures("without_pages")
def test_every_grpo_option_changes_something(
    make_pipeline: MakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A setting that nothing reads would leave the second step's gradient as it was."""

    def mine(q: Quantities, config: GRPOConfig) -> LossOutput:
        # With the advantages as they are, its first gradient would be GRPO's.
        return LossOutput(regularised(q.log_probs_BL * q.advantages_BL.sign(), q), {})

    monkeypatch.setitem(LOSSES, "mine", mine)  # all that a new loss needs
    changes: dict[str, Any] = {
        "num_generations": 6,
        "num_groups": 2,
        "class_labels": (1, 2),
        "num_iterations": 2,
        "beta": 0.5,
        "epsilon": 0.001,
        "epsilon_high": 0.001,
        "entropy_coef": 0.1,
        "loss_type": "mine",
        "delta": 1.0001,
        "importance_sampling_level": "image",
        "kl_estimator": "k3",
        "kl_in_reward": True,
        "temperature": 2.0,
        "target_kl": 1.0,
        "sync_ref_model": True,
        "trained_branches": "conditional",
        "branch_scale": 2,
        "credit": "gradient",
        "advantage_baseline": "leave_one_out",
        "reference_guidance_scale": 3.0,
        "scale_rewards": "none",
        "advantage_epsilon": 0.5,
        "scale_weighting": "token",
        "train_scales": 2,
        "reference_dtype": "bfloat16",
        "kl_scale_weighting": "token",
        "entropy_scale_weighting": "token",
    }

    of_ratios = ("epsilon", "epsilon_high", "delta", "importance_sampling_level")

    def weights(name: str, **options: Any) -> Tensor:
        pipe = make_pipeline()
        base: dict[str, Any] = {"num_iterations": 3} if name in of_ratios or name == "clip" else {}
        base |= {"ref_model_sync_steps": 1} if name == "sync_ref_model" else {}
        base |= {"entropy_coef": 0.1} if name.startswith("entropy") or name == "entropic" else {}
        make_trainer(pipe, tmp_path / name, **base | options).train()
        return torch.cat([each.detach().flatten() for each in pipe.transformer.parameters()])

    plain, thrice, entropic = weights("plain"), weights("clip"), weights("entropic")
    for name, value in changes.items():
        reference = thrice if name in of_ratios else plain
        reference = entropic if name == "entropy_scale_weighting" else reference
        assert not torch.equal(weights(name, **{name: value}), reference), name
    # measure_kl shows in the log, not in the weights; the aggregation needs two rewards. Tests of their own
    # have offload_reference and the correction, which needs a sampler that differs.
    with pytest.raises(ConfigError, match=r"branch_scale 4 leaves nothing to go on with: .* 4 scales"):
        make_trainer(make_pipeline(), tmp_path / "all", branch_scale=4)
    unmeasured = make_trainer(make_pipeline(), tmp_path / "unmeasured", beta=0.0, measure_kl=False)
    assert unmeasured.learner.objective.reference is None
    pair = {"red": redness, "bright": lambda images, conditions: 10 * images.mean((1, 2, 3))}
    first, second = (
        make_trainer(make_pipeline(), tmp_path / way, pair, multi_objective_aggregation=way)
        for way in ("sum_then_normalize", "normalize_then_sum")
    )
    scores = first.collector.scores(first.collector.rollout(1))
    assert not torch.allclose(first.crediting.of_mine(scores), second.crediting.of_mine(scores))


def test_a_kl_in_the_reward_keeps_the_model_near_as_one_in_the_loss_does(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    def last_kl(name: str, **options: Any) -> float:
        make_trainer(make_pipeline(), tmp_path / name, max_steps=16, **options).train()
        return metrics_of(tmp_path / name)[-1]["kl_per_image"]

    free = last_kl("free", beta=1e-9)
    for held in (last_kl("loss", beta=1.0), last_kl("reward", beta=1.0, kl_in_reward=True)):
        assert held < free / 2, (held, free)


@pytest.mark.parametrize("sampling", [GUIDED, GUIDED.replace(top_k=4, top_p=0.9)], ids=["all", "filtered"])
def test_what_a_token_cost_in_kl_is_taken_from_its_advantage(
    make_pipeline: MakePipeline, tmp_path: Path, sampling: SamplingConfig
) -> None:
    """Against log-probs of the two models by themselves, after the model has moved."""
    pipe = make_pipeline()
    options = {"kl_in_reward": True, "beta": 0.3, "per_device_train_batch_size": 3}
    trainer = make_trainer(pipe, tmp_path / "run", sampling=sampling, **options)
    base = copy.deepcopy(pipe.transformer)
    trainer.train()

    drawn = trainer.collector.rollout(3)
    advantages = torch.randn(16, generator=torch.Generator().manual_seed(0))
    found = advantages[:, None] - trainer.crediting.less_kl(advantages, drawn, trainer.coefficients().beta)
    schedule = pipe.transformer.schedule
    with torch.no_grad():
        ours, theirs = (
            teacher_forced_logits(model, schedule, drawn.conditioning, drawn.inputs, sampling)
            for model in (pipe.transformer, base)
        )
    kept = kept_tokens(ours, sampling).scatter(-1, drawn.tokens[..., None], True)
    probs = ours.softmax(-1) * kept
    probs, theirs = probs / probs.sum(-1, keepdim=True), theirs.log_softmax(-1)
    picked = drawn.tokens[..., None]
    log_ratios = probs.gather(-1, picked)[..., 0].log() - theirs.gather(-1, picked)[..., 0]
    kl = torch.where(kept, probs * (probs.log() - theirs), 0.0).sum(-1)
    later = torch.stack([kl[:, slice_.stop :].sum(1) for slice_ in schedule.slices], 1)
    of_groups = later.unflatten(0, (4, 4))
    surplus = later - (of_groups.sum(1, keepdim=True) - of_groups).flatten(0, 1) / 3  # of the others
    expected = log_ratios - kl + surplus.repeat_interleave(torch.tensor(schedule.lengths), 1)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, 0.3 * expected, rtol=1e-3, atol=1e-6)


def test_training_is_at_its_own_temperature(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    """As a run that samples at it is, but for what is measured and kept."""
    pipe, other = make_pipeline(), make_pipeline()
    make_trainer(pipe, tmp_path / "own", temperature=2.0, use_peft=True).train()
    hot = GUIDED.replace(temperature=2.0)
    explicit = make_trainer(other, tmp_path / "all", sampling=hot, use_peft=True)
    explicit.train()
    for ours, theirs in zip(pipe.transformer.parameters(), other.transformer.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert pipe.sampling == GUIDED and other.sampling == hot
    assert VARPipeline.from_pretrained(tmp_path / "own" / "final").sampling == GUIDED
    with safe_open(tmp_path / "own/final/adapter" / TENSORS, "pt") as adapter:
        assert json.loads(adapter.metadata()[METADATA])["sampling"] == GUIDED.told()


def test_an_entropy_floor_holds_the_entropy_of_every_scale(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    def last(name: str, **options: Any) -> dict[str, float]:
        learning = {"max_steps": 12, "learning_rate": 5e-3, "beta": 0.0}
        make_trainer(make_pipeline(), tmp_path / name, **learning | options).train()
        first, *_, last = metrics_of(tmp_path / name)
        scales = range(1, make_pipeline().transformer.schedule.num_scales + 1)
        return {f"scale_{k}": last[f"entropy/scale_{k}"] / first[f"entropy/scale_{k}"] for k in scales}

    free = last("free")
    slow = last("slow", entropy_floor=0.99, entropy_floor_rate=0.1)
    held = last("held", entropy_floor=0.99, entropy_floor_rate=10.0)
    lost = min(free, key=free.__getitem__)
    assert free[lost] < 0.97
    assert free[lost] < slow[lost] < held[lost]


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        (lambda images, conditions: 1 / 0, "raised ZeroDivisionError"),
        (lambda images, conditions: torch.zeros(3), r"returned shape \(3,\), expected \(16,\)"),
        (lambda images, conditions: torch.full((len(images),), float("nan")), "returned NaN for all 16"),
        (lambda images, conditions: "good", "returned str"),
    ],
)
def test_a_bad_reward_stops_the_run_after_a_checkpoint(
    tiny_pipeline: VARPipeline, tmp_path: Path, reward: Any, sentence: str
) -> None:
    def bad(images: Tensor, conditions: list) -> Any:
        return reward(images, conditions)

    with pytest.raises(RewardError, match=f"reward 'bad' {sentence}"):
        make_trainer(tiny_pipeline, tmp_path / "run", bad).train()
    assert (tmp_path / "run" / "checkpoints" / "step-000000").is_dir()


def test_a_reward_that_hangs_stops_the_run_after_a_checkpoint(
    tiny_pipeline: VARPipeline, tmp_path: Path
) -> None:
    over = threading.Event()
    rewards = RewardSet({"slow": lambda images, conditions: over.wait(600)}, timeouts={"slow": 0.1})
    with pytest.raises(RewardError, match=r"^reward 'slow': no answer within its timeout of 0\.1 s$"):
        make_trainer(tiny_pipeline, tmp_path / "run", rewards).train()
    over.set()
    assert (tmp_path / "run" / "checkpoints" / "step-000000").is_dir()


def test_a_run_is_never_overwritten_unasked(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    make_trainer(make_pipeline(), tmp_path / "run", max_steps=1).train()
    with pytest.raises(ConfigError, match="already holds a run"):
        make_trainer(make_pipeline(), tmp_path / "run")
    make_trainer(make_pipeline(), tmp_path / "run", overwrite=True, max_steps=1).train()
    assert len(metrics_of(tmp_path / "run")) == 1


def test_one_process_can_train_in_two_precisions(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    """The precision of one trainer is not that of the next."""
    logged = {}
    for precision in ("no", "bf16", "no"):
        folder = tmp_path / f"{precision}-{len(logged)}"
        make_trainer(make_pipeline(), folder, mixed_precision=precision, max_steps=1).train()
        logged[folder.name] = metrics_of(folder)[0]
    entropies = [each["entropy"] for each in logged.values()]
    assert entropies[0] == entropies[2] != entropies[1] == pytest.approx(entropies[0], rel=0.1)


@pytest.mark.parametrize("is_fast", [True, False])
def test_auto_is_the_precision_that_the_machine_is_fast_in(
    make_pipeline: MakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_fast: bool
) -> None:
    monkeypatch.setattr("nextscale.base.precision.has_fast_bfloat16", lambda device_type: is_fast)
    asked, logged = ("auto", "bf16" if is_fast else "no"), []
    for precision in asked:
        folder = tmp_path / precision
        make_trainer(make_pipeline(), folder, mixed_precision=precision, max_steps=1).train()
        logged.append(metrics_of(folder)[0]["entropy"])
        environment = json.loads((folder / "environment.json").read_text())
        assert environment["mixed_precision"] == asked[1]
    assert logged[0] == logged[1]


def test_bfloat16_without_instructions_for_it_is_warned_of(
    make_pipeline: MakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("nextscale.callbacks.has_fast_bfloat16", lambda device_type: False)
    make_trainer(make_pipeline(), tmp_path / "asked", mixed_precision="bf16", max_steps=2).train()
    assert capsys.readouterr().err.count("no instructions for bfloat16") == 1
    make_trainer(make_pipeline(), tmp_path / "plain", mixed_precision="no", max_steps=2).train()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_sampler_and_the_trainer_run_the_same_policy(
    make_pipeline: MakePipeline, tmp_path: Path, precision: str
) -> None:
    """Each scale's attention is the same kernel on the same shapes in both; products may round by their
    number of rows."""
    trainer = make_trainer(make_pipeline(), tmp_path / "run", mixed_precision=precision)
    metrics = trainer.step(1)
    assert metrics["sampling/sampling_logp_difference/mean"] <= (1e-6 if precision == "no" else 2e-3)


def test_the_first_update_is_exactly_on_policy(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    """Whatever the sampler recorded: bounds that any rounding would exceed clip nothing, until an update has
    moved the policy."""
    options = {"mixed_precision": "bf16", "num_iterations": 2, "epsilon": 1e-7, "beta": 0.0}

    def step(name: str, moves: bool, **more: Any) -> dict[str, float]:
        trainer = make_trainer(make_pipeline(), tmp_path / name, **options, **more)
        rollout = trainer.collector.rollout(1)
        drifted = replace(rollout, log_probs=rollout.log_probs + 0.01)
        trainer.collector.rollout = lambda step: drifted  # type: ignore[method-assign]
        if not moves:
            trainer.learner.optimizer.step = trainer.learner.scheduler.step = lambda: None  # type: ignore[method-assign]
        return trainer.step(1)

    metrics = step("a", moves=False)
    assert metrics["sampling/sampling_logp_difference/max"] > 1e-3
    assert metrics["clip_ratio/region_mean"] == 0  # the second iteration computes the same numbers, too
    moved = step("b", moves=True, learning_rate=1e-3)
    assert 0.2 < moved["clip_ratio/region_mean"] < 0.5  # of two iterations, half the signs
    for name in ("low", "high"):
        assert moved[f"clip_ratio/{name}_mean"] > 0.05


def test_the_reference_runs_once_a_rollout(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    trainer = make_trainer(
        make_pipeline(), tmp_path / "run", num_iterations=3, per_device_train_batch_size=5, beta=0.5
    )
    assert trainer.learner.objective.reference is not None
    model, sizes = trainer.learner.objective.reference.model, []
    compute = model.features

    def features(conditioning: Conditioning, *given: Any) -> Tensor:
        sizes.append(len(conditioning))
        return compute(conditioning, *given)

    model.features = features  # type: ignore[method-assign]
    metrics = trainer.step(1)
    assert sizes == [8, 8, 8, 8]  # both branches of 16 images, in as few parts of 5 at most
    assert metrics["kl"] > 1e-5  # of the later iterations


def test_a_reference_in_less_memory_computes_the_same(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    def run(name: str, **options: Any) -> tuple[dict[str, Tensor], float]:
        pipe = make_pipeline()
        make_trainer(pipe, tmp_path / name, beta=0.5, **options).train()
        return pipe.transformer.state_dict(), metrics_of(tmp_path / name)[-1]["kl"]

    bf16, kl = run("bf16", mixed_precision="bf16")
    for name, options in {
        "float32": {"reference_dtype": "float32"},
        "away": {"offload_reference": True},
    }.items():
        other, same_kl = run(name, mixed_precision="bf16", **options)
        assert same_kl == kl > 1e-5
        assert all(torch.equal(each, bf16[key]) for key, each in other.items()), name
    plain, kl = run("plain")
    rounded, other_kl = run("rounded", reference_dtype="bfloat16")
    assert other_kl != kl and other_kl == pytest.approx(kl, abs=0.02)
    assert any(not torch.equal(each, plain[key]) for key, each in rounded.items())


def test_a_sampler_that_is_not_the_trainers_policy_is_told_once(
    make_pipeline: MakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(make_pipeline(), tmp_path / "run", max_steps=3)
    trainer.learner.objective.sampling = GUIDED.replace(temperature=0.9)
    trainer.train()
    lines = [line for line in capsys.readouterr().err.splitlines() if "sampler and trainer differ" in line]
    assert len(lines) == 1 and "nats a token on average, more than rounding explains" in lines[0]
    make_trainer(make_pipeline(), tmp_path / "exact").train()
    make_trainer(make_pipeline(), tmp_path / "bf16", mixed_precision="bf16").train()
    assert "differ" not in capsys.readouterr().err


def test_the_first_scales_alone_are_trained_and_measured(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    """And the entropy floor holds those alone; the finer scales are drawn as ever."""
    options = {"train_scales": 2, "entropy_floor": 1.0, "entropy_floor_rate": 10.0, "num_iterations": 2}
    trainer = make_trainer(make_pipeline(), tmp_path / "run", **options)
    whole = make_trainer(make_pipeline(), tmp_path / "whole").collector.rollout(1)
    assert torch.equal(trainer.collector.rollout(1).tokens, whole.tokens)
    trainer.train()
    _, last = metrics_of(tmp_path / "run")
    for name in ("entropy", "kl", "entropy_floor"):
        found = sorted(key for key in last if key.startswith(f"{name}/"))
        assert found == [f"{name}/scale_1", f"{name}/scale_2"]
    assert last["num_tokens"] == 2 * 16 * 30


def test_weights_of_16_bits_are_not_trained(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        pipe = make_pipeline()
        pipe.transformer.to(dtype)
        with pytest.raises(
            ConfigError, match=f"^'pos_start' is {name}, in which most updates round to nothing"
        ):
            make_trainer(pipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_score_in_a_group_gives_no_gradient(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    def first_of_each_group(images: Tensor, conditions: list) -> Tensor:
        return torch.where(torch.arange(len(images)) % 4 == 0, redness(images, conditions), torch.nan)

    taken = gradient(make_trainer(tiny_pipeline, tmp_path / "run", first_of_each_group, beta=0.0))
    assert all(each.abs().max() == 0 for each in taken.values())


def test_images_that_are_not_scored_do_not_count(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    """Neither in the log nor, of two rewards, in their sum."""
    given: list[Tensor] = []

    def all_but_the_first_group(images: Tensor, conditions: list) -> Tensor:
        given.append(torch.where(torch.arange(len(images)) < 4, torch.nan, images[:, 0].mean((1, 2))))
        return given[-1]

    def all_but_the_last(images: Tensor, conditions: list) -> list[float | None]:
        return [2.0] * (len(images) - 1) + [None]

    rewards = {"a": all_but_the_first_group, "b": all_but_the_last}
    make_trainer(tiny_pipeline, tmp_path / "run", rewards, max_steps=1).train()
    (metrics,) = metrics_of(tmp_path / "run")
    assert metrics["rewards/a/mean"] == pytest.approx(given[0][4:].mean().item())
    assert metrics["rewards/a/std"] == pytest.approx(given[0][4:].std().item())
    assert (metrics["rewards/b/mean"], metrics["rewards/b/std"]) == (2.0, 0.0)
    assert metrics["reward"] == pytest.approx(given[0][4:-1].mean().item() + 2)
    assert metrics["frac_reward_zero_std"] == 0.25  # the first group has no score at all


def test_an_evaluation_needs_a_score_of_some_image_not_of_every_class(tiny_pipeline: VARPipeline) -> None:
    """It scores batch by batch, and in a batch there may be none."""

    def of_class_2(images: Tensor, conditions: list) -> list[float | None]:
        return [0.5 + i if each.label == 2 else None for i, each in enumerate(conditions)]

    rewards = RewardSet({"mine": of_class_2})
    metrics = evaluate(tiny_pipeline, rewards, GUIDED, num_images=8, batch_size=2).metrics
    assert (metrics["rewards/mine/mean"], metrics["num_images"]) == (1.0, 8.0)
    with pytest.raises(RewardError, match="reward 'mine' returned NaN for all 6 images"):
        evaluate(tiny_pipeline, rewards, GUIDED, num_images=6, conditions=tiny_pipeline.conditions([0, 1, 3]))


@pytest.mark.parametrize("name", ["conditions", "eval_conditions"])
@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([], "an empty list"),
        (["star"], "a list with 'star'"),
        ([0], "a list with an object of type int"),
        ("a red star", "'a red star'"),
        (Condition(0, "star"), "an object of type Condition"),
        (torch.tensor(3), r"a tensor of shape \(\) and torch\.int64"),
        ([Condition(0, "star"), None], "a list with None"),
    ],
)
def test_what_is_no_list_of_conditions_is_refused(
    tiny_pipeline: VARPipeline, tmp_path: Path, name: str, given: Any, found: str
) -> None:
    run = RunConfig(output_dir=str(tmp_path / "run"))
    says = f"{name}: got {found}, expected a list of conditions: .*classes, .* of prompts"
    with pytest.raises(ConfigError, match=f"^{says}$"):
        GRPOTrainer(tiny_pipeline, redness, run=run, **{name: given})
    assert not (tmp_path / "run").exists()


class NoHearts:
    """Cannot score hearts, and takes no part in training where it is held out."""

    def __call__(self, images: Tensor, conditions: list) -> Tensor:
        return torch.ones(len(images))

    def check_conditions(self, conditions: list[Condition]) -> None:
        if any(each.label == 1 for each in conditions):
            raise ConfigError("cannot score a heart")


def test_a_reward_that_cannot_score_a_condition_says_so_before_the_run(
    tiny_pipeline: VARPipeline, tmp_path: Path
) -> None:
    run = RunConfig(output_dir=str(tmp_path / "run"), eval_num_images=4)
    trained = RewardSet({"red": redness, "picky": NoHearts()})
    held_out = RewardSet({"red": redness, "picky": NoHearts()}, held_out=["picky"])
    hearts, others = tiny_pipeline.conditions([0, 1]), tiny_pipeline.conditions([0, 2])
    for rewards, given in (
        (trained, {"conditions": hearts, "eval_conditions": others}),
        (trained, {"conditions": others, "eval_conditions": hearts}),
        (held_out, {"conditions": others, "eval_conditions": hearts}),
        (trained, {}),  # of all classes
    ):
        with pytest.raises(RewardError, match=r"^reward 'picky': cannot score a heart$"):
            GRPOTrainer(tiny_pipeline, rewards, run=run, **given)
    assert not (tmp_path / "run").exists()
    GRPOTrainer(tiny_pipeline, held_out, run=run, conditions=hearts, eval_conditions=others)


def test_conditions_may_come_one_by_one(tiny_pipeline: VARPipeline, tmp_path: Path) -> None:
    conditions = iter(tiny_pipeline.conditions([0, 2]))
    run = RunConfig(output_dir=str(tmp_path / "run"), eval_num_images=4)
    trainer = GRPOTrainer(tiny_pipeline, redness, conditions=conditions, run=run)  # type: ignore[arg-type]
    assert [each.label for each in trainer.conditions] == [0, 2]
    assert trainer.evaluator.conditions == trainer.conditions


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"grpo": {}}, r"grpo: got an object of type dict, expected GRPOConfig\(\.\.\.\)"),
        ({"run": {"max_steps": 1}}, r"run: got an object of type dict, expected RunConfig\("),
        ({"run": RunConfig}, r"run: got the class RunConfig, expected RunConfig\("),
        ({"sampling": {"top_k": 3}}, r"sampling: got an object of type dict, expected SamplingConfig\("),
        ({"optimizer": {}}, r"optimizer: got an object of type dict, expected OptimizerConfig\("),
        ({"tuning": GUIDED}, r"tuning: got an object of type SamplingConfig, expected TuningConfig\("),
        ({"callbacks": Callback()}, "callbacks: got an object of type Callback, expected a list of objects"),
        ({"callbacks": Callback}, "callbacks: got the class Callback, expected a list of objects"),
        ({"callbacks": [Callback]}, "callbacks: got a list with the class Callback, expected a list of obj"),
        ({"callbacks": [print]}, "callbacks: got a list with an object of type builtin_function_or_method"),
        ({"callbacks": None}, "callbacks: got None, expected a list of objects of subclasses of Callback"),
        ({"judges": [redness]}, "judges: got an object of type list, expected a function"),
        ({"embed": "toy"}, "embed: got 'toy', expected a function"),
        ({"measures": [redness]}, "measures: got a list with an object of type function, expected a list of"),
        (
            {"measures": None},
            "measures: got None, expected a list of objects with the methods `features` and",
        ),
        ({"pipe": "toy"}, r"pipe: got 'toy', expected a pipeline, such as VARPipeline\.from_pretrained\("),
    ],
)
def test_arguments_of_another_kind_are_refused(
    tiny_pipeline: VARPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^{says}"):
        GRPOTrainer(**{"pipe": tiny_pipeline, "rewards": redness} | given)
    assert not list(tmp_path.iterdir())
