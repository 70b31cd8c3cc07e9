"""Randomness that depends on names, not on order: every draw has a generator made from what it is for."""

import hashlib

import torch


def derive_seed(*path: int | str) -> int:
    """A 63-bit seed that is a pure function of `path`, such as ("rollout", seed, step, group)."""
    text = "/".join(str(part) for part in path)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator_for(*path: int | str) -> torch.Generator:
    """A CPU generator seeded by `path`: the same numbers on every device and in every process."""
    return torch.Generator().manual_seed(derive_seed(*path))


def group_uniforms(num_images: int, num_tokens: int, *path: int | str) -> torch.Tensor:
    """One uniform number in [0, 1) for each token of a group's images.

    They decide every token of the group by inversion of its distribution, so a group's images depend on
    `path` (seed, step, index of the group) alone: not on the batch, the process or the device.

    Returns:
        (num_images, num_tokens) float32 on the CPU.
    """
    return torch.rand(num_images, num_tokens, generator=generator_for(*path))
