"""The multi-scale residual quantizer: a latent image as S grids of tokens, coarse to fine.

Shapes: B images · S scales · L tokens of all scales · l tokens of one scale · V codebook size ·
D codebook width · h w the full latent grid

Source: VAR (arXiv 2404.02905), algorithms 1 and 2; parameter names are those of the official checkpoints.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nextscale.models.scales import ScaleSchedule

NUM_PHI = 4  # convolutions shared over the scales in every official checkpoint
PHI_RATIO = 0.5  # share of the convolution in phi(h) = (1 - r) h + r conv(h)


class Phi(nn.Conv2d):
    """Smooths an upsampled grid: (1 - r) h + r conv3x3(h)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, kernel_size=3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        return (1 - PHI_RATIO) * input + PHI_RATIO * super().forward(input)


class SharedPhi(nn.Module):
    """Four phi shared by S scales; scale k uses the one whose tick is nearest to k / (S - 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(width) for _ in range(NUM_PHI))

    def index(self, k: int, num_scales: int) -> int:
        """Which of the four phi scale k uses."""
        # With 10 scales, k = 2 and k = 7 are ties that float64 rounding decides, as in the official code: the
        # arithmetic has to stay numpy's.
        ticks = np.linspace(1 / 3 / NUM_PHI, 1 - 1 / 3 / NUM_PHI, NUM_PHI)
        return int(np.argmin(np.abs(ticks - k / max(num_scales - 1, 1))))

    def forward(self, h_BDhw: Tensor, k: int, num_scales: int) -> Tensor:
        return self.qresi_ls[self.index(k, num_scales)](h_BDhw)


def enlarged(h_BDhw: Tensor, size: int) -> Tensor:
    """Grids of `size` by `size`, interpolated bicubically."""
    if not h_BDhw.is_cuda:
        return F.interpolate(h_BDhw, (size, size), mode="bicubic")
    # CUDA's kernel takes as long as the transformer's feed-forward layers, and its gradient is not the same
    # twice. Columns and rows are each a product with the same weights.
    weights_hw = _bicubic_weights(h_BDhw.shape[-1], size, h_BDhw.device)
    with torch.autocast("cuda", enabled=False):
        return ((h_BDhw.float() @ weights_hw.T).mT @ weights_hw.T).mT.contiguous()


@cache
def _bicubic_weights(size_in: int, size_out: int, device: torch.device) -> Tensor:
    """(h_out, h_in) what each of the rows is made of."""
    with torch.inference_mode(False):  # kept, and used in training as well
        eye_11hw = torch.eye(size_in, device="cpu")[None, None]
        return F.interpolate(eye_11hw, (size_out, size_in), mode="bicubic")[0, 0].to(device)


class MultiScaleQuantizer(nn.Module):
    """Codebook and smoothing convolutions, which turn latents into tokens and back.

    Args:
        codebook_size: V, number of codes.
        width: D, width of a code and number of channels of the latent.
        schedule: the token grids; the last has the size of the latent.
    """

    ema_vocab_hit_SV: Tensor

    def __init__(self, codebook_size: int, width: int, schedule: ScaleSchedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.quant_resi = SharedPhi(width)
        # Codebook usage in the official training: unused here, kept so that checkpoints match key for key.
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(schedule.num_scales, codebook_size))
        self.embedding = nn.Embedding(codebook_size, width)

    def empty_latent(self, num_images: int) -> Tensor:
        """(B, D, h, w) zeros, the latent before the first scale."""
        size = self.schedule.sizes[-1]
        weight = self.embedding.weight
        return weight.new_zeros(num_images, weight.shape[1], size, size)

    def add_scale(self, f_hat_BDhw: Tensor, tokens_Bl: Tensor, k: int) -> Tensor:
        """(B, D, h, w): the accumulated latent after scale k, f_hat + phi(upsample(embed(tokens)))."""
        return f_hat_BDhw + self._spread(self.embedding(tokens_Bl), k)

    def next_inputs(self, f_hat_BDhw: Tensor, k: int) -> Tensor:
        """(B, l, D): the accumulated latent downsampled to the grid of scale k, the transformer's input."""
        size = self.schedule.sizes[k]
        return rearrange(F.interpolate(f_hat_BDhw, (size, size), mode="area"), "B D h w -> B (h w) D")

    def tokens_to_latent(self, tokens_BL: Tensor) -> Tensor:
        """(B, L) tokens to the (B, D, h, w) latent that the decoder takes."""
        return self.codes_to_latent(self.embedding(tokens_BL))

    def codes_to_latent(self, codes_BLD: Tensor) -> Tensor:
        """(B, L, D) codes, of the codebook or any others, to the (B, D, h, w) latent that they add up to: an
        affine function, whatever the scales."""
        f_hat_BDhw = self.empty_latent(len(codes_BLD))
        for k, part in enumerate(self.schedule.slices):
            f_hat_BDhw = f_hat_BDhw + self._spread(codes_BLD[:, part], k)
        return f_hat_BDhw

    def tokens_to_inputs(self, tokens_BL: Tensor) -> Tensor:
        """(B, L) tokens to the (B, L - 1, D) teacher-forcing inputs of scales 2 to S."""
        f_hat_BDhw, inputs = self.empty_latent(len(tokens_BL)), []
        for k, part in enumerate(self.schedule.slices[:-1]):
            f_hat_BDhw = self.add_scale(f_hat_BDhw, tokens_BL[:, part], k)
            inputs.append(self.next_inputs(f_hat_BDhw, k + 1))
        if not inputs:
            return self.embedding.weight.new_zeros(len(tokens_BL), 0, self.embedding.embedding_dim)
        return torch.cat(inputs, dim=1)

    @torch.no_grad()
    def encode(self, f_BDhw: Tensor) -> Tensor:
        """(B, D, h, w) latent to (B, L) tokens; each scale takes the codes nearest to the residual so far."""
        rest_BDhw, tokens = f_BDhw, []
        for k in range(self.schedule.num_scales):
            tokens_Bl = self._nearest(rest_BDhw, k)
            rest_BDhw = rest_BDhw - self._spread(self.embedding(tokens_Bl), k)
            tokens.append(tokens_Bl)
        return torch.cat(tokens, dim=1)

    def forward(self, f_BDhw: Tensor, commitment: float = 0.25) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize with a straight-through gradient, for training a tokenizer.

        Args:
            commitment: weight of the commitment loss.

        Returns:
            the quantized latent (B, D, h, w), the tokens (B, L), and the sum of codebook and commitment loss,
            a mean over scales and elements.
        """
        f_hat_BDhw, tokens, loss = torch.zeros_like(f_BDhw), [], f_BDhw.new_zeros(())
        for k in range(self.schedule.num_scales):
            tokens_Bl = self._nearest((f_BDhw - f_hat_BDhw).detach(), k)
            f_hat_BDhw = self.add_scale(f_hat_BDhw, tokens_Bl, k)
            loss = loss + F.mse_loss(f_hat_BDhw, f_BDhw.detach())
            loss = loss + commitment * F.mse_loss(f_hat_BDhw.detach(), f_BDhw)
            tokens.append(tokens_Bl)
        straight_through = f_BDhw + (f_hat_BDhw - f_BDhw).detach()
        return straight_through, torch.cat(tokens, dim=1), loss / self.schedule.num_scales

    def _nearest(self, rest_BDhw: Tensor, k: int) -> Tensor:
        size = self.schedule.sizes[k]
        if k != self.schedule.num_scales - 1:
            rest_BDhw = F.interpolate(rest_BDhw, (size, size), mode="area")
        z_ND = rearrange(rest_BDhw, "B D h w -> (B h w) D")
        e_VD = self.embedding.weight.detach()
        distance_NV = z_ND.square().sum(1, keepdim=True) + e_VD.square().sum(1)
        distance_NV = torch.addmm(distance_NV, z_ND, e_VD.T, alpha=-2)
        return rearrange(distance_NV.argmin(1), "(B l) -> B l", l=size * size)

    def _spread(self, codes_BlD: Tensor, k: int) -> Tensor:
        """(B, D, h, w): what the codes of scale k add to the latent."""
        size, full = self.schedule.sizes[k], self.schedule.sizes[-1]
        h_BDhw = rearrange(codes_BlD, "B (h w) D -> B D h w", h=size)
        if k != self.schedule.num_scales - 1:
            h_BDhw = enlarged(h_BDhw, full)
        return self.quant_resi(h_BDhw, k, self.schedule.num_scales)
