"""Plans, against hand formulas and the official model's cost at full size."""

import re

import pytest
import torch

from nextscale.base.errors import ConfigError, RewardError
from nextscale.config import rehearsal
from nextscale.config.files import RECIPES, packaged_recipes
from nextscale.config.recipe import load_recipe
from nextscale.config.rehearsal import plan_recipe, rehearse
from nextscale.grpo import GRPOConfig
from nextscale.models import zoo
from nextscale.models.scales import ScaleSchedule
from nextscale.models.var import VAR, VARConfig
from nextscale.models.vqvae import VQVAEConfig
from nextscale.models.zoo import TOY_ASSETS
from nextscale.plan.gpus import GPU, GPUS, find_gpu, known
from nextscale.plan.phases import Phases
from nextscale.plan.planning import USABLE_MEMORY, UTILISATION, describe, make_plan
from nextscale.policy import SamplingConfig
from nextscale.rewards.networks.clip import load_clip
from nextscale.runs.config import RunConfig
from nextscale.tuning import TuningConfig

GUIDED = SamplingConfig(guidance_scale=1.5)
SMALL = VARConfig(depth=3, width=64, num_heads=2, codebook_size=96, codebook_width=8, scale_sizes=(1, 2, 4))
SMALL_VQVAE = VQVAEConfig(
    base_channels=32, channel_multipliers=(1, 1), codebook_size=96, codebook_width=8, scale_sizes=(1, 2, 4)
)
WHERE = {"var-d16": ("rtx-4090-24gb", 1), "var-d30": ("h100-80gb", 1), "var-d36": ("h100-80gb", 8)}
PUBLISHED_RECIPES = [name for name in packaged_recipes() if name.startswith("var-d")]
TEXT_RECIPES = [name for name in packaged_recipes() if name.startswith(("var-clip-", "switti-"))]


def small_plan(gpu="h100-80gb", num_gpus=1, backbones=None, evaluated=None, grpo=None, **run):
    grpo = GRPOConfig(num_groups=4, num_generations=2, **grpo or {})
    return make_plan(
        SMALL, SMALL_VQVAE, backbones or {}, grpo, GUIDED, RunConfig(**run), gpu, num_gpus, evaluated
    )


def test_a_cpu_saves_nothing_by_moving_to_main_memory():
    cpu = GPU("cpu", 16e9, None, 1e11)
    plain = small_plan(cpu, gradient_checkpointing=True)
    moved = {"gradient_checkpointing": True, "activation_offloading": True}
    offloaded = small_plan(cpu, grpo={"offload_reference": True}, **moved)
    assert offloaded.peak == plain.peak and offloaded.phases == plain.phases
    on_gpu = small_plan(grpo={"offload_reference": True})
    assert on_gpu.resident["reference"] < small_plan().resident["reference"]


def by_hand(config: VARConfig, lengths: list[int], seen: list[int], embedded: int, passes: int = 1) -> float:
    """Operations of a transformer on one sequence: (l, C) by (C, n) is 2 l C n.

    Args:
        lengths: tokens of each scale.
        seen: tokens that those of each scale attend to.
        embedded: tokens that come in from the codebook.
        passes: in which the scales are run; the blocks' AdaLN is computed in the first alone.
    """
    C, V, D, depth = config.width, config.codebook_size, config.codebook_width, config.depth
    tokens = sum(lengths)
    products = 2 * tokens * 12 * C * C  # queries, keys and values 3, projection 1, feed-forward 8
    attention = sum(4 * length * keys * C for length, keys in zip(lengths, seen, strict=True))
    adaln = 2 * C * 6 * C
    head = 2 * tokens * C * V + passes * 2 * C * 2 * C
    return depth * (products + attention + adaln) + head + 2 * embedded * D * C


def test_d16_costs_what_the_official_model_does():
    """601 GFLOP to sample with guidance, 394 to decode, 310 for a forward pass, 930 with the backward: less
    the AdaLN of nine scales, which the first one's serves, and less the pairs that a mask would hide."""
    model = zoo.describe("var-d16")
    config, tokenizer = model.transformer, model.tokenizer
    run = RunConfig(per_device_train_batch_size=1, per_device_eval_batch_size=1)
    phases = Phases(config, tokenizer, GRPOConfig(), GUIDED, run, 1)
    lengths = [size * size for size in config.scale_sizes]
    seen = [sum(lengths[: k + 1]) for k in range(len(lengths))]

    rollout = phases.rollout().flops
    adaln = 2 * 9 * config.depth * 2 * config.width * 6 * config.width
    assert rollout == pytest.approx(601e9 - adaln, rel=0.005)
    by_parts = 2 * by_hand(config, lengths, seen, 679, passes=10)
    assert rollout == pytest.approx(by_parts, rel=0.002)  # and the quantizer
    assert phases.decode().flops == pytest.approx(394e9, rel=0.005)

    forward = by_hand(config, lengths, seen, 679)
    pairs = sum(length * keys for length, keys in zip(lengths, seen, strict=True))
    assert pairs == pytest.approx(0.62 * 680**2, rel=0.01)
    hidden = 4 * (680**2 - pairs) * config.depth * config.width
    assert forward == pytest.approx(310e9 - hidden, rel=0.005)
    reference = phases.reference().flops
    head = 2 * 680 * config.width * config.codebook_size
    assert reference == 2 * (forward - head)
    update = phases.update().flops - reference
    # Twice as much backward as forward, but for the inputs, which get no gradient; and attention, which is
    # run again, and computes its weights once more in its backward kernel; and the logits, which are computed
    # again. The reference's head runs beside the model's, both times.
    again = config.depth * (4 + 2) * pairs * config.width + head
    inputs = 2 * 679 * config.codebook_width * config.width
    assert update == pytest.approx(2 * (3 * forward + again - inputs + 2 * head), rel=1e-4)
    assert update == pytest.approx(2 * (930e9 - 3 * hidden + again + 2 * head), rel=0.02)


def test_memory_by_hand():
    plan = small_plan(num_gpus=2, eval_steps=0)
    parameters, images, tokens = plan.parameters["transformer"], 4, 21
    with torch.device("meta"):
        model = VAR(SMALL)
    assert parameters == sum(each.numel() for each in model.parameters()) == plan.parameters["reference"]
    assert plan.resident["gradients"] == 4 * parameters
    assert plan.resident["AdamW moments"] == 8 * parameters
    buffers = 8 * tokens + 4 * tokens**2 + 4 * SMALL.depth * SMALL.width
    assert plan.resident["weights"] == plan.resident["reference"] == 4 * parameters + buffers
    assert plan.resident["scored images"] == images * (3 * 8 * 8 * 4 + tokens * (8 + 4 + 2 * 8 * 4))
    assert plan.cache == 2 * SMALL.depth * (2 * images) * tokens * SMALL.width * 4
    assert plan.phases["rollout"] > plan.cache
    assert plan.phases["update"] >= plan.activations > 0
    # There are no gradients while images are drawn.
    drawing = plan.phases["rollout"] - plan.resident["gradients"]
    assert plan.peak == sum(plan.resident.values()) + max(drawing, plan.phases["update"])


def test_a_reference_in_bfloat16_or_in_main_memory():
    whole, half = small_plan(), small_plan(mixed_precision="bf16")
    with torch.device("meta"):
        model = VAR(SMALL)
    # All linear layers but the head and the modulations, which run in float32.
    linear = [model.word_embed]
    for block in model.blocks:
        linear += [block.attn.mat_qkv, block.attn.proj, block.ffn.fc1, block.ffn.fc2]
    saved = 2 * sum(each.numel() for layer in linear for each in layer.parameters())
    assert whole.resident["reference"] - half.resident["reference"] == saved
    assert (
        small_plan(grpo={"reference_dtype": "bfloat16"}).resident["reference"] == half.resident["reference"]
    )
    assert "reference" not in whole.phases
    away = small_plan(grpo={"offload_reference": True})
    head = sum(each.nbytes for each in model.head.parameters())
    assert away.resident["reference"] == head
    assert away.phases["reference"] > whole.resident["reference"] - head
    assert away.phases["update"] == whole.phases["update"]
    assert away.needed("reference") == away.phases["reference"] - away.resident["gradients"]


def test_offloaded_activations_are_not_on_the_gpu():
    """What a recomputed block starts from, which each block but the one at work then has elsewhere."""
    options = {"gradient_checkpointing": True, "per_device_train_batch_size": 4}
    whole, away = (small_plan(**options, activation_offloading=flag) for flag in (False, True))
    stream = whole.phases["update"] - away.phases["update"]
    sequences = 2 * 4  # both branches
    each = 4 * sequences * ScaleSchedule(SMALL.scale_sizes).num_tokens * SMALL.width
    assert stream == pytest.approx((SMALL.depth - 1) * each, rel=0.02)
    assert away.flops == whole.flops and away.resident == whole.resident


@pytest.mark.parametrize("recomputes", [True, False])
def test_in_a_lone_backward_pass_gradients_come_as_activations_go(recomputes):
    plan = small_plan(gradient_checkpointing=recomputes)
    parts = SMALL, SMALL_VQVAE, GRPOConfig(num_groups=4, num_generations=2), GUIDED, plan.run, 8
    later, first = (Phases(*parts).update(has_gradients=each) for each in (True, False))
    gradients = plan.resident["gradients"]
    assert later.peak <= first.peak < later.peak + gradients
    assert plan.phases["update"] == first.peak - gradients
    # What is summed over several passes is there from the second one on, and on several GPUs always.
    several = small_plan(gradient_checkpointing=recomputes, per_device_train_batch_size=4)
    assert several.phases["update"] == Phases(*parts[:4], several.run, 8).update().peak
    assert small_plan(num_gpus=2).phases["update"] == Phases(*parts[:4], RunConfig(), 4).update().peak


def test_more_gpus_share_the_images():
    one, two = small_plan(), small_plan(num_gpus=2)
    assert one.flops == pytest.approx(two.flops) and one.num_images == two.num_images == 8
    assert two.seconds == pytest.approx(one.seconds / 2)
    assert 2 * two.cache == one.cache
    three = small_plan(num_gpus=3)  # with 3, 3 and 2 images
    assert one.flops == pytest.approx(three.flops) and three.seconds == pytest.approx(one.seconds * 3 / 8)
    with pytest.raises(ConfigError, match="9 processes cannot share the 8 images of a step"):
        small_plan(num_gpus=9)


def test_an_evaluation_may_draw_more_at_once_than_a_step():
    """It comes before the first step: a run that does not fit it ends there."""
    drawn = {"eval_num_images": 8, "per_device_eval_batch_size": 8}
    step, measured = small_plan(eval_steps=0), small_plan(**drawn)
    assert measured.phases == step.phases  # as many as a step
    at_once = drawn | {"eval_num_images": 32}
    small, large = small_plan(num_gpus=4, eval_steps=0), small_plan(num_gpus=4, **at_once)
    assert large.phases == small.phases  # less than an update takes
    of_less = {"num_gpus": 4, "per_device_train_batch_size": 1, "gradient_checkpointing": True}
    shared, alone = small_plan(**of_less, eval_steps=0), small_plan(**of_less, **at_once)
    assert alone.phases.pop("evaluation") == max(
        step.phases[name] for name in ("rollout", "decode", "reward")
    )
    assert alone.phases == shared.phases and alone.flops == shared.flops


def test_fsdp_spreads_the_memory():
    with pytest.raises(ConfigError, match="FSDP has nothing to spread over in one process"):
        small_plan(fsdp=True)
    two, sharded = small_plan(num_gpus=2), small_plan(num_gpus=2, fsdp=True)
    for part in ("weights", "gradients", "AdamW moments", "reference"):
        assert 2 * sharded.resident[part] == two.resident[part]
    for part in ("tokenizer", "scored images"):
        assert sharded.resident[part] == two.resident[part]
    parameters = two.parameters["transformer"]
    assert sharded.phases["rollout"] == two.phases["rollout"] + 4 * parameters
    with torch.device("meta"):
        model = VAR(SMALL)
    block = sum(each.numel() for each in model.blocks[0].parameters())
    gathered = parameters - (SMALL.depth - 2) * block
    assert sharded.phases["update"] == two.phases["update"] + 8 * gathered


def test_what_the_options_change():
    plain = small_plan()
    twice = make_plan(
        SMALL,
        SMALL_VQVAE,
        {},
        GRPOConfig(num_groups=4, num_generations=2, num_iterations=2),
        GUIDED,
        RunConfig(),
        "h100-80gb",
    )
    for name, flops in plain.flops.items():
        assert twice.flops[name] == flops * (2 if name == "update" else 1)
    # Of 8 images, both branches: the reference's features, and the log-probs.
    assert twice.kept == 4 * 8 * 21 * (2 * SMALL.width + 1)
    assert plain.kept == 0
    both = {"num_iterations": 2, "offload_reference": True}
    assert small_plan(grpo=both).kept == 4 * 8 * 21  # the features are in main memory
    assert plain.flops["reference"] > 0
    without = make_plan(
        SMALL,
        SMALL_VQVAE,
        {},
        GRPOConfig(num_groups=4, num_generations=2, beta=0, measure_kl=False),
        SamplingConfig(),
        RunConfig(),
        "h100-80gb",
    )
    assert without.flops["reference"] == without.resident["reference"] == 0
    # No guidance, and the reference's head neither before nor in the backward pass.
    heads = 2 * 2 * 8 * 2 * 21 * SMALL.width * SMALL.codebook_size
    with_heads = without.flops["update"] + heads / 2
    assert with_heads == pytest.approx(plain.flops["update"] / 2, rel=1e-3)
    few = small_plan(grpo={"train_scales": 2})
    assert few.flops["rollout"] == plain.flops["rollout"]
    assert few.flops["update"] < plain.flops["update"] * 5 / 21 * 1.2
    recomputed = small_plan(gradient_checkpointing=True)
    assert recomputed.activations < plain.activations / 2
    assert 1.2 < recomputed.flops["update"] / plain.flops["update"] < 4 / 3


@pytest.mark.parametrize(
    ("grpo", "sampling"),
    [
        ({"entropy_floor": 0.8, "scale_weighting": "token"}, {"guidance_scale": 1.5}),
        ({"entropy_coef": 0.1, "epsilon_high": 0.3}, {"top_k": 9, "top_p": 0.9, "temperature": 0.8}),
    ],
)
def test_every_loss_and_policy_can_be_planned(grpo, sampling):
    config = GRPOConfig(num_groups=2, num_generations=2, **grpo)
    plan = make_plan(SMALL, SMALL_VQVAE, {}, config, SamplingConfig(**sampling), RunConfig(), "h100-80gb")
    assert min(plan.flops["rollout"], plan.flops["update"], plan.activations) > 0


OLD_AND_NEW = ("v100-32gb", "a100-40gb")


def test_time_is_operations_by_the_share_of_the_peak():
    plan = small_plan("a100-40gb", mixed_precision="bf16")
    assert plan.seconds == pytest.approx(sum(plan.flops.values()) / (312e12 * UTILISATION))
    assert small_plan("a100-40gb").rate == 19.5e12 * UTILISATION
    old = small_plan("v100-32gb", mixed_precision="bf16")
    assert old.dtype == "float32" and old.rate == 15.7e12 * UTILISATION
    auto = {name: small_plan(name, mixed_precision="auto").run.mixed_precision for name in OLD_AND_NEW}
    assert auto == {"v100-32gb": "no", "a100-40gb": "bf16"}


def test_gpus():
    assert find_gpu("a10-24gb").memory == 24e9
    with pytest.raises(ConfigError, match=r"unknown GPU 'h100'; did you mean 'h100-80gb'\?"):
        find_gpu("h100")
    assert all(float(re.search(r"(\d+)gb", name)[1]) * 1e9 == gpu.memory for name, gpu in GPUS.items())
    assert find_gpu("a10-24gb", 20).memory == 20e9 and find_gpu("a10-24gb", 20).bfloat16 == 125e12
    with pytest.raises(ConfigError, match="must be more than 0 GB, got -1"):
        find_gpu("a10-24gb", -1)


@pytest.mark.parametrize(
    ("name", "gibibytes", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "h100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 79.1, "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", 23.5, "rtx-4090-24gb"),
        ("NVIDIA L4", 22.0, "l4-24gb"),
        ("NVIDIA L40S", 44.4, "l40s-48gb"),
        ("NVIDIA RTX A6000", 47.4, "rtx-a6000-48gb"),
        ("Tesla T4", 14.6, "t4-16gb"),
        ("NVIDIA RTX 6000 Ada Generation", 47.5, None),
    ],
)
def test_a_card_is_known_by_what_its_driver_says(name, gibibytes, expected):
    found = known(name, gibibytes * 2**30)
    assert (found.name if found else None) == expected


def test_without_a_gpu_the_miniature_is_planned_for_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = plan_recipe(load_recipe("toy-painting"))
    assert plan.gpu.name == "cpu" and plan.gpu.is_measured and 1e9 < plan.gpu.float32 < 1e14
    assert "which was measured here" in describe(plan) and "h100" not in describe(plan)
    assert plan_recipe(load_recipe("var-d16-painting")).gpu.name == "h100-80gb"
    assert plan_recipe(load_recipe("var-d16-painting"), gigabytes=24).gpu.memory == 24e9


def test_a_card_that_is_not_known_is_measured_and_may_have_another_memory(monkeypatch):
    card = GPU("NVIDIA Unheard Of", 10e9, 1e12, 1e11, is_measured=True)
    monkeypatch.setattr(rehearsal, "gpu_at_hand", lambda num_parameters: card)
    plan = plan_recipe(load_recipe("toy-painting"), gigabytes=7)
    assert plan.gpu.name == card.name and plan.gpu.memory == 7e9 and plan.gpu.float32 == 1e11


def test_evaluations_are_a_part_of_the_time():
    plan = small_plan("a100-40gb", max_steps=10, eval_steps=4, eval_num_images=64)
    assert plan.num_evaluations == 4  # before, after 4 and 8 steps, and after the last
    drawn = sum(plan.flops[name] for name in ("rollout", "decode", "reward"))
    assert plan.evaluation_seconds == pytest.approx(64 * drawn / 8 / plan.rate)  # a step draws 8
    assert plan.run_seconds == pytest.approx(10 * plan.seconds + 4 * plan.evaluation_seconds)
    assert small_plan("a100-40gb", eval_steps=0).num_evaluations == 0
    assert small_plan("a100-40gb", max_steps=8, eval_steps=4).num_evaluations == 3


def test_backbones_that_are_not_known():
    plan = small_plan(backbones={"mine": None, "other": "somebody/clip"})
    assert plan.unknown == ("mine", "other") and plan.resident["rewards"] == plan.flops["reward"] == 0
    assert "that of 'mine' unknown, not counted" in describe(plan)


@pytest.mark.skipif(not TOY_ASSETS.is_dir(), reason=f"no miniature world in {TOY_ASSETS}")
def test_rewards_share_a_backbone_but_run_it_each():
    buffers = sum(each.nbytes for each in load_clip("toy").model.buffers())
    one, two = small_plan(backbones={"a": "toy"}), small_plan(backbones={"a": "toy", "b": "toy"})
    assert two.flops["reward"] == 2 * one.flops["reward"] > 0
    held_out = small_plan(evaluated={"a": "toy"})
    assert held_out.flops["reward"] == 0 and held_out.resident["rewards"] == one.resident["rewards"]
    assert two.resident["rewards"] == one.resident["rewards"] == 4 * one.parameters["toy"] + buffers


@pytest.mark.parametrize("name", PUBLISHED_RECIPES)
def test_a_recipe_of_a_published_model_is_checked_without_weights(name, monkeypatch):
    monkeypatch.setattr("nextscale.models.hub.find_cached", lambda *words: None)
    recipe = load_recipe(name)
    assert rehearse(recipe, 1) == [recipe.model, "openai/clip-vit-large-patch14"]
    assert recipe.run.output_dir == f"runs/{name}" and name.startswith(f"{recipe.model}-")
    for key, value, says in (
        ("grpo.class_labels", "[0, 1000]", "class 1000 is out of range"),
        ("grpo.class_labels", "[volcano, volcan]", "no class 'volcan'; did you mean 'volcano'"),
        ("grpo.scale_weighting", "[1.0, 2.0]", "scale_weighting needs 10"),
        ("grpo.constraint_rate", "2", "constraint_rate 2.0 has no effect without a constraint"),
        ("grpo.loss_type", "grop", "did you mean 'grpo'"),
        ("tuning.freeze", "blocks.99", "'blocks.99' matches no parameter"),
    ):
        with pytest.raises(ConfigError, match=says):
            rehearse(load_recipe(name, {key: value}), 1)
    with pytest.raises(ConfigError, match="129 processes cannot share the 128 images of a step"):
        rehearse(recipe, 129)


@pytest.mark.parametrize("name", TEXT_RECIPES)
def test_a_recipe_of_a_published_text_model_is_checked_without_weights(name, monkeypatch):
    monkeypatch.setattr("nextscale.models.hub.find_cached", lambda *words: None)
    recipe = load_recipe(name)
    missing = rehearse(recipe, 1)
    assert missing[0] == recipe.model and "openai/clip-vit-large-patch14" in missing
    for key, value, says in (
        ("grpo.class_labels", "[0]", "class_labels has no effect beside prompts"),
        ("prompts", "none.txt", "no file 'none.txt'"),
        ("eval_prompts", recipe.prompts, "held-out prompts are trained on as well"),
        ("grpo.loss_type", "grop", "did you mean 'grpo'"),
        ("tuning.freeze", "blocks.99", "'blocks.99' matches no parameter"),
    ):
        with pytest.raises(ConfigError, match=says):
            rehearse(load_recipe(name, {key: value}), 1)


def test_a_reward_at_hand_is_checked_where_the_model_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr("nextscale.models.hub.find_cached", lambda *words: None)
    (tmp_path / "own.py").write_text("def bright(images, conditions):\n    return images.mean((1, 2, 3))\n")
    recipe = load_recipe("var-d16-painting", {"rewards.own.python": f"{tmp_path}/own.py:bright"})
    assert "var-d16" in rehearse(recipe, 1)
    wrong = load_recipe("var-d16-painting", {"rewards.own.python": f"{tmp_path}/own.py:dark"})
    with pytest.raises((ConfigError, RewardError), match="reward 'own'"):
        rehearse(wrong, 1)


@pytest.mark.parametrize("model", WHERE)
def test_recipes_fit_where_they_say_and_tell_their_plan(model):
    """One plan a model: its three recipes differ in rewards alone."""
    gpu, num_gpus = WHERE[model]
    recipe = load_recipe(f"{model}-combined")
    plan = plan_recipe(recipe, gpu, num_gpus)
    assert plan.fits and not plan.unknown
    assert plan.peak <= USABLE_MEMORY * GPUS[gpu].memory
    told = f"{plan.peak / 1e9:.0f} GB and {plan.seconds:.2g} s a step on {num_gpus} x {gpu}"
    assert told in (RECIPES / f"{model}-combined.yaml").read_text()
    for kind in ("aesthetic", "painting"):
        other = load_recipe(f"{model}-{kind}")
        assert other.sampling == recipe.sampling and other.optimizer == recipe.optimizer
        assert other.run.replace(output_dir=recipe.run.output_dir) == recipe.run
        assert set(other.rewards) < set(recipe.rewards)


@pytest.mark.parametrize(
    ("name", "gpu"), [("var-d16-painting-lora", "rtx-4090-24gb"), ("var-d30-combined-lora", "a100-40gb")]
)
def test_an_adapters_recipe_fits_where_it_says_and_differs_in_nothing_else(name, gpu):
    recipe, whole = load_recipe(name), load_recipe(name.removesuffix("-lora"))
    plan = plan_recipe(recipe, gpu)
    assert plan.fits
    told = f"{plan.peak / 1e9:.0f} GB and {plan.seconds:.2g} s a step on 1 x {gpu}"
    assert told in (RECIPES / f"{name}.yaml").read_text()
    assert recipe.tuning.use_peft and not whole.tuning.use_peft
    assert (recipe.sampling, recipe.rewards, recipe.grpo) == (whole.sampling, whole.rewards, whole.grpo)


def tuned_plan(num_gpus=1, depth=3, **tuning):
    grpo, config = GRPOConfig(num_groups=4, num_generations=2), SMALL.replace(depth=depth)
    more = {"evaluated": None, "tuning": TuningConfig(**tuning)}
    return make_plan(config, SMALL_VQVAE, {}, grpo, GUIDED, RunConfig(), "h100-80gb", num_gpus, **more)


def test_an_adapter_is_counted_by_hand():
    r, C, depth, float32 = 4, SMALL.width, 3, 4
    layers = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)]  # mat_qkv, proj, fc1, fc2
    trained = depth * sum(r * (inputs + outputs) for inputs, outputs in layers)
    whole, lora = tuned_plan(2), tuned_plan(2, use_peft=True, lora_r=r, ema_decay=0.9)
    assert lora.parameters["trained"] == trained and "trained" not in whole.parameters
    assert lora.parameters["transformer"] == whole.parameters["transformer"] + trained
    assert lora.resident["weights"] == whole.resident["weights"] + float32 * trained
    for name in ("gradients", "average"):
        assert lora.resident[name] == float32 * trained
    assert lora.resident["AdamW moments"] == 2 * float32 * trained
    assert lora.resident["reference"] == whole.resident["average"] == 0
    assert lora.flops["reference"] == pytest.approx(whole.flops["reference"])
    assert lora.flops["update"] < 0.85 * whole.flops["update"]  # no gradients of the base's weights


def test_frozen_parameters_are_counted_by_hand():
    whole, frozen = tuned_plan(), tuned_plan(freeze="blocks.*")
    blocks = sum(each.numel() for each in VAR(SMALL).blocks.parameters())
    assert frozen.parameters["trained"] == whole.parameters["transformer"] - blocks
    assert frozen.resident["gradients"] == 4 * frozen.parameters["trained"]
    assert frozen.resident["reference"] == whole.resident["reference"]
    # The last block alone needs gradients within: a plan that took all blocks for alike would not see it.
    last = tuned_plan(depth=4, freeze=("blocks.0", "blocks.1", "blocks.2", "*embed", "class_emb", "pos_*"))
    assert last.activations < tuned_plan(depth=4, freeze=("blocks.1", "blocks.2", "blocks.3")).activations
    with pytest.raises(ConfigError, match=r"'blocks\.9' matches no parameter"):
        tuned_plan(freeze="blocks.9")


def test_a_plan_as_text():
    text = describe(small_plan("a10-24gb", 2))
    lines = text.splitlines()
    assert lines[0] == "2 x a10-24gb, computed, not measured"
    assert "8 images of 21 tokens: 168 tokens" in text
    assert "fits: 21.60 of 24.00 GB are usable" in text
    assert sum(line.startswith("  + ") for line in lines) == 1
    assert "at 30% of the float32 peak" in lines[-2]
    assert lines[-1].startswith("run         100 steps and 5 evaluations of 512 images (")


def test_slopes_cost_the_way_there_and_back_through_decoder_and_rewards():
    """No weight has a gradient there, so the way back costs about as much as the way there."""
    rewards = {"style": "openai/clip-vit-base-patch32"}
    plain, credited = (
        small_plan(backbones=rewards, grpo={"credit": each}) for each in ("none", "contribution")
    )
    assert "credit" not in plain.phases
    once = plain.flops["decode"] + plain.flops["reward"]
    assert credited.flops["credit"] == pytest.approx(2 * once, rel=0.1)
    assert credited.phases["credit"] > credited.phases["decode"] + credited.phases["reward"]
    assert credited.evaluation_seconds == plain.evaluation_seconds
    assert credited.seconds > plain.seconds
