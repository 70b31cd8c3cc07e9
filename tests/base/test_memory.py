"""What reading a file takes of memory: at most twice the file, whatever the file says."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from nextscale.base.errors import NextscaleError
from nextscale.base.images import MAX_PIXELS, read_image
from nextscale.base.tensors import read_state_dict
from nextscale.config.files import read_mapping
from nextscale.models.folder import read_config
from nextscale.runs.manifest import find_damage

MB = 2**20
SLACK = 16 * MB  # what an allocator keeps
LARGE = 100 * MB  # of what bombs unpack to
RESET = Path("/proc/self/clear_refs")

pytestmark = pytest.mark.skipif(not RESET.exists(), reason="this system does not tell the peak of memory")


def peak(function: Callable[[], object]) -> int:
    """Bytes that a function has in memory at most, beyond what was there before."""

    def status(key: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split(f"{key}:")[1].split()[0]) * 1024

    RESET.write_text("5")
    before = status("VmRSS")
    kept = function()
    del kept
    return status("VmHWM") - before


class Calls:
    """Something whose pickle is a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def deflated(path: Path) -> None:
    torch.save({"a": torch.zeros(LARGE // 4)}, path)
    with zipfile.ZipFile(path) as file:
        content = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, each in content.items():
            file.writestr(name, each)


def shared(path: Path) -> None:
    value = torch.zeros(LARGE // 400, dtype=torch.float16)
    torch.save({str(i): value for i in range(100)}, path)


BOMBS: dict[str, Callable[[Path], None]] = {
    "deflated": deflated,
    "shared": shared,
    "expanded": lambda path: torch.save({"a": torch.zeros(1).half().expand(LARGE // 4)}, path),
    "bytes": lambda path: torch.save({"a": Calls(bytearray, LARGE)}, path),
    "bytes-legacy": lambda path: torch.save(
        {"a": Calls(bytearray, LARGE)}, path, _use_new_zipfile_serialization=False
    ),
    "bytes-alone": lambda path: path.write_bytes(pickle.dumps(Calls(bytearray, LARGE), 2)) and None,
    "constructed": lambda path: torch.save({"a": Calls(torch.Tensor, 10_000, 10_000)}, path),
    "sparse": lambda path: torch.save({"a": torch.eye(2).to_sparse().half()}, path),
    "meta": lambda path: torch.save({"a": torch.empty(10**9, device="meta")}, path),
}


@pytest.mark.filterwarnings("ignore:.*[Ss]parse", "ignore:Detected pickle")
@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_stands_for_much_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bomb.pth"
    BOMBS[name](path)

    def read() -> None:
        with pytest.raises(NextscaleError):
            read_state_dict(path)

    read()  # once for what is imported on the way
    assert peak(read) < 2 * path.stat().st_size + SLACK


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_a_large_file_takes_twice_its_size(
    tmp_path: Path, suffix: str, dtype: torch.dtype, wanted: torch.dtype
) -> None:
    path = tmp_path / f"large{suffix}"
    state = {str(i): torch.ones(MB, dtype=dtype) for i in range(24)}
    (torch.save if suffix == ".pth" else save_file)(state, path)
    del state

    def read() -> dict[str, torch.Tensor]:
        found = read_state_dict(path, dtype=wanted)
        assert all(bool((each == 1).all()) for each in found.values())  # all pages
        return found

    assert peak(read) < 2 * path.stat().st_size + SLACK


def test_a_float_of_8_bits_is_refused(tmp_path: Path) -> None:
    """In float32 it would have four times the size."""
    path = tmp_path / "small.safetensors"
    save_file({"a": torch.zeros(8, dtype=torch.float8_e4m3fn)}, path)
    with pytest.raises(NextscaleError, match=r"'a' is float8_e4m3fn, expected one of float32"):
        read_state_dict(path)


def test_a_picture_of_too_many_pixels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (8193, 8192)).save(path)
    assert path.stat().st_size < 100_000

    def read() -> None:
        with pytest.raises(NextscaleError, match=rf"67,117,056 pixels, more than {MAX_PIXELS:,}"):
            read_image(path)

    assert peak(read) < SLACK


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]," * 10_000_000, b'{"a": "\xff"}'])
def test_json_that_is_deep_or_large_is_refused(tmp_path: Path, content: bytes) -> None:
    """A list of lists takes twenty times its file."""
    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "manifest.json").write_bytes(content)

    def read() -> None:
        assert find_damage(tmp_path)
        with pytest.raises(NextscaleError):
            read_config(tmp_path)

    assert peak(read) < 2 * len(content) + SLACK


def test_a_recipe_without_an_end_is_refused() -> None:
    def read() -> None:
        with pytest.raises(NextscaleError, match="has more than 1,000,000 bytes"):
            read_mapping("/dev/zero")

    assert peak(read) < SLACK
