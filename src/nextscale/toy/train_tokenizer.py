"""Train the miniature world's tokenizer: a multi-scale VQVAE that has seen every style.

Shapes: B images · L tokens of all scales · V codebook size · D codebook width
"""

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nextscale.models.vqvae import VQVAE, VQVAEConfig
from nextscale.seeding import generator_for
from nextscale.toy.world import render, sample_scenes

TOKENIZER = VQVAEConfig(
    codebook_size=256,
    codebook_width=16,
    base_channels=32,
    channel_multipliers=(1, 1, 2, 3),
    num_res_blocks=1,
    scale_sizes=(1, 2, 3, 4, 6, 8),
)


def cosine_schedule(step: int, num_steps: int, warmup: int, floor: float = 0.02) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def render_pool(num_images: int, generator: torch.Generator, styles: Tensor | None = None):
    """`num_images` scenes and their images as (N, 3, H, W) uint8, rendered in slices to bound memory."""
    scenes = sample_scenes(num_images, generator, styles=styles)
    parts = [
        render(scenes[i : i + 500]).mul(255).round().to(torch.uint8) for i in range(0, num_images, 500)
    ]
    return scenes, torch.cat(parts)


def train_tokenizer(
    seed: int, num_steps: int = 5000, batch_size: int = 16, log: Callable[[str], None] = print
) -> VQVAE:
    """A VQVAE trained on all classes and styles, a pure function of the seed and the thread count."""
    torch.manual_seed(seed)
    generator = generator_for("toy", "tokenizer", seed)
    _, pool = render_pool(8000, generator)
    model = VQVAE(TOKENIZER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-4, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: cosine_schedule(i, num_steps, 50))
    num_plain = 80  # unquantised steps: a codebook that starts from useful latents does not collapse
    used_V = torch.zeros(TOKENIZER.codebook_size)
    begin = time.time()
    for step in range(num_steps):
        chosen = torch.randint(len(pool), (batch_size,), generator=generator)
        images = pool[chosen].float() / 255
        if step == num_plain:
            _revive_codes(model, images, torch.zeros(TOKENIZER.codebook_size, dtype=torch.bool), generator)
        with torch.autocast("cpu", torch.bfloat16):
            latent = model.images_to_latent(images).float()
            vq_loss, f_hat = latent.new_zeros(()), latent
            if step >= num_plain:
                with torch.autocast("cpu", enabled=False):
                    f_hat, tokens, vq_loss = model.quantize(latent)
                used_V = 0.98 * used_V + torch.bincount(tokens.flatten(), minlength=len(used_V))
            output = model.decoder(model.post_quant_conv(f_hat)).float()
        pixel_loss, edge_loss = reconstruction_losses((output + 1) / 2, images)
        loss = pixel_loss + edge_loss + 0.25 * vq_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if num_plain < step < 0.7 * num_steps and step % 50 == 0:
            _revive_codes(model, images, used_V > 0.5, generator)
        if step % 50 == 0 or step == num_steps - 1:
            log(
                f"tokenizer {step}/{num_steps} pixel {pixel_loss:.4f} edge {edge_loss:.4f} "
                f"vq {vq_loss:.4f} codes {int((used_V > 0.5).sum())} {time.time() - begin:.0f}s"
            )
    return model.eval()


def reconstruction_losses(output: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute error of the pixels, and of their horizontal and vertical differences.

    The second keeps outlines and strokes crisp, which the first alone would blur.
    """
    error = output - images
    edges = (error[..., 1:, :] - error[..., :-1, :]).abs().mean() + error.diff(dim=-1).abs().mean()
    return error.abs().mean(), edges


@torch.no_grad()
def _revive_codes(model: VQVAE, images: Tensor, is_used_V: Tensor, generator: torch.Generator) -> None:
    """Give every unused code the place of a residual that the used ones left, drawn from all scales."""
    quantizer, latent = model.quantize, model.images_to_latent(images)
    f_hat, residuals = torch.zeros_like(latent), []
    for k, (size, part) in enumerate(zip(TOKENIZER.scale_sizes, quantizer.schedule.slices, strict=True)):
        rest = F.interpolate(latent - f_hat, (size, size), mode="area")
        residuals.append(rearrange(rest, "B D h w -> (B h w) D"))
        if is_used_V.any():
            tokens_Bl = quantizer.encode(latent)[:, part]
            f_hat = quantizer.add_scale(f_hat, tokens_Bl, k)
    candidates = torch.cat(residuals)
    dead = (~is_used_V).nonzero().flatten()
    chosen = torch.randint(len(candidates), (len(dead),), generator=generator)
    quantizer.embedding.weight[dead] = candidates[chosen]
    # A revived code's Adam moments are stale, but small: the code was unused, so its gradient was zero.


if __name__ == "__main__":
    import sys

    trained = train_tokenizer(0, int(sys.argv[2]))
    torch.save(trained.state_dict(), sys.argv[1])
