"""An exponential moving average of the parameters that are trained."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """The average of some parameters, beside them and in their dtype. It begins as what they are.

    Args:
        parameters: as the optimizer changes them, in place.
        decay: what each update keeps of the average; the rest is of the parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.values = [each.detach().clone() for each in self.parameters]
        self._update = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Average the parameters in, after they have changed."""
        self._update(self.values, [each.detach() for each in self.parameters], 0)

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the average in the parameters' place, and them in its; exact, and its own inverse."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            held = parameter.clone()  # one at a time: no second copy of the model
            parameter.copy_(value)
            value.copy_(held)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average for its weights."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()
