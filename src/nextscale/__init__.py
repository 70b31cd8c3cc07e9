"""Fine-tune next-scale visual autoregressive (VAR) image models with reinforcement learning.

Source: Gallici & Sáez de Ocáriz Borde, "Fine-Tuning Next-Scale Visual Autoregressive Models with Group
Relative Policy Optimization", arXiv 2505.23331.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nextscale import rewards
    from nextscale.errors import CheckpointError, ConfigError, NextscaleError, RewardError
    from nextscale.grpo import GRPOConfig
    from nextscale.log_probs import log_probs
    from nextscale.optimizer import OptimizerConfig
    from nextscale.pipeline import VAROutput, VARPipeline
    from nextscale.policy import SamplingConfig
    from nextscale.records import Condition
    from nextscale.trainer import GRPOTrainer, RunConfig

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Condition",
    "ConfigError",
    "GRPOConfig",
    "GRPOTrainer",
    "NextscaleError",
    "OptimizerConfig",
    "RewardError",
    "RunConfig",
    "SamplingConfig",
    "VAROutput",
    "VARPipeline",
    "log_probs",
    "rewards",
]

# Public names are imported when they are first asked for: torch takes seconds, `nextscale --help` should not.
_HOMES = {
    **dict.fromkeys(("CheckpointError", "ConfigError", "NextscaleError", "RewardError"), "errors"),
    "log_probs": "log_probs",
    **dict.fromkeys(("VAROutput", "VARPipeline"), "pipeline"),
    "SamplingConfig": "policy",
    "Condition": "records",
    "GRPOConfig": "grpo",
    "OptimizerConfig": "optimizer",
    **dict.fromkeys(("GRPOTrainer", "RunConfig"), "trainer"),
}


def __getattr__(name: str) -> object:
    if name == "rewards":
        return import_module("nextscale.rewards")
    if name not in _HOMES:
        raise AttributeError(f"module 'nextscale' has no attribute '{name}'")
    value = getattr(import_module(f"nextscale.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The import system binds every imported submodule to its package: `log_probs` stays the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
