"""Draw the true pictures that images are compared with, and write what the judges see in them.

Also what no policy can beat: the same measures of other true pictures, and of the tokenizer's reconstructions
of these.

Shapes: N pictures · H W pixels
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nextscale.base.seeding import generator_for
from nextscale.models.vqvae import VQVAE
from nextscale.toy.judges import KINDS, Judge, load_judge
from nextscale.toy.realism import LIMITS, NUM_TRUE, REFERENCES, TRUE_STYLES, Realism, pack, read_references
from nextscale.toy.world import CLASSES, STYLES, render, sample_scenes


def true_pictures(style: str, split: str, num_images: int, seed: int = 0) -> Tensor:
    """True pictures of a style, (N, 3, H, W); the i-th shows class i modulo 8, and does not depend on N.

    Args:
        split: the pictures of different splits are independent, and of all that models were trained on.
    """
    labels, index = torch.arange(num_images) % len(CLASSES), STYLES.index(style)
    generator = generator_for("toy", "true", split, style, seed)
    scenes = sample_scenes(num_images, generator, labels, torch.full((num_images,), index))
    return torch.cat([render(scenes[i : i + 256]) for i in range(0, num_images, 256)])


@torch.no_grad()
def features_of(judges: dict[str, Judge], images: Tensor) -> dict[str, Tensor]:
    """What each judge sees in the images, (N, D)."""
    return {
        kind: torch.cat([judge.look(part)[1] for part in images.split(64)]) for kind, judge in judges.items()
    }


def reconstructions(tokenizer: VQVAE, images: Tensor) -> Tensor:
    """(N, 3, H, W) what the tokenizer keeps of images: nothing drawn by tokens can be nearer to them."""
    with torch.no_grad():
        return torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in images.split(64)])


def write_references(
    folder: Path,
    tokenizer: VQVAE,
    num_images: int = NUM_TRUE,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> Path:
    """Write what the judges of a folder see in true pictures, and how near other true pictures and
    reconstructions come to these, as many or 512 of them; returns the path of the former.

    Args:
        folder: of the judges, whose files are there already.
        num_images: of each style.
    """
    judges = {kind: load_judge(kind, folder) for kind in KINDS}
    stored: dict[str, Tensor] = {"labels": (torch.arange(num_images) % len(CLASSES)).to(torch.uint8)}
    others = {style: true_pictures(style, "other", num_images, seed) for style in TRUE_STYLES}
    for style in TRUE_STYLES:
        for kind, each in features_of(judges, true_pictures(style, "reference", num_images, seed)).items():
            stored[f"{style}.{kind}"], stored[f"{style}.{kind}.unit"] = pack(each)
        log(f"references of {style}: {num_images} pictures")
    path = folder / REFERENCES
    save_file(stored, path)

    # What no policy can beat, in the same measures.
    realism = Realism(read_references(folder))
    labels = list(range(len(CLASSES)))
    limits: dict[
        str, dict[str, dict[str, float]]
    ] = {}  # by number of images, since the measures depend on it
    for style, images in others.items():
        sets = {"true": images, "reconstructed": reconstructions(tokenizer, images)}
        for name, each in sets.items():
            features = features_of(judges, each)
            for num in sorted({min(512, num_images), num_images}):
                found = realism.distances({kind: rows[:num] for kind, rows in features.items()}, labels)
                own = {key: round(value, 4) for key, value in found.items() if f"/{style}/" in key}
                limits.setdefault(str(num), {})[f"{name}/{style}"] = own
                log(f"{num} {name} pictures of {style}: {own}")
    (folder / LIMITS).write_text(json.dumps(limits, indent=2) + "\n")
    return path
