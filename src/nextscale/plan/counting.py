"""Count the floating-point operations and the memory of a computation without carrying it out.

The computation runs unchanged on tensors that have shapes but no data. Operations are counted with torch's
formulas, memory by the lifetime of every storage.
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
from torch.utils.flop_counter import flop_registry

FLOAT32_ON_A_GPU = (F.normalize, F.group_norm)  # under autocast; CPU autocast leaves them as they are


@dataclass(frozen=True)
class Count:
    """The cost of a computation; bytes are those of storages that it allocates itself.

    Attributes:
        flops: floating-point operations of matrix products and convolutions, including the backward pass.
        saved: bytes that the forward pass keeps for the backward pass.
        forward_peak, backward_peak: most bytes allocated at the same time.
    """

    flops: float = 0.0
    saved: float = 0.0
    forward_peak: float = 0.0
    backward_peak: float = 0.0

    @property
    def peak(self) -> float:
        """Most bytes allocated at the same time, in either pass."""
        return max(self.forward_peak, self.backward_peak)

    def extrapolate(self, next_one: "Count", steps: int) -> "Count":
        """The count after `steps` more steps, each adding the difference between `next_one` and this one."""
        pairs = zip(astuple(self), astuple(next_one), strict=True)
        return Count(*(here + steps * (there - here) for here, there in pairs))


@contextmanager
def without_data(*, as_on_gpu: bool = True) -> Iterator[None]:
    """Tensors created in this context have shapes but no data.

    They are CPU tensors, since torch supports CUDA's autocast only where CUDA is present.

    Args:
        as_on_gpu: use CUDA's attention kernel and autocast rules, which save other tensors for backward.
    """
    with FakeTensorMode(), _WithoutData(as_on_gpu):
        yield


def count(forward: Callable[[], Any], *, bfloat16: bool = False) -> Count:
    """Count a computation, and its backward pass if it returns a tensor that requires grad.

    Args:
        bfloat16: run the forward pass under autocast.
    """
    packed: list[weakref.ref[Tensor]] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata in tally.sizes:  # excludes parameters, which existed before
            packed.append(weakref.ref(tensor))
        return tensor

    with _Tally() as tally:
        with torch.autocast("cpu", torch.bfloat16, bfloat16), saved_tensors_hooks(keep, lambda kept: kept):
            result = forward()
        forward_peak, tally.peak = tally.peak, tally.now
        # A graph that a layer makes and throws away within its pass, as DoRA's norms do, keeps nothing.
        kept = [each.untyped_storage() for ref in packed if (each := ref()) is not None]
        saved = sum({storage._cdata: storage.nbytes() for storage in kept}.values())
        del kept
        if not (isinstance(result, Tensor) and result.requires_grad):
            return Count(tally.flops, forward_peak=forward_peak)
        # Not `result.backward()`: it leaves the `without_data` mode, which gradient checkpointing needs.
        engine, start = torch.autograd.Variable._execution_engine, (torch.ones_like(result),)
        engine.run_backward((result,), start, False, False, (), allow_unreachable=True, accumulate_grad=True)
    return Count(tally.flops, saved, forward_peak, tally.peak)


class _WithoutData(TorchFunctionMode):
    def __init__(self, as_on_gpu: bool) -> None:
        super().__init__()
        self.as_on_gpu = as_on_gpu

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__bool__:
            return False  # the package only asks this of error conditions, such as NaN logits
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
    """The kernel that CUDA uses with a mask: stores no (l, l) weights, but computes masked pairs too."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is not None:
        attn_mask = attn_mask.to(dtype).expand(*query.shape[:2], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


class _Tally(TorchDispatchMode):
    """Adds up the operations of all calls made within, and the bytes of the storages that they allocate.

    `FlopCounterMode` uses the same formulas, but its module hooks keep alive what a backward pass recomputes,
    which would then count as memory.

    Attributes:
        flops: by torch's formulas.
        now, peak: current and largest number of allocated bytes.
        sizes: bytes of each live storage, by its address.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # half of all calls: autograd asks it of every tensor
            return args[0].fake_device
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=result)
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self.sizes:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, address: int) -> None:
        self.now -= self.sizes.pop(address)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
