"""Silhouettes of the miniature world as signed distance functions.

A silhouette is drawn in unit coordinates, x to the right and y up, within the unit disc, so that an object of
radius r pixels extends hardly further than r from its centre. Distances are negative inside. Each silhouette
has three layers: the whole object, the part in a pale accent and the part in a deep accent.

Shapes: P is any shape, such as (N, 64, 64).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Larger than any distance in the unit disc: the distance to a layer that a silhouette lacks.
FAR = 8.0


class Silhouette(NamedTuple):
    """Signed distances to the three layers, each of shape P.

    Args:
        outline: the whole object, including the accents.
        pale: the part in the pale accent.
        deep: the part in the deep accent, which covers the pale one.
    """

    outline: Tensor
    pale: Tensor
    deep: Tensor


def circle(x: Tensor, y: Tensor, centre_x: float, centre_y: float, radius: float) -> Tensor:
    """Distance to a disc."""
    return torch.hypot(x - centre_x, y - centre_y) - radius


def ellipse(x: Tensor, y: Tensor, radius_x: float, radius_y: float) -> Tensor:
    """Distance to an ellipse at the origin, to first order (exact at the edge, which is what is visible)."""
    scaled = torch.hypot(x / radius_x, y / radius_y)
    slope = torch.hypot(x / radius_x**2, y / radius_y**2).clamp_min(1e-6)
    # Near the centre the first-order formula tends to 0/0; the true distance there is the smaller radius.
    return torch.where(scaled < 1e-3, -min(radius_x, radius_y), scaled * (scaled - 1) / slope)


def box(x: Tensor, y: Tensor, left: float, bottom: float, right: float, top: float) -> Tensor:
    """Distance to an axis-aligned rectangle."""
    beside = (x - (left + right) / 2).abs() - (right - left) / 2
    above = (y - (bottom + top) / 2).abs() - (top - bottom) / 2
    return torch.hypot(beside.clamp_min(0), above.clamp_min(0)) + torch.maximum(beside, above).clamp_max(0)


def polygon(x: Tensor, y: Tensor, corners: Sequence[tuple[float, float]]) -> Tensor:
    """Distance to a simple polygon; a ray from a point inside crosses its edges an odd number of times."""
    squared = torch.full_like(x, FAR**2)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        edge_x, edge_y = bx - ax, by - ay
        from_x, from_y = x - ax, y - ay
        along = ((from_x * edge_x + from_y * edge_y) / (edge_x**2 + edge_y**2)).clamp(0, 1)
        squared = torch.minimum(squared, (from_x - along * edge_x) ** 2 + (from_y - along * edge_y) ** 2)
        if edge_y != 0:
            spans = (y >= min(ay, by)) & (y < max(ay, by))
            inside ^= spans & (from_x < from_y * (edge_x / edge_y))
    distance = squared.sqrt()
    return torch.where(inside, -distance, distance)


def mirrored(right_half: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of a polygon symmetric about the y axis, from those of its right half, top to bottom."""
    return [*right_half, *((-x, y) for x, y in reversed(right_half) if x != 0)]


def star(x: Tensor, y: Tensor) -> Silhouette:
    """A five-pointed star with slightly rounded points."""
    rounding = 0.07
    radii = (0.95 - rounding, 0.46 - rounding)
    angles = [math.pi * (0.5 + i / 5) for i in range(10)]
    corners = [(radii[i % 2] * math.cos(a), radii[i % 2] * math.sin(a)) for i, a in enumerate(angles)]
    outline = polygon(x, y, corners) - rounding
    return Silhouette(outline, torch.full_like(x, FAR), torch.full_like(x, FAR))


def heart(x: Tensor, y: Tensor) -> Silhouette:
    """A heart: a square on its corner with two half-discs."""
    scale = 1.6
    across, up = x.abs() / scale, y / scale + 0.57
    lobe = torch.hypot(across - 0.25, up - 0.75) - math.sqrt(2) / 4
    half = (across + up).clamp_min(0) / 2
    to_side = (across - half) ** 2 + (up - half) ** 2
    to_cleft = across**2 + (up - 1) ** 2
    below = torch.minimum(to_side, to_cleft).sqrt() * torch.sign(across - up)
    outline = torch.where(across + up > 1, lobe, below) * scale
    return Silhouette(outline, torch.full_like(x, FAR), torch.full_like(x, FAR))


def moon(x: Tensor, y: Tensor) -> Silhouette:
    """A crescent moon that opens to the upper right: one disc minus another."""
    tilt, away, bite_radius, radius = math.radians(18), 0.46, 0.68, 0.95
    along, across = x * math.cos(tilt) + y * math.sin(tilt), (y * math.cos(tilt) - x * math.sin(tilt)).abs()
    bite = circle(along, across, away, 0, bite_radius)
    crescent = torch.maximum(circle(along, across, 0, 0, radius), -bite)
    # Beyond the horns, the nearest point is the tip of a horn, which neither circle accounts for.
    tip_x = (radius**2 - bite_radius**2 + away**2) / (2 * away)
    tip_y = math.sqrt(radius**2 - tip_x**2)
    beyond = along * tip_y - across * tip_x > away * (tip_y - across).clamp_min(0)
    outline = torch.where(beyond, circle(along, across, tip_x, tip_y, 0), crescent)
    return Silhouette(outline, torch.full_like(x, FAR), torch.full_like(x, FAR))


def house(x: Tensor, y: Tensor) -> Silhouette:
    """A house: coloured roof and chimney, pale walls, a deep door."""
    roof = torch.minimum(
        polygon(x, y, mirrored([(0.0, 0.92), (0.96, 0.1)])), box(x, y, 0.42, 0.3, 0.68, 0.72)
    )
    walls = box(x, y, -0.68, -0.72, 0.68, 0.12)
    door = box(x, y, -0.2, -0.72, 0.2, -0.16)
    return Silhouette(torch.minimum(roof, walls), torch.maximum(walls, -roof), door)


def tree(x: Tensor, y: Tensor) -> Silhouette:
    """A conifer of three stacked triangles on a deep trunk."""
    right_half = [(0.0, 0.98), (0.46, 0.4), (0.26, 0.4), (0.62, -0.1), (0.38, -0.1), (0.78, -0.6)]
    crown = polygon(x, y, mirrored(right_half))
    trunk = box(x, y, -0.17, -0.95, 0.17, -0.55)
    return Silhouette(torch.minimum(crown, trunk), torch.full_like(x, FAR), torch.maximum(trunk, -crown))


def fish(x: Tensor, y: Tensor) -> Silhouette:
    """A fish that swims to the left, with a tail, one pale stripe and an eye."""
    body = ellipse(x + 0.24, y, 0.72, 0.6)
    tail = polygon(x, y, [(0.2, 0.0), (0.84, 0.48), (0.7, 0.0), (0.84, -0.48)]) - 0.05
    eye = circle(x, y, -0.6, 0.13, 0.1)
    stripe = torch.maximum(ellipse(x + 0.05, y, 0.13, 0.9), body)
    return Silhouette(torch.minimum(body, tail), torch.minimum(stripe, eye - 0.09), eye)


def mushroom(x: Tensor, y: Tensor) -> Silhouette:
    """A mushroom: a domed cap with pale spots on a pale stem."""
    cap = torch.maximum(ellipse(x, y + 0.05, 0.95, 0.95), -0.05 - y) - 0.03
    stem = box(x, y, -0.2, -0.85, 0.2, 0.1) - 0.09
    spots = torch.minimum(circle(x, y, -0.47, 0.27, 0.18), circle(x, y, 0.49, 0.25, 0.17))
    spots = torch.minimum(spots, circle(x, y, 0.02, 0.56, 0.2))
    pale = torch.minimum(spots, torch.maximum(stem, -cap))
    return Silhouette(torch.minimum(cap, stem), pale, torch.full_like(x, FAR))


def flower(x: Tensor, y: Tensor) -> Silhouette:
    """A flower of six round petals around a pale centre."""
    petals = circle(x, y, 0, 0, 0.4)
    for i in range(6):
        angle = math.pi * (i / 3 + 1 / 6)
        petals = torch.minimum(petals, circle(x, y, 0.61 * math.cos(angle), 0.61 * math.sin(angle), 0.34))
    return Silhouette(petals, circle(x, y, 0, 0, 0.3), torch.full_like(x, FAR))


SILHOUETTES: dict[str, Callable[[Tensor, Tensor], Silhouette]] = {
    "star": star,
    "heart": heart,
    "moon": moon,
    "house": house,
    "tree": tree,
    "fish": fish,
    "mushroom": mushroom,
    "flower": flower,
}
