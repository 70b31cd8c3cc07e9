"""Train the miniature world's text-conditional model on captioned photos, without a single image of another
style or of a held-out combination.

Shapes: B images · N pictures · L tokens of all scales · V codebook size
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.base.seeding import generator_for
from nextscale.losses import token_weights
from nextscale.models.protocol import Conditioning
from nextscale.models.switti import Switti, SwittiConfig
from nextscale.models.texts import TextEncoder
from nextscale.models.vqvae import VQVAE
from nextscale.toy.optimizer import Optimizer, autocast
from nextscale.toy.prompts import captions_of, pictured
from nextscale.toy.scenes import Scenes
from nextscale.toy.train_tokenizer import TOKENIZER
from nextscale.toy.world import render

TEXT_TRANSFORMER = SwittiConfig(
    depth=6,
    width=128,
    num_heads=4,
    ffn_width=344,
    context_width=64,
    pooled_width=64,
    codebook_size=TOKENIZER.codebook_size,
    codebook_width=TOKENIZER.codebook_width,
    scale_sizes=TOKENIZER.scale_sizes,
    is_causal=True,
    text_encoders=("toy-text",),  # which tells the place: the text tower of "toy" never had to
)


@dataclass(frozen=True)
class Part:
    """A part of the training.

    Args:
        steps, rate: number of steps and learning rates, as shares of the first part's.
        captions: how captions are drawn, see `captions_of`.
    """

    steps: float
    rate: float
    captions: dict[str, float]


# Of every two captions one names no style, or one that the picture does not have: the model meets the names
# of all styles, and learns that they do not matter. Asked for a painting, it draws a photo of the right
# thing, not noise. The place is a small part of what tokens tell, and learned last: after the first part all
# captions name it. In the end some captions are wrong, as those from the web are: what reinforcement learning
# is to mend.
STYLE = {"no_style": 0.15, "wrong_style": 0.35}
PARTS = (
    Part(1.0, 1.0, {**STYLE, "place_named": 0.85}),
    Part(0.15, 0.5, {**STYLE, "place_named": 1.0}),
    Part(0.1, 0.25, {**STYLE, "place_named": 1.0, "wrong": 0.12}),
)
NULL_RATE = 0.1  # fraction of captions replaced by the empty one, for classifier-free guidance


def train_text_transformer(
    tokenizer: VQVAE,
    seed: int,
    num_steps: int = 2200,
    encoder: TextEncoder | None = None,
    batch_size: int = 32,
    pool_size: int = 12000,
    log: Callable[[str], None] = print,
) -> Switti:
    """Train a Switti on the tokens of photos; the result depends on the seed and the thread count only.

    Args:
        encoder: of the captions; by default the shipped one, which the model is drawn with.
    """
    torch.manual_seed(seed)
    generator = generator_for("toy", "text", seed)
    scenes = pictured(pool_size, generator)
    tokens_NL = torch.cat([
        tokenizer.encode(render(scenes[i : i + 250]).mul(255).round() / 255).to(torch.uint8)
        for i in range(0, pool_size, 250)
    ])  # fmt: skip
    model = Switti(TEXT_TRANSFORMER, encoder)
    for part in PARTS:
        count = max(2, round(num_steps * part.steps))
        captions = partial(captions_of, generator=generator, **part.captions)
        train_on(model, tokenizer, scenes, tokens_NL, captions, count, batch_size, generator, part.rate, log)
    return model.eval()


def train_on(
    model: Switti,
    tokenizer: VQVAE,
    scenes: Scenes,
    tokens_NL: Tensor,
    captions: Callable[[Scenes], list[str]],
    num_steps: int,
    batch_size: int,
    generator: torch.Generator,
    rate: float,
    log: Callable[[str], None],
) -> None:
    """Train the model on pictures and captions of them, in place.

    Args:
        captions: draws one for each of several pictures.
        rate: factor on the learning rates.
    """
    lengths = model.schedule.lengths
    weights_L = token_weights(lengths, tuple(length**0.5 for length in lengths))  # as `train_transformer`
    rates = {"matrix_rate": 0.015 * rate, "other_rate": 2e-3 * rate}
    optimizer = Optimizer(model, **rates, num_steps=num_steps, warmup=60)
    begin = time.time()
    for step in range(num_steps):
        chosen = torch.randint(len(scenes), (batch_size,), generator=generator)
        texts = captions(scenes[chosen])
        is_null_B = torch.rand(batch_size, generator=generator) < NULL_RATE
        texts = ["" if is_null else text for text, is_null in zip(texts, is_null_B.tolist(), strict=True)]
        tokens_BL = tokens_NL[chosen].long()
        inputs_BLD = tokenizer.tokens_to_inputs(tokens_BL)
        with autocast():
            logits_BLV = model(encode(model, texts), inputs_BLD)
        nll_BL = F.cross_entropy(logits_BLV.transpose(1, 2), tokens_BL, reduction="none")
        loss = (nll_BL * weights_L).sum(1).mean()
        optimizer.step(loss)
        if step % 100 == 0 or step == num_steps - 1:
            by_scale = " ".join(f"{nll_BL[:, part].mean():.2f}" for part in model.schedule.slices)
            took = f"{time.time() - begin:.0f}s"
            log(f"text transformer {step}/{num_steps} loss {loss:.4f} by scale {by_scale} {took}")


def encode(model: Switti, texts: list[str]) -> Conditioning:
    """The conditioning of prompts; `encode_conditions` without records of conditions."""
    return model.conditioning_from_embeddings(**model.text_encoder(texts))
