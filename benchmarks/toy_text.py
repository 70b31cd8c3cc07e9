"""What there is to win in the recipes of toy-text: true pictures, and the best of what the base draws.

    python benchmarks/toy_text.py
    python benchmarks/toy_text.py --style mosaic
    python benchmarks/toy_text.py --model runs/demo-text/final --guidance 1.5

Of held-out prompts. Diversity is measured as evaluations measure it: the mean distance between two pictures
of one prompt. "Best of 16" is the image of 16 with the highest CLIP score of the recipe: a model that drew so
would be at most log 16 - 15 / 16 = 1.8 nats of KL away.

Shapes: P prompts · n images of one prompt · E width of the embedding
"""

import argparse

import torch
from einops import rearrange
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.evaluation import mean_pairwise_distance
from nextscale.pipeline import VARPipeline
from nextscale.rewards.clip_score import ClipScore
from nextscale.rewards.networks.clip import load_clip
from nextscale.toy.judges import judge_prompted
from nextscale.toy.prompts import ATTRIBUTES, combinations_of, pictured, prompt_of, prompts
from nextscale.toy.world import render

NAMES = ("all", *ATTRIBUTES)
NUM = 4  # true pictures of each prompt
DRAWN = 16  # images of each


def row(name: str, images: Tensor, texts: list[str], chosen_P: Tensor | None = None) -> None:
    """What is right, and the diversity of images, (P, n, 3, H, W): of all, and of those that are all right.

    Args:
        chosen_P: one of each prompt, to look at alone.
    """
    conditions = [Condition(None, text) for text in texts for _ in range(images.shape[1])]
    judged = judge_prompted(images.flatten(0, 1), conditions)
    right = {each: judged[f"judge/{each}_right"].unflatten(0, images.shape[:2]) for each in NAMES}
    cells = []
    if chosen_P is None:
        embeddings = load_clip("toy").embed_images(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        good = [each[mask] for each, mask in zip(embeddings, right["all"] > 0, strict=True)]
        for groups in (list(embeddings), [each for each in good if len(each) > 1]):
            cells.append(f"{sum(mean_pairwise_distance(each) for each in groups) / len(groups):.3f}")
    else:
        right = {each: value.gather(1, chosen_P[:, None]) for each, value in right.items()}
        cells = ["-", "-"]
    shares = [f"{100 * right[each].mean():.1f} %" for each in NAMES]
    print(f"| {name} | " + " | ".join(shares + cells) + " |", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--style", default="photo")
    parser.add_argument("--model", default="toy-text", help="a tuned one, to look at in place of the base")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5, 3.0, 5.0])
    given = parser.parse_args()
    style = given.style
    torch.set_num_threads(1)
    pipe, reward = VARPipeline.from_pretrained(given.model), ClipScore("{text}", clip="toy-text")
    print(f"| | {' | '.join(NAMES)} | diversity | of the right ones |")
    print("| --- |" + " --- |" * (len(NAMES) + 2))
    scenes = pictured(4000, torch.Generator().manual_seed(7), held_out=True, style=style)
    found = [prompt_of(each, style) for each in combinations_of(scenes)]
    texts = [each for each in prompts(held_out=True, style=style) if found.count(each) >= NUM]
    chosen = [[i for i, each in enumerate(found) if each == text][:NUM] for text in texts]
    true = render(scenes[torch.tensor(chosen).flatten()])
    decoded = pipe.tokenizer.decode(pipe.tokenizer.encode(true))
    for name, images in (("true pictures", true), ("their reconstructions", decoded)):
        row(name, rearrange(images, "(P n) c h w -> P n c h w", n=NUM), texts)
    for guidance in given.guidance:
        drawn = pipe(prompts=texts, num_images_per_prompt=DRAWN, guidance_scale=guidance, seed=2).images
        scores = reward(drawn, [Condition(None, text) for text in texts for _ in range(DRAWN)])
        images = rearrange(drawn, "(P n) c h w -> P n c h w", n=DRAWN)
        row(f"{given.model}, guidance {guidance:g}", images, texts)
        row(f"best of {DRAWN} of these", images, texts, scores.view(len(texts), DRAWN).argmax(1))


if __name__ == "__main__":
    main()
