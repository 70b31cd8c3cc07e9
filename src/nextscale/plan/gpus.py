"""GPUs: known ones from the vendor's data sheets, and what this machine has."""

import os
import time
from dataclasses import dataclass, replace

from nextscale.base.errors import ConfigError
from nextscale.base.precision import has_fast_bfloat16
from nextscale.base.records import did_you_mean


@dataclass(frozen=True)
class GPU:
    """A GPU model, or the CPU of this machine.

    Attributes:
        name: a key of `GPUS`, or as the machine calls it.
        memory: bytes, taking a data sheet's GB as 10^9; no card falls short of that by more than 2 %.
        bfloat16: peak FLOP/s of dense matrix products with float32 accumulation; None if not supported.
        float32: peak FLOP/s without tensor cores, which torch does not use for float32 by default.
        is_measured: whether the rates were measured here, not taken from a data sheet.
    """

    name: str
    memory: float
    bfloat16: float | None
    float32: float
    is_measured: bool = False


def _gpu(name: str, bfloat16: float | None, float32: float) -> GPU:
    gigabytes = float(name.rpartition("-")[2].removesuffix("gb"))
    return GPU(name, gigabytes * 1e9, None if bfloat16 is None else bfloat16 * 1e12, float32 * 1e12)


# Source: NVIDIA's data sheets of the A100, H100 (SXM), H200 (SXM), B200 (HGX), L40S, L4, T4, A10, RTX A6000
# and V100 (SXM2), and its white papers on GA102 (RTX 3090), Ada (RTX 4090) and Blackwell (RTX 5080, 5090).
# Without sparsity: half of what some advertise.
GPUS = {
    each.name: each
    for each in (
        _gpu("a100-40gb", 312, 19.5),
        _gpu("a100-80gb", 312, 19.5),
        _gpu("h100-80gb", 989, 67),
        _gpu("h200-141gb", 989, 67),
        _gpu("b200-180gb", 2250, 75),
        _gpu("l40s-48gb", 362, 91.6),
        _gpu("l4-24gb", 121, 30.3),
        _gpu("rtx-a6000-48gb", 155, 38.7),
        _gpu("rtx-5090-32gb", 209, 104.8),
        _gpu("rtx-5080-16gb", 113, 56.3),
        _gpu("rtx-4090-24gb", 165, 82.6),
        _gpu("rtx-3090-24gb", 71, 35.6),
        _gpu("a10-24gb", 125, 31.2),
        _gpu("v100-32gb", None, 15.7),  # its tensor cores (125 TFLOP/s) support float16 only
        _gpu("t4-16gb", None, 8.1),  # likewise (65 TFLOP/s)
    )
}
DEFAULT_GPU = "h100-80gb"
SMALL = 100e6
"""Parameters of a model that a CPU trains well."""


def find_gpu(name: str, gigabytes: float | None = None) -> GPU:
    """The GPU of this name, or "cpu" for that of this machine.

    Args:
        gigabytes: its memory, if not that of the data sheet.

    Raises:
        ConfigError: there is none; suggests the nearest.
    """
    if name != "cpu" and name not in GPUS:
        raise ConfigError(f"unknown GPU '{name}'{did_you_mean(name, [*GPUS, 'cpu'])}")
    return with_memory(this_cpu() if name == "cpu" else GPUS[name], gigabytes)


def with_memory(gpu: GPU, gigabytes: float | None) -> GPU:
    """The GPU, with so much memory where that is given.

    Raises:
        ConfigError: it is not more than nothing.
    """
    if gigabytes is None:
        return gpu
    if not gigabytes > 0:
        raise ConfigError(f"a GPU's memory must be more than 0 GB, got {gigabytes}")
    return replace(gpu, memory=gigabytes * 1e9)


def gpu_at_hand(num_parameters: int) -> GPU:
    """What a plan is for, where nobody says: the GPU of this machine; without one, its CPU for a model so
    small that it trains there, else the usual GPU for such models.

    Args:
        num_parameters: of the model.
    """
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return known(properties.name, properties.total_memory) or _measured(properties.name, "cuda")
    return this_cpu() if num_parameters < SMALL else GPUS[DEFAULT_GPU]


def known(name: str, memory: float) -> GPU | None:
    """The data sheet of a card, by what its driver calls it ("NVIDIA H100 80GB HBM3") and its bytes."""
    words = name.lower().replace("-", " ").split()
    for gpu in GPUS.values():
        *model, _ = gpu.name.split("-")
        if all(word in words for word in model) and 0.9 < memory / gpu.memory < 1.1:
            return gpu
    return None


def this_cpu() -> GPU:
    """The CPU of this machine, with all of its memory; its rate is measured, which takes a moment."""
    return _measured("cpu", "cpu")


def _measured(name: str, device: str) -> GPU:
    import torch

    size = 4096 if device == "cuda" else 1024

    def rate(dtype: torch.dtype) -> float:
        left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        seconds = []
        for _ in range(4):
            begin = time.perf_counter()
            (left @ right)[0, 0].item()  # waits for the device
            seconds.append(time.perf_counter() - begin)
        return 2 * size**3 / min(seconds)

    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Without instructions for it, a product of this size takes seconds, to learn that it is slow.
    bfloat16 = rate(torch.bfloat16) if has_fast_bfloat16(device) else None
    return GPU(name, memory, bfloat16, rate(torch.float32), is_measured=True)
