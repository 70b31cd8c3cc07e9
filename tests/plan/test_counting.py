"""What is counted without data is what a real run does, measured by other means."""

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from nextscale.base.conditions import Condition
from nextscale.grpo import GRPOConfig
from nextscale.models.lora import adapter_off
from nextscale.models.var import VAR, VARConfig
from nextscale.models.vqvae import VQVAE, VQVAEConfig
from nextscale.objective import Microbatch, Objective
from nextscale.plan.counting import Count, count, without_data
from nextscale.plan.phases import Phases
from nextscale.policy import SamplingConfig
from nextscale.reference import Reference
from nextscale.runs.config import RunConfig
from nextscale.sampling import Branches, sample
from nextscale.tuning import TuningConfig, tune

SCALES = (1, 3, 8)
CONFIG = VARConfig(
    depth=3, width=64, num_heads=2, num_classes=4, codebook_size=96, codebook_width=8, scale_sizes=SCALES
)
TOKENIZER = VQVAEConfig(
    base_channels=32, channel_multipliers=(1, 1), codebook_size=96, codebook_width=8, scale_sizes=SCALES
)
GUIDED = SamplingConfig(guidance_scale=1.5)
BATCH = 8  # the scratch memory of a CPU's kernels does not grow with it


def phases(**options):
    run = {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH}
    run |= {name: options.pop(name) for name in set(options) & set(RunConfig.model_fields)}
    return Phases(CONFIG, TOKENIZER, GRPOConfig(), GUIDED, RunConfig(**run), BATCH, **options)


def test_operations_of_a_linear_layer():
    with without_data():
        layer, x = torch.nn.Linear(5, 7), torch.zeros(3, 5)
        assert count(lambda: layer(x).detach()).flops == 2 * 3 * 5 * 7
        assert count(lambda: layer(x).sum()).flops == 2 * (
            2 * 3 * 5 * 7
        )  # and those of the weight's gradient


def test_bytes_of_a_few_operations():
    with without_data():
        x = torch.zeros(1000, requires_grad=True)
        assert count(lambda: (torch.zeros(1000) + 1).sum()).forward_peak == 8000
        counted = count(lambda: (x.exp() + 1).sum())
    assert counted.saved == 4000  # the result of exp
    assert counted.forward_peak == 8004 and counted.backward_peak >= 8000


def test_extrapolation_is_linear():
    assert Count(10, 4, 7, 1).extrapolate(Count(12, 4, 10, 0), 3) == Count(16, 4, 16, -2)
    assert Count(0, 0, 5, 3).peak == 5


WHOLE = TuningConfig()
LORA = TuningConfig(use_peft=True, lora_r=4, lora_target_modules="*")


@pytest.mark.parametrize(
    ("mixed_precision", "gradient_checkpointing", "tuning"),
    [
        ("no", False, WHOLE),
        ("no", True, WHOLE),
        ("bf16", False, WHOLE),
        ("bf16", True, WHOLE),
        ("no", False, LORA),
        ("bf16", True, LORA),
        ("no", False, LORA.replace(use_dora=True, lora_target_modules="blocks.1")),
        ("bf16", False, TuningConfig(freeze=("blocks.0", "class_emb"))),
    ],
)
def test_an_update_as_measured_on_a_cpu(mixed_precision, gradient_checkpointing, tuning):
    """Saved bytes by the hooks of a real forward pass, the peak by torch's profiler, FLOPs by its counter."""
    options = {"mixed_precision": mixed_precision, "gradient_checkpointing": gradient_checkpointing}
    counted = phases(as_on_gpu=False, tuning=tuning, **options).update()

    model = VAR(CONFIG)
    tune(model, tuning)
    dtype = "bfloat16" if mixed_precision == "bf16" else "float32"
    reference = Reference.copy_of(VAR(CONFIG), dtype)
    if tuning.use_peft:
        reference = Reference(model, partial(adapter_off, model))
    model.gradient_checkpointing = gradient_checkpointing
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    objective = Objective(GRPOConfig(), GUIDED, model.schedule, reference)
    num_tokens = model.schedule.num_tokens
    tokens, inputs = torch.zeros(BATCH, num_tokens, dtype=torch.long), torch.zeros(BATCH, num_tokens - 1, 8)
    labels, advantages = torch.zeros(BATCH, dtype=torch.long), torch.zeros(BATCH)
    conditioning = model.conditioning_from_labels(labels)
    batch = Microbatch(conditioning, tokens, inputs, torch.zeros(tokens.shape), advantages)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, mixed_precision == "bf16"):
            return objective(model, batch).loss

    packed = []
    given = [tokens, inputs, labels, batch.log_probs, advantages, objective.weights_L]
    networks = [
        *model.parameters(),
        *model.buffers(),
        *reference.model.parameters(),
        *reference.model.buffers(),
    ]
    before = {each.untyped_storage().data_ptr() for each in [*given, *networks]}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in before:
            packed.append(weakref.ref(tensor))
        return tensor

    with saved_tensors_hooks(keep, lambda kept: kept):
        result = forward()
    kept = [each.untyped_storage() for ref in packed if (each := ref()) is not None]
    saved = {storage.data_ptr(): storage.nbytes() for storage in kept}
    assert counted.saved == pytest.approx(sum(saved.values()), rel=1e-3)
    del result, kept, each

    with FlopCounterMode(display=False) as flops:
        forward().backward()
    assert counted.flops == flops.get_total_flops()

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        forward().backward()
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    # The kernels of a real run take some scratch memory besides.
    assert counted.peak == pytest.approx(peak, rel=0.04)


@pytest.mark.parametrize("recomputes", [True, False])
@pytest.mark.parametrize("tuning", [WHOLE, LORA])
def test_blocks_are_alike(tuning, recomputes):
    """A transformer of five blocks, run whole, costs what the first blocks let expect."""
    deep = phases(gradient_checkpointing=recomputes, mixed_precision="bf16", tuning=tuning)
    deep = Phases(CONFIG.replace(depth=5), *[getattr(deep, name) for name in list(deep.__dict__)[1:]])

    class Whole(Phases):
        def _by_depth(self, run):
            return self._at_depth(run, 5)

    whole = Whole(**deep.__dict__)
    assert deep.rollout() == whole.rollout()
    assert deep.update() == whole.update()


def test_attention_as_on_a_gpu_keeps_no_weights():
    B, H, L, d = 2, 3, 64, 8

    def attend():
        query, key, value = (torch.zeros(B, H, L, d, requires_grad=True) * 1 for _ in range(3))
        return F.scaled_dot_product_attention(query, key, value, torch.zeros(L, L), scale=1.0).sum()

    with without_data():
        fused = count(attend)
    with without_data(as_on_gpu=False), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = count(attend)
    operands, mask, normaliser = 4 * (4 * B * H * L * d), 4 * L * L, 4 * B * H * L
    assert fused.saved == pytest.approx(operands + mask + normaliser, abs=64)
    assert plain.saved >= operands - 4 * B * H * L * d + 4 * B * H * L * L
    # Once more queries times keys in the backward pass, where the weights were not kept.
    assert fused.flops - plain.flops == 2 * B * H * L * L * d


def test_branching_counts_what_is_shared_once():
    def drawn(**options):
        grpo, run = GRPOConfig(**options), RunConfig(per_device_eval_batch_size=BATCH)
        return Phases(CONFIG, TOKENIZER, grpo, GUIDED, run, BATCH, as_on_gpu=False).rollout().flops

    model, tokenizer = VAR(CONFIG), VQVAE(TOKENIZER)
    conditioning = model.encode_conditions([Condition(0, "any")] * BATCH)
    uniforms = torch.rand(BATCH, model.schedule.num_tokens)
    for branches in (2, 4):
        branching = Branches(2, branches).of(range(BATCH))
        with FlopCounterMode(display=False) as flops:
            sample(model, tokenizer, conditioning, uniforms, GUIDED, branching)
        assert drawn(branch_scale=2, branches=branches) == flops.get_total_flops()
    # Halves of the shared scales are left out, then quarters of what was left.
    whole, two, four = drawn(), *(drawn(branch_scale=2, branches=each) for each in (2, 4))
    assert whole - two == 2 * (two - four) > 0
