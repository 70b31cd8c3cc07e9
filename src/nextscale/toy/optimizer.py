"""The optimizer that trains the miniature models: Muon for the matrices, AdamW for the rest."""

import math

import torch
from torch import Tensor, nn

from nextscale.base.precision import has_fast_bfloat16


def cosine_schedule(step: int, num_steps: int, warmup: int, floor: float = 0.01) -> float:
    """Fraction of the peak learning rate: linear warm-up, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def autocast() -> torch.autocast:
    """What the models are trained under: bfloat16, if the CPU has instructions for it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16("cpu"))


class Optimizer:
    """Muon for linear and convolution weights (each filter is a row), AdamW for embeddings, biases and norms.

    Chosen because Muon is reported to need fewer steps; not compared with AdamW in a controlled run.

    Args:
        matrix_rate: peak learning rate of Muon.
        other_rate: peak learning rate of AdamW.

    Source: Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(
        self, model: nn.Module, *, matrix_rate: float, other_rate: float, num_steps: int, warmup: int
    ) -> None:
        layers = [each for each in model.modules() if isinstance(each, nn.Linear | nn.Conv2d)]
        self.matrices = [layer.weight for layer in layers if layer.weight.requires_grad]
        ids = {id(weight) for weight in self.matrices}
        others = [each for each in model.parameters() if id(each) not in ids and each.requires_grad]
        # Views that share storage with the weights: torch's Muon accepts matrices only.
        self.flat = [nn.Parameter(weight.data.view(len(weight), -1)) for weight in self.matrices]
        self.parameters = self.matrices + others
        muon = torch.optim.Muon(self.flat, lr=matrix_rate, momentum=0.95, weight_decay=0.01)
        adamw = torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.optimizers = (muon, adamw)
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(each, lambda i: cosine_schedule(i, num_steps, warmup))
            for each in self.optimizers
        ]

    def step(self, loss: Tensor) -> None:
        """Backpropagate, clip the gradient to norm 1 and update."""
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for flat, weight in zip(self.flat, self.matrices, strict=True):
            flat.grad = None if weight.grad is None else weight.grad.view(flat.shape)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
