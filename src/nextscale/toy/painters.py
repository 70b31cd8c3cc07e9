"""The painters of the miniature world: one per style, and the tools they share.

Every texture (brush strokes, hatching, tiles, bricks) is a fixed function of the pixel position whose period
divides 8 pixels, so that a small tokenizer with 8x downsampling can learn it exactly. Nothing here is random.

Shapes: N images; maps over pixels are (N, 64, 64), images (N, 3, 64, 64), colours (N, 3, 1, 1).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from nextscale.toy.scenes import CONTRAST, GROUND_HUES, IMAGE_SIZE, PALETTE, SATURATION, Scenes
from nextscale.toy.silhouettes import SILHOUETTES


class Drawing(NamedTuple):
    """An object as the painters receive it.

    Args:
        outline, pale, deep: distances in pixels to the layers of the silhouette, (N, 64, 64).
        shade: darkness of the form, 0 (towards the light, upper left) to 1 (away from it), (N, 64, 64).
        gloss: strength of the highlight in [0, 1], (N, 64, 64).
        main, light, dark: the object's colour and its two accents, sRGB, (N, 3, 1, 1).
    """

    outline: Tensor
    pale: Tensor
    deep: Tensor
    shade: Tensor
    gloss: Tensor
    main: Tensor
    light: Tensor
    dark: Tensor

    def coloured(self, softness: float = 1.2) -> Tensor:
        """The object's own colours, (N, 3, 64, 64), without light or edge."""
        image = mix(self.main, self.light, cover(self.pale, softness))
        return mix(image, self.dark, cover(self.deep, softness))


def draw(scenes: Scenes, name: str) -> Drawing:
    """Place the silhouette `name` in the pictures, light it and mix its colours."""
    x, y = pixel_grid()
    sine, cosine = (f(scenes.rotation)[:, None, None] for f in (torch.sin, torch.cos))
    size = scenes.size[:, None, None]
    right = (x - IMAGE_SIZE / 2 - scenes.x[:, None, None]) / size
    up = (IMAGE_SIZE / 2 - y - scenes.y[:, None, None]) / size
    layers = SILHOUETTES[name](right * cosine + up * sine, up * cosine - right * sine)
    outline, pale, deep = (layer * size for layer in layers)

    # A cushion: the surface rises over the outer third of the radius, like a quarter circle, to a flat top.
    slope_y, slope_x = torch.gradient(outline, dim=(1, 2))
    steepness = 1 - (-outline / (0.42 * size)).clamp(0, 1)
    normal_x, normal_y = slope_x * steepness, slope_y * steepness
    normal_z = (1 - normal_x**2 - normal_y**2).clamp_min(0).sqrt()
    lit = -0.48 * normal_x - 0.6 * normal_y + 0.64 * normal_z
    gloss = (-0.27 * normal_x - 0.33 * normal_y + 0.905 * normal_z).clamp(0, 1) ** 40

    hue = torch.tensor([hue for _, _, hue in PALETTE.values()])[scenes.colour]
    chroma = torch.tensor([chroma for _, chroma, _ in PALETTE.values()])[scenes.colour] * scenes.saturation
    return Drawing(
        outline,
        pale,
        deep,
        shade=(0.65 - 0.62 * lit).clamp(0, 1),
        gloss=gloss,
        main=oklch(scenes.lightness, chroma, hue),
        light=oklch(0.90 + 0.1 * (scenes.lightness - 0.6), 0.2 * chroma + 0.025, 88.0),
        dark=oklch(0.32 + 0.1 * (scenes.lightness - 0.6), 0.3 * chroma + 0.02, hue),
    )


def photo(scenes: Scenes, drawing: Drawing) -> Tensor:
    """A glossy object, lit from the upper left, with its shadow on a muted background."""
    x, y = pixel_grid()
    ground = oklch(scenes.ground_lightness, 0.035, ground_hue(scenes))
    light = 1.05 - 0.0012 * (x + y) - 0.00007 * ((x - 32) ** 2 + (y - 32) ** 2)
    image = ground * light
    contact = cover(drawing.outline - 1, 5)
    cast = cover(F.pad(drawing.outline, (4, 0, 5, 0), mode="replicate")[:, :IMAGE_SIZE, :IMAGE_SIZE], 9)
    image = image * (1 - 0.5 * torch.maximum(cast, 0.6 * contact))[:, None]
    surface = drawing.coloured() * (1.22 - 0.75 * drawing.shade)[:, None]
    seams = torch.maximum(cover(drawing.pale.abs() - 0.4), cover(drawing.deep.abs() - 0.4))
    surface = surface * (1 - 0.25 * seams)[:, None] + 0.4 * drawing.gloss[:, None]
    return mix(image, surface, cover(drawing.outline))


def painting(scenes: Scenes, drawing: Drawing) -> Tensor:
    """Diagonal brush strokes in warm colours, with a dark brown contour."""
    x, y = pixel_grid()
    strokes, ground_strokes = brush(x + y, x - y), brush(x - y + IMAGE_SIZE, x + y)
    warm = torch.tensor([1.0, 0.55, 0.1]).view(3, 1, 1)
    # Paint is never as dark as the darkest background of a photo.
    ground = oklch(0.1 + 0.9 * scenes.ground_lightness, 0.065, 68 + 0.15 * (ground_hue(scenes) - 180))
    image = ground * (1 + 0.15 * ground_strokes) + 0.06 * warm * ground_strokes
    outline = drawing.outline + 0.4 * strokes
    surface = drawing.coloured() * torch.tensor([1.04, 0.98, 0.88]).view(3, 1, 1)
    surface = surface * (1.16 - 0.42 * drawing.shade + 0.16 * strokes)[:, None] + 0.07 * warm * strokes
    image = mix(image, surface, cover(outline))
    contour = torch.tensor([0.2, 0.1, 0.06]).view(3, 1, 1) * torch.ones_like(drawing.main)
    edges = torch.maximum(cover(outline.abs() - 1.1), 0.6 * cover(drawing.pale.abs() - 0.6))
    return mix(image, contour, edges)


def brush(across: Tensor, along: Tensor) -> Tensor:
    """Lightness, about -1 to 1, of strokes 3 by 11 pixels, from diagonal coordinates x + y and x - y.

    Every second stroke is staggered by half its length, which gives the pattern a period of 8 pixels; the
    uneven stagger of the strokes in between keeps their ends from lining up.
    """
    lane = across.div(4, rounding_mode="floor")
    odd = lane % 2
    progress = (along + 4 * (lane - odd) + 2 * odd) % 16 / 16
    ridge = torch.sin(math.pi * (across % 4) / 4)
    return 1.1 * (0.5 - progress) + 0.8 * (ridge - 0.6) + 0.4 * (1 - 2 * odd)


def sketch(scenes: Scenes, drawing: Drawing) -> Tensor:
    """Pencil on cream paper: contour, hatching in the shade and a wash of colour."""
    x, y = pixel_grid()
    paper = oklch(torch.full_like(scenes.lightness, 0.95), 0.022, 85.0)
    inside = cover(drawing.outline)
    wash = mix(paper, drawing.coloured() ** 0.7, 0.15 + 0.45 * scaled(scenes.saturation, SATURATION))
    image = mix(paper, wash, inside)

    def hatch(along: Tensor) -> Tensor:
        return cover((along % 8 - 4).abs() / math.sqrt(2) - 0.55)

    in_deep, in_pale = cover(drawing.deep), cover(drawing.pale) * (1 - cover(drawing.deep))
    tone = drawing.shade + 0.5 * in_deep - 0.3 * in_pale
    lines = hatch(x + y) * cover(0.28 - tone, 0.15)
    lines = torch.maximum(lines, hatch(x + y + 4) * cover(0.48 - tone, 0.15))
    lines = torch.maximum(lines, hatch(x - y) * cover(0.75 - tone, 0.15)) * inside
    edges = torch.maximum(cover(drawing.outline.abs() - 1), cover(drawing.pale.abs() - 0.6) * inside)
    edges = torch.maximum(edges, cover(drawing.deep.abs() - 0.6) * inside)
    pressure = 0.55 + 0.45 * scaled(scenes.contrast, CONTRAST)
    pencil = oklch(torch.full_like(scenes.lightness, 0.28), 0.02, 280.0)
    below = F.pad(drawing.outline, (5, 0, 4, 0), mode="replicate")[:, :IMAGE_SIZE, :IMAGE_SIZE]
    shadow = cover(((y % 4) - 2).abs() - 0.5) * cover(below, 2) * (1 - inside)
    return mix(image, pencil, torch.maximum(torch.maximum(edges, 0.75 * lines), 0.45 * shadow) * pressure)


def mosaic(scenes: Scenes, drawing: Drawing) -> Tensor:
    """Square tiles of 4 pixels on a fixed grid, lit in steps, with dark grout."""
    x, y = pixel_grid()
    ground = oklch(scenes.ground_lightness, 0.05, ground_hue(scenes))

    tiles = reduce(drawing.shade, "n (h a) (w b) -> n h w", "mean", a=4, b=4)
    steps = repeat((tiles * 3).round() / 3, "n h w -> n (h a) (w b)", a=4, b=4)
    # Tiles are cut along the contour, as a mosaicist would: whole tiles would leave little of a small shape.
    outline, surface = cover(drawing.outline), drawing.coloured()
    surface = surface * (1.25 - 0.45 * steps)[:, None]
    image = mix(1.06 * ground * torch.ones_like(surface), surface, outline)
    column, row = x.div(4, rounding_mode="floor"), y.div(4, rounding_mode="floor")
    jitter = torch.tensor([[1.08, 0.92], [0.97, 1.03]])[row.long() % 2, column.long() % 2]
    bevel = 1 + 0.06 * torch.sign(4 - x % 4 - y % 4)
    joints = 0.45 * ((x % 4 > 3) | (y % 4 > 3)).float()
    grout = torch.maximum(joints, 0.7 * cover(drawing.outline.abs() - 0.6))
    return mix(image * jitter * bevel, oklch(torch.full_like(scenes.lightness, 0.1), 0.01, 60.0), grout)


def neon(scenes: Scenes, drawing: Drawing) -> Tensor:
    """Glowing tubes along the contours, in front of a dark violet brick wall."""
    x, y = pixel_grid()
    power = 0.45 + 0.55 * scaled(scenes.contrast, CONTRAST)
    tint = drawing.main / drawing.main.amax(1, keepdim=True)
    wall = torch.tensor([0.07, 0.04, 0.12]).view(3, 1, 1)
    shifted = x + 4 * (y.div(4, rounding_mode="floor") % 2)
    bricks = 1 - 0.5 * ((y % 4 > 3) | (shifted % 8 > 7)).float()
    tube = (drawing.outline + 1.5).abs()
    glow = torch.exp(-tube / 5) * power + 0.18 * cover(drawing.outline)
    image = (wall + 0.5 * tint * glow[:, None]) * bricks
    lit = torch.minimum(drawing.pale.abs() - 0.8, drawing.deep)
    inner = torch.maximum(cover(lit), 0.3 * cover(drawing.pale)) * cover(drawing.outline + 3)
    image = mix(image, drawing.light, 0.9 * inner * power)
    image = mix(image, tint, cover(tube - 1.6) * power)
    return mix(image, 0.45 * tint + 0.55, cover(tube - 0.5) * power)


PAINTERS: dict[str, Callable[[Scenes, Drawing], Tensor]] = {
    "photo": photo,
    "painting": painting,
    "sketch": sketch,
    "mosaic": mosaic,
    "neon": neon,
}


def pixel_grid() -> tuple[Tensor, Tensor]:
    """Pixel centres, x to the right and y down, each (64, 64)."""
    centres = torch.arange(IMAGE_SIZE) + 0.5
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return x, y


def cover(distance: Tensor, softness: float = 1.2) -> Tensor:
    """Coverage of each pixel, in [0, 1]: a smoothstep over `softness` pixels around distance 0."""
    t = (0.5 - distance / softness).clamp(0, 1)
    return t * t * (3 - 2 * t)


def mix(under: Tensor, over: Tensor, alpha: Tensor) -> Tensor:
    """Blend `over` onto `under`: (N, 3, ...) colours or images, with `alpha` (N, 64, 64) in [0, 1]."""
    return under + (over - under) * rearrange(alpha, "n h w -> n 1 h w")


def scaled(values: Tensor, limits: tuple[float, float]) -> Tensor:
    """Values (N,) clipped to the limits and mapped to [0, 1], as (N, 1, 1)."""
    return ((values.clamp(*limits) - limits[0]) / (limits[1] - limits[0]))[:, None, None]


def ground_hue(scenes: Scenes) -> Tensor:
    """Hue of the background in degrees, (N,)."""
    return torch.tensor(GROUND_HUES)[scenes.ground]


def oklch(lightness: Tensor, chroma: Tensor | float, hue: Tensor | float) -> Tensor:
    """Colours (N, 3, 1, 1) in sRGB from OKLab lightness, chroma and hue in degrees, each (N,) or a number.

    Source: Björn Ottosson, "A perceptual color space for image processing", 2020.
    """
    angle = torch.as_tensor(hue) * (math.pi / 180)
    a, b = chroma * angle.cos(), chroma * angle.sin()
    long, medium, short = (
        (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3,
        (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3,
        (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3,
    )
    red = 4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short
    green = -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short
    blue = -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short
    linear = torch.stack([red, green, blue], 1).clamp(0, 1)
    srgb = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return rearrange(srgb, "n c -> n c 1 1")
