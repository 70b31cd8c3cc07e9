"""Means of metrics over a step."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Means:
    """Collects values by name and gives their means; for names that end in "/min" or "/max", the minimum
    or maximum instead."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Collect values of any shape."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach().float().flatten())

    def items(self) -> Iterator[tuple[str, float]]:
        """Each name with its mean, minimum or maximum."""
        for name, values in self._values.items():
            flat = torch.cat(values)
            if name.endswith("/max"):
                yield name, flat.max().item()
            elif name.endswith("/min"):
                yield name, flat.min().item()
            else:
                yield name, flat.mean().item()
