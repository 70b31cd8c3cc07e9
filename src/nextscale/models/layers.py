"""Layers that the families of next-scale transformers share: adaptive LayerNorm, and the head.

Shapes: B images · l tokens of the scales at hand · C width
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

NORM_EPS = 1e-6


class Modulated(torch.autograd.Function):
    """LayerNorm without affine parameters, then scale and shift.

    The normalised input is computed again in the backward pass: autograd would save it, one more float32
    tensor of the stream's size beside the stream itself.
    """

    @staticmethod
    def forward(ctx: Any, x_BlC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
        normed_BlC, mean_Bl1, rstd_Bl1 = torch.native_layer_norm(
            x_BlC, x_BlC.shape[-1:], None, None, NORM_EPS
        )
        ctx.save_for_backward(x_BlC, scale_B1C, mean_Bl1, rstd_Bl1)
        return torch.addcmul(shift_B1C, normed_BlC, scale_B1C + 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (d_BlC,), (x_BlC, scale_B1C, mean_Bl1, rstd_Bl1) = gradients, ctx.saved_tensors
        normed_BlC = (x_BlC - mean_Bl1) * rstd_Bl1
        dx_BlC = torch.ops.aten.native_layer_norm_backward(
            d_BlC * (scale_B1C + 1),
            x_BlC,
            x_BlC.shape[-1:],
            mean_Bl1,
            rstd_Bl1,
            None,
            None,
            [True, False, False],
        )[0]
        return dx_BlC, (d_BlC * normed_BlC).sum(1, keepdim=True), d_BlC.sum(1, keepdim=True)


def as_stored(layer: nn.Module, condition_BC: Tensor) -> Tensor:
    """A modulation in the dtype of its weights, a third of the model's, whatever autocast says. It has one
    row an image: to cast the weights and their gradients would cost more than the product."""
    with torch.autocast(condition_BC.device.type, torch.bfloat16, enabled=False):
        return layer(condition_BC)


def modulate(x_BlC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor, weight: Tensor) -> Tensor:
    """LayerNorm, then scale and shift, in the dtype of the next layer's weight."""
    return Modulated.apply(x_BlC, scale_B1C, shift_B1C).to(weight.dtype)


class AdaLNBeforeHead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BlC: Tensor, condition_BC: Tensor) -> Tensor:
        two = rearrange(as_stored(self.ada_lin, condition_BC), "B (n C) -> n B 1 C", n=2).float()
        return Modulated.apply(x_BlC, two[0], two[1])


class Head(nn.Linear):
    """From features to logits, in float32 whatever its weights are stored in. A layer of its own, so that it
    may carry an adapter."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float(), self.bias.float())


def last_weight(layers: nn.Sequential) -> Tensor:
    """The weight of the linear layer at the end of a modulation."""
    linear = layers[-1]
    assert isinstance(linear, nn.Linear)
    return linear.weight
