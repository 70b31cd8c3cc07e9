"""What one rollout image costs: next-scale, next-token and diffusion transformers of equal size.

    pip install diffusers
    python benchmarks/online_sampling.py --dtype bfloat16 --batch 2

Random weights, one machine, one precision, guidance on in all of them (two branches in one batch):

- VAR-d16: 310M parameters, 680 tokens in 10 forward passes with a cache;
- a next-token transformer: transformers' Llama with the sizes of LlamaGen-L (arXiv 2406.06525), 343M, 256
  tokens in 256 passes with a cache;
- a diffusion transformer: diffusers' DiT (arXiv 2212.09748) with the width, depth and heads of VAR-d16, 342M,
  256 patches, 20 and 50 passes of a stochastic sampler (DDIM with eta 1, whose steps have a likelihood).

The first two decode with the VQVAE's decoder, the third with Stable Diffusion's. An image is 256 pixels wide.
Operations are those of matrix products, convolutions and attention; a multiply-add counts as two.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from nextscale.models.var import VAR, VARConfig
from nextscale.models.vqvae import VQVAE, VQVAEConfig
from nextscale.policy import DEFAULT_SAMPLING
from nextscale.sampling import sample

GUIDANCE = DEFAULT_SAMPLING.guidance_scale
NUM_CLASSES = 1000


@dataclass(frozen=True)
class Sampler:
    """One way to draw images.

    Attributes:
        passes: forward passes of the transformer.
        draw: draws the latents of so many images.
        decode: latents to images.
    """

    name: str
    parameters: int
    passes: int
    draw: Callable[[int], Tensor]
    decode: Callable[[Tensor], Tensor]


def next_scale(device: torch.device, dtype: torch.dtype, depth: int) -> Iterator[Sampler]:
    config = VARConfig(depth=depth)
    model, tokenizer = VAR(config).to(device, dtype).eval(), VQVAE(VQVAEConfig()).to(device).eval()

    def draw(num_images: int) -> Tensor:
        conditioning = model.conditioning_from_labels(torch.arange(num_images, device=device))
        uniforms_BL = torch.rand(num_images, model.schedule.num_tokens, device=device)
        return sample(model, tokenizer, conditioning, uniforms_BL, DEFAULT_SAMPLING).latent

    name = f"next scale (VAR-d{depth})"
    yield Sampler(name, _size(model), model.schedule.num_scales, draw, _decoder(tokenizer, device, dtype))


def next_token(device: torch.device, dtype: torch.dtype, depth: int) -> Iterator[Sampler]:
    num_tokens, codebook_size, width, null = 256, 16384, 1024, 16384 + NUM_CLASSES
    config = LlamaConfig(
        vocab_size=null + 1,
        hidden_size=width,
        intermediate_size=2816,
        num_hidden_layers=depth,
        num_attention_heads=16,
        max_position_embeddings=num_tokens + 1,
    )
    model = LlamaForCausalLM(config).to(device, dtype).eval()
    tokenizer = VQVAE(VQVAEConfig()).to(device).eval()

    def draw(num_images: int) -> Tensor:
        # The first token is the class, or for the second half of the batch the empty class.
        labels_B = codebook_size + torch.arange(num_images, device=device)
        ids_B1 = torch.cat([labels_B, torch.full_like(labels_B, null)])[:, None]
        cache, drawn = DynamicCache(config=config), []
        for _ in range(num_tokens):
            output = model(input_ids=ids_B1, past_key_values=cache, use_cache=True)
            cond_BV, null_BV = output.logits[:, -1, :codebook_size].float().chunk(2)
            log_probs_BV = ((1 + GUIDANCE) * cond_BV - GUIDANCE * null_BV).log_softmax(-1)
            token_B1 = log_probs_BV.exp().multinomial(1)
            drawn.append(token_B1)
            ids_B1 = token_B1.repeat(2, 1)
        tokens_BL = torch.cat(drawn, 1)
        # The codebook is VAR's; its 4096 codes stand for the 16384, at the same cost.
        codes_BLD = tokenizer.quantize.embedding(tokens_BL % tokenizer.config.codebook_size)
        return codes_BLD.transpose(1, 2).unflatten(2, (16, 16))

    name = "next token (Llama, LlamaGen-L)"
    yield Sampler(name, _size(model), num_tokens, draw, _decoder(tokenizer, device, dtype))


def diffusion(device: torch.device, dtype: torch.dtype, depth: int) -> Iterator[Sampler]:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=64,
        num_layers=depth,
        in_channels=4,
        out_channels=8,  # noise and its variance, as DiT learns both
        sample_size=32,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    model = model.to(device, dtype).eval()
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    vae = AutoencoderKL(**blocks, **widths).to(device, dtype).eval()
    for num_steps in (20, 50):
        scheduler = DDIMScheduler()

        def draw(num_images: int, num_steps: int = num_steps, scheduler: DDIMScheduler = scheduler) -> Tensor:
            scheduler.set_timesteps(num_steps, device=device)
            labels_B = torch.arange(num_images, device=device)
            labels_2B = torch.cat([labels_B, torch.full_like(labels_B, NUM_CLASSES)])
            latent = torch.randn(num_images, 4, 32, 32, device=device)
            for timestep in scheduler.timesteps:
                both = latent.to(dtype).repeat(2, 1, 1, 1)
                noise = model(both, timestep=timestep.expand(len(both)), class_labels=labels_2B).sample
                cond, null = noise[:, :4].float().chunk(2)
                guided = (1 + GUIDANCE) * cond - GUIDANCE * null
                latent = scheduler.step(guided, timestep, latent, eta=1.0).prev_sample
            return latent

        name = f"diffusion (DiT, {num_steps} steps)"
        yield Sampler(name, _size(model), num_steps, draw, lambda latent: vae.decode(latent.to(dtype)).sample)


def _decoder(tokenizer: VQVAE, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The VQVAE's decoder, as training runs it: under autocast, its weights being float32."""

    def decode(latent: Tensor) -> Tensor:
        is_low = dtype != torch.float32
        with torch.autocast(device.type, dtype) if is_low else nullcontext():
            return tokenizer.latent_to_images(latent.float())

    return decode


def _size(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


@torch.inference_mode()
def measure(sampler: Sampler, batch: int, repeats: int, device: torch.device) -> dict[str, object]:
    """Seconds (medians) and operations of one image, transformer and decoder apart."""

    def seconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return statistics.median(times) / batch

    def operations(run: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / batch

    latent = sampler.draw(batch)  # also warms up
    flops = operations(lambda: sampler.draw(batch)), operations(lambda: sampler.decode(latent))
    times = seconds(lambda: sampler.draw(batch)), seconds(lambda: sampler.decode(latent))
    return {
        "name": sampler.name,
        "parameters": sampler.parameters,
        "passes": sampler.passes,
        "transformer_seconds": times[0],
        "decode_seconds": times[1],
        "transformer_gflop": flops[0] / 1e9,
        "decode_gflop": flops[1] / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=2, help="images drawn at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--depth", type=int, default=16, help="of VAR and DiT; the Llama's is half as much more"
    )
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)

    rows = []
    for make, depth in ((next_scale, args.depth), (next_token, args.depth * 3 // 2), (diffusion, args.depth)):
        for sampler in make(device, dtype, depth):
            rows.append(measure(sampler, args.batch, args.repeats, device))
            print(json.dumps(rows[-1]), flush=True)

    chip = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(
        f"\n{chip}, {versions}, Python {platform.python_version()}; {args.dtype}, batch {args.batch}, ",
        end="",
    )
    print(f"guidance {GUIDANCE}, median of {args.repeats}, random weights\n")
    print("| model | parameters | passes | transformer, s | decode, s | image, s | GFLOP | x next scale |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    totals = [row["transformer_seconds"] + row["decode_seconds"] for row in rows]
    for row, total in zip(rows, totals, strict=True):
        gflop = row["transformer_gflop"] + row["decode_gflop"]
        print(
            f"| {row['name']} | {row['parameters'] / 1e6:.0f}M | {row['passes']} "
            f"| {row['transformer_seconds']:.4f} | {row['decode_seconds']:.4f} | {total:.4f} | {gflop:.0f} "
            f"| {total / totals[0]:.1f} |"
        )


if __name__ == "__main__":
    main()
