"""Train the judges, with their own seeds, images and architecture, independently of all other models.

Shapes: B images · K kinds
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.base.seeding import generator_for
from nextscale.models.vqvae import VQVAE
from nextscale.toy.judges import KINDS, Judge
from nextscale.toy.optimizer import Optimizer
from nextscale.toy.train_clip import pool_with_reconstructions


def train_judge(
    kind: str,
    tokenizer: VQVAE,
    seed: int,
    num_steps: int = 800,
    batch_size: int = 96,
    pool_size: int = 10000,
    log: Callable[[str], None] = print,
) -> Judge:
    """Train the judge of "class" or "style"; the result depends on the seed and the thread count only."""
    torch.manual_seed(seed)
    generator = generator_for("toy", "judge", kind, seed)
    scenes, images = pool_with_reconstructions(tokenizer, pool_size, generator)
    targets_N = scenes.label if kind == "class" else scenes.style
    model = Judge(len(KINDS[kind]))
    optimizer = Optimizer(model, matrix_rate=0.01, other_rate=2e-3, num_steps=num_steps, warmup=50)
    begin = time.time()
    for step in range(num_steps):
        chosen = torch.randint(pool_size, (batch_size,), generator=generator)
        pixels = disturb(images[chosen].float() / 255, generator)
        loss = F.cross_entropy(model(pixels), targets_N[chosen], label_smoothing=0.02)
        optimizer.step(loss)
        if step % 100 == 0 or step == num_steps - 1:
            log(f"judge of {kind} {step}/{num_steps} loss {loss:.4f} {time.time() - begin:.0f}s")
    return model.eval()


def disturb(images: Tensor, generator: torch.Generator, *, is_shifted: bool = True) -> Tensor:
    """Random gain, offset and noise per image, and a shift, so that no judge relies on exact pixels."""
    num = len(images)
    gain, offset, noise = (
        torch.rand(num, 1, 1, 1, generator=generator) * width + low
        for low, width in ((0.85, 0.3), (-0.06, 0.12), (0.0, 0.04))
    )
    images = images * gain + offset + noise * torch.randn(images.shape, generator=generator)
    if not is_shifted:
        return images.clamp(0, 1)
    shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return images.roll(shift, (2, 3)).clamp(0, 1)
