"""What of a model is trained: all of it, the parts that are not frozen, or a low-rank adapter (LoRA)."""

import copy
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from nextscale.base.errors import ConfigError
from nextscale.base.patterns import matching, require_match
from nextscale.base.records import Record
from nextscale.models.lora import (
    adapter_parameters,
    add_adapter,
    fingerprint,
    linear_layers,
    merge_adapter,
)
from nextscale.models.protocol import NextScaleModel

FROZEN_BEFORE = "_frozen_before_tuning"


class TuningConfig(Record):
    """What of the model is trained, and what average of it is kept. Names are TRL's for LoRA."""

    use_peft: bool = False
    """Train a low-rank adapter (LoRA) by peft in place of the weights; final/ has it merged, and beside."""
    lora_r: int = Field(default=16, ge=1)
    """Rank of the adapter."""
    lora_alpha: int = Field(default=32, ge=1)
    """The adapter's output is scaled by lora_alpha / lora_r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Always 0: with dropout, the policy that is trained would not be the one that draws (docs/lora.md)."""
    lora_target_modules: str | tuple[str, ...] | None = None
    """Linear layers that get an adapter, by words of their names: "proj", "blocks.0", "ada_lin", "*". By
    default those of attention and feed-forward."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_r) instead, for large ranks."""
    use_dora: bool = False
    """Train the norm of each layer's weights apart from their direction (DoRA); slower."""
    freeze: str | tuple[str, ...] = ()
    """Parameters that stay as they are, by words of their names: "blocks.0", "class_emb", "blocks.*.ffn"."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep an exponential moving average of what is trained: the share of it that each update keeps."""
    ema_use: Literal["both", "evaluation", "export"] = "both"
    """Where the average stands in for the trained weights: evaluations, final/, or both."""

    @property
    def evaluates_average(self) -> bool:
        return self.ema_decay is not None and self.ema_use != "export"

    @property
    def exports_average(self) -> bool:
        return self.ema_decay is not None and self.ema_use != "evaluation"


def _several(patterns: str | tuple[str, ...]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else patterns


def target_layers(config: TuningConfig, model: nn.Module) -> list[str]:
    """Names of the layers that get an adapter; none without LoRA.

    Raises:
        ConfigError: a pattern that matches no linear layer, or no pattern.
    """
    if not config.use_peft:
        return []
    layers, key = linear_layers(model), "tuning.lora_target_modules"
    given = config.lora_target_modules
    targets = getattr(model, "LORA_TARGETS", ("*",)) if given is None else _several(given)
    if not targets:
        raise ConfigError(f"{key} is empty, so that nothing would be trained: name linear layers")
    wanted = {name for each in targets for name in require_match(key, each, layers, "linear layer")}
    return [name for name in layers if name in wanted]


def check_tuning(config: TuningConfig, model: nn.Module) -> None:
    """Check that every option has an effect on this model, and that something is trained.

    Args:
        model: without an adapter; may be on the meta device.

    Raises:
        ConfigError: an option has none, a pattern matches nothing, or everything is frozen.
    """
    idle = [name for name in TuningConfig.model_fields if name.startswith(("lora_", "use_r", "use_d"))]
    needs = {"tuning.use_peft": (not config.use_peft, idle)}
    needs["tuning.ema_decay"] = (config.ema_decay is None, ["ema_use"])
    for need, (is_idle, names) in needs.items():
        for name in names:
            value = getattr(config, name)
            if is_idle and value != TuningConfig.model_fields[name].default:
                raise ConfigError(
                    f"tuning.{name} {value} has no effect without {need}: set that too, or remove "
                    f"tuning.{name}"
                )
    if config.lora_dropout:
        raise ConfigError(
            f"tuning.lora_dropout is {config.lora_dropout}, but images are drawn without dropout, so the "
            "policy that is trained would be another: remove it, and hold the adapter back with grpo.beta"
        )
    layers = target_layers(config, model)
    trained = adapter_parameters(layers, config.use_dora) if config.use_peft else _trainable(model)
    frozen = _frozen(config, trained)
    if len(frozen) == len(trained):
        raise ConfigError(
            f"tuning.freeze {', '.join(_several(config.freeze))} leaves nothing to train: freeze less"
            if config.freeze
            else "every parameter of the model is frozen: give some of them requires_grad"
        )


def tune(model: nn.Module, config: TuningConfig, seed: int = 0) -> None:
    """Freeze what is not to be trained, and add the adapter, in place; `untune` undoes it.

    Args:
        seed: of the adapter's first factor.

    Raises:
        ConfigError: as `check_tuning` does.
    """
    untune(model)  # of a trainer that was made and never run
    check_tuning(config, model)
    setattr(model, FROZEN_BEFORE, [name for name, each in model.named_parameters() if not each.requires_grad])
    if layers := target_layers(config, model):
        scale = {"use_rslora": config.use_rslora, "use_dora": config.use_dora}
        add_adapter(model, layers, r=config.lora_r, alpha=config.lora_alpha, seed=seed, **scale)
    frozen = _frozen(config, _trainable(model))
    for name, each in model.named_parameters():
        if name in frozen:
            each.requires_grad_(False)


def untune(model: nn.Module) -> None:
    """Merge the adapter, and let what `tune` froze be trainable again: a model as any other."""
    merge_adapter(model)
    frozen = getattr(model, FROZEN_BEFORE, None)
    if frozen is not None:
        for name, each in model.named_parameters():
            each.requires_grad_(name not in frozen)
        delattr(model, FROZEN_BEFORE)


def frozen_fingerprint(model: nn.Module) -> str | None:
    """What a checkpoint, which holds what is trained alone, has to find again; None where all is trained."""
    frozen = {name: each for name, each in model.named_parameters() if not each.requires_grad}
    return fingerprint(frozen) if frozen else None


def base_fingerprint(model: nn.Module) -> str:
    """What tells the model that a run begins with from others: of all its parameters, before `tune`."""
    return fingerprint(dict(model.named_parameters()))


def _trainable(model: nn.Module) -> list[str]:
    return [name for name, each in model.named_parameters() if each.requires_grad]


def _frozen(config: TuningConfig, trained: list[str]) -> set[str]:
    """Those of the trained parameters that `freeze` means.

    Raises:
        ConfigError: a pattern that means none of them.
    """
    patterns = _several(config.freeze)
    for pattern in patterns:
        require_match("tuning.freeze", pattern, trained, "parameter that would be trained")
    return {name for pattern in patterns for name in matching(pattern, trained)}


@torch.no_grad()
def interpolated(base: NextScaleModel, tuned: NextScaleModel, alpha: float) -> NextScaleModel:
    """A model between two: the base at 0, the tuned one at 1. For a plain LoRA that is scaling it.

    Raises:
        ConfigError: alpha is not in [0, 1], or the two are not of the same shape.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"the strength alpha must be between 0 and 1, got {alpha}")
    ours, theirs = (dict(each.named_parameters()) for each in (tuned, base))
    if {name: each.shape for name, each in ours.items()} != {n: each.shape for n, each in theirs.items()}:
        raise ConfigError(
            "the tuned model and its base differ in their shape: give the base that it was tuned from"
        )
    model = copy.deepcopy(tuned)
    for name, each in model.named_parameters():
        each.copy_(torch.lerp(theirs[name].to(each), each, alpha))
    return model
