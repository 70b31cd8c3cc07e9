"""Count the floating-point operations and the bytes of a computation without doing it.

The computation runs as it is on tensors that have shapes but no data. Operations are counted by torch, bytes
by the life of every storage.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

FLOAT32_ON_A_GPU = (F.normalize, F.group_norm)  # under autocast; on a CPU they are not


@dataclass(frozen=True)
class Count:
    """What a computation costs; bytes are those of storages that it makes itself.

    Attributes:
        flops: floating-point operations of matrix products and convolutions, backward pass included.
        saved: bytes that the forward pass keeps for the backward pass.
        forward_peak, backward_peak: most bytes that are alive at once.
    """

    flops: float = 0.0
    saved: float = 0.0
    forward_peak: float = 0.0
    backward_peak: float = 0.0

    @property
    def peak(self) -> float:
        return max(self.forward_peak, self.backward_peak)

    def extrapolate(self, next_one: "Count", steps: int) -> "Count":
        """The count `steps` steps on, where each adds what `next_one` adds to this one."""
        pairs = zip(astuple(self), astuple(next_one), strict=True)
        return Count(*(here + steps * (there - here) for here, there in pairs))


@contextmanager
def without_data(*, as_on_gpu: bool = True) -> Iterator[None]:
    """Tensors made within have shapes but no data.

    They pass for tensors of a CPU, since torch knows CUDA's autocast only where there is CUDA.

    Args:
        as_on_gpu: keep for the backward pass what CUDA's kernels keep, which differ in attention.
    """
    with FakeTensorMode(), _WithoutData(as_on_gpu):
        yield


def count(forward: Callable[[], Any], *, bfloat16: bool = False) -> Count:
    """Run a computation, and its backward pass where it returns a tensor that has one.

    Args:
        bfloat16: run the forward pass under autocast.
    """
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata in live.sizes:  # not a parameter: that one was there before
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as flops, _LiveBytes() as live:
        with torch.autocast("cpu", torch.bfloat16, bfloat16), saved_tensors_hooks(keep, lambda kept: kept):
            result = forward()
        forward_peak, live.peak = live.peak, live.now
        if not (isinstance(result, Tensor) and result.requires_grad):
            return Count(flops.get_total_flops(), forward_peak=forward_peak)
        torch.autograd.backward(result)  # not `result.backward`, which hides recomputation from the modes
    return Count(flops.get_total_flops(), sum(saved.values()), forward_peak, live.peak)


class _WithoutData(TorchFunctionMode):
    def __init__(self, as_on_gpu: bool) -> None:
        super().__init__()
        self.as_on_gpu = as_on_gpu

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__bool__:
            return False  # the project asks this only of what must not be, such as logits that are NaN
        if self.as_on_gpu and func is F.scaled_dot_product_attention:
            return _memory_efficient_attention(*args, **kwargs)
        if self.as_on_gpu and func in FLOAT32_ON_A_GPU:
            return func(args[0].float(), *args[1:], **kwargs)
        return func(*args, **kwargs)


def _memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The kernel that CUDA takes with a mask: no weights (l, l) in memory, and hidden ones are computed too."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is not None:
        attn_mask = attn_mask.to(dtype).expand(*query.shape[:2], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made within and are still alive; `sizes` has each, by its address."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage(), before)
        return result

    def _add(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self.sizes or address in before:
            return
        self.sizes[address] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, address)

    def _remove(self, address: int) -> None:
        self.now -= self.sizes.pop(address)
