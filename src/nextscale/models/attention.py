"""Attention of next-scale transformers, scale by scale, and the cache of keys and values.

Shapes: B images · L tokens of all scales · l tokens of the scales at hand · H heads · d width of a head
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """What the scales that have run leave to the next ones. The caller makes one for each batch of images.

    Args:
        capacity: number of tokens of all scales, L.

    Attributes:
        num_tokens: number of tokens of the scales that have run.
        of_conditions: of each layer, what depends on the conditions alone, such as the modulation: all scales
            have the same.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.num_tokens = capacity, 0
        self.of_conditions: dict[int, tuple[Tensor, ...]] = {}
        self._layers: dict[int, Tensor] = {}

    def extend(self, layer: int, k_BlHd: Tensor, v_BlHd: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of one scale to those of a layer; returns all of that layer's."""
        if layer not in self._layers:  # one buffer for all scales: nothing is copied to make room
            B, _, H, d = k_BlHd.shape
            self._layers[layer] = k_BlHd.new_empty(2, B, self.capacity, H, d)
        held, end = self._layers[layer], self.num_tokens + k_BlHd.shape[1]
        held[0, :, self.num_tokens : end], held[1, :, self.num_tokens : end] = k_BlHd, v_BlHd
        return held[0, :, :end], held[1, :, :end]

    def select(self, index_B: Tensor) -> "KVCache":
        """A cache of these images, each of which may come several times, as where rollouts branch."""
        chosen = KVCache(self.capacity)
        chosen.num_tokens = self.num_tokens
        chosen.of_conditions = {
            layer: tuple(each[index_B] for each in held) for layer, held in self.of_conditions.items()
        }
        for layer, held in self._layers.items():
            chosen._layers[layer] = held.new_empty(2, len(index_B), *held.shape[2:])
            chosen._layers[layer][:, :, : self.num_tokens] = held[:, index_B, : self.num_tokens]
        return chosen


class AttentionByScale(torch.autograd.Function):
    """Attention of one or several consecutive scales, each to itself and to all coarser ones if it is causal.

    Each scale is one call without a mask, in training on exactly the shapes that it had in sampling. A mask
    over all scales would compute 38 % hidden pairs, and have other kernels with other rounding.
    The backward pass runs each scale's attention again, so that nothing quadratic is saved, and adds up the
    gradients of keys and values in place: autograd would pad those of every scale to all tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BlHd: Tensor,
        k_BLHd: Tensor,
        v_BLHd: Tensor,
        lengths: tuple[int, ...],
        is_causal: bool = True,
    ) -> Tensor:
        """(B, l, H, d), from queries of scales of these lengths, and the keys and values up to the last.

        `is_causal` says whether coarser scales are seen.
        """
        ctx.save_for_backward(q_BlHd, k_BLHd, v_BLHd)
        ctx.lengths, ctx.is_causal = lengths, is_causal
        parts = _scales(lengths, k_BLHd.shape[1], is_causal)
        outs = [_attend(q_BlHd[:, at], k_BLHd[:, seen], v_BLHd[:, seen]) for at, seen in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (d_out_BlHd,), (q_BlHd, k_BLHd, v_BLHd) = gradients, ctx.saved_tensors
        is_bf16_on_cpu = q_BlHd.device.type == "cpu" and q_BlHd.dtype == torch.bfloat16
        attend_backward = _attend_backward_on_cpu if is_bf16_on_cpu else _attend_backward
        q, k, v, d_out = (each.transpose(1, 2) for each in (q_BlHd, k_BLHd, v_BLHd, d_out_BlHd))
        if q.device.type == "cpu":  # each head's numbers together, as matrix products there want them
            q, k, v, d_out = (each.contiguous() for each in (q, k, v, d_out))
        dq = torch.empty_like(q)
        # Up to S terms are added to a gradient: in float32.
        dk, dv = (torch.zeros_like(each, dtype=torch.float32) for each in (k, v))
        for at, seen in _scales(ctx.lengths, k.shape[2], ctx.is_causal):
            of_scale = q[:, :, at], k[:, :, seen], v[:, :, seen], d_out[:, :, at]
            dq[:, :, at], dk_seen, dv_seen = attend_backward(*of_scale)
            dk[:, :, seen] += dk_seen
            dv[:, :, seen] += dv_seen
        dq_BlHd, dk_BLHd, dv_BLHd = (each.transpose(1, 2) for each in (dq, dk, dv))
        return dq_BlHd, dk_BLHd.to(k.dtype), dv_BLHd.to(v.dtype), None, None


def _scales(lengths: tuple[int, ...], num_keys: int, is_causal: bool) -> Iterator[tuple[slice, slice]]:
    """For each scale, where its queries are, and the keys that they see."""
    start, hidden = 0, num_keys - sum(lengths)
    for length in lengths:
        end = start + length
        yield slice(start, end), slice(0 if is_causal else hidden + start, hidden + end)
        start = end


def _attend(q_BlHd: Tensor, k_BLHd: Tensor, v_BLHd: Tensor) -> Tensor:
    q_BHld, k_BHLd, v_BHLd = (each.transpose(1, 2) for each in (q_BlHd, k_BLHd, v_BLHd))
    return F.scaled_dot_product_attention(q_BHld, k_BHLd, v_BHLd, scale=1.0).transpose(1, 2)


def _attend_backward(q_BHld: Tensor, k_BHLd: Tensor, v_BHLd: Tensor, d_out_BHld: Tensor) -> Sequence[Tensor]:
    """The gradients of queries, keys and values."""
    with torch.enable_grad():
        q_BHld, k_BHLd, v_BHLd = (each.detach().requires_grad_() for each in (q_BHld, k_BHLd, v_BHLd))
        out_BHld = F.scaled_dot_product_attention(q_BHld, k_BHLd, v_BHLd, scale=1.0)
    return torch.autograd.grad(out_BHld, (q_BHld, k_BHLd, v_BHLd), d_out_BHld)


def _attend_backward_on_cpu(
    q_BHld: Tensor, k_BHLd: Tensor, v_BHLd: Tensor, d_out_BHld: Tensor
) -> Sequence[Tensor]:
    """The same of bfloat16 in matrix products: faster there than the fused kernel's backward pass."""
    # Attention is sharp: bfloat16 would round its logits by up to 0.25. The factors are bfloat16 numbers, so
    # that to multiply them as such loses nothing, and sums stay float32.
    with _products_of_bfloat16():
        logits_BHlL = q_BHld.float() @ k_BHLd.float().mT
    weights_BHlL = logits_BHlL.softmax(-1).to(v_BHLd.dtype)
    d_weights_BHlL = d_out_BHld @ v_BHLd.mT
    d_logits_BHlL = torch.ops.aten._softmax_backward_data(d_weights_BHlL, weights_BHlL, -1, v_BHLd.dtype)
    return d_logits_BHlL @ k_BHLd, d_logits_BHlL.mT @ q_BHld, weights_BHlL.mT @ d_out_BHld


@contextmanager
def _products_of_bfloat16() -> Iterator[None]:
    """On a CPU, multiply float32 matrices as bfloat16, and add the products up in float32."""
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
