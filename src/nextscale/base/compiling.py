"""Parts of a network that torch.compile fuses, where that is asked for: on a GPU, what runs between two
matrix products is then one pass over memory in place of several."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from nextscale.base.errors import ConfigError, first_sentence

BACKEND = "inductor"
MAX_VARIANTS = 64
"""Of a part: with and without gradient, autocast, adapter or guidance, and for one token or more."""


class Fusible(nn.Module):
    """A network whose own methods may run compiled.

    Attributes:
        is_compiled: whether they do; set by `compile_parts`.
    """

    is_compiled = False

    def fused(self, method: Callable[..., Any], *given: Any, dynamic: bool | None = True) -> Any:
        """What a method of this class returns, given its arguments, compiled if that was asked for.

        All networks of a class share what is compiled. Attention and caches stay outside: their shapes change
        from scale to scale.

        Args:
            dynamic: whether shapes are variables; None compiles for the first ones, and again for others.

        Raises:
            ConfigError: it cannot be compiled on this machine.
        """
        if not self.is_compiled:
            return method(self, *given)
        from torch._dynamo.exc import TorchDynamoException

        try:
            return _compiled(method, dynamic, BACKEND)(self, *given)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            raise ConfigError(
                f"torch.compile failed here ({first_sentence(cause)}): set run.torch_compile to false, or "
                "install what it needs: a C++ compiler, and on a GPU Triton"
            ) from error


@cache
def _compiled(method: Callable[..., Any], dynamic: bool | None, backend: str) -> Callable[..., Any]:
    import torch._dynamo as dynamo

    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, MAX_VARIANTS)
    return torch.compile(method, dynamic=dynamic, backend=backend)


def compile_parts(network: nn.Module, enabled: bool = True) -> None:
    """Run what can be fused of a network compiled from its next call on, or no longer."""
    for each in network.modules():
        if isinstance(each, Fusible):
            each.is_compiled = enabled
