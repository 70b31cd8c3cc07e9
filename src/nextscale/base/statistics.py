"""Statistics that leave out what was not scored (NaN)."""

import torch
from torch import Tensor


def centred(values: Tensor) -> Tensor:
    """Values less their mean along the last axis; 0 where there is none."""
    # From the largest, not from 0: a mean rounds, and equal values would not centre to exactly 0.
    is_scored = ~values.isnan()
    shifted = values - values.masked_fill(~is_scored, float("-inf")).amax(-1, keepdim=True)
    count = is_scored.sum(-1, keepdim=True).clamp_min(1)
    mean = torch.where(is_scored, shifted, 0.0).sum(-1, keepdim=True) / count
    return torch.where(is_scored, shifted - mean, 0.0)


def deviation(values: Tensor) -> Tensor:
    """Sample standard deviation (n - 1) along the last axis, of shape (..., 1); 0 of fewer than two
    values."""
    degrees = (~values.isnan()).sum(-1, keepdim=True) - 1
    return (centred(values).square().sum(-1, keepdim=True) / degrees.clamp_min(1)).sqrt()


def standard_error(values: Tensor) -> Tensor:
    """Of the mean along the last axis, of shape (..., 1); 0 of fewer than two values."""
    return deviation(values) / (~values.isnan()).sum(-1, keepdim=True).clamp_min(1).sqrt()
