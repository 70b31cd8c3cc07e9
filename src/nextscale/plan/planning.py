"""Plan a run: parameters, operations, memory and time, without weights or a GPU.

The package's own sampling, decoding and loss run on tensors without data (`counting`), so there is no second
model of their cost to maintain. docs/planning.md explains what is counted and what is assumed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nextscale.base.numbers import duration
from nextscale.base.processes import share_of
from nextscale.credit import WITH_SLOPES
from nextscale.grpo import GRPOConfig
from nextscale.models.scales import ScaleSchedule
from nextscale.models.vqvae import VQVAE, VQVAEConfig
from nextscale.plan.counting import Count
from nextscale.plan.gpus import GPU, find_gpu
from nextscale.plan.networks import ClipNetwork, Network, find_network, text_networks
from nextscale.plan.phases import Phases, tuned_transformer
from nextscale.policy import SamplingConfig
from nextscale.reference import cast, reference_dtype
from nextscale.runs.config import RunConfig
from nextscale.runs.launch import check_shards
from nextscale.tuning import TuningConfig

UTILISATION = 0.3
"""Assumed fraction of a GPU's peak throughput; well-tuned training of large models reaches more."""
USABLE_MEMORY = 0.9
"""Fraction of a GPU's memory that a plan may use; the rest is for CUDA, cuDNN and fragmentation."""
FLOAT32 = 4  # bytes
OF_AN_IMAGE = ("rollout", "decode", "reward")
"""Phases that an evaluation has too."""
WITHOUT_GRADIENTS = ("texts", *OF_AN_IMAGE, "evaluation", "credit", "reference")
"""Phases in which the gradients do not exist: they are freed after each optimizer step, but for those that
DistributedDataParallel reduces in place."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will need. Everything is computed; nothing is measured.

    Attributes:
        gpu, num_gpus: what it is to run on.
        run: how long it is, and what it measures.
        dtype: of the matrix products.
        parameters: number of parameters, by network; and of those that are trained, where not all are.
        unknown: rewards (and other users of a network) whose network is unknown and not counted.
        num_images: images per step, over all GPUs.
        tokens_per_image: number of tokens of all scales, L.
        flops: operations per step, over all GPUs, by phase.
        resident: bytes that one process holds throughout, by part.
        phases: peak bytes that one process needs in addition, by phase.
        cache: the part of the rollout's bytes that holds keys and values.
        activations: the part of the update's bytes that is saved for the backward pass.
        kept: the part that is kept of all images until the update is done.
        rate: assumed FLOP/s of all GPUs together.
        keeps_gradients: whether the gradients exist in all phases.
    """

    gpu: GPU
    num_gpus: int
    run: RunConfig
    dtype: str
    parameters: dict[str, int]
    unknown: tuple[str, ...]
    num_images: int
    tokens_per_image: int
    flops: dict[str, float]
    resident: dict[str, float]
    phases: dict[str, float]
    cache: float
    activations: float
    kept: float
    rate: float
    keeps_gradients: bool = False

    @property
    def peak(self) -> float:
        """Most bytes that one process holds at the same time."""
        return sum(self.resident.values()) + max(map(self.needed, self.phases))

    def needed(self, phase: str) -> float:
        """Bytes that a phase needs besides what is resident, less the gradients where there are none."""
        are_absent = phase in WITHOUT_GRADIENTS and not self.keeps_gradients
        return self.phases[phase] - (self.resident["gradients"] if are_absent else 0)

    @property
    def fits(self) -> bool:
        """Whether a process fits on its GPU."""
        return self.peak <= USABLE_MEMORY * self.gpu.memory

    @property
    def seconds(self) -> float:
        """Estimated time per step."""
        return sum(self.flops.values()) / self.rate

    @property
    def num_evaluations(self) -> int:
        """Evaluations of the whole run: before training, every so often, and after it."""
        every, steps = self.run.eval_steps, self.run.max_steps
        return 1 + steps // every + bool(steps % every) if every else 0

    @property
    def evaluation_seconds(self) -> float:
        """Estimated time of an evaluation, which draws and scores; judges and embeddings are not counted."""
        drawn = sum(self.flops[name] for name in OF_AN_IMAGE) / self.num_images
        return self.run.eval_num_images * drawn / self.rate

    @property
    def run_seconds(self) -> float:
        """Estimated time of the whole run."""
        return self.run.max_steps * self.seconds + self.num_evaluations * self.evaluation_seconds


def make_plan(
    transformer: Any,
    tokenizer: VQVAEConfig,
    backbones: Mapping[str, str | None],
    grpo: GRPOConfig,
    sampling: SamplingConfig,
    run: RunConfig,
    gpu: str | GPU,
    num_gpus: int = 1,
    evaluated: Mapping[str, str | None] | None = None,
    tuning: TuningConfig | None = None,
) -> Plan:
    """Plan a run.

    Args:
        backbones: name of each reward to the name of its network; None if unknown.
        gpu: a name in `gpus.GPUS`, or what else a plan is for.
        num_gpus: number of GPUs, each with one process.
        evaluated: purpose to name of networks that are loaded too, but run in evaluations only.
        tuning: what of the transformer is trained; by default all of it.

    Raises:
        ConfigError: the GPU is unknown, there are more processes than images, FSDP has one GPU alone, or
            `tuning` does not fit the model.
    """
    device = find_gpu(gpu) if isinstance(gpu, str) else gpu
    if run.mixed_precision == "auto":
        run = run.replace(mixed_precision="bf16" if (device.bfloat16 or 0) > device.float32 else "no")
    grpo.check_processes(num_gpus)
    check_shards(run.fsdp, num_gpus)
    num_images, tuning = grpo.num_images, tuning or TuningConfig()
    tuned = tuned_transformer(transformer, tuning)
    weights, trained = _size(tuned), _size(tuned, is_trained=True)
    sizes = {"transformer": weights}
    if trained.parameters < weights.parameters:
        sizes["trained"] = trained
    if grpo.needs_reference and not tuning.use_peft:  # an adapter is switched off instead
        dtype = reference_dtype(grpo, run.mixed_precision)
        sizes["reference"] = _size(cast(tuned_transformer(transformer, tuning), dtype))
    sizes["tokenizer"] = _size(_on_meta(lambda: VQVAE(tokenizer)))
    named = {**backbones, **(evaluated or {})}
    networks = {name: each for name in named.values() if name and (each := find_network(name))}
    sizes |= {name: _size(_on_meta(each.build)) for name, each in networks.items()}
    encoders = text_networks(getattr(tuned, "text_encoder", None))
    of_texts = {f"text of {name}": build for name, build in encoders.items() if build}
    sizes |= {name: _size(_on_meta(build)) for name, build in of_texts.items()}

    # What the phases cost: of this process the memory, of all together the operations.
    share = len(share_of(num_images, 0, num_gpus))  # the largest, which all wait for
    of = Phases(transformer, tokenizer, grpo, sampling, run, share, tuning, device.name != "cpu")
    is_alone = num_gpus == 1 and of.num_passes == 1  # the backward pass, before which there is no gradient
    scored_by = [networks[name] for name in backbones.values() if name in networks]
    counts = _counts(of, scored_by, is_alone=is_alone)

    # What is there all the time.
    is_sharded = bool(run.fsdp)
    shards = num_gpus if is_sharded else 1
    one_each = FLOAT32 * trained.parameters / shards
    reference = sizes["reference"].num_bytes if "reference" in sizes else 0
    is_offloaded = grpo.offload_reference and of.as_on_gpu
    waiting = reference - _size(tuned.head).num_bytes if is_offloaded else 0  # in main memory
    bytes_of_texts = sum(sizes[name].num_bytes for name in of_texts)
    resident = {
        "weights": weights.num_bytes / shards,
        "gradients": one_each,
        "AdamW moments": 2 * one_each,
        "average": one_each if tuning.ema_decay is not None else 0,
        "reference": (reference - waiting) / shards,
        "tokenizer": sizes["tokenizer"].num_bytes,
        "rewards": sum(sizes[name].num_bytes for name in networks),
        # They are on a GPU while they run, with each prompt once; a CPU has them always.
        "text encoder": 0 if of.as_on_gpu else bytes_of_texts,
        "scored images": of.scored_bytes(),
    }

    # What each phase needs besides.
    phases = {name: counts[name].peak for name in (*OF_AN_IMAGE, "credit") if name in counts}
    if evaluation := _evaluation(of, counts, list(networks.values()), num_gpus):
        phases["evaluation"] = evaluation
    if of_texts:
        at_work = of.texts(list(of_texts.values()))
        phases = {"texts": at_work + bytes_of_texts - resident["text encoder"], **phases}
    if waiting:  # it comes once for all images, before there is a gradient
        phases["reference"] = waiting + counts["reference"].peak
    phases["update"] = counts["update"].peak + of.kept_bytes() - (one_each if is_alone else 0)
    if is_sharded:
        for name in phases.keys() & {*OF_AN_IMAGE, "evaluation"}:
            phases[name] += FLOAT32 * weights.parameters  # gathered once for all scales and batches
        phases["update"] += FLOAT32 * _gathered(tuned)

    in_bfloat16 = run.mixed_precision == "bf16" and device.bfloat16 is not None
    peak_rate = device.bfloat16 if in_bfloat16 and device.bfloat16 else device.float32
    return Plan(
        gpu=device,
        num_gpus=num_gpus,
        run=run,
        dtype="bfloat16" if in_bfloat16 else "float32",
        parameters={name: size.parameters for name, size in sizes.items()},
        unknown=(
            *(name for name, network in named.items() if network not in networks),
            *(f"text of {name}" for name, build in encoders.items() if build is None),
        ),
        num_images=num_images,
        tokens_per_image=ScaleSchedule(transformer.scale_sizes).num_tokens,
        flops=_operations(counts, grpo.num_iterations, num_images, share),
        resident=resident,
        phases=phases,
        cache=of.cache_bytes(),
        activations=counts["update"].saved,
        kept=of.kept_bytes(),
        rate=peak_rate * UTILISATION * num_images / share,
        keeps_gradients=num_gpus > 1 and not is_sharded,
    )


def _counts(of: Phases, scored_by: Sequence[Network], *, is_alone: bool) -> dict[str, Count]:
    """The cost of each phase that there is.

    Args:
        scored_by: the networks of the rewards that are trained on.
        is_alone: whether the update is one backward pass, before which there is no gradient.
    """
    counts = {
        "rollout": of.rollout(),
        "decode": of.decode(),
        "reward": of.reward(scored_by),
        "reference": of.reference() if of.grpo.needs_reference else Count(),
        "update": of.update(has_gradients=not is_alone),
    }
    if of.grpo.credit in WITH_SLOPES:
        counts["credit"] = of.credit([each.config for each in scored_by if isinstance(each, ClipNetwork)])
    if of.grpo.kl_in_reward:
        counts["divergence"] = of.divergence()
    return counts


def _operations(
    counts: Mapping[str, Count], num_iterations: int, num_images: int, share: int
) -> dict[str, float]:
    """The operations of a step, of all processes together.

    Args:
        share: of the `num_images` of a step those that were counted.
    """
    flops = {name: each.flops * num_images / share for name, each in counts.items()}
    divergence = flops.pop("divergence", 0.0)
    flops["update"] -= flops["reference"]  # which runs inside the loss, once a rollout
    flops["update"] = flops["update"] * num_iterations + divergence
    return flops


def _evaluation(of: Phases, counts: Mapping[str, Count], networks: Sequence[Network], num_gpus: int) -> float:
    """Most bytes that an evaluation takes, where it draws more at once than a step of few images and may take
    more than an update. Elsewhere a step takes as much, and this is 0.

    Args:
        counts: of a step.
        networks: of all rewards, also of those that are measured alone.
    """
    at_once = min(len(share_of(of.run.eval_num_images, 0, num_gpus)), of.run.per_device_eval_batch_size)
    if not of.run.eval_steps or at_once <= of.num_images:
        return 0.0
    drawing = replace(of, grpo=GRPOConfig(), num_images=at_once)  # no branches
    reward = drawing.reward(networks).peak
    # Bytes grow by no more than images do: what is then less than an update's needs no count.
    most = at_once / of.num_images * max(counts["rollout"].peak, counts["decode"].peak)
    if not of.run.fsdp and max(most, reward) <= counts["update"].peak:
        return 0.0
    return max(drawing.rollout().peak, drawing.decode().peak, reward)


def _gathered(tuned: Any) -> int:
    """Parameters and gradients that a pass over a sharded model holds at most: what is in no block, and two
    blocks, one at work and one on its way."""

    def at_once(*, is_trained: bool) -> int:
        block = _size(tuned.blocks[0], is_trained=is_trained).parameters
        return _size(tuned, is_trained=is_trained).parameters + (2 - len(tuned.blocks)) * block

    return at_once(is_trained=False) + at_once(is_trained=True)


def describe(plan: Plan) -> str:
    """A plan as a few lines of text."""
    networks = [f"{name} {_with_unit(number)}" for name, number in plan.parameters.items()]
    networks += [f"that of '{name}' unknown, not counted" for name in plan.unknown]
    operations = [f"{name} {_with_unit(number)}" for name, number in plan.flops.items()]
    total = sum(plan.flops.values())
    names = {"update": "backward pass"}
    place = "" if plan.keeps_gradients else "in place of the gradients"
    details: dict[str, str] = dict.fromkeys(WITHOUT_GRADIENTS, place)
    details["rollout"] = "; ".join(filter(None, [f"keys and values {_gigabytes(plan.cache)}", place]))
    details["update"] = f"activations {_gigabytes(plan.activations)}"
    if plan.kept:
        details["update"] += f"; kept of all images {_gigabytes(plan.kept)}"
    largest = max(plan.phases, key=plan.needed)
    rows = [(name, number, "") for name, number in plan.resident.items() if number]
    rows += [
        (
            f"{'+' if name == largest else ' '} {names.get(name, name)}",
            number,
            details.get(name, ""),
        )
        for name, number in plan.phases.items()
    ]
    measured = ", which was measured here" if plan.gpu.is_measured else ""
    evaluations = ""
    if plan.num_evaluations:
        each = duration(plan.evaluation_seconds)
        evaluations = f" and {plan.num_evaluations} evaluations of {plan.run.eval_num_images} images ({each})"
    verdict = "fits" if plan.fits else "does not fit"
    limit = f"{_gigabytes(USABLE_MEMORY * plan.gpu.memory)} of {_gigabytes(plan.gpu.memory)} GB"
    lines = [
        f"{plan.num_gpus} x {plan.gpu.name}, computed, not measured",
        f"parameters  {' · '.join(networks)}",
        f"step        {plan.num_images} images of {plan.tokens_per_image} tokens: "
        f"{plan.num_images * plan.tokens_per_image:,} tokens",
        f"FLOP        {' · '.join(operations)} · sum {_with_unit(total)}",
        "memory      of one process, in GB; of the indented lines only the largest (+) counts",
        *(
            f"  {name:<22}{_gigabytes(number):>8}{f'  ({detail})' if detail else ''}"
            for name, number, detail in rows
        ),
        f"  {'peak':<22}{_gigabytes(plan.peak):>8}  {verdict}: {limit} are usable",
        f"time        {plan.seconds:.2g} s a step, at {UTILISATION:.0%} of the {plan.dtype} peak{measured}",
        f"run         {plan.run.max_steps:,} steps{evaluations}: about {duration(plan.run_seconds)}",
    ]
    return "\n".join(lines)


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.2f}"


def _with_unit(number: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.0f}"


@dataclass(frozen=True)
class _Size:
    """Number of parameters of a network, and bytes of its parameters and buffers."""

    parameters: int
    num_bytes: int


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def _size(model: nn.Module, is_trained: bool = False) -> _Size:
    """The size of a model, or of what is trained of it."""
    parameters = [each for each in model.parameters() if each.requires_grad or not is_trained]
    buffers = [] if is_trained else list(model.buffers())
    return _Size(
        sum(each.numel() for each in parameters), sum(each.nbytes for each in [*parameters, *buffers])
    )
