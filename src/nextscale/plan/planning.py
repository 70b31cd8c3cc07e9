"""What a run will take: parameters, operations, memory and time, without weights and without a GPU.

The project's own sampling, decoding and loss are run on tensors without data (`counting`), so that nothing
here has to follow them by hand. docs/planning.md says what is counted and what is assumed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import CLIPModel

from nextscale.grpo import GRPOConfig
from nextscale.models.scales import ScaleSchedule
from nextscale.models.var import VAR, VARConfig
from nextscale.models.vqvae import VQVAE, VQVAEConfig
from nextscale.plan.counting import Count
from nextscale.plan.gpus import find_gpu
from nextscale.plan.phases import Phases
from nextscale.policy import SamplingConfig
from nextscale.rewards.networks.backbones import backbone_config
from nextscale.runs.config import RunConfig

UTILISATION = 0.3
"""Share of a GPU's peak that is taken to be reached; well-tuned training of large models reaches more."""
USABLE_MEMORY = 0.9
"""Share of a GPU's memory that is planned with; the rest is for CUDA, cuDNN and fragmentation."""
FLOAT32 = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take. All of it is computed, nothing measured.

    Attributes:
        gpu, num_gpus: where it is to run.
        dtype: of the matrix products.
        parameters: of each network.
        unknown: rewards (and what else has a network) whose network is not known here, nor counted anywhere.
        num_images: of a step, over all GPUs.
        tokens_per_image: L.
        flops: of a step, over all GPUs, by phase.
        resident: bytes that one process holds throughout, by part.
        phases: most bytes that one process holds besides, by phase.
        cache: bytes of the keys and values, of those of the rollout.
        activations: bytes kept for the backward pass, of those of the update.
        memory: bytes of one GPU.
        rate: FLOP/s that all GPUs together are taken to reach.
    """

    gpu: str
    num_gpus: int
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
    memory: float
    rate: float

    @property
    def peak(self) -> float:
        """Most bytes that one process holds at once."""
        return sum(self.resident.values()) + max(self.phases.values())

    @property
    def fits(self) -> bool:
        """Whether a process fits into its GPU."""
        return self.peak <= USABLE_MEMORY * self.memory

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.flops.values()) / self.rate


def make_plan(
    transformer: VARConfig,
    tokenizer: VQVAEConfig,
    backbones: Mapping[str, str | None],
    grpo: GRPOConfig,
    sampling: SamplingConfig,
    run: RunConfig,
    gpu: str,
    num_gpus: int = 1,
    evaluated: Mapping[str, str | None] | None = None,
) -> Plan:
    """Plan a run.

    Args:
        backbones: each reward's network by name; None where it has none that is known.
        gpu: a name in `gpus.GPUS`.
        num_gpus: one process each.
        evaluated: networks that are loaded as well, but run in evaluations only; by what they are for.

    Raises:
        ConfigError: an unknown GPU, or groups that the processes cannot share.
    """
    device = find_gpu(gpu)
    grpo.check_processes(num_gpus)
    num_images = grpo.num_images
    sizes = {"transformer": _transformer_size(transformer)}
    if grpo.needs_reference:
        sizes["reference"] = sizes["transformer"]
    sizes["tokenizer"] = _size(lambda: VQVAE(tokenizer))
    named = {**backbones, **(evaluated or {})}
    clips = {name: config for name in named.values() if name and (config := backbone_config(name))}
    sizes |= {name: _size(lambda config=config: CLIPModel(config)) for name, config in clips.items()}

    of = Phases(transformer, tokenizer, grpo, sampling, run, num_images // num_gpus)
    counts = {
        "rollout": of.rollout(),
        "decode": of.decode(),
        "reward": of.reward([clips[name] for name in backbones.values() if name in clips]),
        "reference": of.reference() if grpo.needs_reference else Count(),
        "update": of.update(),
    }
    flops = {name: each.flops * num_gpus for name, each in counts.items()}
    flops["update"] -= flops["reference"]  # it is run inside the loss
    for name in ("reference", "update"):
        flops[name] *= grpo.num_iterations

    trained = FLOAT32 * sizes["transformer"].parameters
    resident = {
        "weights": sizes["transformer"].num_bytes,
        "gradients": trained,
        "AdamW moments": 2 * trained,
        "reference": sizes["reference"].num_bytes if grpo.needs_reference else 0,
        "tokenizer": sizes["tokenizer"].num_bytes,
        "rewards": sum(sizes[name].num_bytes for name in clips),
        # DistributedDataParallel sums gradients in buckets of its own, together as large as they are.
        "gradient buckets": trained if num_gpus > 1 else 0,
        "scored images": of.scored_bytes(),
    }
    phases = {name: counts[name].peak for name in ("rollout", "decode", "reward", "update")}
    phases["AdamW"] = trained  # torch's AdamW on a GPU holds the roots of all second moments at once
    in_bfloat16 = run.mixed_precision == "bf16" and device.bfloat16 is not None
    peak_rate = device.bfloat16 if in_bfloat16 and device.bfloat16 else device.float32
    return Plan(
        gpu=gpu,
        num_gpus=num_gpus,
        dtype="bfloat16" if in_bfloat16 else "float32",
        parameters={name: size.parameters for name, size in sizes.items()},
        unknown=tuple(name for name, backbone in named.items() if backbone not in clips),
        num_images=num_images,
        tokens_per_image=ScaleSchedule(transformer.scale_sizes).num_tokens,
        flops=flops,
        resident=resident,
        phases=phases,
        cache=of.cache_bytes(),
        activations=counts["update"].saved,
        memory=device.memory,
        rate=peak_rate * UTILISATION * num_gpus,
    )


def describe(plan: Plan) -> str:
    """A plan as text of a few lines."""
    networks = [f"{name} {_with_unit(number)}" for name, number in plan.parameters.items()]
    networks += [f"that of '{name}' unknown, not counted" for name in plan.unknown]
    operations = [f"{name} {_with_unit(number)}" for name, number in plan.flops.items()]
    total = sum(plan.flops.values())
    names = {"update": "backward pass", "AdamW": "AdamW's step"}
    details = {"rollout": f"keys and values {_gigabytes(plan.cache)}"}
    details["update"] = f"activations {_gigabytes(plan.activations)}"
    largest = max(plan.phases, key=plan.phases.__getitem__)
    rows = [(name, number, "") for name, number in plan.resident.items() if number]
    rows += [
        (f"{'+' if name == largest else ' '} {names.get(name, name)}", number, details.get(name, ""))
        for name, number in plan.phases.items()
    ]
    verdict = "fits" if plan.fits else "does not fit"
    limit = f"{_gigabytes(USABLE_MEMORY * plan.memory)} of {_gigabytes(plan.memory)} GB"
    lines = [
        f"{plan.num_gpus} x {plan.gpu}, computed, not measured",
        f"parameters  {' · '.join(networks)}",
        f"step        {plan.num_images} images of {plan.tokens_per_image} tokens: "
        f"{plan.num_images * plan.tokens_per_image:,} tokens",
        f"FLOP        {' · '.join(operations)} · sum {_with_unit(total)}",
        "memory      of one process, in GB; of the lines with a margin only the largest (+) counts",
        *(
            f"  {name:<22}{_gigabytes(number):>8}{f'  ({detail})' if detail else ''}"
            for name, number, detail in rows
        ),
        f"  {'peak':<22}{_gigabytes(plan.peak):>8}  {verdict}: {limit} are planned with",
        f"time        {plan.seconds:.2g} s a step, if {UTILISATION:.0%} of the {plan.dtype} peak is reached",
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
    """Of a network: the number of its parameters, and the bytes of parameters and buffers."""

    parameters: int
    num_bytes: int


def _size(build: Callable[[], nn.Module]) -> _Size:
    with torch.device("meta"):
        model = build()
    parameters = list(model.parameters())
    return _Size(
        sum(each.numel() for each in parameters),
        sum(each.nbytes for each in [*parameters, *model.buffers()]),
    )


def _transformer_size(config: VARConfig) -> _Size:
    """As of all its blocks, from one and two of them, which are quicker to make."""
    one, two = (_size(lambda depth=depth: VAR(config.replace(depth=depth))) for depth in (1, 2))
    more = config.depth - 1
    return _Size(
        one.parameters + more * (two.parameters - one.parameters),
        one.num_bytes + more * (two.num_bytes - one.num_bytes),
    )
