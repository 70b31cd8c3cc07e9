"""Tensor files: read without executing code, checked key by key, and written atomically."""

import hashlib
import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nextscale.base.errors import CheckpointError, ConfigError, first_sentence
from nextscale.base.files import replacing
from nextscale.base.progress import bar_of

StateDict = dict[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)
MAX_GROWTH = 8
"""How many times a file's size its tensors may be: some share their memory, others are packed, such as test
weights of few values to a sixth. A few bytes can stand for more than any memory holds."""
NAMES = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v[23]|parameter)|torch(\.storage)? \w+"
)
"""What a `.pth` file may name: all that tensors by name need."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point torch dtype, given as itself or by name, such as "bfloat16".

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if str(dtype) not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} cannot be used: give one of {', '.join(DTYPES)}")
    return DTYPES[str(dtype)]


def read_state_dict(
    path: str | Path,
    nested_key: str | None = None,
    dtype: torch.dtype = torch.float32,
    keep_float32: Collection[str] = (),
) -> StateDict:
    """The tensors of a `.pth` or `.safetensors` file, on the CPU.

    float32 tensors that are requested as float32 stay memory-mapped: their pages are loaded on first use and
    never copied. For any other dtype, each tensor is read, converted and freed in turn, since mapped pages
    would stay in memory beside the result.

    Args:
        nested_key: key that holds them in a training checkpoint ("var_wo_ddp" or "vae_local").
        dtype: of the floating-point tensors; all others keep theirs.
        keep_float32: keys of tensors that become float32 whatever `dtype` is.

    Raises:
        CheckpointError: the file is missing, truncated, not a checkpoint, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no file '{path}': give the path of a checkpoint")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = _read_safetensors(path, dtype, keep_float32)
        else:
            content = _read_pth(path, is_mapped=dtype == torch.float32 and _can_be_mapped(path))
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it wants to run {refused[1]}" if refused else "it is not a checkpoint of tensors"
        raise CheckpointError(f"'{path}' was not loaded: {what}; only tensors are read from a file") from None
    except Exception as error:  # on arbitrary bytes, the unpickler can raise anything
        raise CheckpointError(
            f"'{path}' cannot be read ({first_sentence(error)}): it is truncated or no checkpoint"
        ) from None
    for key in ("trainer", nested_key):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"'{path}' holds {type(content).__name__}, expected a state dict of tensors")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"'{path}': entry '{key}' is {type(value).__name__}, expected a tensor")
        _check_kind(key, value, path)
    _check_growth(sum(value.nbytes for value in content.values()), path)
    with bar_of(len(content), f"reading {path.name}", "tensor") as bar:
        for key, value in content.items():
            wanted = torch.float32 if key in keep_float32 else dtype
            content[key] = value.to(wanted) if value.is_floating_point() else value
            bar.update()
    return content


def _read_pth(path: Path, is_mapped: bool) -> Any:
    """What a `.pth` file holds.

    Raises:
        CheckpointError: it asks for anything but tensors, or unpacks to far more than it has.
    """
    with path.open("rb") as opened:
        pickles: list[IO[bytes]] = [
            opened
        ] * 4  # before torch 1.6: one after the other, then the tensors' bytes
        if opened.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(opened) as packed:
                _check_growth(sum(entry.file_size for entry in packed.infolist()), path)
                names = [name for name in packed.namelist() if name.endswith("data.pkl")]
                pickles = [io.BytesIO(packed.read(name)) for name in names]
        opened.seek(0)
        for each in pickles:
            _check_names(each)
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    if is_mapped and any(
        each.is_floating_point() and each.dtype != torch.float32 for each in _tensors(content)
    ):
        content = torch.load(
            path, map_location="cpu", weights_only=True
        )  # each is freed once it is converted
    return content


def _check_names(opened: IO[bytes]) -> None:
    """Check what a pickle names. Unpickling itself refuses what could run, but not what takes memory, such as
    bytearray(10**10)."""
    try:
        for code, argument, _ in pickletools.genops(opened):
            if code.name == "GLOBAL" and not NAMES.fullmatch(str(argument)):
                raise pickle.UnpicklingError(f"GLOBAL {str(argument).replace(' ', '.')}")
    except ValueError as error:
        raise pickle.UnpicklingError(str(error)) from None


def _tensors(content: Any) -> list[Tensor]:
    values = content.values() if isinstance(content, dict) else ()
    return [each for value in values for each in ([value] if isinstance(value, Tensor) else _tensors(value))]


def _check_growth(num_bytes: int, path: Path) -> None:
    size = path.stat().st_size
    if num_bytes > max(MAX_GROWTH * size, 1_000_000):
        raise CheckpointError(
            f"'{path}' has {size:,} bytes and stands for {num_bytes:,}: it is no checkpoint of a model"
        )


def _check_kind(key: str, value: Tensor, path: Path) -> None:
    kinds = (*DTYPES.values(), torch.float64)
    is_known = not value.is_floating_point() or value.dtype in kinds
    if value.layout != torch.strided or value.device.type != "cpu" or not is_known or value.is_quantized:
        kind = str(value.dtype if not is_known else value.layout).removeprefix("torch.")
        raise CheckpointError(f"'{path}': '{key}' is {kind}, expected one of {', '.join(DTYPES)}, and dense")


def _can_be_mapped(path: Path) -> bool:
    """Whether a `.pth` file is an uncompressed zip; files from before torch 1.6 are not."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in file.infolist())


def _read_safetensors(path: Path, dtype: torch.dtype, keep_float32: Collection[str]) -> StateDict:
    """The tensors of a safetensors file: mapped, or converted one at a time."""
    state = {}
    with (
        safe_open(path, "pt") as shared,
        bar_of(len(keys := list(shared.keys())), f"reading {path.name}", "tensor") as bar,
    ):
        for key in keys:
            value = shared.get_tensor(key)
            wanted = torch.float32 if key in keep_float32 else dtype
            if value.is_floating_point() and value.dtype != wanted:
                _check_kind(key, value, path)
                with safe_open(path, "pt") as file:  # a separate mapping, freed with the tensor
                    value = file.get_tensor(key).to(wanted)
            state[key] = value
            bar.update()
    return state


def build_strictly(make: Callable[[], Model], state: StateDict, path: str | Path) -> Model:
    """A model with exactly these tensors; built on the meta device, it allocates no memory of its own.

    Args:
        make: builds the model.
        path: file that the tensors come from, for the error message.

    Raises:
        CheckpointError: a key is missing or unknown, or a tensor has the wrong shape or kind of dtype.
    """
    try:
        with torch.device("meta"):
            model = make()
    except ValueError as error:
        raise CheckpointError(f"'{path}' has sizes that no model can have: {error}") from None
    check_tensors(state, model.state_dict(), path)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(True)


def check_tensors(state: StateDict, expected: StateDict, path: str | Path) -> None:
    """Check that these are the tensors of a model.

    Args:
        expected: the model's own.
        path: file that they come from, for the error message.

    Raises:
        CheckpointError: a key is missing, unknown, of another shape or of another kind of dtype.
    """
    for key, value in expected.items():
        if key not in state:
            unknown = [name for name in state if name not in expected]
            renamed = f" (it holds '{unknown[0]}', which the model does not know)" if unknown else ""
            raise CheckpointError(f"'{path}' lacks '{key}'{renamed}")
        if state[key].shape != value.shape:
            found, wanted = tuple(state[key].shape), tuple(value.shape)
            raise CheckpointError(f"'{path}': '{key}' has shape {found}, expected {wanted}")
        if state[key].is_floating_point() != value.is_floating_point():
            raise CheckpointError(f"'{path}': '{key}' is {state[key].dtype}, expected {value.dtype}")
    for key in state:
        if key not in expected:
            raise CheckpointError(f"'{path}' holds '{key}', which the model does not know")


def load_strictly(
    make: Callable[[], Model],
    path: Path,
    dtype: torch.dtype = torch.float32,
    keep_float32: Collection[str] = (),
) -> Model:
    """A model with the tensors of a file: `read_state_dict`, then `build_strictly`.

    Raises:
        CheckpointError: the file cannot be read, or its tensors do not fit the model.
    """
    return build_strictly(make, read_state_dict(path, dtype=dtype, keep_float32=keep_float32), path)


def write_tensors(
    model: nn.Module,
    path: Path,
    dtype: torch.dtype | str | None = None,
    keep_float32: Collection[str] = (),
    more: StateDict | None = None,
) -> None:
    """Write a model's state dict to a `.safetensors` or `.pth` file, replacing what is there.

    Args:
        dtype: of the floating-point tensors; by default each tensor's own.
        keep_float32: keys of tensors that keep theirs.
        more: tensors to write besides.
    """
    dtype = None if dtype is None else to_dtype(dtype)
    state = {}
    for key, value in (model.state_dict() | (more or {})).items():
        value = value.detach().cpu().contiguous()
        is_cast = dtype is not None and value.is_floating_point() and key not in keep_float32
        state[key] = value.to(dtype) if is_cast else value
    save = save_tensors if path.suffix == ".safetensors" else torch.save
    with replacing(path) as aside:  # the model may be mapped from this file
        save(state, aside)


def save_tensors(tensors: StateDict, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written, as when the disk is full.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(0, first_sentence(error), str(path)) from None


def fingerprint(state: StateDict) -> str:
    """What tells these tensors from any others: a hash of their names, shapes and bits; 1 or 2 s a GB."""
    digest = hashlib.sha256()
    with bar_of(len(state), "hashing weights", "tensor") as bar:
        for key, value in state.items():
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
            numbers = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(numbers.data)
            bar.update()
    return digest.hexdigest()


def shape_of(state: StateDict, path: str | Path, kind: str, key: str, num_axes: int) -> tuple[int, ...]:
    """The shape of a tensor that tells a size of the model.

    Args:
        path: file that the tensors come from, for the error message.
        kind: what the file is expected to hold, such as "VQVAE".

    Raises:
        CheckpointError: the tensor is missing, or does not have `num_axes` axes.
    """
    if key not in state:
        raise CheckpointError(f"'{path}' lacks '{key}': is it the checkpoint of a {kind}?")
    shape = tuple(state[key].shape)
    if len(shape) != num_axes:
        raise CheckpointError(f"'{path}': '{key}' has shape {shape}, expected {num_axes} axes")
    return shape


def count_layers(state: dict[str, Tensor], prefix: str) -> int:
    """The number of layers: one more than the highest number that follows `prefix` in a key."""
    numbers = [key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)]
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1
