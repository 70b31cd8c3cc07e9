"""Statistics that ignore NaN, the score of an image that was not scored."""

import torch
from torch import Tensor


def centred(values: Tensor) -> Tensor:
    """Values minus their mean along the last axis; 0 in place of NaN."""
    # Shift by the maximum first: a mean rounds, and equal values would not centre to exactly 0.
    is_scored = ~values.isnan()
    shifted = values - values.masked_fill(~is_scored, float("-inf")).amax(-1, keepdim=True)
    count = is_scored.sum(-1, keepdim=True).clamp_min(1)
    mean = torch.where(is_scored, shifted, 0.0).sum(-1, keepdim=True) / count
    return torch.where(is_scored, shifted - mean, 0.0)


def deviation(values: Tensor) -> Tensor:
    """Sample standard deviation (n - 1) along the last axis, shape (..., 1); 0 for fewer than two values."""
    degrees = (~values.isnan()).sum(-1, keepdim=True) - 1
    return (centred(values).square().sum(-1, keepdim=True) / degrees.clamp_min(1)).sqrt()


def standard_error(values: Tensor) -> Tensor:
    """Standard error of the mean along the last axis, shape (..., 1); 0 for fewer than two values."""
    return deviation(values) / (~values.isnan()).sum(-1, keepdim=True).clamp_min(1).sqrt()
