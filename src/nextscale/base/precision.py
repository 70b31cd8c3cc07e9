"""The precision that networks run in, and whether a machine multiplies bfloat16 fast."""

from typing import Literal

Precision = Literal["no", "bf16"]
"""As Accelerate names them: float32, or autocast to bfloat16."""
AskedPrecision = Literal["auto", "no", "bf16"]


def precision_on(device_type: str, asked: AskedPrecision) -> Precision:
    """What was asked for; "auto" is bf16 where the device has instructions for it, else float32."""
    if asked == "auto":
        return "bf16" if has_fast_bfloat16(device_type) else "no"
    return asked


def has_fast_bfloat16(device_type: str) -> bool:
    """Whether the device has instructions for products of bfloat16. A CPU without takes some 50 times as long
    for them as for those of float32.

    Args:
        device_type: "cpu" or "cuda"; of other devices nothing is known, and the answer is no.
    """
    import torch  # here, since the records of options need none of it

    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():  # oneDNN, which uses them
        return False
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)  # torch before 2.10 does not tell
    capabilities = get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
