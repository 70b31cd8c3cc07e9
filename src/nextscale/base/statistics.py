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


def standard_error(values_N: Tensor, group_N: Tensor | None = None) -> Tensor:
    """() Standard error of the mean; 0 for fewer than two values, or groups.

    Args:
        values_N: values, or NaN.
        group_N: number of the group that a value is of, from 0, where those of one group depend on each
            other, as distances between its members do; by default none does.

    Source: the cluster-robust variance of a mean (Cameron and Miller 2015, "A Practitioner's Guide to
    Cluster-Robust Inference"), with the factor n / (n - 1) of n groups.
    """
    is_scored_N = ~values_N.isnan()
    sums, counts = centred(values_N), is_scored_N.long()
    if group_N is not None:
        zeros = torch.zeros(int(group_N.max()) + 1)
        sums = zeros.to(sums).index_add(0, group_N, sums)
        counts = zeros.to(counts).index_add(0, group_N, counts)
    num, num_groups = counts.sum(), (counts > 0).sum()
    factor = num_groups / (num_groups - 1).clamp_min(1)
    return torch.where(num_groups > 1, (factor * sums.square().sum()).sqrt() / num.clamp_min(1), 0.0)
