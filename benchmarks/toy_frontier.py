"""The diversity that a higher aesthetic reward must cost any model that stays close to the base model.

    python benchmarks/toy_frontier.py

Of all distributions with a given mean reward, the one closest to the base model in KL weights its images by
exp(reward / temperature). So reweighted images of the base model give the best trade-off that a model can
reach without drawing images that the base model would never draw.

Shapes: N classes · G images of one class · E width of the embedding
"""

import argparse

import torch
from torch import Tensor

from nextscale.config.recipe import load_recipe
from nextscale.pipeline import VARPipeline
from nextscale.rewards import Aesthetic
from nextscale.rewards.networks.clip import load_clip


def weighted_distance(embeddings_GE: Tensor, weights_G: Tensor) -> Tensor:
    """Mean pairwise 1 - cosine of two different images, each sampled by weight."""
    pairs_GG = (weights_G[:, None] * weights_G[None, :]).fill_diagonal_(0)
    return (pairs_GG * (1 - embeddings_GE @ embeddings_GE.T)).sum() / pairs_GG.sum()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=384, help="images per class")
    args = parser.parse_args()
    pipe, clip, reward = VARPipeline.from_pretrained("toy"), load_clip("toy"), Aesthetic("toy", clip="toy")
    guidance_scale = load_recipe("toy-aesthetic").sampling.guidance_scale
    rewards, embeddings = [], []
    for label in range(pipe.num_classes):
        images = torch.cat(
            [
                pipe([label], 64, guidance_scale=guidance_scale, seed=1000 * label + i).images
                for i in range(args.num_images // 64)
            ]
        )
        rewards.append(reward(images, pipe.conditions([label] * len(images))))
        embeddings.append(clip.embed_images(images))
    rewards_NG, embeddings_NGE = torch.stack(rewards), torch.stack(embeddings)
    standard_NG = (rewards_NG - rewards_NG.mean()) / rewards_NG.std()
    print("| reward, base sd | diversity / base | effective images of a class |\n| --- | --- | --- |")
    base = None
    for strength in (0.0, 1.0, 2.0, 3.0, 4.0, 5.0):
        weights_NG = (strength * standard_NG).softmax(1)
        mean = (weights_NG * standard_NG).sum(1).mean()
        pairs = zip(embeddings_NGE, weights_NG, strict=True)
        diversity = torch.stack([weighted_distance(*each) for each in pairs]).mean()
        base = diversity if base is None else base
        effective = (1 / weights_NG.square().sum(1)).mean()
        print(f"| {round(mean.item(), 2) + 0.0:+.2f} | {diversity / base:.2f} | {effective:.0f} |")


if __name__ == "__main__":
    main()
