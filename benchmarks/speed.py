"""Time one training step by its parts, on random weights, and compare with the public VAR code.

    python benchmarks/speed.py d16 --dtype float32 bf16
    python benchmarks/speed.py d16 --dtype bf16 --peer path/to/VAR --repeats 5 --only-peer
    python benchmarks/speed.py d30 --device cuda --dtype bf16 --fill --peer path/to/VAR --output d30.json

Every time is the median of `--repeats`, after one run that does not count. "Bound" is the time that the
matrix products of a part would take at the rate of one large one, measured on the same machine before and
after; a backward pass counts as two forward passes, whatever it computes again. Normalisations, activations
and the drawing itself are not in it. `--fill` doubles the batch until memory is full. With `--peer`, a
checkout of the public VAR code runs in turn with ours, A B A B, in one process, with the same weights,
threads, precision, guidance and filters; the ratio is its median time over ours. On a CPU that others use
as well, `--cpu-time` with OMP_NUM_THREADS=1 counts the seconds of the process alone.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from nextscale.base.conditions import Condition
from nextscale.models.var import VAR, VARConfig
from nextscale.models.vqvae import VQVAE, VQVAEConfig
from nextscale.optimizer import OptimizerConfig, make_optimizer
from nextscale.pipeline import VARPipeline
from nextscale.plan.counting import count, without_data
from nextscale.policy import SamplingConfig
from nextscale.rescoring import log_probs, teacher_forced_logits
from nextscale.rewards.networks.backbones import backbone_config
from nextscale.rewards.networks.preprocessing import clip_preprocessing
from nextscale.runs.environment import environment
from nextscale.sampling import sample

SIZES = {"d16": VARConfig(), "d30": VARConfig(depth=30, width=1920, num_heads=30)}
CLIPS = {"d16": "openai/clip-vit-large-patch14", "d30": "openai/clip-vit-large-patch14", "toy": "toy"}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
# On one H100 in bf16: images/s of a rollout, update's share of the matrix product's rate, the public code's
# time over ours, and share of a step that is neither forward, backward, decode nor reward.
GPU_BARS = {"d16": (350.0, 0.40, 2.0, 0.03), "d30": (100.0, 0.45, 2.0, 0.03)}
CLOCK: list[Callable[[], float]] = [time.perf_counter]  # or time.process_time, with --cpu-time
ROW = "| {:22} | {:>9} | {:>9} | {:>8} | {:>8} | {:>7} | {:>8} |"


class Bench:
    """One model, its batch, and the parts of a step."""

    def __init__(
        self,
        name: str,
        batch: int,
        dtype: str,
        device: torch.device,
        sampling: SamplingConfig,
        update_batch: int | None = None,
        compiled: bool = False,
    ) -> None:
        self.name, self.batch, self.dtype, self.device, self.sampling = name, batch, dtype, device, sampling
        self.update_batch = min(update_batch or batch, batch)
        torch.manual_seed(0)
        if name == "toy":
            self.pipe = VARPipeline.from_pretrained("toy", device=device)
        else:
            with device:
                self.pipe = VARPipeline(VAR(SIZES[name]), VQVAE(VQVAEConfig()))
        self.pipe.compile(compiled)
        self.clip_config = backbone_config(CLIPS[name])
        assert self.clip_config is not None
        vision: Any = self.clip_config.vision_config  # transformers types its sizes loosely
        self.prepare = clip_preprocessing(vision.image_size)
        self.adamw, _ = make_optimizer(self.pipe.transformer, OptimizerConfig(learning_rate=1e-6), 1)
        transformer = self.pipe.transformer
        conditions = [Condition(i % transformer.num_classes, "any") for i in range(batch)]
        self.conditioning = transformer.encode_conditions(conditions)
        self.uniforms = torch.rand(batch, transformer.schedule.num_tokens, device=device)
        self.samples = self.sampled()
        self.images = self.decoded()

    @cached_property
    def tower(self) -> nn.Module:
        """The reward's image tower."""
        with self.device:
            return CLIPModel(self.clip_config).vision_model.eval().requires_grad_(False)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16")

    # ---- the parts of a step

    def sampled(self) -> Any:
        with self.autocast():
            return sample(
                self.pipe.transformer, self.pipe.tokenizer, self.conditioning, self.uniforms, self.sampling
            )

    @torch.no_grad()
    def decoded(self) -> Tensor:
        with self.autocast():
            return self.pipe.tokenizer.latent_to_images(self.samples.latent)

    @torch.no_grad()
    def rewarded(self) -> Tensor:
        with self.autocast():
            return self.tower(pixel_values=self.prepare(self.images)).pooler_output

    def updated(self) -> None:
        """Forward, loss and backward; the gradients of an update before are freed first, as in training."""
        self.adamw.zero_grad(set_to_none=True)
        for at in range(0, self.batch, self.update_batch):
            part = slice(at, at + self.update_batch)
            of_part = self.conditioning.select(part), self.samples.tokens[part], self.sampling
            with self.autocast():
                new_BL = log_probs(self.pipe, *of_part)
            (-(new_BL - self.samples.log_probs[part]).exp().mean()).backward()

    def stepped(self) -> None:
        self.adamw.step()

    def whole(self) -> None:
        self.samples = self.sampled()
        self.images = self.decoded()
        self.rewarded()
        self.updated()
        self.stepped()

    def parts(self) -> dict[str, Callable[[], object]]:
        return {
            "transformer, sampling": self.sampled,
            "decode": self.decoded,
            "reward": self.rewarded,
            "forward, backward": self.updated,
            "AdamW": self.stepped,
            "whole step": self.whole,
        }

    def flops(self) -> dict[str, float]:
        """Operations of each part, counted on tensors without data, as a GPU would carry them out."""
        config, tokenizer_config, sampling = (
            self.pipe.transformer.config,
            self.pipe.tokenizer.config,
            self.sampling,
        )
        size, batch = tokenizer_config.image_size, self.batch
        with without_data(), torch.no_grad():
            model, tokenizer = VAR(config), VQVAE(tokenizer_config)
            tower = CLIPModel(self.clip_config).vision_model
            schedule = model.schedule
            conditioning = model.encode_conditions([Condition(0, "any")] * batch)
            uniforms = torch.zeros(batch, schedule.num_tokens)
            inputs = torch.zeros(batch, schedule.num_tokens - 1, config.codebook_width)
            latent, images = tokenizer.empty_latent(batch), torch.zeros(batch, 3, size, size)
            flops = {
                "transformer, sampling": count(
                    lambda: sample(model, tokenizer, conditioning, uniforms, sampling)
                ),
                "decode": count(lambda: tokenizer.latent_to_images(latent)),
                "reward": count(lambda: tower(pixel_values=self.prepare(images))),
                "forward, backward": count(
                    lambda: teacher_forced_logits(model, schedule, conditioning, inputs, sampling)
                ),
            }
        counted = {name: each.flops for name, each in flops.items()}
        counted["forward, backward"] *= 3
        return counted | {"AdamW": 0.0, "whole step": sum(counted.values())}


def matmul_rate(dtype: str, device: torch.device) -> float:
    """FLOP/s of one large matrix product, the best of five."""
    size = 8192 if device.type == "cuda" else 2048
    left = torch.randn(size, size, device=device, dtype=DTYPES[dtype])
    seconds = [timed(lambda: left @ left, device) for _ in range(6)]
    return 2 * size**3 / min(seconds)


def timed(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    begin = CLOCK[0]()
    run()
    synchronize(device)
    return CLOCK[0]() - begin


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(bench: Bench, repeats: int) -> list[dict[str, Any]]:
    """A record for each part: seconds, rate, share of the bound and peak memory."""
    device, flops = bench.device, bench.flops()
    before = matmul_rate(bench.dtype, device)
    records = []
    for name, run in bench.parts().items():
        run()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = median(timed(run, device) for _ in range(repeats))
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        records.append({"part": name, "seconds": seconds, "flops": flops[name], "peak_bytes": peak})
    rates = before, matmul_rate(bench.dtype, device)
    for record in records:
        record["images_per_second"] = bench.batch / record["seconds"]
        record["share_of_bound"] = record["flops"] / record["seconds"] / (sum(rates) / 2)
        record |= {"dtype": bench.dtype, "batch": bench.batch, "update_batch": bench.update_batch}
        record["matmul_rates"] = rates
    return records


def show(bench: Bench, records: list[dict[str, Any]]) -> None:
    rates = " and ".join(f"{rate / 1e9:.0f}" for rate in records[0]["matmul_rates"])
    print(f"\n{bench.name}, {bench.dtype}, batch {bench.batch}; matrix products {rates} GFLOP/s\n")
    print(ROW.format("part", "s", "s/image", "images/s", "GFLOP/s", "bound", "peak GB"))
    print(ROW.format(*7 * ["---"]))
    for each in records:
        seconds, peak = each["seconds"], each["peak_bytes"]
        cells = [each["part"], f"{seconds:.3f}", f"{seconds / bench.batch:.4f}"]
        cells += [f"{each['images_per_second']:.2f}", f"{each['flops'] / seconds / 1e9:.0f}"]
        cells += [f"{each['share_of_bound']:.0%}", "-" if peak is None else f"{peak / 1e9:.1f}"]
        print(ROW.format(*cells))


# ---- the public code


def load_peer(path: Path, bench: Bench) -> tuple[Any, Any]:
    """(VQVAE, VAR) of a checkout of the public code, of the same sizes, in evaluation mode."""
    with undamaged_layers(), redirect_stdout(StringIO()):
        sys.path.insert(0, str(path))
        from models import build_vae_var  # pyright: ignore[reportMissingImports]  (the checkout's)

        vae, var = build_vae_var(bench.device, depth=bench.pipe.transformer.config.depth)
        sys.path.pop(0)
    vae.load_state_dict(bench.pipe.tokenizer.state_dict())  # what it builds holds whatever lay in memory
    var.load_state_dict(bench.pipe.transformer.state_dict())
    var.cond_drop_rate = 0.0  # it would drop labels in evaluation mode as well
    return vae.eval(), var.eval()


@contextmanager
def undamaged_layers() -> Iterator[None]:
    """Give torch's layers back the initialisation that building the public code takes away for good."""
    layers = (nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Conv1d, nn.Conv2d)
    layers += (nn.ConvTranspose1d, nn.ConvTranspose2d)
    kept = {layer: layer.reset_parameters for layer in layers}
    try:
        yield
    finally:
        for layer, reset in kept.items():
            layer.reset_parameters = reset


def compare(path: Path, bench: Bench, repeats: int) -> list[dict[str, Any]]:
    """Times of both codes in turn, for sampling with decode, decode, and a teacher-forced pass and back.

    Teacher forcing is unguided here, with the cross entropy of all tokens: the public code's own training.
    """
    vae, var = load_peer(path, bench)
    ours, config, device = bench.pipe, bench.sampling, bench.device
    learned = bench.conditioning.select(slice(bench.update_batch))
    tokens, inputs = (each[: bench.update_batch] for each in (bench.samples.tokens, bench.samples.inputs))
    latent = bench.samples.latent
    top_p = config.top_p if config.top_p < 1 else 0.0

    def draw() -> None:
        with bench.autocast(), torch.no_grad():
            made = sample(ours.transformer, ours.tokenizer, bench.conditioning, bench.uniforms, config)
            ours.tokenizer.latent_to_images(made.latent)

    def their_draw() -> None:
        with bench.autocast():
            var.autoregressive_infer_cfg(
                bench.batch,
                bench.conditioning["labels"],
                g_seed=0,
                cfg=config.guidance_scale,
                top_k=config.top_k,
                top_p=top_p,
            )

    def decode() -> None:
        with bench.autocast(), torch.no_grad():
            ours.tokenizer.latent_to_images(latent)

    def their_decode() -> None:
        with bench.autocast(), torch.no_grad():
            vae.fhat_to_img(latent).add_(1).mul_(0.5)

    def backward(model: nn.Module, logits: Callable[[], Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        with bench.autocast():
            loss = F.cross_entropy(logits().flatten(0, 1), tokens.flatten())
        loss.backward()

    pairs = {
        "sampling with decode": (their_draw, draw),
        "decode": (their_decode, decode),
        "forward, backward": (
            lambda: backward(var, lambda: var(learned["labels"], inputs)),
            lambda: backward(ours.transformer, lambda: ours.transformer(learned, inputs)),
        ),
    }
    records = []
    print(f"\npublic code and ours, {bench.name}, {bench.dtype}, batch {bench.batch}, seconds an image\n")
    print("| work | public | ours | ours is |\n| --- | --- | --- | --- |")
    for name, (theirs_run, ours_run) in pairs.items():
        theirs_run(), ours_run()
        times = [(timed(theirs_run, device), timed(ours_run, device)) for _ in range(repeats)]
        num_images = bench.update_batch if name == "forward, backward" else bench.batch
        theirs, own = (median(each) / num_images for each in zip(*times, strict=True))
        print(f"| {name} | {theirs:.4f} | {own:.4f} | {theirs / own:.2f}x |", flush=True)
        records.append(
            {"work": name, "dtype": bench.dtype, "public": theirs, "ours": own, "ratio": theirs / own}
        )
    return records


def show_bars(name: str, records: list[dict[str, Any]], compared: list[dict[str, Any]]) -> None:
    """The bars for one H100 in bf16, and what was reached."""
    images_bar, update_bar, ratio_bar, overhead_bar = GPU_BARS[name]
    by_part = {each["part"]: each for each in records}
    rollout = by_part["transformer, sampling"]["seconds"] + by_part["decode"]["seconds"]
    known = rollout + by_part["reward"]["seconds"] + by_part["forward, backward"]["seconds"]
    whole = by_part["whole step"]["seconds"]
    print("\n| bar, one H100, bf16 | asked | reached |\n| --- | --- | --- |")
    print(f"| rollout, images/s | >= {images_bar:.0f} | {records[0]['batch'] / rollout:.1f} |")
    share = by_part["forward, backward"]["share_of_bound"]
    print(f"| update, share of the bound | >= {update_bar:.0%} | {share:.0%} |")
    print(f"| the rest of a step | <= {overhead_bar:.0%} | {1 - known / whole:.1%} |")
    for each in compared:
        print(f"| {each['work']}, times the public code | >= {ratio_bar} | {each['ratio']:.2f} |")


def fill(make: Callable[[int], Bench]) -> int:
    """The largest power of two as a batch whose whole step fits into the GPU's memory."""
    batch = 1
    while True:
        try:
            make(2 * batch).whole()
        except torch.cuda.OutOfMemoryError:
            fits = False
        else:
            fits = True
        gc.collect()  # outside of the handler, whose traceback would hold the tensors
        torch.cuda.empty_cache()
        if not fits:
            return batch
        batch *= 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=list(CLIPS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=2, help="images at once")
    parser.add_argument("--update-batch", type=int, help="images per backward pass; by default all")
    parser.add_argument("--fill", action="store_true", help="on a GPU: as many images as fit")
    parser.add_argument("--compile", action="store_true", help="ours with run.torch_compile")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--peer", type=Path, help="checkout of the public VAR code")
    parser.add_argument("--only-peer", action="store_true", help="compare, and leave the step's parts out")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds, not those of the clock")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = parser.parse_args()
    device = torch.device(given.device)
    if given.fill and device.type != "cuda":
        parser.error("--fill needs a GPU: give --batch")
    if given.only_peer and not given.peer:
        parser.error("--only-peer needs --peer")
    if given.peer and given.model == "toy":
        parser.error("the public code has no model of the miniature's sizes: leave --peer out")
    if given.cpu_time and device.type == "cuda":
        parser.error("--cpu-time measures nothing of a GPU: leave it out")
    CLOCK[0] = time.process_time if given.cpu_time else time.perf_counter
    sampling = SamplingConfig(guidance_scale=given.guidance_scale, top_k=given.top_k, top_p=given.top_p)
    result: dict[str, Any] = environment(device, sys.argv)
    result |= {
        "model": given.model,
        "compiled": given.compile,
        "clock": "cpu" if given.cpu_time else "wall",
        "parts": [],
        "peer": [],
    }

    for dtype in given.dtype:
        if device.type == "cuda":  # as a run does
            torch.set_float32_matmul_precision("high" if dtype == "bf16" else "highest")

        def make(batch: int, dtype: str = dtype) -> Bench:
            return Bench(given.model, batch, dtype, device, sampling, given.update_batch, given.compile)

        bench = make(fill(make) if given.fill else given.batch)
        records = [] if given.only_peer else measure(bench, given.repeats)
        if records:
            show(bench, records)
        compared = compare(given.peer, bench, given.repeats) if given.peer else []
        if device.type == "cuda" and dtype == "bf16" and records and given.model in GPU_BARS:
            show_bars(given.model, records, compared)
        result["parts"] += records
        result["peer"] += compared
        del bench
        gc.collect()
    if given.output:
        given.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
