"""Switti: a text-conditional next-scale transformer, with cross-attention to the prompt's tokens.

Shapes: B images · S scales · L tokens of all scales · l tokens of the scales at hand · T tokens of a text ·
V codebook size · C width · D codebook width · E width of the texts' tokens · P width of a pooled text ·
H heads · d width of a head

Source: Switti (arXiv 2412.01819); parameter names are those of the published files.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from nextscale.base.compiling import Fusible
from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.base.records import Record
from nextscale.models.attention import AttentionByScale, KVCache
from nextscale.models.layers import NORM_EPS, as_stored, last_weight
from nextscale.models.protocol import Conditioning
from nextscale.models.scales import ScaleSchedule, ScaleSizes
from nextscale.models.texts import SWITTI_ENCODERS, TextEncoder, TokensAndPooled
from nextscale.models.transformer import BlockTransformer, init_adaln

CROP_SIZE = 512
"""Side of the square that training images were cropped to, in pixels; of the models at 1024 px as well."""


NUM_TEXT_TOKENS = 77
"""Of a text, in the published models: padded, or cut."""


class SwittiConfig(Record):
    """Sizes of a Switti transformer. The defaults are those of the published model at 512 px."""

    depth: int = Field(default=30, gt=0)
    """Number of transformer blocks."""
    width: int = Field(default=1920, gt=0)
    """Transformer width, C."""
    num_heads: int = Field(default=30, gt=0)
    """Number of attention heads, H; must divide the width."""
    ffn_width: int = Field(default=5120, gt=0)
    """Hidden width of the feed-forward layers."""
    context_width: int = Field(default=2048, gt=0)
    """Width of a text's tokens, E: both encoders' side by side."""
    pooled_width: int = Field(default=1280, gt=0)
    """Width of a pooled text, P."""
    codebook_size: int = Field(default=4096, gt=0)
    """Number of codes, V."""
    codebook_width: int = Field(default=32, gt=0)
    """Width of a code, D."""
    scale_sizes: ScaleSizes = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
    """Side lengths of the token grids, coarse to fine."""
    is_causal: bool = False
    """Whether tokens attend to coarser scales too, or to their own alone; `use_ar` in the published files."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the frequencies of the rotary embedding."""
    rope_size: float = Field(default=128.0, gt=0)
    """Span of positions over the side of every scale."""
    text_encoders: tuple[str, ...] = SWITTI_ENCODERS
    """The text models, each a folder or a hub repository. All give tokens, and the last the pooled text."""

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.width % (4 * self.num_heads):
            raise ValueError(
                f"width ({self.width}) must be a multiple of 4 times num_heads ({self.num_heads}): a head "
                "turns pairs by column and by row"
            )
        if self.width % 8:
            raise ValueError(f"width must be a multiple of 8, got {self.width}")
        return self


class RMSNorm(nn.Module):
    """Division by the root mean square, in float32, then a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), NORM_EPS)


def normed_heads(x_BlC: Tensor, num_heads: int) -> Tensor:
    """(B, l, H, d) float32 queries or keys: normalised over the whole width, then split into heads."""
    normed_BlC = F.layer_norm(x_BlC.float(), x_BlC.shape[-1:], eps=NORM_EPS)
    return rearrange(normed_BlC, "B l (H d) -> B l H d", H=num_heads)


def rope_table(
    scale_l: Tensor, start: int, schedule: ScaleSchedule, head_width: int, theta: float, size: float
) -> Tensor:
    """(2, l, d / 2) cosines and sines: by what each pair of a head's numbers is turned, token by token.

    The first half of the pairs turns with the column, the other with the row; every scale spans 0 to `size`.

    Args:
        scale_l: index of each token's scale.
        start: position of the first of them among all tokens.
    """
    device = scale_l.device
    sides = torch.tensor(schedule.sizes, device=device)
    starts = torch.tensor([part.start for part in schedule.slices], device=device)
    side_l = sides[scale_l]
    place_l = start + torch.arange(len(scale_l), device=device) - starts[scale_l]
    # A side of 1 has the one place 0, whatever it is divided by.
    step_l = size / (side_l - 1).clamp_min(1).float()
    column_l, row_l = (place_l % side_l) * step_l, (place_l // side_l) * step_l
    frequencies = theta ** (-4 * torch.arange(head_width // 4, device=device).float() / head_width)
    angles = torch.cat([column_l[:, None] * frequencies, row_l[:, None] * frequencies], 1)
    return torch.stack([angles.cos(), angles.sin()])


def turned(x_BlHd: Tensor, rope_2lp: Tensor) -> Tensor:
    """Adjacent pairs of a head's numbers, turned by the angles of their token."""
    cos_l1p, sin_l1p = rope_2lp[:, :, None]
    even_BlHp, odd_BlHp = x_BlHd[..., ::2], x_BlHd[..., 1::2]
    pairs = even_BlHp * cos_l1p - odd_BlHp * sin_l1p, even_BlHp * sin_l1p + odd_BlHp * cos_l1p
    return torch.stack(pairs, -1).flatten(-2)


class SelfAttention(nn.Module):
    """The weights of attention among a scale's tokens, and in causal models to coarser ones, with rotary
    embedding. The block runs it."""

    def __init__(self, config: SwittiConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.to_qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def queries_keys_values(self, x_BlC: Tensor, rope_2lp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each (B, l, H, d)."""
        q_BlC, k_BlC, v_BlC = self.to_qkv(x_BlC).chunk(3, -1)
        v_BlHd = rearrange(v_BlC, "B l (H d) -> B l H d", H=self.num_heads)
        q_BlHd, k_BlHd = (turned(normed_heads(each, self.num_heads), rope_2lp) for each in (q_BlC, k_BlC))
        # The attention below divides by nothing: here by the root of a head's width.
        q_BlHd = (q_BlHd * q_BlHd.shape[-1] ** -0.5).to(v_BlHd.dtype)
        return q_BlHd, k_BlHd.to(v_BlHd.dtype), v_BlHd


class CrossAttention(nn.Module):
    """Attention to the tokens of the text."""

    def __init__(self, config: SwittiConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.to_q = nn.Linear(config.width, config.width)
        self.to_kv = nn.Linear(config.context_width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def keys_and_values(self, context_BTE: Tensor) -> tuple[Tensor, Tensor]:
        """Each (B, T, H, d)."""
        k_BTC, v_BTC = self.to_kv(context_BTE).chunk(2, -1)
        v_BTHd = rearrange(v_BTC, "B T (H d) -> B T H d", H=self.num_heads)
        return normed_heads(k_BTC, self.num_heads).to(v_BTHd.dtype), v_BTHd

    def forward(self, x_BlC: Tensor, k_BTHd: Tensor, v_BTHd: Tensor, bias_BT: Tensor) -> Tensor:
        q_BlHd = normed_heads(self.to_q(x_BlC), self.num_heads).to(v_BTHd.dtype)
        q, k, v = (each.transpose(1, 2) for each in (q_BlHd, k_BTHd, v_BTHd))
        bias_B11T = bias_BT[:, None, None].to(q.dtype)
        out_BHld = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_B11T)
        return self.proj(rearrange(out_BHld, "B H l d -> B l (H d)"))


class GatedFeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SwittiBlock(Fusible):
    """Self-attention, cross-attention and feed-forward, each between two norms. The first and the last are
    scaled, shifted and gated by the condition."""

    def __init__(self, config: SwittiConfig) -> None:
        super().__init__()
        width = config.width
        self.is_causal = config.is_causal
        self.attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config)
        self.ffn = GatedFeedForward(width, config.ffn_width)
        self.self_attention_norm1, self.self_attention_norm2 = RMSNorm(width), RMSNorm(width)
        self.cross_attention_norm1, self.cross_attention_norm2 = RMSNorm(width), RMSNorm(width)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(width), RMSNorm(width)
        self.attention_y_norm = RMSNorm(config.context_width)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.crop_cond_scales = nn.Parameter(torch.zeros(1, width))

    def of_condition(self, condition_BC: Tensor, crop_BC: Tensor, context_BTE: Tensor) -> tuple[Tensor, ...]:
        """What the conditions alone decide: six modulations, (B, 1, C), then the text's keys and values."""
        six = as_stored(self.ada_lin, condition_BC + self.crop_cond_scales * crop_BC)
        modulations = rearrange(six, "B (n C) -> n B 1 C", n=6).float().unbind(0)
        context_BTE = self.attention_y_norm(context_BTE).to(self.cross_attn.to_kv.weight.dtype)
        return *modulations, *self.cross_attn.keys_and_values(context_BTE)

    def forward(
        self,
        x_BlC: Tensor,
        condition_BC: Tensor,
        crop_BC: Tensor,
        context_BTE: Tensor,
        bias_BT: Tensor,
        rope_2lp: Tensor,
        lengths: tuple[int, ...],
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        held = None if cache is None else cache.of_conditions.get(layer)
        if held is None:
            held = self.of_condition(condition_BC, crop_BC, context_BTE)
        if cache is not None:
            cache.of_conditions[layer] = held
        gamma1, gamma2, scale1, scale2, shift1, shift2, k_BTHd, v_BTHd = held
        attended_BlHd = self.attended(x_BlC, scale1, shift1, rope_2lp, lengths, cache, layer)
        x_BlC = self.fused(SwittiBlock.after_attention, x_BlC, attended_BlHd, gamma1)
        in_BlC = self.cross_attention_norm1(x_BlC).to(self.attn.proj.weight.dtype)
        crossed_BlC = self.cross_attn(in_BlC, k_BTHd, v_BTHd, bias_BT)
        return self.fused(SwittiBlock.after_text, x_BlC, crossed_BlC, gamma2, scale2, shift2)

    def attended(
        self,
        x_BlC: Tensor,
        scale_B1C: Tensor,
        shift_B1C: Tensor,
        rope_2lp: Tensor,
        lengths: tuple[int, ...],
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        """(B, l, H, d) what each token saw in its own scale, and in causal models in coarser ones."""
        before = SwittiBlock.before_attention
        q_BlHd, k_BLHd, v_BLHd = self.fused(before, x_BlC, scale_B1C, shift_B1C, rope_2lp)
        if cache is not None and self.is_causal:
            k_BLHd, v_BLHd = cache.extend(layer, k_BLHd, v_BLHd)
        return AttentionByScale.apply(q_BlHd, k_BLHd, v_BLHd, lengths, self.is_causal)

    def before_attention(
        self, x_BlC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor, rope_2lp: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, l, H, d) queries, keys and values."""
        in_BlC = torch.addcmul(shift_B1C, self.self_attention_norm1(x_BlC), scale_B1C + 1)
        return self.attn.queries_keys_values(in_BlC.to(self.attn.proj.weight.dtype), rope_2lp)

    def after_attention(self, x_BlC: Tensor, attended_BlHd: Tensor, gamma_B1C: Tensor) -> Tensor:
        """(B, l, C) with what the images' tokens saw in each other."""
        # The residual stream stays float32: in bfloat16, sampling and teacher forcing would drift apart.
        attended_BlC = self.attn.proj(rearrange(attended_BlHd, "B l H d -> B l (H d)"))
        return torch.addcmul(x_BlC, self.self_attention_norm2(attended_BlC), gamma_B1C)

    def after_text(
        self, x_BlC: Tensor, crossed_BlC: Tensor, gamma_B1C: Tensor, scale_B1C: Tensor, shift_B1C: Tensor
    ) -> Tensor:
        """(B, l, C) what the block adds up to, given what was seen in the text."""
        x_BlC = x_BlC + self.cross_attention_norm2(crossed_BlC)
        in_BlC = torch.addcmul(shift_B1C, self.ffn_norm1(x_BlC), scale_B1C + 1)
        fed_BlC = self.ffn_norm2(self.ffn(in_BlC.to(self.attn.proj.weight.dtype)))
        return torch.addcmul(x_BlC, fed_BlC, gamma_B1C)


class CropEmbedding(nn.Module):
    """Four integers, the crop that an image would have been trained as, as Fourier features.

    The frequencies are random and fixed. Phases reach thousands of radians, so they stay float32 in a model
    of any dtype: in bfloat16 the features are noise.

    Source: `GaussianFourierProjection` of diffusers, as the published code calls it; the order of the
    products decides the last digits, and with them the phases.
    """

    weight: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(width))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = self.weight
        super()._apply(fn, recurse)
        if self.weight.is_floating_point() and self.weight.dtype != before.dtype:
            self.weight = before.to(self.weight.device)
        return self

    def forward(self, crop_B4: Tensor) -> Tensor:
        """(B, 8 w) float32, for w frequencies: sines, then cosines, of one integer after the other."""
        phases_B4w = crop_B4.float()[..., None] * self.weight * 2 * math.pi
        return torch.cat([phases_B4w.sin(), phases_B4w.cos()], -1).flatten(1)


def crops_of(image_sizes: Tensor | Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Tensor:
    """(B, 4) int64: (height, width) scaled to a short side of 512, then top and left of a central crop.

    Args:
        image_sizes: (B, 2) heights and widths in pixels.

    Source: the published code, which computes in float32 and truncates: the short side may become 511.
    """
    sizes_B2 = torch.as_tensor(image_sizes).float().cpu()
    scaled_B2 = (sizes_B2 * (CROP_SIZE / sizes_B2.amin(1, keepdim=True))).long()
    corners_B2 = ((scaled_B2 - CROP_SIZE) // 2).clamp_min(0)
    return torch.cat([scaled_B2, corners_B2], 1).to(device)


class Switti(BlockTransformer):
    """The text-conditional next-scale transformer.

    Attributes:
        text_encoder: what turns prompts into embeddings; loaded with the first prompt.
    """

    FLOAT32_TENSORS = frozenset({"crop_embed.weight"})
    NOT_NEEDED = frozenset({"attn_bias_for_masking"})  # built from `is_causal`: the files' cannot be trusted

    LORA_TARGETS = ("to_qkv", "to_q", "to_kv", "proj", "up_proj", "gate_proj", "down_proj")

    config: SwittiConfig

    def __init__(self, config: SwittiConfig, text_encoder: TextEncoder | None = None) -> None:
        super().__init__(config)
        self.text_encoder = text_encoder or TokensAndPooled(config.text_encoders)
        width = config.width
        self.text_pooler = nn.Linear(config.pooled_width, width)
        self.lvl_embed = nn.Embedding(self.schedule.num_scales, width)
        self.crop_embed = CropEmbedding(width // 8)
        self.crop_proj = nn.Linear(width, width)
        self.add_blocks(SwittiBlock(config) for _ in range(config.depth))

    def encode_conditions(self, conditions: Sequence[Condition]) -> Conditioning:
        """The embeddings of the prompts, as of square images.

        Raises:
            CheckpointError: the text encoders cannot be loaded.
        """
        texts = self.text_encoder([each.text for each in conditions], self.device)
        null = self.text_encoder([""], self.device)
        return self.conditioning_from_embeddings(
            **texts, **{f"null_{name}": each for name, each in null.items()}
        )

    def conditioning_from_embeddings(
        self,
        context: Tensor,
        pooled: Tensor,
        bias: Tensor,
        image_sizes: Tensor | Sequence[Sequence[int]] | None = None,
        *,
        null_context: Tensor | None = None,
        null_pooled: Tensor | None = None,
        null_bias: Tensor | None = None,
    ) -> Conditioning:
        """The conditioning of B images by the embeddings of their prompts.

        Args:
            context: (B, T, E) the encoders' last hidden states, side by side.
            pooled: (B, P) the second encoder's pooled text.
            bias: (B, T) added to the attention's logits: 0 for the tokens of the text, -inf for padding.
            image_sizes: (B, 2) heights and widths of the training images to draw like; square by default, as
                published samples are drawn.
            null_context, null_pooled, null_bias: the same of the empty prompt, or of a negative one,
                (1, ...) or (B, ...); guidance needs them.

        Raises:
            ConfigError: a shape does not fit, or some of the null prompt's are missing.
        """
        config, device = self.config, self.device
        null = {"context": null_context, "pooled": null_pooled, "bias": null_bias}
        missing = [f"null_{name}" for name, each in null.items() if each is None]
        if 0 < len(missing) < len(null):
            raise ConfigError(f"the null prompt lacks {' and '.join(missing)}: give all three, or none")
        widths = {"context": (3, config.context_width), "pooled": (2, config.pooled_width), "bias": (2, None)}
        tensors = {"context": context, "pooled": pooled, "bias": bias}
        for name, each in [*tensors.items(), *((name, each) for name, each in null.items())]:
            ndim, width = widths[name]
            if each is not None and (each.ndim != ndim or width not in (None, each.shape[-1])):
                expected = "(B, T)" if width is None else f"(B, {'T, ' if ndim == 3 else ''}{width})"
                raise ConfigError(f"{name} has shape {tuple(each.shape)}, expected {expected}")
        sizes = [(CROP_SIZE, CROP_SIZE)] * len(pooled) if image_sizes is None else image_sizes
        tensors["crop"] = crops_of(sizes, device)
        if len({len(each) for each in tensors.values()}) != 1:
            lengths = ", ".join(f"{name} {len(each)}" for name, each in tensors.items())
            raise ConfigError(f"expected one row for each image, got {lengths}")
        return Conditioning(
            {name: each.to(device) for name, each in tensors.items()},
            {name: each.to(device) for name, each in null.items() if each is not None},
        )

    def blank_conditions(self, num_images: int) -> Conditioning:
        config, num_tokens = self.config, NUM_TEXT_TOKENS
        context = torch.zeros(num_images, num_tokens, config.context_width)
        pooled, bias = torch.zeros(num_images, config.pooled_width), torch.zeros(num_images, num_tokens)
        null = {"null_context": context[:1], "null_pooled": pooled[:1], "null_bias": bias[:1]}
        return self.conditioning_from_embeddings(context, pooled, bias, **null)

    def in_float32(self) -> list[nn.Module]:
        """The head, and all that has one row an image."""
        modulations = [each for name, each in self.named_modules() if name.endswith("ada_lin")]
        return [self.head, self.text_pooler, self.crop_proj, *modulations]

    @property
    def num_cached(self) -> int:
        """The text's tokens, and in causal models those of all scales."""
        return NUM_TEXT_TOKENS + (self.schedule.num_tokens if self.config.is_causal else 0)

    def condition(self, conditioning: Conditioning) -> Tensor:
        return as_stored(self.text_pooler, conditioning["pooled"].to(self.text_pooler.weight.dtype))

    def shared_inputs(
        self, conditioning: Conditioning, condition_BC: Tensor, at: slice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The crop, (B, C), the text's tokens and their bias, and the angles of the tokens at hand."""
        crop_BE = self.crop_embed(conditioning["crop"]).to(self.crop_proj.weight.dtype)
        crop_BC = as_stored(self.crop_proj, crop_BE)
        head_width = self.config.width // self.config.num_heads
        theta, size = self.config.rope_theta, self.config.rope_size
        rope_2lp = rope_table(self.lvl_1L[0, at], at.start, self.schedule, head_width, theta, size)
        return crop_BC, conditioning["context"], conditioning["bias"], rope_2lp

    def init_block(self, block: SwittiBlock, adaln_std: float, adaln_gamma_std: float) -> None:
        init_adaln(last_weight(block.ada_lin), adaln_std, adaln_gamma_std)
        # No gate: the norm after it makes even a small output as large as its weight.
        block.cross_attention_norm2.weight.fill_(0.1)
