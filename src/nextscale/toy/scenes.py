"""Scenes of the miniature world: their parameters, how they are sampled, and how beautiful they are.

Shapes: N scenes
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

CLASSES = ("star", "heart", "moon", "house", "tree", "fish", "mushroom", "flower")
STYLES = ("photo", "painting", "sketch", "mosaic", "neon")
IMAGE_SIZE = 64

# Object colours in OKLCH, by name: lightness, maximum chroma and hue angle in degrees.
PALETTE = {
    "red": (0.57, 0.215, 27.0),
    "orange": (0.71, 0.175, 55.0),
    "yellow": (0.85, 0.170, 97.0),
    "green": (0.66, 0.190, 143.0),
    "teal": (0.70, 0.118, 190.0),
    "blue": (0.55, 0.190, 258.0),
    "purple": (0.53, 0.210, 300.0),
    "pink": (0.75, 0.150, 352.0),
}
GROUND_HUES = (30.0, 75.0, 140.0, 200.0, 260.0, 320.0)

# Ranges of the uniform attributes that make a scene beautiful.
SATURATION = (0.35, 1.0)
CONTRAST = (0.13, 0.36)
# Raters see a wider range, and like contrast above the maximum of CONTRAST no better. Otherwise a predictor
# of their ratings would keep rising towards light colours on black, and favour the hues that allow it.
RATED_CONTRAST = (0.05, 0.65)
SIZE = (20.0, 26.0)
# The maximum distance of an object from the middle: the largest object then just stays in the picture.
MAX_OFFSET = 5.0
MAX_ROTATION = math.radians(12)


@dataclass(frozen=True)
class Scenes:
    """A batch of scene parameters, each a tensor of shape (N,).

    Args:
        label: index into CLASSES, int64.
        style: index into STYLES, int64.
        colour: index into PALETTE, int64.
        saturation: of the object, as a fraction of its colour's maximum chroma, in SATURATION.
        lightness: OKLab lightness of the object, within 0.03 of its colour's.
        ground: index into GROUND_HUES, int64.
        ground_lightness: OKLab lightness of the background, which differs from `lightness` by CONTRAST.
        x: offset of the centre to the right, in pixels; the offset is at most MAX_OFFSET long.
        y: offset of the centre upwards, in pixels.
        size: radius of the object in pixels, in SIZE.
        rotation: anticlockwise, in radians, at most MAX_ROTATION.
    """

    label: Tensor
    style: Tensor
    colour: Tensor
    saturation: Tensor
    lightness: Tensor
    ground: Tensor
    ground_lightness: Tensor
    x: Tensor
    y: Tensor
    size: Tensor
    rotation: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: Tensor | slice) -> "Scenes":
        """The scenes at `index`: a slice, a boolean mask or a tensor of positions."""
        return Scenes(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    @property
    def contrast(self) -> Tensor:
        """Difference in lightness between object and background, (N,), in CONTRAST."""
        return (self.lightness - self.ground_lightness).abs()


def sample_scenes(
    num: int,
    generator: torch.Generator,
    labels: Tensor | None = None,
    styles: Tensor | None = None,
    contrast: tuple[float, float] = CONTRAST,
) -> Scenes:
    """Sample scenes; all attributes are independent and uniform.

    Args:
        num: number of scenes N.
        generator: a CPU generator. It yields one row of numbers per scene, so the first scenes do not depend
            on `num`, and other attributes do not depend on whether labels and styles are given.
        labels: indices into CLASSES, (N,); random by default.
        styles: indices into STYLES, (N,); random by default.
        contrast: range of the difference in lightness between object and background.

    Raises:
        ValueError: labels or styles are not N valid indices.
    """
    for name, given, count in (("labels", labels, len(CLASSES)), ("styles", styles, len(STYLES))):
        if given is not None and (given.shape != (num,) or ((given < 0) | (given >= count)).any()):
            raise ValueError(f"{name} must be {num} indices below {count}, got {given}")
    u = torch.rand(num, 12, generator=generator).unbind(1)

    def pick(uniform: Tensor, count: int) -> Tensor:
        return (uniform * count).long().clamp_max(count - 1)

    def between(uniform: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * uniform

    colour = pick(u[2], len(PALETTE))
    base_lightness = torch.tensor([lightness for lightness, _, _ in PALETTE.values()])[colour]
    lightness = base_lightness + between(u[4], -0.03, 0.03)
    # A light colour leaves no room for a lighter background; the contrast never depends on the colour.
    side = torch.where((base_lightness < 0.6) & (u[6] < 0.6), 1.0, -1.0)
    # The square root makes the centre uniform in the disc, and so its squared distance uniform as well.
    offset, direction = MAX_OFFSET * u[8].sqrt(), 2 * math.pi * u[9]
    return Scenes(
        label=pick(u[0], len(CLASSES)) if labels is None else labels.long(),
        style=pick(u[1], len(STYLES)) if styles is None else styles.long(),
        colour=colour,
        saturation=between(u[3], *SATURATION),
        lightness=lightness,
        ground=pick(u[5], len(GROUND_HUES)),
        ground_lightness=(lightness + side * between(u[7], *contrast)).clamp(0.05, 0.97),
        x=offset * direction.cos(),
        y=offset * direction.sin(),
        size=between(u[10], *SIZE),
        rotation=between(u[11], -MAX_ROTATION, MAX_ROTATION),
    )


def beauty(scenes: Scenes) -> Tensor:
    """Latent beauty, (N,), with mean 0 and sd 1 under `sample_scenes`.

    The equally weighted sum of saturation, contrast (clipped to CONTRAST), centring and size. None of them
    depends on hue, label or style, so neither does beauty.
    """
    centred = 1 - (scenes.x**2 + scenes.y**2) / MAX_OFFSET**2
    attributes = (
        (scenes.saturation, *SATURATION),
        (scenes.contrast.clamp(*CONTRAST), *CONTRAST),
        (centred, 0.0, 1.0),
        (scenes.size, *SIZE),
    )
    # A uniform variable of range r has sd r / sqrt(12); the sum of four of sd 1 has sd 2.
    standardised = [
        (value - (low + high) / 2) * math.sqrt(12) / (high - low) for value, low, high in attributes
    ]
    return torch.stack(standardised).sum(0) / 2
