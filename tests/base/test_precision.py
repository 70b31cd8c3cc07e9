import pytest
import torch

from nextscale.base.precision import has_fast_bfloat16, precision_on


@pytest.mark.parametrize(
    ("capabilities", "is_fast"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_f": True, "avx512_bw": True, "avx512_bf16": False}, False),  # it would only be emulated
        ({"avx512_f": True, "avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True, "bf16": False}, False),
    ],
)
def test_auto_is_bfloat16_where_a_cpu_has_instructions_for_it(monkeypatch, capabilities, is_fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert has_fast_bfloat16("cpu") == is_fast
    assert precision_on("cpu", "auto") == ("bf16" if is_fast else "no")
    assert [precision_on("cpu", asked) for asked in ("no", "bf16")] == ["no", "bf16"]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not has_fast_bfloat16("cpu")  # oneDNN is what uses them


def test_an_old_torch_or_another_device_tells_nothing(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert precision_on("cpu", "auto") == precision_on("mps", "auto") == "no"
