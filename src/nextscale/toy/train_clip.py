"""Train the miniature world's CLIP on captions, and an aesthetic head on simulated human ratings.

Both see original images and the tokenizer's reconstructions, since a reward scores decoded images.

Shapes: B images · N texts · E width of the embedding
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from nextscale.base.seeding import generator_for
from nextscale.models.vqvae import VQVAE
from nextscale.rewards.aesthetic import RELU_LAYERS
from nextscale.rewards.networks.preprocessing import MEAN, STD, clip_preprocessing
from nextscale.toy.optimizer import Optimizer, autocast
from nextscale.toy.scenes import CONTRAST, RATED_CONTRAST
from nextscale.toy.train_tokenizer import render_pool
from nextscale.toy.world import IMAGE_SIZE, VOCABULARY, Scenes, captions, ratings

EMBEDDING = 64
MAX_TEXT = 16
END = "<|endoftext|>"


def text_tokenizer(folder: Path, vocabulary: Sequence[str] = VOCABULARY) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer in whose vocabulary each of these words is one token.

    Also written to `folder`, in the hub's layout.
    """
    words = {word: [*word[:-1], word[-1] + "</w>"] for word in vocabulary}
    merges: list[tuple[str, str]] = []
    pieces = {piece for split in words.values() for piece in split}
    while pairs := Counter(pair for split in words.values() for pair in pairwise(split)):
        merge = max(sorted(pairs), key=pairs.__getitem__)
        merges.append(merge)
        pieces.add("".join(merge))
        words = {word: _merged(split, merge) for word, split in words.items()}
    alphabet = {letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")}
    tokens = [*sorted(alphabet | pieces), "<|startoftext|>", END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {piece: i for i, piece in enumerate(tokens)}
    pairs_of_pieces = cast("list[str]", merges)  # annotated as strings, but pairs are expected
    tokenizer = CLIPTokenizer(vocab=vocab, merges=pairs_of_pieces, model_max_length=MAX_TEXT)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _merged(split: list[str], merge: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in split:
        if joined and (joined[-1], piece) == merge:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """A CLIP of 0.6 M parameters for 64x64 images."""
    return CLIPConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=dict(
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=IMAGE_SIZE,
            patch_size=8,
        ),
        projection_dim=EMBEDDING,
    )


def pool_with_reconstructions(
    tokenizer: VQVAE,
    num_images: int,
    generator: torch.Generator,
    contrast: tuple[float, float] = CONTRAST,
) -> tuple[Scenes, Tensor]:
    """Scenes of all styles and images (N, 3, H, W) uint8, every second one a tokenizer reconstruction."""
    scenes, images = render_pool(num_images, generator, contrast=contrast)
    for start in range(0, num_images, 250):
        part = images[start : start + 250 : 2]
        decoded = tokenizer.decode(tokenizer.encode(part.float() / 255))
        images[start : start + 250 : 2] = decoded.mul(255).round().to(torch.uint8)
    return scenes, images


def contrastive_loss(image_BE: Tensor, text_BE: Tensor, texts: list[str], logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric loss; images with identical captions count as positives of each other.

    Source: Radford et al., "Learning transferable visual models from natural language supervision", 2021.
    """
    index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    ids_B = torch.tensor([index[text] for text in texts])
    same_BB = (ids_B[:, None] == ids_B[None, :]).float()
    targets_BB = same_BB / same_BB.sum(1, keepdim=True)
    logits_BB = logit_scale.clamp_max(4.6).exp() * image_BE @ text_BE.T
    return (F.cross_entropy(logits_BB, targets_BB) + F.cross_entropy(logits_BB.T, targets_BB)) / 2


def train_clip(
    tokenizer: VQVAE,
    folder: Path,
    seed: int,
    num_steps: int = 2000,
    batch_size: int = 128,
    pool_size: int = 12000,
    log: Callable[[str], None] = print,
) -> CLIPModel:
    """Train a CLIP and write it to `folder` in the hub's layout, as float16; returns the model."""
    torch.manual_seed(seed)
    generator = generator_for("toy", "clip", seed)
    words, prepare = text_tokenizer(folder), clip_preprocessing(IMAGE_SIZE)
    scenes, images = pool_with_reconstructions(tokenizer, pool_size, generator)
    model = CLIPModel(clip_config(words))
    optimizer = Optimizer(model, matrix_rate=0.01, other_rate=1e-3, num_steps=num_steps, warmup=50)
    begin = time.time()
    for step in range(num_steps):
        chosen = torch.randint(pool_size, (batch_size,), generator=generator)
        texts = captions(scenes[chosen], generator)
        tokens = words(texts, padding=True, return_tensors="pt")
        with autocast():
            pooled = model.vision_model(prepare(images[chosen].float() / 255)).pooler_output
            image_BE = F.normalize(model.visual_projection(pooled).float(), dim=-1)
            pooled = model.text_model(**tokens).pooler_output
            text_BE = F.normalize(model.text_projection(pooled).float(), dim=-1)
        loss = contrastive_loss(image_BE, text_BE, texts, model.logit_scale)
        optimizer.step(loss)
        if step % 100 == 0 or step == num_steps - 1:
            log(f"clip {step}/{num_steps} loss {loss:.4f} {time.time() - begin:.0f}s")
    model.eval().half().save_pretrained(folder)
    write_preprocessor(folder)
    return model.float()


def write_preprocessor(folder: Path) -> None:
    """Write the hub's preprocessing file, for loading this CLIP with transformers alone."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    content = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n")


def train_aesthetic_head(
    tokenizer: VQVAE,
    clip: CLIPModel,
    seed: int,
    num_images: int = 16000,
    num_steps: int = 3000,
    log: Callable[[str], None] = print,
) -> dict[str, Tensor]:
    """Train a head like LAION's v2, with ReLU, on noisy ratings; returns a state dict for `load_head`."""
    torch.manual_seed(seed)
    generator = generator_for("toy", "aesthetic", seed)
    scenes, images = pool_with_reconstructions(tokenizer, num_images, generator, RATED_CONTRAST)
    target_N = ratings(scenes, generator)
    prepare = clip_preprocessing(IMAGE_SIZE)
    with torch.no_grad():
        embeddings_NE = torch.cat(
            [
                F.normalize(
                    clip.visual_projection(clip.vision_model(prepare(part.float() / 255)).pooler_output),
                    dim=-1,
                )
                for part in images.split(250)
            ]
        )
    widths = (EMBEDDING, 96, 48, 32, 16, 1)
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    dropouts = (0.1, 0.1, 0.0)
    model = nn.Sequential()
    for i, layer in enumerate(layers):
        model.append(layer)
        if i < len(layers) - 1:
            model.append(nn.ReLU())
        if i < len(dropouts):
            model.append(nn.Dropout(dropouts[i]))
    nn.init.constant_(layers[-1].bias, 5.0)
    optimizer = Optimizer(model, matrix_rate=0.005, other_rate=1e-3, num_steps=num_steps, warmup=50)
    num_train = int(0.9 * num_images)
    for _ in range(num_steps):
        chosen = torch.randint(num_train, (512,), generator=generator)
        optimizer.step(F.mse_loss(model(embeddings_NE[chosen]).squeeze(-1), target_N[chosen]))
    model.eval()
    with torch.no_grad():
        predicted = model(embeddings_NE[num_train:]).squeeze(-1)
    correlation = torch.corrcoef(torch.stack([predicted, target_N[num_train:]]))[0, 1]
    log(f"aesthetic head: correlation with held-out ratings {correlation:.3f}")
    assert [i for i, each in enumerate(model) if isinstance(each, nn.Linear)] == list(RELU_LAYERS)
    return {f"layers.{key}": value.clone() for key, value in model.state_dict().items()}
