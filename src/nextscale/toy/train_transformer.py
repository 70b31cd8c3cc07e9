"""Train the miniature world's VAR on photos only, without a single image of another style.

Shapes: B images · L tokens of all scales · V codebook size
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.base.seeding import generator_for
from nextscale.losses import token_weights
from nextscale.models.var import VAR, VARConfig
from nextscale.models.vqvae import VQVAE
from nextscale.toy.optimizer import Optimizer, autocast
from nextscale.toy.train_tokenizer import TOKENIZER, render_pool
from nextscale.toy.world import CLASSES, STYLES

TRANSFORMER = VARConfig(
    depth=6,
    width=160,
    num_heads=5,
    num_classes=len(CLASSES),
    codebook_size=TOKENIZER.codebook_size,
    codebook_width=TOKENIZER.codebook_width,
    scale_sizes=TOKENIZER.scale_sizes,
)
NULL_RATE = 0.1  # fraction of labels replaced by the null class, for classifier-free guidance


def train_transformer(
    tokenizer: VQVAE,
    seed: int,
    num_steps: int = 2200,
    batch_size: int = 32,
    pool_size: int = 12000,
    log: Callable[[str], None] = print,
) -> VAR:
    """Train a VAR on the tokens of photos; the result depends on the seed and the thread count only."""
    torch.manual_seed(seed)
    generator = generator_for("toy", "transformer", seed)
    labels_N, tokens_NL = encode_photos(tokenizer, pool_size, generator)
    model = VAR(TRANSFORMER)
    # Half-way between equal tokens and equal scales: the class is decided in the coarse scales, which have
    # few tokens, and would otherwise be learned late.
    lengths = model.schedule.lengths
    weights_L = token_weights(lengths, tuple(length**0.5 for length in lengths))
    optimizer = Optimizer(model, matrix_rate=0.015, other_rate=2e-3, num_steps=num_steps, warmup=60)
    begin = time.time()
    for step in range(num_steps):
        chosen = torch.randint(pool_size, (batch_size,), generator=generator)
        tokens_BL, labels_B = tokens_NL[chosen].long(), labels_N[chosen]
        is_null_B = torch.rand(batch_size, generator=generator) < NULL_RATE
        labels_B = torch.where(is_null_B, TRANSFORMER.num_classes, labels_B)
        inputs_BLD = tokenizer.tokens_to_inputs(tokens_BL)
        with autocast():
            logits_BLV = model(model.conditioning_from_labels(labels_B), inputs_BLD)
        nll_BL = F.cross_entropy(logits_BLV.transpose(1, 2), tokens_BL, reduction="none")
        loss = (nll_BL * weights_L).sum(1).mean()
        optimizer.step(loss)
        if step % 100 == 0 or step == num_steps - 1:
            by_scale = " ".join(f"{nll_BL[:, part].mean():.2f}" for part in model.schedule.slices)
            took = f"{time.time() - begin:.0f}s"
            log(f"transformer {step}/{num_steps} loss {loss:.4f} by scale {by_scale} {took}")
    return model.eval()


def encode_photos(tokenizer: VQVAE, num_images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels (N,) and tokens (N, L) of new photos; tokens are uint8 to save memory."""
    assert TOKENIZER.codebook_size <= 256
    photo = torch.full((num_images,), STYLES.index("photo"))
    scenes, images = render_pool(num_images, generator, photo)
    parts = [tokenizer.encode(each.float() / 255).to(torch.uint8) for each in images.split(250)]
    return scenes.label, torch.cat(parts)
