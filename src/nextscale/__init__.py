"""Fine-tune next-scale visual autoregressive (VAR) image models with reinforcement learning.

Source: Gallici & Sáez de Ocáriz Borde, "Fine-Tuning Next-Scale Visual Autoregressive Models with Group
Relative Policy Optimization", arXiv 2505.23331.
"""

from nextscale import rewards
from nextscale.errors import CheckpointError, ConfigError, NextscaleError, RewardError
from nextscale.log_probs import log_probs
from nextscale.pipeline import VAROutput, VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.records import Condition
from nextscale.trainer import GRPOConfig, GRPOTrainer, OptimizerConfig, RunConfig

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
