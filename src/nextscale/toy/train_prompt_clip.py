"""Teach the miniature world's CLIP all that prompts name: on pictures and captions of training prompts, each
with a caption beside it that is wrong in one attribute.

Among captions of other pictures, none is wrong in the place alone: the CLIP of the world's classes and styles
never had to look for it.

Shapes: B images · E width of the embedding
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from nextscale.base.seeding import generator_for
from nextscale.models.embedded import CLIPS
from nextscale.models.vqvae import VQVAE
from nextscale.rewards.networks.preprocessing import clip_preprocessing
from nextscale.toy.optimizer import Optimizer, autocast
from nextscale.toy.prompts import ATTRIBUTES, WORDS, Combination, combinations_of, pictured, prompt_of
from nextscale.toy.train_clip import clip_config, text_tokenizer, write_preprocessor
from nextscale.toy.world import IMAGE_SIZE, STYLES, render

MOST_SHOWN = ("photo", "painting")  # half of the pictures are of these styles
PLACE_SHARE = 0.5  # of the wrong captions that are wrong in the place, of which its start knows no sides


def train_prompt_clip(
    tokenizer: VQVAE,
    folder: Path,
    seed: int,
    num_steps: int = 500,
    start: Path = CLIPS["toy"],
    batch_size: int = 96,
    pool_size: int = 8000,
    log: Callable[[str], None] = print,
) -> CLIPModel:
    """Go on training a CLIP, and write the result to `folder` in the hub's layout, as float16.

    Args:
        start: the CLIP's folder.
    """
    torch.manual_seed(seed)
    generator = generator_for("toy", "prompt clip", seed)
    words = text_tokenizer(folder, WORDS)
    model = with_words(CLIPModel.from_pretrained(start), CLIPTokenizer.from_pretrained(start), words)
    prepare = clip_preprocessing(IMAGE_SIZE)
    shown: list[tuple[str, Combination]] = []
    parts = []
    for style in STYLES:
        size = pool_size // 2 // (len(MOST_SHOWN) if style in MOST_SHOWN else len(STYLES) - 2)
        scenes = pictured(size, generator, style=style)
        shown += [(style, each) for each in combinations_of(scenes)]
        for i in range(0, size, 250):
            images = render(scenes[i : i + 250])
            images[::2] = tokenizer.decode(tokenizer.encode(images[::2]))
            parts.append(images.mul(255).round().to(torch.uint8))
    pool = torch.cat(parts)
    optimizer = Optimizer(model, matrix_rate=0.005, other_rate=5e-4, num_steps=num_steps, warmup=20)
    begin = time.time()

    def embed_texts(texts: list[str]) -> Tensor:
        pooled = model.text_model(**words(texts, padding=True, return_tensors="pt")).pooler_output
        return F.normalize(model.text_projection(pooled).float(), dim=-1)

    for step in range(num_steps):
        chosen = torch.randint(len(pool), (batch_size,), generator=generator)
        of_images = [shown[i] for i in chosen.tolist()]
        texts = [prompt_of(combination, style) for style, combination in of_images]
        wrong = [prompt_of(changed(each, generator), style) for style, each in of_images]
        with autocast():
            pooled = model.vision_model(prepare(pool[chosen].float() / 255)).pooler_output
            image_BE = F.normalize(model.visual_projection(pooled).float(), dim=-1)
            text_BE, wrong_BE = embed_texts(texts), embed_texts(wrong)
        scale = model.logit_scale.clamp_max(4.6).exp()
        logits_BB = scale * image_BE @ text_BE.T
        # A caption that two pictures share is right for both.
        same_BB = torch.tensor([[a == b for b in texts] for a in texts]).float()
        targets_BB = same_BB / same_BB.sum(1, keepdim=True)
        to_texts = F.cross_entropy(logits_BB, targets_BB) + F.cross_entropy(logits_BB.T, targets_BB)
        gap_B = scale * (image_BE * (text_BE - wrong_BE)).sum(1)
        loss = to_texts / 2 + F.softplus(-gap_B).mean()
        optimizer.step(loss)
        if step % 100 == 0 or step == num_steps - 1:
            told = f"right {(gap_B > 0).float().mean():.3f} {time.time() - begin:.0f}s"
            log(f"prompt clip {step}/{num_steps} loss {loss:.4f} {told}")
    model.eval().half().save_pretrained(folder)
    write_preprocessor(folder)
    return model.float()


def with_words(model: CLIPModel, words: CLIPTokenizer, others: CLIPTokenizer) -> CLIPModel:
    """The CLIP for another vocabulary, in float32; tokens that its own lacks begin at random."""
    key = "text_model.embeddings.token_embedding.weight"
    result = CLIPModel(clip_config(others))
    state, known, embeddings = model.float().state_dict(), words.get_vocab(), result.state_dict()[key]
    for token, place in others.get_vocab().items():
        if token in known:
            embeddings[place] = state[key][known[token]]
    result.load_state_dict({**state, key: embeddings})
    return result


def changed(combination: Combination, generator: torch.Generator) -> Combination:
    """The combination with another value of one attribute."""
    uniform = torch.rand(3, generator=generator).tolist()
    names = list(ATTRIBUTES)
    attribute = len(names) - 1 if uniform[0] < PLACE_SHARE else int(uniform[1] * (len(names) - 1))
    num = len(ATTRIBUTES[names[attribute]])
    other = (combination[attribute] + 1 + int(uniform[2] * (num - 1))) % num
    return (*combination[:attribute], other, *combination[attribute + 1 :])
