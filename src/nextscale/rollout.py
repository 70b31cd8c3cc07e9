"""Groups of scored images: what one step learns from.

Shapes: N groups · G images of one group · B = N G images · L tokens of all scales · D codebook width
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from nextscale.base.clock import Clock
from nextscale.base.conditions import Condition
from nextscale.base.seeding import generator_for, group_uniforms
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rewards.reward_set import RewardSet


@dataclass(frozen=True)
class Rollout:
    """Scored images; those of one group stand together.

    Attributes:
        labels: (B,) int64 class indices.
        conditions: what each image was asked to show.
        tokens: (B, L) int64.
        log_probs: (B, L) float32, recorded while sampling.
        inputs: (B, L - 1, D) teacher-forcing inputs of the tokens.
        images: (B, 3, H, W) float32 in [0, 1].
        components: each reward's scores, (N, G) on the CPU, unweighted.
        seconds: time of `rollout`, `decode` and `reward`.
    """

    labels: Tensor
    conditions: list[Condition]
    tokens: Tensor
    log_probs: Tensor
    inputs: Tensor
    images: Tensor
    components: dict[str, Tensor]
    seconds: dict[str, float]


def step_labels(labels: Sequence[int], num_groups: int, seed: int, step: int) -> list[int]:
    """The class of each group of a step: the classes in shuffled rounds, so that all come equally often.

    Args:
        labels: the classes to train on.
        step: from 1.

    Returns:
        `num_groups` labels, a pure function of (seed, step).
    """
    chosen: list[int] = []
    position = (step - 1) * num_groups
    while len(chosen) < num_groups:
        number, offset = divmod(position + len(chosen), len(labels))
        order = torch.randperm(len(labels), generator=generator_for("labels", seed, number)).tolist()
        chosen += [labels[i] for i in order[offset:]]
    return chosen[:num_groups]


@torch.no_grad()
def collect(
    pipe: VARPipeline,
    labels: Sequence[int],
    group_seeds: Sequence[tuple[int | str, ...]],
    num_generations: int,
    sampling: SamplingConfig,
    rewards: RewardSet,
    batch_size: int | None = None,
) -> Rollout:
    """Sample, decode and score one group for each label.

    Args:
        labels: N class indices.
        group_seeds: what each group's images depend on, and on nothing else.
        num_generations: G.
        batch_size: images run at once; all by default.

    Raises:
        RewardError: a reward that cannot be used.
    """
    clock = Clock(pipe.device)
    num_tokens = pipe.transformer.schedule.num_tokens
    uniforms = torch.cat([group_uniforms(num_generations, num_tokens, *path) for path in group_seeds])
    each_label = [label for label in labels for _ in range(num_generations)]
    conditions = pipe.conditions(each_label)
    tokens, log_probs, images, inputs = [], [], [], []
    for start in range(0, len(each_label), batch_size or len(each_label)):
        part = slice(start, start + (batch_size or len(each_label)))
        with clock("rollout"):
            samples = pipe.draw(each_label[part], uniforms[part], sampling)
            inputs.append(pipe.tokenizer.tokens_to_inputs(samples.tokens))
        with clock("decode"):
            images.append(pipe.tokenizer.latent_to_images(samples.latent))
        tokens.append(samples.tokens)
        log_probs.append(samples.log_probs)
    all_images = torch.cat(images)
    with clock("reward"):
        scores = rewards.scores(all_images, conditions)
    return Rollout(
        labels=torch.tensor(each_label, device=pipe.device),
        conditions=conditions,
        tokens=torch.cat(tokens),
        log_probs=torch.cat(log_probs),
        inputs=torch.cat(inputs),
        images=all_images,
        components={
            name: rearrange(each, "(N G) -> N G", G=num_generations) for name, each in scores.items()
        },
        seconds=clock.seconds,
    )
