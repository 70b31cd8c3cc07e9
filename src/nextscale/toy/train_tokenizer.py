"""Train the miniature world's tokenizer: a multi-scale VQVAE that sees every style.

Shapes: B images · L tokens of all scales · V codebook size · D codebook width · M vectors
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nextscale.base.seeding import generator_for
from nextscale.models.vqvae import VQVAE, VQVAEConfig
from nextscale.toy.optimizer import Optimizer, autocast
from nextscale.toy.world import CONTRAST, Scenes, render, sample_scenes

TOKENIZER = VQVAEConfig(
    codebook_size=256,
    codebook_width=16,
    base_channels=32,
    channel_multipliers=(1, 1, 2, 3),
    num_res_blocks=1,
    scale_sizes=(1, 2, 3, 4, 6, 8),
)
PLAIN_SHARE = 0.15  # of the steps, at the start, without quantization: a codebook needs meaningful latents


def render_pool(
    num_images: int,
    generator: torch.Generator,
    styles: Tensor | None = None,
    contrast: tuple[float, float] = CONTRAST,
) -> tuple[Scenes, Tensor]:
    """Scenes and their images as (N, 3, H, W) uint8, rendered in slices to bound memory."""
    scenes = sample_scenes(num_images, generator, styles=styles, contrast=contrast)
    starts = range(0, num_images, 500)
    parts = [render(scenes[i : i + 500]).mul(255).round().to(torch.uint8) for i in starts]
    return scenes, torch.cat(parts)


def train_tokenizer(
    seed: int,
    num_steps: int = 3600,
    batch_size: int = 8,
    pool_size: int = 10000,
    log: Callable[[str], None] = print,
) -> VQVAE:
    """Train a VQVAE on all classes and styles; the result depends on the seed and the thread count only."""
    torch.manual_seed(seed)
    generator = generator_for("toy", "tokenizer", seed)
    _, pool = render_pool(pool_size, generator)
    model = VQVAE(TOKENIZER)
    num_plain = int(PLAIN_SHARE * num_steps)
    optimizer = Optimizer(model, matrix_rate=0.02, other_rate=2e-3, num_steps=num_steps, warmup=20)
    used_V = torch.zeros(TOKENIZER.codebook_size)
    begin = time.time()
    for step in range(num_steps):
        if step == num_plain:
            chosen = torch.randint(len(pool), (min(256, len(pool)),), generator=generator)
            start_codebook(model, pool[chosen].float() / 255, generator)
        chosen = torch.randint(len(pool), (batch_size,), generator=generator)
        images = pool[chosen].float() / 255
        with autocast():
            latent = model.images_to_latent(images).float()
            vq_loss, quantized = latent.new_zeros(()), latent
            if step >= num_plain:
                with torch.autocast("cpu", enabled=False):
                    quantized, tokens, vq_loss = model.quantize(latent)
                used_V = 0.98 * used_V + torch.bincount(tokens.flatten(), minlength=len(used_V))
            output = (model.decoder(model.post_quant_conv(quantized)).float() + 1) / 2
        # The edge loss ramps up: at first, before the colours are right, it would only punish outlines.
        edge_weight = min(1.0, step / max(1, num_plain))
        pixel_loss, edge_loss = reconstruction_losses(output, images)
        optimizer.step(pixel_loss + edge_weight * edge_loss + 0.25 * vq_loss)
        if num_plain + 50 < step < 0.7 * num_steps and step % 50 == 0:
            revive_codes(model, latent.detach(), used_V < 0.5, generator)
        if step % 50 == 0 or step == num_steps - 1:
            log(
                f"tokenizer {step}/{num_steps} pixel {pixel_loss:.4f} edge {edge_loss:.4f} "
                f"vq {vq_loss:.4f} codes {int((used_V > 0.5).sum())} {time.time() - begin:.0f}s"
            )
    return model.eval()


def reconstruction_losses(output: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """The pixel loss, with a term for hue, and the edge loss: the error of differences between neighbours.

    The edge loss keeps outlines and strokes crisp, which the pixel loss alone would blur. Hue has a separate
    term, on 4x4 means: most of an image's variance is lightness, so hue would be learned last.
    """
    error = output - images
    hue_error = F.avg_pool2d(error - error.mean(1, keepdim=True), 4)
    pixel = error.abs().mean() + 5 * error.square().mean()
    pixel = pixel + 3 * hue_error.abs().mean() + 30 * hue_error.square().mean()
    return pixel, error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


@torch.no_grad()
def start_codebook(model: VQVAE, images: Tensor, generator: torch.Generator) -> None:
    """Initialize the codebook scale by scale, by k-means on the residuals that the coarser scales leave."""
    quantizer = model.quantize
    latent, lengths = model.images_to_latent(images), quantizer.schedule.lengths
    shares = torch.tensor([length**0.5 for length in lengths])
    counts = (shares / shares.sum() * TOKENIZER.codebook_size).long()
    counts[-1] += TOKENIZER.codebook_size - counts.sum()
    quantizer.embedding.weight.fill_(1e4)  # never nearest until filled
    filled, f_hat = 0, torch.zeros_like(latent)
    for k, count in enumerate(counts.tolist()):
        vectors_MD = residual_vectors(latent - f_hat, k)
        quantizer.embedding.weight[filled : filled + count] = k_means(vectors_MD, count, generator)
        filled += count
        part = quantizer.schedule.slices[k]
        f_hat = quantizer.add_scale(f_hat, quantizer.encode(latent)[:, part], k)


def residual_vectors(rest_BDhw: Tensor, k: int) -> Tensor:
    """(M, D) vectors of the residual latent at the resolution of scale k."""
    size = TOKENIZER.scale_sizes[k]
    return rearrange(F.interpolate(rest_BDhw, (size, size), mode="area"), "B D h w -> (B h w) D")


def k_means(vectors_MD: Tensor, num_means: int, generator: torch.Generator, num_rounds: int = 10) -> Tensor:
    """(num_means, D) by Lloyd's algorithm, starting from random vectors; an empty cluster keeps its mean."""
    means = vectors_MD[torch.randperm(len(vectors_MD), generator=generator)[:num_means]].clone()
    for _ in range(num_rounds):
        nearest_M = torch.cdist(vectors_MD, means).argmin(1)
        sums = torch.zeros_like(means).index_add_(0, nearest_M, vectors_MD)
        sizes = torch.bincount(nearest_M, minlength=num_means)[:, None]
        means = torch.where(sizes > 0, sums / sizes.clamp_min(1), means)
    return means


@torch.no_grad()
def revive_codes(model: VQVAE, latent: Tensor, is_dead_V: Tensor, generator: torch.Generator) -> None:
    """Move every unused code to a random residual, drawn equally from all scales.

    Its Adam moments need no reset: an unused code has received no gradient.
    """
    quantizer, dead = model.quantize, is_dead_V.nonzero().flatten()
    tokens_BL, f_hat, candidates = quantizer.encode(latent), torch.zeros_like(latent), []
    for k, part in enumerate(quantizer.schedule.slices):
        vectors_MD = residual_vectors(latent - f_hat, k)
        candidates.append(vectors_MD[torch.randint(len(vectors_MD), (64,), generator=generator)])
        f_hat = quantizer.add_scale(f_hat, tokens_BL[:, part], k)
    pool_MD = torch.cat(candidates)
    quantizer.embedding.weight[dead] = pool_MD[torch.randint(len(pool_MD), (len(dead),), generator=generator)]
