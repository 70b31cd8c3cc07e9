"""The frozen reference model of the KL term.

It runs once a rollout, whatever the number of iterations: its features are kept, and its head, which costs
little, makes log-probabilities of them block by block, where the loss needs them.

Shapes: B images · l tokens of the scales or the block at hand · V codebook size · C width of the features ·
D codebook width
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.grpo import GRPOConfig, ReferenceDtype
from nextscale.models.protocol import Conditioning, NextScaleModel
from nextscale.policy import Ramp, SamplingConfig, all_branches_logits
from nextscale.rescoring import guided_tokens, teacher_forced


def reference_dtype(grpo: GRPOConfig, mixed_precision: str) -> ReferenceDtype:
    """The dtype of the reference's linear layers: as chosen, or what autocast would round them to anyway. One
    that moves needs all bits: most of its moves are too small for 16."""
    is_rounded = mixed_precision == "bf16" and not grpo.sync_ref_model
    return grpo.reference_dtype or ("bfloat16" if is_rounded else "float32")


class Reference:
    """A model that stays as it is.

    Args:
        model: a frozen copy of the trained model; or the trained model itself, where `context` makes it the
            reference while it is entered, as by switching an adapter off.
        context: entered for each use of the model.
        is_offloaded: whether the weights wait in the memory they are in, and are brought to the device of the
            inputs for `features` alone, or while `brought_to` is entered. The head, which the loss uses block
            by block, must be there already.
    """

    def __init__(
        self,
        model: NextScaleModel,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
        is_offloaded: bool = False,
    ) -> None:
        self.model, self.context, self.is_offloaded = model, context, is_offloaded

    @classmethod
    def copy_of(
        cls, model: NextScaleModel, dtype: ReferenceDtype = "float32", is_offloaded: bool = False
    ) -> "Reference":
        """A copy of the model as it is now.

        Args:
            dtype: of the linear layers that autocast rounds, two thirds of a VAR's weights. In bfloat16 they
                take half the memory and give the same numbers. The rest stays float32.
            is_offloaded: keep it in main memory, all but its head.
        """
        copied = cast(copy.deepcopy(model), dtype)
        if is_offloaded:
            copied.to("cpu")
            if model.device.type == "cuda":  # which copies from pinned memory several times as fast
                for each in copied.parameters():
                    each.data = each.data.pin_memory()
            copied.head.to(model.device)
        return cls(copied, is_offloaded=is_offloaded)

    @torch.no_grad()
    def features(self, conditioning: Conditioning, inputs_BlD: Tensor, sampling: SamplingConfig) -> Tensor:
        """(B, l, C) features, or with guidance (2B, l, C): what `log_probs` needs of a rollout."""
        place = self.brought_to(inputs_BlD.device) if self.is_offloaded else nullcontext()
        # Linear layers in bfloat16 need its autocast, whatever the run's precision is.
        is_bf16 = any(each.weight.dtype == torch.bfloat16 for each in rounded_layers(self.model))
        autocast = torch.autocast(inputs_BlD.device.type, torch.bfloat16) if is_bf16 else nullcontext()
        with self.context(), place, autocast:
            num_guided = guided_tokens(sampling, self.model.schedule, inputs_BlD)
            both = teacher_forced(conditioning, inputs_BlD, sampling)
            if num_guided is None:
                return self.model.features(*both)
            return self.model.features_of_branches(*both, num_guided)

    @torch.no_grad()
    def log_probs(self, features_BlC: Tensor, ramp: Ramp, sampling: SamplingConfig) -> Tensor:
        """(B, l, V) log-probabilities after guidance and temperature, before filtering (see `exact_kl`).

        Args:
            features_BlC: from `features`, of some of the tokens.
            ramp: of these.
        """
        with self.context():
            logits_BlV = self.model.logits(features_BlC)
        return all_branches_logits(logits_BlV, ramp, sampling).log_softmax(-1)

    @torch.no_grad()
    def move_towards(self, model: NextScaleModel, share: float) -> None:
        """Become a mixture of itself and the trained model, in its own dtypes.

        Args:
            share: of the trained model.

        Source: TR-DPO (arXiv 2404.09656), its soft update.
        """
        for ours, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            ours.lerp_(theirs.to(ours), share)

    @contextmanager
    def brought_to(self, device: torch.device) -> Iterator[None]:
        """The weights on this device; afterwards they are where they were, and nothing is copied back. Within
        itself it does nothing."""
        tables: list[dict[str, Any]] = []
        for module in self.model.modules():
            tables += [module._parameters, module._buffers]
        kept = [dict(table) for table in tables]
        for table in tables:
            moved = {
                name: each.to(device, non_blocking=True) for name, each in table.items() if each is not None
            }
            table.update(moved)
        try:
            yield
        finally:
            for table, weights in zip(tables, kept, strict=True):
                table.update(weights)


def cast(model: NextScaleModel, dtype: ReferenceDtype) -> NextScaleModel:
    """The model, in place, frozen, and what autocast rounds of it in this dtype."""
    for layer in rounded_layers(model):
        # New parameters, and not `layer.to`: that cannot replace those of a plan, which have no data.
        for name, each in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, nn.Parameter(each.detach().to(getattr(torch, dtype))))
    return model.requires_grad_(False)


def rounded_layers(model: NextScaleModel) -> list[nn.Linear]:
    """The linear layers that run in bfloat16 under its autocast."""
    spared = {each for part in model.in_float32() for each in part.modules()}
    return [each for each in model.modules() if isinstance(each, nn.Linear) and each not in spared]
