"""The schedule of scales: which tokens belong to which scale, and which tokens each may attend to.

Shapes: S scales · L tokens of all scales
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import AfterValidator


def check_growing(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The side lengths of grids, coarse to fine, as they are.

    Raises:
        ValueError: one is not positive, or they do not grow.
    """
    growing = all(a < b for a, b in pairwise(sizes))
    if not sizes or sizes[0] < 1 or not growing:
        raise ValueError(f"scale sizes must be positive and growing, got {sizes}")
    return sizes


ScaleSizes = Annotated[tuple[int, ...], AfterValidator(check_growing)]


@dataclass(frozen=True)
class ScaleSchedule:
    """The token grids of an image.

    Attributes:
        sizes: side lengths of the grids, coarse to fine, such as (1, 2, 3, 4, 5, 6, 8, 10, 13, 16).

    Raises:
        ValueError: a size is not positive, or the sizes are not strictly increasing.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(int(size) for size in self.sizes))
        check_growing(self.sizes)

    @property
    def num_scales(self) -> int:
        """S."""
        return len(self.sizes)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each scale."""
        return tuple(size * size for size in self.sizes)

    @property
    def num_tokens(self) -> int:
        """L, the number of tokens of all scales."""
        return sum(self.lengths)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """For each scale, the positions of its tokens among the L."""
        ends = [sum(self.lengths[: k + 1]) for k in range(self.num_scales)]
        return tuple(slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True))

    def lengths_of(self, start: int, stop: int) -> tuple[int, ...]:
        """Number of tokens of each scale from position `start` on, up to `stop`.

        Raises:
            ValueError: a scale begins or ends elsewhere.
        """
        lengths = tuple(part.stop - part.start for part in self.slices if start <= part.start < stop)
        if not lengths or start not in {part.start for part in self.slices} or start + sum(lengths) != stop:
            raise ValueError(f"tokens {start} to {stop} are not whole scales of {self.lengths} tokens")
        return lengths

    def scale_of_token(self) -> torch.Tensor:
        """(L,) int64: the index of the scale that each token belongs to."""
        return torch.cat([torch.full((length,), k) for k, length in enumerate(self.lengths)])

    def guidance_ramp(self) -> torch.Tensor:
        """(L,) float32: k / (S - 1) for the tokens of scale k, the factor that guidance is multiplied by.

        Source: official VAR, `t = cfg * ratio` with `ratio = si / num_stages_minus_1`.
        """
        return self.scale_of_token() / max(self.num_scales - 1, 1)

    def attention_bias(self) -> torch.Tensor:
        """(L, L) float32: 0 where a token may attend to another (same scale or coarser), -inf elsewhere."""
        scale_L = self.scale_of_token()
        hidden_LL = scale_L[:, None] < scale_L[None, :]
        return torch.zeros(hidden_LL.shape).masked_fill(hidden_LL, float("-inf"))
