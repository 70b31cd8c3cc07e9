"""The frozen reference model of the KL term.

Shapes: B images · L tokens of all scales · V codebook size · D codebook width
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from nextscale.models.protocol import Conditioning, NextScaleModel
from nextscale.policy import SamplingConfig
from nextscale.rescoring import teacher_forced_logits


class Reference:
    """A frozen model.

    Args:
        model: of the same family and sizes as the trained one; its parameters are frozen here. With
            `context`, the trained one itself, which is left as it is.
        context: what the model runs within, such as one that switches its adapter off.
    """

    def __init__(
        self, model: NextScaleModel, context: Callable[[], AbstractContextManager[None]] | None = None
    ) -> None:
        self.model = model if context else model.requires_grad_(False)
        self.context = context or nullcontext

    @classmethod
    def copy_of(cls, model: NextScaleModel) -> "Reference":
        """A copy of the model as it is now; takes as much memory again."""
        return cls(copy.deepcopy(model))

    @torch.no_grad()
    def log_probs(self, conditioning: Conditioning, inputs_BLD: Tensor, sampling: SamplingConfig) -> Tensor:
        """(B, L, V) log-probabilities after guidance and temperature, before filtering (see `exact_kl`)."""
        schedule = self.model.schedule
        with self.context():
            logits_BLV = teacher_forced_logits(self.model, schedule, conditioning, inputs_BLD, sampling)
        return logits_BLV.log_softmax(-1)
