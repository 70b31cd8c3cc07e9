"""What only a GPU can show: its kernels, its memory, its training. The rest of the suite runs on its CPU."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nextscale import GRPOConfig, GRPOTrainer, RunConfig, TuningConfig, VARPipeline, log_probs
from nextscale.base.conditions import Condition
from nextscale.cli.main import main
from nextscale.models.attention import AttentionByScale
from nextscale.models.var import VAR, VARConfig
from nextscale.models.vqvae import VQVAE, VQVAEConfig
from nextscale.plan.planning import make_plan
from nextscale.policy import SamplingConfig
from nextscale.runs.config import MAX_DRIFT
from nextscale.sampling import sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MakePipeline = Callable[..., VARPipeline]
GUIDED = SamplingConfig(guidance_scale=1.5, top_k=40, top_p=0.95)


def brightness(images: Tensor, conditions: Sequence[Condition]) -> Tensor:
    return images.mean((1, 2, 3))


def test_the_same_numbers_draw_the_same_images_as_on_a_cpu(
    make_pipeline: MakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    made = []
    for device in ("cpu", "cuda"):
        pipe = make_pipeline().to(device)
        conditioning = pipe.transformer.encode_conditions([Condition(i % 4, "any") for i in range(32)])
        uniforms_BL = torch.rand(32, 30, generator=torch.Generator().manual_seed(0)).to(device)
        samples = sample(pipe.transformer, pipe.tokenizer, conditioning, uniforms_BL, GUIDED)
        images = pipe.tokenizer.latent_to_images(samples.latent)
        made.append([each.cpu() for each in (samples.tokens, samples.log_probs, images)])
    (tokens, drawn, images), (gpu_tokens, gpu_drawn, gpu_images) = made
    same = (tokens == gpu_tokens).all(1)  # a number within rounding of a threshold may draw the next code
    assert same.sum() >= 31
    assert torch.allclose(drawn[same], gpu_drawn[same], atol=1e-4)
    assert torch.allclose(images[same], gpu_images[same], atol=1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_sampler_and_trainer_run_the_same_policy(precision: str) -> None:
    """At VAR's own scales and head width, in the shapes that its kernels are chosen by."""
    torch.manual_seed(0)
    pipe = VARPipeline(VAR(VARConfig(depth=8, width=512, num_heads=8)), VQVAE(VQVAEConfig())).to("cuda")
    with torch.no_grad():  # as trained ones, gates let every block through
        for block in pipe.transformer.blocks:
            block.ada_lin[-1].weight.normal_(std=0.02)  # type: ignore[union-attr, index]
        pipe.transformer.class_emb.weight.normal_()  # type: ignore[union-attr]
        pipe.transformer.head.weight.normal_(std=0.1)
    conditioning = pipe.transformer.encode_conditions([Condition(i, "any") for i in range(8)])
    uniforms_BL = torch.rand(8, 680, device="cuda")
    sampling = SamplingConfig(guidance_scale=1.5)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"), torch.no_grad():
        samples = sample(pipe.transformer, pipe.tokenizer, conditioning, uniforms_BL, sampling)
        scored_BL = log_probs(pipe, conditioning, samples.tokens, sampling)
    drift = (scored_BL - samples.log_probs).abs().mean().item()
    print(f"mean |difference of log-probs|, {precision}: {drift:.1e}; of them {samples.log_probs.std():.2f}")
    assert drift <= (1e-4 if precision == "no" else 2e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_and_its_gradient_equal_the_dense_formula(dtype: torch.dtype, tolerance: float) -> None:
    lengths = (1, 4, 9, 16)
    scale_L = torch.arange(4, device="cuda").repeat_interleave(torch.tensor(lengths, device="cuda"))
    hidden_LL = scale_L[:, None] < scale_L
    torch.manual_seed(0)
    inputs = [torch.randn(3, 30, 2, 64, device="cuda", dtype=dtype) for _ in range(4)]
    ours, dense = ([each.clone().requires_grad_() for each in inputs[:3]] for _ in range(2))
    out = AttentionByScale.apply(*ours, lengths)
    q, k, v = (each.double() for each in dense)
    logits = torch.einsum("blhd,bLhd->bhlL", q, k).masked_fill(hidden_LL, float("-inf"))
    expected = torch.einsum("bhlL,bLhd->blhd", logits.softmax(-1), v)
    got, wanted = [out], [expected]
    got += torch.autograd.grad(out, ours, inputs[3])
    wanted += torch.autograd.grad(expected, dense, inputs[3].double())
    for mine, theirs in zip(got, wanted, strict=True):
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--run.mixed_precision", "bf16"],
        ["--tuning.use_peft", "true", "--tuning.ema_decay", "0.9"],
        ["--grpo.credit", "gradient"],
        ["--grpo.offload_reference", "true", "--run.gradient_checkpointing", "true"],
        ["--run.gradient_checkpointing", "true", "--run.activation_offloading", "true"],
    ],
    ids=["float32", "bf16", "lora", "gradient", "offloaded reference", "offloaded activations"],
)
def test_the_miniature_trains_and_resumes_to_the_bit(tmp_path: Path, options: list[str]) -> None:
    """Straight through, and stopped at a checkpoint: the same weights in the end."""
    quiet = ["--grpo.num_groups", "2", "--run.eval_steps", "0", "--run.report_to", "none"]
    quiet += ["--run.save_steps", "2", "--run.disable_tqdm", "true", *options]

    def train(name: str, *more: str) -> dict[str, Tensor]:
        command = ["train", "toy-painting", "--run.output_dir", str(tmp_path / name), *quiet, *more]
        assert main(command) == 0
        (weights,) = (tmp_path / name / "final").glob("*transformer*.safetensors")
        return load_file(weights)

    straight = train("straight", "--run.max_steps", "3")
    (checkpoint,) = (tmp_path / "straight" / "checkpoints").glob("*2")
    parts = train("parts", "--run.max_steps", "3", "--run.resume", str(checkpoint))
    assert straight.keys() == parts.keys()
    largest = max((value - parts[key]).abs().max().item() for key, value in straight.items())
    assert largest == 0
    first = json.loads((tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()[0])
    drift = first["sampling/sampling_logp_difference/mean"]
    assert drift <= MAX_DRIFT["bf16" if "bf16" in options else "no"]


@pytest.mark.parametrize(
    ("depth", "precision", "recomputes", "use_peft"),
    [
        (8, "no", False, False),
        (16, "bf16", False, False),
        (16, "bf16", True, False),
        (16, "bf16", False, True),
    ],
    ids=["d8", "d16", "recomputed", "lora"],
)
def test_the_plan_counts_what_a_step_takes(
    tmp_path: Path, depth: int, precision: Any, recomputes: bool, use_peft: bool
) -> None:
    """Within 10 %; benchmarks/NOTES.md has the figures of an H200."""
    config = VARConfig(depth=depth, width=64 * depth, num_heads=depth)
    run = RunConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        eval_steps=0,
        save_steps=0,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        mixed_precision=precision,
        gradient_checkpointing=recomputes,
        report_to="none",
        disable_tqdm=True,
    )
    grpo = GRPOConfig(num_groups=2, num_generations=8, class_labels=(0, 1))
    tuning, sampling = TuningConfig(use_peft=use_peft), SamplingConfig(guidance_scale=1.5)
    plan = make_plan(config, VQVAEConfig(), {}, grpo, sampling, run, "h100-80gb", tuning=tuning)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pipe = VARPipeline(VAR(config), VQVAE(VQVAEConfig()))
    trainer = GRPOTrainer(pipe, brightness, grpo, sampling=sampling, tuning=tuning, run=run)
    for step in (1, 2):
        trainer.step(step)
    measured = torch.cuda.max_memory_allocated() - before
    print(f"d{depth} {precision}: plan {plan.peak / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB")
    assert plan.peak == pytest.approx(measured, rel=0.1)


def test_compiled_layers_compute_the_same(tmp_path: Path) -> None:
    """One guided step of the miniature in bf16, its gradient and its drift, compiled and not."""
    found = []
    for compiled in (False, True):
        pipe = VARPipeline.from_pretrained("toy")
        run = RunConfig(
            output_dir=str(tmp_path / str(compiled)),
            eval_steps=0,
            save_steps=0,
            mixed_precision="bf16",
            torch_compile=compiled,
            report_to="none",
            disable_tqdm=True,
        )
        grpo = GRPOConfig(num_groups=4, num_generations=8)
        trainer = GRPOTrainer(pipe, brightness, grpo, sampling=SamplingConfig(guidance_scale=1.5), run=run)
        found.append(trainer.step(1))
    plain, fused = found
    assert fused["sampling/sampling_logp_difference/mean"] <= MAX_DRIFT["bf16"]
    assert fused["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.1)
    assert fused["entropy"] == pytest.approx(plain["entropy"], rel=0.01)
