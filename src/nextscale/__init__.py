"""Fine-tune next-scale visual autoregressive (VAR) image models with reinforcement learning.

Source: Gallici & Sáez de Ocáriz Borde, "Fine-Tuning Next-Scale Visual Autoregressive Models with Group
Relative Policy Optimization", arXiv 2505.23331.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nextscale import rewards
    from nextscale.base.conditions import Condition
    from nextscale.base.errors import CheckpointError, ConfigError, NextscaleError, RewardError
    from nextscale.callbacks import Callback
    from nextscale.grpo import GRPOConfig
    from nextscale.optimizer import OptimizerConfig
    from nextscale.pipeline import VAROutput, VARPipeline
    from nextscale.policy import SamplingConfig
    from nextscale.prompts import read_prompts
    from nextscale.rescoring import log_probs
    from nextscale.runs.config import RunConfig
    from nextscale.trainer import GRPOTrainer
    from nextscale.tuning import TuningConfig

__version__ = "0.1.0"

__all__ = [
    "Callback",
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
    "TuningConfig",
    "VAROutput",
    "VARPipeline",
    "log_probs",
    "read_prompts",
    "rewards",
]

# Public names are imported when they are first asked for: torch takes seconds, `nextscale --help` should not.
_HOMES = {
    **dict.fromkeys(("CheckpointError", "ConfigError", "NextscaleError", "RewardError"), "base.errors"),
    "Callback": "callbacks",
    "log_probs": "rescoring",
    **dict.fromkeys(("VAROutput", "VARPipeline"), "pipeline"),
    "SamplingConfig": "policy",
    "read_prompts": "prompts",
    "Condition": "base.conditions",
    "GRPOConfig": "grpo",
    "OptimizerConfig": "optimizer",
    "RunConfig": "runs.config",
    "GRPOTrainer": "trainer",
    "TuningConfig": "tuning",
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
