"""Official checkpoints in and out: sizes read from the tensors, keys and shapes checked, nothing executed.

Source: github.com/FoundationVision/VAR; its trainer's checkpoints nest the two state dicts under
`trainer.var_wo_ddp` and `trainer.vae_local`.
"""

import math
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from nextscale.errors import CheckpointError, NextscaleError
from nextscale.models.var import VAR, VARConfig
from nextscale.models.vqvae import VQVAE, VQVAEConfig

StateDict = dict[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)


def read_state_dict(
    path: str | Path, nested_key: str | None = None, dtype: torch.dtype = torch.float32
) -> StateDict:
    """The tensors of a `.pth` or `.safetensors` file, on the CPU.

    What is float32 in the file, and asked for so, stays mapped from it: pages come into memory when they are
    used, and are never copied. For another dtype the tensors are read, and freed one by one as they are
    converted, for mapped pages would stay in memory beside the result.

    Args:
        nested_key: where a trainer's checkpoint holds them ("var_wo_ddp" or "vae_local").
        dtype: of the floating-point tensors.

    Raises:
        CheckpointError: the file is missing, truncated, no checkpoint, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no file '{path}': give the path of a checkpoint")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path) if dtype == torch.float32 else _read_each(path, dtype)
        else:
            is_mapped = dtype == torch.float32 and _can_be_mapped(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it wants to run {refused[1]}" if refused else "it is not a checkpoint of tensors"
        raise CheckpointError(f"'{path}' was not loaded: {what}; only tensors are read from a file") from None
    except Exception as error:  # on a file that is no pickle the reader fails with whatever its bytes lead to
        reason = re.split(r"\.\s|\n", str(error))[0][:120] or type(error).__name__
        raise CheckpointError(
            f"'{path}' cannot be read ({reason}): it is truncated or no checkpoint"
        ) from None
    for key in ("trainer", nested_key):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"'{path}' holds {type(content).__name__}, expected a state dict of tensors")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"'{path}': entry '{key}' is {type(value).__name__}, expected a tensor")
        content[key] = value.to(dtype) if value.is_floating_point() else value
    return content


def _can_be_mapped(path: Path) -> bool:
    """Whether a `.pth` file is a zip of plain entries: not one of torch before 1.6, nor packed again."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in file.infolist())


def _read_each(path: Path, dtype: torch.dtype) -> StateDict:
    """Converted copies of the tensors of a safetensors file."""
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
    state = {}
    for key in keys:
        with safe_open(path, "pt") as file:  # a mapping for each, which leaves the memory with its tensor
            value = file.get_tensor(key)
        state[key] = value.to(dtype if value.is_floating_point() else value.dtype, copy=True)
    return state


def read_var_config(state: StateDict, path: str | Path) -> VARConfig:
    """The sizes of a VAR transformer, read from its tensors.

    Raises:
        CheckpointError: a tensor that tells a size is absent or cannot be one.
    """
    get = _getter(state, path, "VAR transformer")
    width, codebook_width = get("word_embed.weight", 2)
    lengths = sorted(Counter(_scale_indices(get, state, path)).items())
    sizes = tuple(math.isqrt(length) for _, length in lengths)
    shared = "shared_ada_lin.1.weight" in state
    return _sizes(path, VARConfig, lambda: dict(
        depth=_count(state, r"blocks\.(\d+)\."),
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
    """The sizes of a VQVAE, read from its tensors; the scales are the transformer's.

    Raises:
        CheckpointError: a tensor that tells a size is absent or cannot be one.
    """
    get = _getter(state, path, "VQVAE")
    base = get("encoder.conv_in.weight", 4)[0]
    levels = _count(state, r"encoder\.down\.(\d+)\.")
    codebook_size, codebook_width = get("quantize.embedding.weight", 2)
    return _sizes(path, VQVAEConfig, lambda: dict(
        codebook_size=codebook_size,
        codebook_width=codebook_width,
        base_channels=base,
        channel_multipliers=tuple(
            get(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] // base for i in range(levels)
        ),
        num_res_blocks=_count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        scale_sizes=scale_sizes,
    ))  # fmt: skip


def build_strictly(make: Callable[[], Model], state: StateDict, path: str | Path) -> Model:
    """A model that holds exactly these tensors: built without memory of its own, every key and shape checked.

    Args:
        make: makes the model; called on the meta device.

    Raises:
        CheckpointError: names the file and the first key that is missing, unknown or of another shape.
    """
    try:
        with torch.device("meta"):
            model = make()
    except ValueError as error:
        raise CheckpointError(f"'{path}' has sizes that no model can have: {error}") from None
    expected = model.state_dict()
    for key, value in expected.items():
        if key not in state:
            unknown = [name for name in state if name not in expected]
            renamed = f" ('{unknown[0]}' stands in the file and is not known)" if unknown else ""
            raise CheckpointError(f"'{path}' lacks '{key}'{renamed}")
        if state[key].shape != value.shape:
            found, wanted = tuple(state[key].shape), tuple(value.shape)
            raise CheckpointError(f"'{path}': '{key}' has shape {found}, expected {wanted}")
        if state[key].is_floating_point() != value.is_floating_point():
            raise CheckpointError(f"'{path}': '{key}' is {state[key].dtype}, expected {value.dtype}")
    for key in state:
        if key not in expected:
            raise CheckpointError(f"'{path}' holds '{key}', which the model does not know")
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(True)


def load_strictly(make: Callable[[], Model], path: Path, dtype: torch.dtype = torch.float32) -> Model:
    """A model of known sizes with the tensors of a file; raises as the two that it calls do."""
    return build_strictly(make, read_state_dict(path, dtype=dtype), path)


def load_official(
    var_path: str | Path, vae_path: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[VAR, VQVAE]:
    """The two networks of official checkpoints, every size read from the tensors.

    Raises:
        CheckpointError: a file that cannot be used, or two that do not belong together.
    """
    var_state = read_state_dict(var_path, "var_wo_ddp", dtype)
    var_config = read_var_config(var_state, var_path)
    vae_state = read_state_dict(vae_path, "vae_local")
    vae_config = read_vqvae_config(vae_state, vae_path, var_config.scale_sizes)
    for name in ("codebook_size", "codebook_width"):
        ours, theirs = getattr(var_config, name), getattr(vae_config, name)
        if ours != theirs:
            raise CheckpointError(
                f"'{var_path}' has {name} {ours}, but '{vae_path}' has {theirs}: they do not belong together"
            )
    transformer = build_strictly(lambda: VAR(var_config), var_state, var_path)
    tokenizer = build_strictly(lambda: VQVAE(vae_config), vae_state, vae_path)
    return transformer, tokenizer


def stored_state_dict(model: nn.Module, dtype: torch.dtype | None = None) -> StateDict:
    """A model's tensors as they are written: contiguous, on the CPU, the floating-point ones in `dtype`."""
    state = {}
    for key, value in model.state_dict().items():
        value = value.detach().cpu().contiguous()
        state[key] = value.to(dtype) if dtype and value.is_floating_point() else value
    return state


def save_official(
    transformer: nn.Module, tokenizer: nn.Module, folder: str | Path, dtype: torch.dtype | None = None
) -> tuple[Path, Path]:
    """Write `var.pth` and `vae.pth`, state dicts as the official code loads them; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "var.pth", folder / "vae.pth"
    for model, path in zip((transformer, tokenizer), paths, strict=True):
        aside = path.with_suffix(".writing")  # the file this very model was loaded from may still be mapped
        torch.save(stored_state_dict(model, dtype), aside)
        aside.replace(path)
    return paths


def _getter(state: StateDict, path: str | Path, kind: str) -> Callable[[str, int], tuple[int, ...]]:
    def shape_of(key: str, num_axes: int) -> tuple[int, ...]:
        if key not in state:
            raise CheckpointError(f"'{path}' lacks '{key}': is it the checkpoint of a {kind}?")
        shape = tuple(state[key].shape)
        if len(shape) != num_axes:
            raise CheckpointError(f"'{path}': '{key}' has shape {shape}, expected {num_axes} axes")
        return shape

    return shape_of


def _count(state: StateDict, pattern: str) -> int:
    found = [int(match[1]) for key in state if (match := re.match(pattern, key))]
    return max(found, default=-1) + 1


def _scale_indices(
    get: Callable[[str, int], tuple[int, ...]], state: StateDict, path: str | Path
) -> list[int]:
    get("lvl_1L", 2)
    indices = state["lvl_1L"].flatten().tolist()
    counts = Counter(indices)
    if sorted(counts) != list(range(len(counts))) or any(math.isqrt(n) ** 2 != n for n in counts.values()):
        raise CheckpointError(f"'{path}': 'lvl_1L' does not describe square scales, found {dict(counts)}")
    return indices


Config = TypeVar("Config", VARConfig, VQVAEConfig)


def _sizes(path: str | Path, record: type[Config], values: Callable[[], dict]) -> Config:
    try:
        return record(**values())
    except CheckpointError:
        raise
    except NextscaleError as error:
        raise CheckpointError(f"'{path}' has sizes that no model can have: {error}") from None
