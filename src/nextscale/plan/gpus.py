"""GPU specifications from the vendor's data sheets."""

from dataclasses import dataclass

from nextscale.base.errors import ConfigError
from nextscale.base.records import did_you_mean


@dataclass(frozen=True)
class GPU:
    """A GPU model.

    Attributes:
        memory: bytes, taking a data sheet's GB as 10^9; no card falls short of that by more than 2 %.
        bfloat16: peak FLOP/s of dense matrix products with float32 accumulation; None if not supported.
        float32: peak FLOP/s without tensor cores, which torch does not use for float32 by default.
    """

    memory: float
    bfloat16: float | None
    float32: float


def _gpu(gigabytes: float, bfloat16: float | None, float32: float) -> GPU:
    return GPU(gigabytes * 1e9, None if bfloat16 is None else bfloat16 * 1e12, float32 * 1e12)


# Source: NVIDIA's data sheets of the A100, H100 (SXM), H200 (SXM), L40S, A10 and V100 (SXM2), and its
# white papers on GA102 (RTX 3090) and Ada (RTX 4090). Without sparsity: half of what some advertise.
GPUS = {
    "a100-40gb": _gpu(40, 312, 19.5),
    "a100-80gb": _gpu(80, 312, 19.5),
    "h100-80gb": _gpu(80, 989, 67),
    "h200-141gb": _gpu(141, 989, 67),
    "l40s-48gb": _gpu(48, 362, 91.6),
    "rtx-4090-24gb": _gpu(24, 165, 82.6),
    "rtx-3090-24gb": _gpu(24, 71, 35.6),
    "a10-24gb": _gpu(24, 125, 31.2),
    "v100-32gb": _gpu(32, None, 15.7),  # its tensor cores (125 TFLOP/s) support float16 only
}
DEFAULT_GPU = "h100-80gb"


def find_gpu(name: str) -> GPU:
    """The GPU of this name.

    Raises:
        ConfigError: there is none; suggests the nearest.
    """
    if name not in GPUS:
        raise ConfigError(f"unknown GPU '{name}'{did_you_mean(name, GPUS)}")
    return GPUS[name]
