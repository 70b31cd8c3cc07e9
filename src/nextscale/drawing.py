"""Draw groups of images: tokens by the policy, decoded, batch by batch.

Shapes: B images · L tokens of all scales · D code width · h w latent · H W pixels
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextscale.base.clock import Clock
from nextscale.base.conditions import Condition
from nextscale.base.seeding import group_uniforms
from nextscale.models.protocol import Conditioning, NextScaleModel
from nextscale.models.vqvae import VQVAE
from nextscale.policy import SamplingConfig
from nextscale.sampling import Branches, OnScale, sample


@dataclass(frozen=True)
class Drawn:
    """Groups of images; the images of a group are consecutive.

    Attributes:
        conditions: what each of the B images was asked to show.
        conditioning: the same, encoded for the model.
        tokens: (B, L) int64.
        log_probs: (B, L) float32, of each token under the sampling policy.
        expected_codes: (B, L, D) the mean code of the distribution that each token was drawn from.
        inputs: (B, L - 1, D) teacher-forcing inputs of the tokens.
        images: (B, 3, H, W) float32 in [0, 1].
        seconds: time spent in `rollout` (sampling tokens) and `decode`.
    """

    conditions: list[Condition]
    conditioning: Conditioning
    tokens: Tensor
    log_probs: Tensor
    expected_codes: Tensor
    inputs: Tensor
    images: Tensor
    seconds: dict[str, float]

    @staticmethod
    def cat(parts: "Sequence[Drawn]") -> "Drawn":
        """The batches of `draw_batches`, put together."""
        return Drawn(
            conditions=[condition for each in parts for condition in each.conditions],
            conditioning=Conditioning.cat([each.conditioning for each in parts]),
            tokens=torch.cat([each.tokens for each in parts]),
            log_probs=torch.cat([each.log_probs for each in parts]),
            expected_codes=torch.cat([each.expected_codes for each in parts]),
            inputs=torch.cat([each.inputs for each in parts]),
            images=torch.cat([each.images for each in parts]),
            seconds={name: sum(each.seconds[name] for each in parts) for name in parts[0].seconds},
        )

    def select(self, index_B: Tensor) -> "Drawn":
        """These of the images, in this order."""
        here_B = index_B.to(self.tokens.device)
        return Drawn(
            conditions=[self.conditions[i] for i in index_B.tolist()],
            conditioning=self.conditioning.select(here_B),
            tokens=self.tokens[here_B],
            log_probs=self.log_probs[here_B],
            expected_codes=self.expected_codes[here_B],
            inputs=self.inputs[here_B],
            images=self.images[here_B],
            seconds=self.seconds,
        )


@torch.no_grad()
def draw_batches(
    transformer: NextScaleModel,
    tokenizer: VQVAE,
    conditions: Sequence[Condition],
    group_seeds: Sequence[tuple[int | str, ...]],
    num_images: int,
    sampling: SamplingConfig,
    batch_size: int | None = None,
    share: range | None = None,
    branches: Branches | None = None,
    on_scale: OnScale | None = None,
    negative: Sequence[str] = ("",),
) -> Iterator[Drawn]:
    """A group of images for each condition, batch by batch: all are full but the last, and run across groups.
    A group's images depend on its seed alone, never on the batch.

    Args:
        conditions: one for each group.
        group_seeds: one for each group, a path as `seeding.derive_seed` takes it.
        num_images: of each group.
        batch_size: images run at once; all by default.
        share: the images to draw, contiguous, of all those of all groups, which it may cut; all by default.
        branches: how images share their first scales; by default none do.
        on_scale: called after every scale of a batch.
        negative: prompts that guidance leads away from, as `guided_away` takes them.
    """
    num_tokens, device = transformer.schedule.num_tokens, transformer.device
    share = range(len(conditions) * num_images) if share is None else share
    conditioning = guided_away(transformer, conditions, negative)
    size = batch_size or max(len(share), 1)
    for start in range(share.start, share.stop, size):
        stop = min(start + size, share.stop)
        first = start // num_images
        groups = slice(first, -(-stop // num_images))
        part = slice(start - first * num_images, stop - first * num_images)
        batch = conditioning.select(groups).repeat(num_images).select(part)
        # Of whole groups: an image's numbers do not depend on where a share or a batch cuts its group.
        uniforms = [group_uniforms(num_images, num_tokens, *path) for path in group_seeds[groups]]
        uniforms_BL, branching = torch.cat(uniforms), None
        if branches is not None:  # a prefix that two batches share has the same numbers in both
            uniforms_BL = branches.shared(uniforms_BL, transformer.schedule)
            branching = branches.of(range(start, stop))
        uniforms_BL = uniforms_BL[part].to(device)
        clock = Clock(device)
        with clock("rollout"):
            drawn_by = batch, uniforms_BL, sampling, branching, on_scale
            samples = sample(transformer, tokenizer, *drawn_by)
        with clock("decode"):
            images = decode(tokenizer, samples.latent)
        yield Drawn(
            conditions=[conditions[i // num_images] for i in range(start, stop)],
            conditioning=batch,
            tokens=samples.tokens,
            log_probs=samples.log_probs,
            expected_codes=samples.expected_codes,
            inputs=samples.inputs,
            images=images,
            seconds=clock.seconds,
        )


def guided_away(
    transformer: NextScaleModel, conditions: Sequence[Condition], negative: Sequence[str]
) -> Conditioning:
    """The conditions for the model, with what guidance leads away from in place of the empty condition.

    Args:
        negative: a prompt for each condition, or one for all; an empty one stands for the empty condition.
    """
    conditioning = transformer.encode_conditions(conditions)
    if not any(negative):
        return conditioning
    away = transformer.encode_conditions([Condition(None, text) for text in negative])
    if not all(negative):
        is_empty = torch.tensor([not text for text in negative], device=transformer.device)
        for name, null in conditioning.null.items():
            away[name][is_empty] = null
    return conditioning.against(away)


def decoded_at_once(image_size: int) -> int:
    """How many images a CPU decodes together: at 256 pixels one, which is as quick as several."""
    return min(max(256**2 // image_size**2, 1), 16)


def decode(tokenizer: VQVAE, latent_BDhw: Tensor) -> Tensor:
    """The images of these latents. A CPU decodes a fixed number at once, the last batch filled up: a
    convolution rounds by the size of its batch, so an image's bits do not depend on its neighbours."""
    if latent_BDhw.device.type != "cpu":
        return tokenizer.latent_to_images(latent_BDhw)
    num, size = len(latent_BDhw), decoded_at_once(tokenizer.config.image_size)
    filled_BDhw = torch.cat([latent_BDhw, latent_BDhw.new_zeros(-num % size, *latent_BDhw.shape[1:])])
    parts = [tokenizer.latent_to_images(each) for each in filled_BDhw.split(size)]
    return torch.cat(parts)[:num]
