"""Random numbers that depend on names, not on order: each draw gets a generator seeded by its purpose."""

import hashlib

import torch


def derive_seed(*path: int | str) -> int:
    """A 63-bit seed, a pure function of `path`, such as ("rollout", seed, step, group)."""
    text = "/".join(str(part) for part in path)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator_for(*path: int | str) -> torch.Generator:
    """A CPU generator seeded by `path`; gives the same numbers on every device and in every process."""
    return torch.Generator().manual_seed(derive_seed(*path))


def group_uniforms(num_images: int, num_tokens: int, *path: int | str) -> torch.Tensor:
    """One uniform number in [0, 1) for each token of a group's images.

    Each token is sampled by inverse transform from its number, so a group's images depend on `path` (seed,
    step, index of the group) and not on the batch, the process or the device.

    Returns:
        (num_images, num_tokens) float32 on the CPU.
    """
    return torch.rand(num_images, num_tokens, generator=generator_for(*path))


def mixed_order(num: int) -> torch.Tensor:
    """(num,) numbers below `num` in a random order, always the same: images of an evaluation come class by
    class, and where they are cut into parts, each is to have all classes."""
    return torch.randperm(num, generator=generator_for("mixed", num))
