"""Means of metrics over a step."""

import math
from collections.abc import Iterator, Mapping, Sequence

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

    def parts(self) -> dict[str, tuple[float, int]]:
        """What `combined` needs of these values: each name's mean or extreme, and of how many."""
        return {name: (value, sum(map(len, self._values[name]))) for name, value in self.items()}

    @staticmethod
    def combined(parts: Sequence[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
        """What the means would be over the values of several `Means` together; each value counts alike."""
        means: dict[str, float] = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            values, counts = zip(*(part[name] for part in parts if name in part), strict=True)
            if name.endswith("/max") or name.endswith("/min"):
                held = torch.tensor(values)  # unlike Python's, its extremes keep a NaN
                means[name] = (held.max() if name.endswith("/max") else held.min()).item()
            else:
                weighted = zip(values, counts, strict=True)
                means[name] = sum(value * count for value, count in weighted) / sum(counts)
        return means


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those that JSON has a number for."""
    return {name: each for name, each in metrics.items() if math.isfinite(each)}
