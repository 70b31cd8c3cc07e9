"""The method in one file, to be read: GRPO for a next-scale model, on nextscale's public names and torch.

A model of photos learns to paint: CLIP compares each image with "a painting of a {label}". Two minutes on a
laptop.

    python examples/grpo_in_one_file.py            # writes before.png, after.png
    python examples/grpo_in_one_file.py --steps 2

`nextscale train` does the same and much more (exact KL, entropy floor, several rewards, many processes,
checkpoints). docs/algorithm.md has the equations, numbered as here.

Shapes: N groups · G images of one group · B = N G images · L tokens of all scales
"""

import argparse

import torch
from PIL import Image
from torch import Tensor

import nextscale as ns

GROUPS, GROUP_SIZE, MICROBATCH = 8, 8, 16
LEARNING_RATE, BETA = 8e-4, 0.01
TRAINED_SCALES = 4  # of 6: the coarse ones decide what the image is, in 30 tokens of 130


def group_advantages(rewards_NG: Tensor) -> Tensor:
    """(N, G) how much better each image scored than its group (equation 4)."""
    centred_NG = rewards_NG - rewards_NG.mean(1, keepdim=True)
    return centred_NG / (rewards_NG.std(1, keepdim=True) + 1e-4)


def token_weights(lengths: list[int]) -> Tensor:
    """(L,) weights that sum to 1: each trained scale has the same total, whatever its number of tokens."""
    trained = [1 / TRAINED_SCALES if k < TRAINED_SCALES else 0.0 for k in range(len(lengths))]
    return torch.cat([torch.full((n,), total / n) for n, total in zip(lengths, trained, strict=True)])


def grpo_loss(
    log_probs_BL: Tensor,
    old_log_probs_BL: Tensor,
    reference_BL: Tensor,
    advantages_B: Tensor,
    weights_L: Tensor,
    epsilon: float = 0.2,
) -> Tensor:
    """The clipped surrogate less the KL to the reference, a mean over images (equations 5 to 7).

    Args:
        log_probs_BL: of the drawn tokens under the policy in training, with gradient.
        old_log_probs_BL: under the policy that drew them.
        reference_BL: under the frozen model.
        advantages_B: of each image, for all its tokens.
    """
    ratio_BL = (log_probs_BL - old_log_probs_BL).exp()
    clipped_BL = ratio_BL.clamp(1 - epsilon, 1 + epsilon)
    advantages_B1 = advantages_B[:, None]
    surrogate_BL = torch.minimum(ratio_BL * advantages_B1, clipped_BL * advantages_B1)
    # KL(policy || reference), estimated from the drawn token alone (k3); the package sums over the codebook.
    difference_BL = reference_BL - log_probs_BL
    kl_BL = difference_BL.exp() - 1 - difference_BL
    return -((surrogate_BL - BETA * kl_BL) * weights_L).sum(1).mean()


def train(pipe: ns.VARPipeline, num_steps: int, seed: int) -> None:
    """Move the pipeline's transformer, in place, towards what the reward prefers."""
    # The policy is what is sampled: guidance is a part of it, in drawing and in training alike.
    reference = ns.VARPipeline.from_pretrained("toy")
    policy = ns.SamplingConfig(guidance_scale=1.5)
    reward = ns.rewards.ClipScore("a painting of a {label}", clip="toy")
    weights_L = token_weights(list(pipe.transformer.schedule.lengths))
    optimizer = torch.optim.AdamW(pipe.transformer.parameters(), LEARNING_RATE, (0.9, 0.95), weight_decay=0)

    for step in range(1, num_steps + 1):
        # Rollout: a group of images for each of N classes, with the log-probability of every token.
        classes = torch.arange(GROUPS) % pipe.num_classes
        drawn = pipe(classes, GROUP_SIZE, guidance_scale=policy.guidance_scale, seed=1000 * seed + step)

        # Score all images, and compare each with its group.
        labels_B = classes.repeat_interleave(GROUP_SIZE)
        rewards_B = torch.as_tensor(reward(drawn.images, pipe.conditions(labels_B)))
        advantages_B = group_advantages(rewards_B.view(GROUPS, GROUP_SIZE)).flatten()

        # Update: one step on the gradient of all images. One teacher-forced pass re-scores all tokens of a
        # microbatch, in all scales at once, under exactly the policy that drew them.
        for part in torch.arange(len(labels_B)).split(MICROBATCH):
            labels_b, tokens_bL = labels_B[part], drawn.tokens[part]
            with torch.no_grad():
                reference_bL = ns.log_probs(reference, labels_b, tokens_bL, policy)
            log_probs_bL = ns.log_probs(pipe, labels_b, tokens_bL, policy)
            old_bL = drawn.log_probs[part]
            loss = grpo_loss(log_probs_bL, old_bL, reference_bL, advantages_B[part], weights_L)
            (loss * len(part) / len(labels_B)).backward()
        torch.nn.utils.clip_grad_norm_(pipe.transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:3d}   reward {rewards_B.mean():.3f}", flush=True)


def save_samples(pipe: ns.VARPipeline, path: str) -> None:
    """A picture of one row of samples for each class, from the same seed every time."""
    images = pipe(range(pipe.num_classes), 8, guidance_scale=1.5, seed=7).pil()
    width, height = images[0].size
    page = Image.new("RGB", (8 * width, pipe.num_classes * height))
    for i, image in enumerate(images):
        page.paste(image, (i % 8 * width, i // 8 * height))
    page.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipe = ns.VARPipeline.from_pretrained("toy")
    save_samples(pipe, "before.png")
    train(pipe, args.steps, args.seed)
    save_samples(pipe, "after.png")


if __name__ == "__main__":
    main()
