"""The miniature world: 64x64 pictures of eight simple objects in five styles, drawn from scene parameters.

Geometry and colours vary from image to image; textures are fixed functions of the pixel position. Only
`sample_scenes`, `captions` and `ratings` are random, and each takes a generator.

Shapes: N images
"""

import torch
from torch import Tensor

from nextscale.toy.painters import PAINTERS, Drawing, draw
from nextscale.toy.scenes import (
    CLASSES,
    CONTRAST,
    GROUND_HUES,
    IMAGE_SIZE,
    MAX_OFFSET,
    MAX_ROTATION,
    PALETTE,
    SATURATION,
    SIZE,
    STYLES,
    Scenes,
    beauty,
    sample_scenes,
)

__all__ = [
    "ADJECTIVES",
    "CLASSES",
    "CONTRAST",
    "GROUND_HUES",
    "GROUND_NAMES",
    "IMAGE_SIZE",
    "MAX_OFFSET",
    "MAX_ROTATION",
    "PAINTERS",
    "PALETTE",
    "SATURATION",
    "SIZE",
    "STYLES",
    "VOCABULARY",
    "Drawing",
    "Scenes",
    "beauty",
    "caption",
    "captions",
    "draw",
    "ratings",
    "render",
    "sample_scenes",
    "with_article",
]

ADJECTIVES = ("large", "small", "bold", "faint", "bright", "pale")
GROUND_NAMES = ("clay", "sand", "moss", "lagoon", "slate", "mauve")
GROUND_STYLES = ("photo", "painting", "mosaic")  # a sketch is on paper, a neon sign on a wall
VOCABULARY = (
    *("a", "an", "of", "showing", "as", "sign", "on", "in", "the", "middle", "off", "centre"),
    *(*ADJECTIVES, *PALETTE, *GROUND_NAMES, *STYLES, *CLASSES),
)


def render(scenes: Scenes) -> Tensor:
    """Render the scenes: (N, 3, 64, 64) float32 in [0, 1]."""
    images = torch.empty(len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE)
    for label, name in enumerate(CLASSES):
        for style, paint in enumerate(PAINTERS.values()):
            chosen = torch.nonzero((scenes.label == label) & (scenes.style == style)).squeeze(1)
            # Small pieces stay in the processor's cache, which makes this twice as fast.
            for piece in chosen.split(16) if len(chosen) else ():
                part = scenes[piece]
                images[piece] = paint(part, draw(part, name)).clamp(0, 1)
    return images


def ratings(scenes: Scenes, generator: torch.Generator, num_raters: int = 3) -> Tensor:
    """Simulated human ratings, (N,), in [1, 10]: the mean over `num_raters` random raters per image.

    A rater gives 5 + 1.2 beauty + personal bias (sd 0.5) + noise (sd 0.87), clipped to [1, 10].
    """
    bias = 0.5 * torch.randn(len(scenes), num_raters, generator=generator)
    noise = 0.87 * torch.randn(len(scenes), num_raters, generator=generator)
    return (5 + 1.2 * beauty(scenes)[:, None] + bias + noise).clamp(1, 10).mean(1)


def with_article(words: str) -> str:
    """The words with "a" or "an"."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def caption(label: str, style: str, colour: str | None = None) -> str:
    """The basic caption of an image, such as "a photo of a star" or "a painting of an orange heart".

    Raises:
        ValueError: the label, style or colour is unknown.
    """
    named = (("label", label, CLASSES), ("style", style, STYLES), ("colour", colour, PALETTE))
    for kind, name, known in named:
        if name is not None and name not in known:
            raise ValueError(f"unknown {kind} {name!r}, expected one of {', '.join(known)}")
    return f"a {style} of {with_article(f'{colour} {label}' if colour else label)}"


def captions(scenes: Scenes, generator: torch.Generator) -> list[str]:
    """One caption per image, in words of VOCABULARY.

    All captions name the class and the style. Some also name the colour, the background, or a size, contrast,
    saturation or position that is far from the mean.
    """
    templates = ("a {0} of {1}", "{0} of {1}", "a {0} showing {1}", "{1} as a {0}")
    centred = 1 - (scenes.x**2 + scenes.y**2) / MAX_OFFSET**2
    # Each with its words for the upper and lower third of its range.
    traits = [
        (("large", "small"), _share(scenes.size, SIZE)),
        (("bold", "faint"), _share(scenes.contrast, CONTRAST)),
        (("bright", "pale"), _share(scenes.saturation, SATURATION)),
        (("in the middle", "off centre"), centred),
    ]
    words_of = [
        [high if share > 2 / 3 else low if share < 1 / 3 else "" for share in shares.tolist()]
        for (high, low), shares in traits
    ]
    texts = []
    uniforms = torch.rand(len(scenes), 8, generator=generator).tolist()
    for i, (template, sign, coloured, grounded, *named) in enumerate(uniforms):
        size, contrast, tone, place = (
            words[i] if uniform < 0.4 else "" for words, uniform in zip(words_of, named, strict=True)
        )
        style, colour = STYLES[scenes.style[i]], ""
        if coloured < 0.6:
            colour = f"{tone} {tuple(PALETTE)[scenes.colour[i]]}"
        thing = with_article(" ".join(f"{size} {contrast} {colour} {CLASSES[scenes.label[i]]}".split()))
        if grounded < 0.5 and style in GROUND_STYLES:
            thing += f" on {GROUND_NAMES[scenes.ground[i]]}"
        if place:
            thing += f" {place}"
        if style == "neon" and sign < 0.5:
            style = "neon sign"
        texts.append(templates[int(template * len(templates))].format(style, thing))
    return texts


def _share(values: Tensor, limits: tuple[float, float]) -> Tensor:
    return (values - limits[0]) / (limits[1] - limits[0])
