"""Train the judges of what prompts name, on true photos, paintings and mosaics of all combinations and their
reconstructions, with their own seeds, independently of all other models.

Shapes: B images · N pictures · K values of an attribute
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.base.seeding import generator_for
from nextscale.models.vqvae import VQVAE
from nextscale.toy.judges import Judge
from nextscale.toy.optimizer import Optimizer
from nextscale.toy.prompts import ATTRIBUTES, Combination, combinations_of, pictured
from nextscale.toy.train_judges import disturb
from nextscale.toy.world import GROUND_STYLES, render


def captioned_pictures(
    tokenizer: VQVAE, num_images: int, generator: torch.Generator, styles: tuple[str, ...] = GROUND_STYLES
) -> tuple[list[Combination], Tensor]:
    """What pictures show, and the pictures, (N, 3, H, W) uint8, every second one as reconstructed."""
    shown: list[Combination] = []
    parts = []
    for style in styles:
        scenes = pictured(num_images // len(styles), generator, held_out=None, style=style)
        shown += combinations_of(scenes)
        for i in range(0, len(scenes), 250):
            images = render(scenes[i : i + 250])
            images[::2] = tokenizer.decode(tokenizer.encode(images[::2]))
            parts.append(images.mul(255).round().to(torch.uint8))
    return shown, torch.cat(parts)


def train_attribute_judge(
    attribute: str,
    tokenizer: VQVAE,
    seed: int,
    num_steps: int = 800,
    batch_size: int = 96,
    pool_size: int = 8000,
    log: Callable[[str], None] = print,
) -> Judge:
    """Train the judge of "colour", "ground" or "place"; the result depends on the seed and the thread count
    only."""
    torch.manual_seed(seed)
    generator = generator_for("toy", "judge", attribute, seed)
    shown, images = captioned_pictures(tokenizer, pool_size, generator)
    index = list(ATTRIBUTES).index(attribute)
    targets_N = torch.tensor([each[index] for each in shown])
    model = Judge(len(ATTRIBUTES[attribute]))
    optimizer = Optimizer(model, matrix_rate=0.01, other_rate=2e-3, num_steps=num_steps, warmup=50)
    begin = time.time()
    for step in range(num_steps):
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        # Where it is counts for the place, and how light it is does not.
        pixels = disturb(images[chosen].float() / 255, generator, is_shifted=attribute != "place")
        loss = F.cross_entropy(model(pixels), targets_N[chosen], label_smoothing=0.02)
        optimizer.step(loss)
        if step % 100 == 0 or step == num_steps - 1:
            log(f"judge of {attribute} {step}/{num_steps} loss {loss:.4f} {time.time() - begin:.0f}s")
    return model.eval()
