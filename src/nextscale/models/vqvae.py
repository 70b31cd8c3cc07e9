"""The multi-scale VQVAE: from images to grids of tokens and back.

Shapes: B images · L tokens of all scales · D codebook width · h w the latent grid · H W pixels

Source: VAR (arXiv 2404.02905) on the encoder and decoder of VQGAN (arXiv 2012.09841); parameter names are
those of the official checkpoint `vae_ch160v4096z32.pth`.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from nextscale.base.compiling import Fusible
from nextscale.base.errors import ConfigError
from nextscale.base.records import Record
from nextscale.models.quantizer import MultiScaleQuantizer
from nextscale.models.scales import ScaleSchedule, ScaleSizes

NORM_GROUPS = 32


class VQVAEConfig(Record):
    """Sizes of a VQVAE. The defaults are those of the official checkpoint."""

    codebook_size: int = Field(default=4096, gt=0)
    """Number of codes, V."""
    codebook_width: int = Field(default=32, gt=0)
    """Width of a code and number of channels of the latent, D."""
    base_channels: int = Field(default=160, gt=0, multiple_of=NORM_GROUPS)
    """Channels at full resolution."""
    channel_multipliers: tuple[int, ...] = Field(default=(1, 1, 2, 2, 4), min_length=1)
    """Channels of each level, as multiples of the base; every level but the last halves the resolution."""
    num_res_blocks: int = Field(default=2, gt=0)
    """Residual blocks per level of the encoder; the decoder has one more in each."""
    scale_sizes: ScaleSizes = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Side lengths of the token grids, coarse to fine."""

    @property
    def image_size(self) -> int:
        """Side length of the images in pixels."""
        return self.scale_sizes[-1] * 2 ** (len(self.channel_multipliers) - 1)


def check_same_grids(transformer: Any, tokenizer: VQVAEConfig) -> None:
    """Check that a transformer predicts the tokens of this tokenizer.

    Args:
        transformer: the sizes of a transformer of any family.

    Raises:
        ConfigError: their codebooks or scales differ.
    """
    for name in ("codebook_size", "codebook_width", "scale_sizes"):
        ours, theirs = getattr(transformer, name), getattr(tokenizer, name)
        if ours != theirs:
            raise ConfigError(f"the transformer has {name} {ours}, but the tokenizer has {theirs}")


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


def _conv3(width_in: int, width_out: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, kernel_size=3, padding=1)


class ResBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(width_in)
        self.conv1 = _conv3(width_in, width_out)
        self.norm2 = _norm(width_out)
        self.conv2 = _conv3(width_out, width_out)
        self.nin_shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class SpatialAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x)), "B (n C) h w -> n B 1 (h w) C", n=3)
        h = F.scaled_dot_product_attention(q, k, v)  # the default scale is C^-0.5
        return x + self.proj_out(rearrange(h, "B 1 (h w) C -> B C h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # pads right and bottom only, as the official code does


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(width, width)
        self.attn_1 = SpatialAttention(width)
        self.block_2 = ResBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks at one resolution (with attention after each at the lowest), then a resampling."""

    def __init__(self, width_in: int, width_out: int, num_blocks: int, *, has_attention: bool) -> None:
        super().__init__()
        widths = [width_in] + [width_out] * num_blocks
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(SpatialAttention(width_out) for _ in range(num_blocks * has_attention))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in (1, *config.channel_multipliers)]
        last = len(config.channel_multipliers) - 1
        self.conv_in = _conv3(3, config.base_channels)
        self.down = nn.ModuleList()
        for i in range(last + 1):
            level = Level(widths[i], widths[i + 1], config.num_res_blocks, has_attention=i == last)
            if i != last:
                level.downsample = Downsample(widths[i + 1])
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv3(widths[-1], config.codebook_width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if (downsample := getattr(level, "downsample", None)) is not None:
                x = downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(Fusible):
    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        last = len(widths) - 1
        self.conv_in = _conv3(config.codebook_width, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()  # up[0] is the finest, as in the official keys, so it runs last
        for i in range(last + 1):
            width_in = widths[min(i + 1, last)]
            level = Level(width_in, widths[i], config.num_res_blocks + 1, has_attention=i == last)
            if i != 0:
                level.upsample = Upsample(widths[i])
            self.up.append(level)
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv3(widths[0], 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(Decoder.decoded, x, dynamic=None)

    def decoded(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
            if (upsample := getattr(level, "upsample", None)) is not None:
                x = upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQVAE(nn.Module):
    """The tokenizer of a next-scale model."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule = ScaleSchedule(config.scale_sizes)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = MultiScaleQuantizer(config.codebook_size, config.codebook_width, self.schedule)
        self.quant_conv = _conv3(config.codebook_width, config.codebook_width)
        self.post_quant_conv = _conv3(config.codebook_width, config.codebook_width)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] to (B, L) int64 tokens.

        Raises:
            ValueError: the images are not of the model's size.
        """
        size = self.config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(f"images must have shape (B, 3, {size}, {size}), got {tuple(images.shape)}")
        return self.quantize.encode(self.images_to_latent(images))

    def images_to_latent(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] to the (B, D, h, w) latent before quantization."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.quant_conv(self.encoder(images * 2 - 1)).contiguous()

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor) -> Tensor:
        """(B, L) tokens to (B, 3, H, W) float32 images in [0, 1]."""
        return self.latent_to_images(self.quantize.tokens_to_latent(tokens_BL))

    def latent_to_images(self, f_hat_BDhw: Tensor) -> Tensor:
        """(B, D, h, w) quantized latent to (B, 3, H, W) float32 images in [0, 1]."""
        # Channels last: convolutions are then up to twice as fast, as no layer changes the layout.
        f_hat_BDhw = f_hat_BDhw.contiguous(memory_format=torch.channels_last)
        images = self.decoder(self.post_quant_conv(f_hat_BDhw)).clamp(-1, 1)
        return images.float().add(1).mul(0.5).contiguous()

    @property
    def codebook(self) -> Tensor:
        """(V, D) the code of each token."""
        return self.quantize.embedding.weight

    def codes_to_latent(self, codes_BLD: Tensor) -> Tensor:
        """(B, L, D) codes to the (B, D, h, w) latent that they add up to."""
        return self.quantize.codes_to_latent(codes_BLD)

    def empty_latent(self, num_images: int) -> Tensor:
        """(B, D, h, w) zeros: the latent before the first scale."""
        return self.quantize.empty_latent(num_images)

    def add_scale(self, f_hat_BDhw: Tensor, tokens_Bl: Tensor, k: int) -> Tensor:
        """The accumulated latent after scale k."""
        return self.quantize.add_scale(f_hat_BDhw, tokens_Bl, k)

    def next_inputs(self, f_hat_BDhw: Tensor, k: int) -> Tensor:
        """(B, l, D): what the transformer sees at scale k of the latent accumulated so far."""
        return self.quantize.next_inputs(f_hat_BDhw, k)

    @torch.no_grad()
    def tokens_to_inputs(self, tokens_BL: Tensor) -> Tensor:
        """(B, L) tokens to the (B, L - 1, D) teacher-forcing inputs of scales 2 to S."""
        return self.quantize.tokens_to_inputs(tokens_BL)
