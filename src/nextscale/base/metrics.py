"""Means of numbers over a step, over all processes."""

from collections.abc import Iterator

import torch
from torch import Tensor


class Means:
    """Collects values by name and gives their means; "/min" and "/max" names give extremes instead."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, **values: Tensor | float) -> None:
        """Record values (any shape); two underscores in a name become a slash: kl__mean -> kl/mean."""
        for name, value in values.items():
            self.put(name.replace("__", "/"), value)

    def put(self, name: str, value: Tensor | float) -> None:
        """Record a value of any shape under a name."""
        flat = torch.as_tensor(value, dtype=torch.float32).detach().flatten()
        self._values.setdefault(name, []).append(flat)

    def items(self) -> Iterator[tuple[str, float]]:
        for name, values in self._values.items():
            flat = torch.cat(values)
            if name.endswith("/max"):
                yield name, flat.max().item()
            elif name.endswith("/min"):
                yield name, flat.min().item()
            else:
                yield name, flat.mean().item()
