"""The VAR transformer: the distribution of the tokens of each scale, given all coarser scales and a class.

Shapes: B images · S scales · L tokens of all scales · l tokens of the scales at hand · V codebook size ·
C width · D codebook width · H heads · d width of a head

Source: VAR (arXiv 2404.02905), section 3.2; parameter names are those of the official checkpoints.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.base.records import Record
from nextscale.models.protocol import Conditioning, NextScaleModel
from nextscale.models.scales import ScaleSchedule

MAX_LOG_ATTENTION_SCALE = math.log(100)
NORM_EPS = 1e-6


class VARConfig(Record):
    """Sizes of a VAR transformer. The defaults are those of the official VAR-d16."""

    depth: int = Field(default=16, gt=0)
    """Number of transformer blocks."""
    width: int = Field(default=1024, gt=0)
    """Transformer width, C."""
    num_heads: int = Field(default=16, gt=0)
    """Number of attention heads, H; must divide the width."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of the feed-forward layers, as a multiple of the transformer's width."""
    num_classes: int = Field(default=1000, gt=0)
    """Number of classes. The null class is not counted; its label is `num_classes`."""
    codebook_size: int = Field(default=4096, gt=0)
    """Number of codes, V."""
    codebook_width: int = Field(default=32, gt=0)
    """Width of a code, D."""
    scale_sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Side lengths of the token grids, coarse to fine."""
    shared_adaln: bool = False
    """Whether all blocks share one AdaLN projection, as in VAR-d36 at 512 px."""


class KVCache:
    """What the scales that have run leave to the next ones. The caller makes one for each batch of images.

    Args:
        capacity: number of tokens of all scales, L.

    Attributes:
        num_tokens: number of tokens of the scales that have run.
        modulations: of each layer; they depend on the conditions alone, so all scales have the same.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.num_tokens = capacity, 0
        self.modulations: dict[int, tuple[Tensor, ...]] = {}
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
        chosen.modulations = {
            layer: tuple(each[index_B] for each in modulation)
            for layer, modulation in self.modulations.items()
        }
        for layer, held in self._layers.items():
            chosen._layers[layer] = held.new_empty(2, len(index_B), *held.shape[2:])
            chosen._layers[layer][:, :, : self.num_tokens] = held[:, index_B, : self.num_tokens]
        return chosen


class AttentionByScale(torch.autograd.Function):
    """Attention of one or several consecutive scales, each to itself and to all coarser ones.

    Each scale is one call without a mask, in training on exactly the shapes that it had in sampling. A mask
    over all scales would compute 38 % hidden pairs, and have other kernels with other rounding.
    The backward pass runs each scale's attention again, so that nothing quadratic is saved, and adds up the
    gradients of keys and values in place: autograd would pad those of every scale to all tokens.
    """

    @staticmethod
    def forward(ctx: Any, q_BlHd: Tensor, k_BLHd: Tensor, v_BLHd: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """(B, l, H, d), from queries of scales of these lengths, and the keys and values up to the last."""
        ctx.save_for_backward(q_BlHd, k_BLHd, v_BLHd)
        ctx.lengths = lengths
        parts = _scales(lengths, k_BLHd.shape[1])
        outs = [_attend(q_BlHd[:, at], k_BLHd[:, :end], v_BLHd[:, :end]) for at, end in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (d_out_BlHd,), (q_BlHd, k_BLHd, v_BLHd) = gradients, ctx.saved_tensors
        is_bf16_on_cpu = q_BlHd.device.type == "cpu" and q_BlHd.dtype == torch.bfloat16
        attend_backward = _attend_backward_on_cpu if is_bf16_on_cpu else _attend_backward
        # Heads first, and each head's numbers together, as matrix products want them.
        q, k, v, d_out = (each.transpose(1, 2).contiguous() for each in (q_BlHd, k_BLHd, v_BLHd, d_out_BlHd))
        dq = torch.empty_like(q)
        # Up to S terms are added to a gradient: in float32.
        dk, dv = (torch.zeros_like(each, dtype=torch.float32) for each in (k, v))
        for at, end in _scales(ctx.lengths, k.shape[2]):
            seen = q[:, :, at], k[:, :, :end], v[:, :, :end], d_out[:, :, at]
            dq[:, :, at], dk_seen, dv_seen = attend_backward(*seen)
            dk[:, :, :end] += dk_seen
            dv[:, :, :end] += dv_seen
        dq_BlHd, dk_BLHd, dv_BLHd = (each.transpose(1, 2) for each in (dq, dk, dv))
        return dq_BlHd, dk_BLHd.to(k.dtype), dv_BLHd.to(v.dtype), None


def _scales(lengths: tuple[int, ...], num_keys: int) -> Iterator[tuple[slice, int]]:
    """For each scale, where its queries are, and the end of what they attend to."""
    start, hidden = 0, num_keys - sum(lengths)
    for length in lengths:
        yield slice(start, start + length), hidden + start + length
        start += length


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


class Attention(nn.Module):
    """Multi-head attention with L2-normalized queries and keys and a learned scale per head."""

    zero_k_bias: Tensor

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BlC: Tensor, lengths: tuple[int, ...], cache: KVCache | None, layer: int) -> Tensor:
        qkv = self.mat_qkv(x_BlC)  # called, not read for its weight: it may carry an adapter
        # Each in a tensor of its own: what a backward pass saves of one would keep the others as well.
        biases = self.q_bias, self.zero_k_bias, self.v_bias
        q_BlHd, k_BlHd, v_BlHd = (
            rearrange(each_BlC + bias_C.to(qkv.dtype), "B l (H d) -> B l H d", H=self.num_heads)
            for each_BlC, bias_C in zip(qkv.chunk(3, -1), biases, strict=True)
        )
        scale_H1 = self.scale_mul_1H11.clamp_max(MAX_LOG_ATTENTION_SCALE).exp()[0, :, :, 0]
        q_BlHd = (F.normalize(q_BlHd, dim=-1) * scale_H1).to(v_BlHd.dtype)
        k_BLHd, v_BLHd = F.normalize(k_BlHd, dim=-1).to(v_BlHd.dtype), v_BlHd
        if cache is not None:
            k_BLHd, v_BLHd = cache.extend(layer, k_BLHd, v_BLHd)
        out_BlHd = AttentionByScale.apply(q_BlHd, k_BLHd, v_BLHd, lengths)
        return self.proj(rearrange(out_BlHd, "B l H d -> B l (H d)"))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and feed-forward, each scaled, shifted and gated by the condition (AdaLN)."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width = config.width
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        self.attn = Attention(width, config.num_heads)
        self.ffn = FeedForward(width, round(width * config.mlp_ratio))
        if not config.shared_adaln:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulation(self, condition_BC: Tensor, shared_B16C: Tensor | None) -> tuple[Tensor, ...]:
        if shared_B16C is not None:
            six_B16C = shared_B16C + self.ada_gss
        else:
            six_B16C = rearrange(_as_stored(self.ada_lin, condition_BC), "B (n C) -> B 1 n C", n=6)
        return six_B16C.float().unbind(2)

    def forward(
        self,
        x_BlC: Tensor,
        condition_BC: Tensor,
        shared_B16C: Tensor | None,
        lengths: tuple[int, ...],
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        modulation = None if cache is None else cache.modulations.get(layer)
        if modulation is None:
            modulation = self.modulation(condition_BC, shared_B16C)
        if cache is not None:
            cache.modulations[layer] = modulation
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        # The residual stream stays float32: in bfloat16, sampling and teacher forcing would drift apart.
        attended = self.attn(_modulate(x_BlC, scale1, shift1, self.attn.proj.weight), lengths, cache, layer)
        x_BlC = torch.addcmul(x_BlC, attended, gamma1)
        fed = self.ffn(_modulate(x_BlC, scale2, shift2, self.ffn.fc1.weight))
        return torch.addcmul(x_BlC, fed, gamma2)


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


def _as_stored(layer: nn.Module, condition_BC: Tensor) -> Tensor:
    """A modulation in the dtype of its weights, a third of the model's, whatever autocast says. It has one
    row an image: to cast the weights and their gradients would cost more than the product."""
    with torch.autocast(condition_BC.device.type, torch.bfloat16, enabled=False):
        return layer(condition_BC)


def _modulate(x_BlC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor, weight: Tensor) -> Tensor:
    """LayerNorm, then scale and shift, in the dtype of the next layer's weight."""
    return Modulated.apply(x_BlC, scale_B1C, shift_B1C).to(weight.dtype)


class AdaLNBeforeHead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BlC: Tensor, condition_BC: Tensor) -> Tensor:
        two = rearrange(_as_stored(self.ada_lin, condition_BC), "B (n C) -> n B 1 C", n=2).float()
        return Modulated.apply(x_BlC, two[0], two[1])


class Head(nn.Linear):
    """From features to logits, in float32 whatever its weights are stored in. A layer of its own, so that it
    may carry an adapter."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float(), self.bias.float())


class VAR(NextScaleModel):
    """The next-scale transformer.

    Raises:
        ValueError: the number of heads does not divide the width.
    """

    lvl_1L: Tensor
    attn_bias_for_masking: Tensor

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        if config.width % config.num_heads:
            raise ValueError(f"num_heads ({config.num_heads}) must divide width ({config.width})")
        self.config, self.num_classes = config, config.num_classes
        self.schedule = ScaleSchedule(config.scale_sizes)
        width, num_tokens = config.width, self.schedule.num_tokens
        self.pos_start = nn.Parameter(torch.empty(1, 1, width))
        self.pos_1LC = nn.Parameter(torch.empty(1, num_tokens, width))
        self.register_buffer("lvl_1L", self.schedule.scale_of_token()[None])
        # Of the official files alone, which have it: attention runs scale by scale, and needs no mask.
        self.register_buffer("attn_bias_for_masking", self.schedule.attention_bias()[None, None])
        self.word_embed = nn.Linear(config.codebook_width, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.lvl_embed = nn.Embedding(self.schedule.num_scales, width)
        if config.shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = AdaLNBeforeHead(width)
        self.head = Head(width, config.codebook_size)
        self.init_weights()

    def encode_conditions(self, conditions: Sequence[Condition]) -> Conditioning:
        """The class labels, int64; the null class is the one after the last.

        Raises:
            ConfigError: a condition without a label.
        """
        labels = [each.label for each in conditions]
        if None in labels:
            raise ConfigError(
                f"'{conditions[labels.index(None)].text}' has no class label, which this model draws by"
            )
        return self.conditioning_from_labels(torch.tensor(labels, device=self.device))

    def conditioning_from_labels(self, labels_B: Tensor) -> Conditioning:
        """The conditioning of class indices in [0, num_classes); num_classes itself is the null class."""
        null = torch.full((1,), self.num_classes, dtype=torch.long, device=labels_B.device)
        return Conditioning({"labels": labels_B}, {"labels": null})

    def in_float32(self) -> list[nn.Module]:
        """The head and all modulations."""
        named = self.named_modules()
        return [self.head, *(each for name, each in named if name.endswith(("ada_lin", "shared_ada_lin")))]

    def parts(self) -> list[list[nn.Module]]:
        """The blocks."""
        return [[block] for block in self.blocks]

    def new_cache(self) -> KVCache:
        return KVCache(self.schedule.num_tokens)

    def features(
        self, conditioning: Conditioning, inputs_BlD: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        start = 0 if cache is None else cache.num_tokens
        condition_BC = self.class_emb(conditioning["labels"])
        x_BlC = self._embed(condition_BC, inputs_BlD, start)
        lengths = self.schedule.lengths_of(start, start + x_BlC.shape[1])
        shared_B16C = None
        if self.config.shared_adaln:
            six_BC = _as_stored(self.shared_ada_lin, condition_BC)
            shared_B16C = rearrange(six_BC, "B (n C) -> B 1 n C", n=6)
        recompute = self.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        for layer, block in enumerate(cast("Iterable[Block]", self.blocks)):
            arguments = x_BlC, condition_BC, shared_B16C, lengths, cache, layer
            x_BlC = checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
        if cache is not None:
            cache.num_tokens += x_BlC.shape[1]
        return self.head_nm(x_BlC, condition_BC)

    def _embed(self, condition_BC: Tensor, inputs_BlD: Tensor, start: int) -> Tensor:
        # In one layout: a CPU rounds products of others in another way.
        inputs_BlD = inputs_BlD.to(self.word_embed.weight.dtype).contiguous()
        x_BlC = self.word_embed(inputs_BlD).float()
        if start == 0:
            first_B1C = (condition_BC[:, None] + self.pos_start).float()
            x_BlC = torch.cat([first_B1C, x_BlC], dim=1)
        at = slice(start, start + x_BlC.shape[1])
        return x_BlC + self.lvl_embed(self.lvl_1L[:, at]).float() + self.pos_1LC[:, at].float()

    def init_weights(self, adaln_std: float = 0.5, adaln_gamma_std: float = 1e-5) -> None:
        """Random weights as in the official code: every block starts near the identity.

        Args:
            adaln_std: factor on the weights of the AdaLN projections.
            adaln_gamma_std: factor on those of the gates.
        """
        std = math.sqrt(1 / self.config.width / 3)
        for parameter in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(parameter, std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            _last_weight(self.head_nm.ada_lin).mul_(adaln_std)
            for block in cast("Iterable[Block]", self.blocks):
                block.attn.proj.weight.div_(math.sqrt(2 * self.config.depth))
                block.ffn.fc2.weight.div_(math.sqrt(2 * self.config.depth))
                if not self.config.shared_adaln:
                    weight, gamma = _last_weight(block.ada_lin), 2 * self.config.width
                    weight[gamma:].mul_(adaln_std)
                    weight[:gamma].mul_(adaln_gamma_std)
                else:
                    block.ada_gss[:, :, 2:].mul_(adaln_std)
                    block.ada_gss[:, :, :2].mul_(adaln_gamma_std)


def _last_weight(layers: nn.Sequential) -> Tensor:
    """The weight of the linear layer at the end of a modulation."""
    linear = layers[-1]
    assert isinstance(linear, nn.Linear)
    return linear.weight
