"""Checkpoints in the format of VAR's official code: sizes read from the tensors, every key and shape checked.

Source: github.com/FoundationVision/VAR; the checkpoints of its trainer nest the two state dicts under
`trainer.var_wo_ddp` and `trainer.vae_local`.
"""

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from nextscale.base.errors import CheckpointError, NextscaleError
from nextscale.base.tensors import (
    StateDict,
    build_strictly,
    count_layers,
    read_state_dict,
    shape_of,
    write_tensors,
)
from nextscale.models.var import VAR, VARConfig
from nextscale.models.vqvae import VQVAE, VQVAEConfig, check_same_grids

Sizes = TypeVar("Sizes", VARConfig, VQVAEConfig)


def read_var_config(state: StateDict, path: str | Path) -> VARConfig:
    """The sizes of a VAR transformer, read from its tensors.

    Args:
        path: file that the tensors come from, for the error message.

    Raises:
        CheckpointError: a tensor that determines a size is missing or has an impossible shape.
    """
    get = partial(shape_of, state, path, "VAR transformer")
    width, codebook_width = get("word_embed.weight", 2)
    lengths = sorted(Counter(_scale_indices(get, state, path)).items())
    sizes = tuple(math.isqrt(length) for _, length in lengths)
    shared = "shared_ada_lin.1.weight" in state
    return _checked(path, VARConfig, lambda: dict(
        depth=count_layers(state, "blocks."),
        width=width,
        num_heads=get("blocks.0.attn.scale_mul_1H11", 4)[1],
        mlp_ratio=get("blocks.0.ffn.fc1.weight", 2)[0] / width,
        num_classes=get("class_emb.weight", 2)[0] - 1,
        codebook_size=get("head.weight", 2)[0],
        codebook_width=codebook_width,
        scale_sizes=sizes,
        shared_adaln=shared,
    ))  # fmt: skip


def read_vqvae_config(state: StateDict, path: str | Path, scale_sizes: tuple[int, ...]) -> VQVAEConfig:
    """The sizes of a VQVAE, read from its tensors.

    Args:
        path: file that the tensors come from, for the error message.
        scale_sizes: those of the transformer; the tensors of a VQVAE do not determine them.

    Raises:
        CheckpointError: a tensor that determines a size is missing or has an impossible shape.
    """
    get = partial(shape_of, state, path, "VQVAE")
    base = get("encoder.conv_in.weight", 4)[0]
    levels = count_layers(state, "encoder.down.")
    codebook_size, codebook_width = get("quantize.embedding.weight", 2)
    return _checked(path, VQVAEConfig, lambda: dict(
        codebook_size=codebook_size,
        codebook_width=codebook_width,
        base_channels=base,
        channel_multipliers=tuple(
            get(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] // base for i in range(levels)
        ),
        num_res_blocks=count_layers(state, "encoder.down.0.block."),
        scale_sizes=scale_sizes,
    ))  # fmt: skip


def load_official(
    var_path: str | Path, vae_path: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[VAR, VQVAE]:
    """The two networks of official checkpoints, their sizes read from the tensors.

    Args:
        dtype: of the transformer; the tokenizer is float32.

    Raises:
        CheckpointError: a file cannot be used, or the two do not belong together.
    """
    var_state = read_state_dict(var_path, "var_wo_ddp", dtype)
    var_config = read_var_config(var_state, var_path)
    vae_state = read_state_dict(vae_path, "vae_local")
    vae_config = read_vqvae_config(vae_state, vae_path, var_config.scale_sizes)
    try:
        check_same_grids(var_config, vae_config)
    except NextscaleError as error:
        raise CheckpointError(f"'{var_path}' and '{vae_path}' do not belong together: {error}") from None
    transformer = build_strictly(lambda: VAR(var_config), var_state, var_path)
    tokenizer = build_strictly(lambda: VQVAE(vae_config), vae_state, vae_path)
    return transformer, tokenizer


def save_official(
    transformer: VAR, tokenizer: VQVAE, folder: str | Path, dtype: torch.dtype | str | None = None
) -> tuple[Path, Path]:
    """Write `var.pth` and `vae.pth`, state dicts as the official code loads them; returns their paths.

    Args:
        dtype: of the stored floating-point tensors; by default each tensor's own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "var.pth", folder / "vae.pth"
    for model, path in zip((transformer, tokenizer), paths, strict=True):
        write_tensors(model, path, dtype)
    return paths


def _scale_indices(
    get: Callable[[str, int], tuple[int, ...]], state: StateDict, path: str | Path
) -> list[int]:
    get("lvl_1L", 2)
    indices = state["lvl_1L"].flatten().tolist()
    counts = Counter(indices)
    if sorted(counts) != list(range(len(counts))) or any(math.isqrt(n) ** 2 != n for n in counts.values()):
        raise CheckpointError(f"'{path}': 'lvl_1L' does not describe square scales, found {dict(counts)}")
    return indices


def _checked(path: str | Path, record: type[Sizes], values: Callable[[], dict]) -> Sizes:
    """A record of sizes; an impossible one is the file's fault, not the user's."""
    try:
        return record(**values())
    except CheckpointError:
        raise
    except NextscaleError as error:
        raise CheckpointError(f"'{path}' has sizes that no model can have: {error}") from None
