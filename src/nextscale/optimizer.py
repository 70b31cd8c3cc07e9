"""The optimizer and its learning rate schedule."""

from typing import Literal

import torch
import transformers
from pydantic import Field
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from nextscale.base.records import Record


class OptimizerConfig(Record):
    """Options of AdamW and its learning rate schedule."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of the first moment."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=True)
    """Maximum gradient norm; larger gradients are clipped. Infinity clips none."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """Learning rate schedule after the warm-up."""

    @property
    def depends_on_the_end(self) -> bool:
        """Whether the number of steps shapes the schedule, and not only where it is cut off."""
        return self.lr_scheduler_type != "constant_with_warmup"


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, num_updates: int
) -> tuple[torch.optim.AdamW, LRScheduler]:
    """AdamW on all trainable parameters, and its schedule over `num_updates` optimizer steps."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_gpu = bool(parameters) and all(each.device.type == "cuda" for each in parameters)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        # One kernel in place of several, none of which then allocates a copy of the parameters.
        fused=True if on_gpu else None,
    )
    scheduler = transformers.get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=num_updates,
    )
    return optimizer, scheduler
