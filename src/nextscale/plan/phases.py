"""The cost of each phase of a training step, counted on tensors without data.

Shapes: B images processed at once · L tokens of all scales · D codebook width
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import CLIPConfig, CLIPModel

from nextscale.base.processes import share_of
from nextscale.base.records import Record
from nextscale.drawing import decoded_at_once
from nextscale.grpo import GRPOConfig
from nextscale.losses import trained_lengths
from nextscale.models.folder import build_transformer
from nextscale.models.lora import adapter_off
from nextscale.models.scales import ScaleSchedule
from nextscale.models.vqvae import VQVAE, VQVAEConfig
from nextscale.objective import Microbatch, Objective
from nextscale.plan.counting import Count, count, without_data
from nextscale.plan.networks import Network
from nextscale.policy import SamplingConfig
from nextscale.reference import Reference, cast, reference_dtype
from nextscale.rollout import branches_of
from nextscale.runs.config import RunConfig
from nextscale.sampling import sample
from nextscale.tuning import TuningConfig, tune


@dataclass(frozen=True)
class Phases:
    """The phases of a step in one process.

    Each method returns the operations for all images of the process, and the memory for those processed at
    once. Where all blocks are the same, the transformer is run with one block and with two (with an adapter
    two and three), and every further block adds as much as the last. Where some are frozen or adapted unlike
    the rest, and where an update is one backward pass, it is run with all.

    Attributes:
        num_images: images per step of this process.
        as_on_gpu: see `without_data`; also whether main memory is elsewhere.
    """

    transformer: Any
    tokenizer: VQVAEConfig
    grpo: GRPOConfig
    sampling: SamplingConfig
    run: RunConfig
    num_images: int
    tuning: TuningConfig = field(default_factory=TuningConfig)
    as_on_gpu: bool = True

    def rollout(self) -> Count:
        """Sampling of the tokens."""
        batch = self._drawn_at_once

        def draw(transformer: Any) -> Count:
            tokenizer = VQVAE(self.tokenizer)
            conditioning = transformer.blank_conditions(batch)
            uniforms_BL = torch.zeros(batch, self._num_tokens)
            branches = branches_of(self.grpo, transformer.schedule)
            branching = None if branches is None else branches.of(range(batch))
            run = partial(sample, transformer, tokenizer, conditioning, uniforms_BL, self.sampling, branching)
            return self._count(run, batch)

        return self._by_depth(draw)

    def decode(self) -> Count:
        """Decoding of latents to pixels."""
        on_cpu = decoded_at_once(self.tokenizer.image_size)
        batch = self._drawn_at_once if self.as_on_gpu else on_cpu
        with self._without_data(), torch.no_grad():
            tokenizer = VQVAE(self.tokenizer)
            latent = tokenizer.quantize.empty_latent(batch)
            return self._count(lambda: tokenizer.latent_to_images(latent), batch)

    def texts(self, networks: Sequence[Callable[[], nn.Module]]) -> float:
        """Most bytes that the encoding of one prompt takes besides the networks, which are float32."""
        peaks = []
        for build in networks:
            with self._without_data(), torch.no_grad():
                network: Any = build().eval()
                tokens = torch.zeros(1, network.config.max_position_embeddings, dtype=torch.long)
                peaks.append(count(partial(network, tokens)).peak)
        return max(peaks, default=0.0)

    def reward(self, networks: Sequence[Network]) -> Count:
        """The networks of all rewards, one after the other."""
        total, batch = Count(), self._drawn_at_once
        counted: dict[int, Count] = {}
        for network in networks:
            if id(network) not in counted:  # rewards may share one, which runs for each of them
                with self._without_data(), torch.no_grad():
                    run = network.run(batch, self.tokenizer.image_size)
                    counted[id(network)] = self._count(run, batch)
            each = counted[id(network)]
            total = Count(total.flops + each.flops, forward_peak=max(total.peak, each.peak))
        return total

    def credit(self, clips: Sequence[CLIPConfig]) -> Count:
        """The way back from all rewards to the codes of the tokens, and the way there again."""
        batch = self._trained_at_once
        with self._without_data():
            tokenizer = VQVAE(self.tokenizer).requires_grad_(False)
            towers: list[Any] = [CLIPModel(each).vision_model.requires_grad_(False) for each in clips]
            codes_BLD = torch.zeros(batch, self._num_tokens, self.tokenizer.codebook_width).requires_grad_()

            def score() -> Tensor:
                images = tokenizer.latent_to_images(tokenizer.codes_to_latent(codes_BLD))
                total = images.sum()
                for tower in towers:
                    pixels = F.interpolate(images, [tower.config.image_size] * 2, mode="bicubic")
                    total = total + tower(pixel_values=pixels).pooler_output.sum()
                return total

            return self._count(score, batch)

    def reference(self) -> Count:
        """The reference model's pass, without its head, which is part of the loss."""
        batch = self._trained_at_once

        sampling = self._reference_sampling

        def run(model: Any) -> Count:
            reference = self._reference(model)
            conditioning = reference.model.blank_conditions(batch)
            inputs_BlD = self._inputs(batch)[:, : self._num_trained - 1]
            return self._count(partial(reference.features, conditioning, inputs_BlD, sampling), batch)

        return self._by_depth(run)

    def update(self, *, has_gradients: bool = True) -> Count:
        """The loss, including the reference, and its backward pass.

        Args:
            has_gradients: whether the gradients are there already, as from the second of several backward
                passes on, and are not counted. Else they come as the activations go.
        """
        batch = self._trained_at_once

        def run(model: Any) -> Count:
            objective, microbatch = self._objective(model, batch)
            model.gradient_checkpointing = self.run.gradient_checkpointing
            if self.run.activation_offloading and self.as_on_gpu:
                model.keeping_inputs = partial(saved_tensors_hooks, *_ELSEWHERE)
            for parameter in model.parameters():
                if parameter.requires_grad and has_gradients:
                    parameter.grad = torch.zeros_like(parameter)
            return self._count(lambda: objective(model, microbatch).loss, batch)

        if not has_gradients:  # the peak is at one end of the backward pass or at the other: no line in depth
            return self._at_depth(run, self.transformer.depth)
        return self._by_depth(run)

    def divergence(self) -> Count:
        """What each token costs in KL, where that is taken from the reward."""
        batch = self._trained_at_once

        def run(model: Any) -> Count:
            objective, microbatch = self._objective(model, batch)
            return self._count(partial(objective.divergence, model, microbatch), batch)

        return self._by_depth(run)

    def scored_bytes(self) -> float:
        """Bytes of a rollout, held until the end of the step: images, tokens, log-probs, and
        the inputs and expected codes."""
        float32, int64 = 4, 8
        image = 3 * self.tokenizer.image_size**2 * float32
        token = int64 + float32 + 2 * self.tokenizer.codebook_width * float32
        return self.num_images * (image + self._num_tokens * token)

    def kept_bytes(self) -> float:
        """Bytes that the first iteration keeps for the others: log-probs, and the reference's features, but
        for those of an offloaded one, which are kept in main memory."""
        if self.grpo.num_iterations == 1:
            return 0.0
        float32 = 4
        keeps_features = self.grpo.needs_reference and not self.grpo.offload_reference
        sequences = (2 if self._reference_sampling.is_guided else 1) if keeps_features else 0
        return float32 * self.num_images * self._num_trained * (1.0 + sequences * self.transformer.width)

    def cache_bytes(self) -> float:
        """Bytes of the keys and values that all blocks keep when the last scale is sampled."""
        with torch.device("meta"):
            num_cached = build_transformer(self.transformer.replace(depth=1)).num_cached
        sequences = self._drawn_at_once * (2 if self.sampling.is_guided else 1)
        width = 2 if self.run.mixed_precision == "bf16" else 4
        return 2.0 * sequences * num_cached * self.transformer.depth * self.transformer.width * width

    @property
    def _reference_sampling(self) -> SamplingConfig:
        scale = self.grpo.reference_guidance_scale
        return self.sampling if scale is None else self.sampling.replace(guidance_scale=scale)

    @property
    def _num_tokens(self) -> int:
        return ScaleSchedule(self.transformer.scale_sizes).num_tokens

    @property
    def _num_trained(self) -> int:
        return sum(trained_lengths(ScaleSchedule(self.transformer.scale_sizes).lengths, self.grpo))

    @property
    def _drawn_at_once(self) -> int:
        return min(self.num_images, self.run.per_device_eval_batch_size)

    @property
    def num_passes(self) -> int:
        """Backward passes of one update."""
        return -(-self.num_images // self.run.per_device_train_batch_size)

    @property
    def _trained_at_once(self) -> int:
        return len(share_of(self.num_images, 0, self.num_passes))

    def _inputs(self, batch: int) -> Tensor:
        return torch.zeros(batch, self._num_tokens - 1, self.transformer.codebook_width)

    def _objective(self, model: Any, batch: int) -> tuple[Objective, Microbatch]:
        """The loss, and images to give to it."""
        reference = self._reference(model) if self.grpo.needs_reference else None
        tokens_BL = torch.zeros(batch, self._num_tokens, dtype=torch.long)
        conditioning = model.blank_conditions(batch)
        log_probs_BL, advantages_B = torch.zeros(tokens_BL.shape), torch.zeros(batch)
        drawn = Microbatch(conditioning, tokens_BL, self._inputs(batch), log_probs_BL, advantages_B)
        return Objective(self.grpo, self.sampling, model.schedule, reference), drawn

    def _without_data(self) -> AbstractContextManager[None]:
        return without_data(as_on_gpu=self.as_on_gpu)

    def _count(self, run: Callable[[], object], batch: int) -> Count:
        counted = count(run, bfloat16=self.run.mixed_precision == "bf16")
        return replace(counted, flops=counted.flops * self.num_images / batch)

    def _reference(self, model: Any) -> Reference:
        """As the trainer makes it: a copy of the model, or the model with its adapter off."""
        if self.tuning.use_peft:
            return Reference(model, partial(adapter_off, model))
        dtype = reference_dtype(self.grpo, self.run.mixed_precision)
        return Reference(cast(build_transformer(self.transformer.replace(depth=len(model.blocks))), dtype))

    def _by_depth(self, run: Callable[[Any], Count]) -> Count:
        depth = self.transformer.depth
        # With an adapter the first block is unlike the others: it is given nothing that is trained, and keeps
        # less for the backward pass.
        first = 2 if self.tuning.use_peft else 1
        if depth <= first or not _is_uniform(tuned_transformer(self.transformer, self.tuning)):
            return self._at_depth(run, depth)
        return self._at_depth(run, first).extrapolate(self._at_depth(run, first + 1), depth - first)

    def _at_depth(self, run: Callable[[Any], Count], depth: int) -> Count:
        model = tuned_transformer(self.transformer, self.tuning)
        model.blocks = model.blocks[:depth]
        with self._without_data():
            _leave_meta(model)
            return run(model)


# What autograd saves in main memory: away from the GPU in between, a tensor of its own when it comes back.
_ELSEWHERE = (lambda tensor: (tensor.shape, tensor.dtype), lambda kept: torch.zeros(kept[0], dtype=kept[1]))


def tuned_transformer(config: Record, tuning: TuningConfig) -> Any:
    """The model as it is trained, on the meta device."""
    with torch.device("meta"):
        model: Any = build_transformer(config)
        tune(model, tuning)
    return model


def _is_uniform(model: Any) -> bool:
    """Whether the same parameters are trained in all blocks."""
    parameters = [
        [(name, each.requires_grad) for name, each in block.named_parameters()] for block in model.blocks
    ]
    return all(each == parameters[0] for each in parameters)


def _leave_meta(model: nn.Module) -> None:
    """Give a model tensors of the mode that is on; `to_empty` cannot, from the meta device to this mode."""
    for module in model.modules():
        for name, each in list(module.named_parameters(recurse=False)):
            empty = torch.empty(each.shape, dtype=each.dtype)
            setattr(module, name, nn.Parameter(empty, each.requires_grad))
        for name, each in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(each.shape, dtype=each.dtype))
