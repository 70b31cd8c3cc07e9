"""Check the measures themselves: they must rank true pictures, reconstructions and models as a person would.

    python benchmarks/measures.py toy-painting=runs/results/toy-painting-0/final

Of each row there are equally many images, drawn from seeds that nothing else uses. Prints the table of
docs/miniature.md.
"""

import argparse
import time

import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.drawing import draw_batches
from nextscale.pipeline import VARPipeline
from nextscale.toy.judges import KINDS, judge_images
from nextscale.toy.realism import NUM_TRUE, Realism
from nextscale.toy.references import true_pictures
from nextscale.toy.world import CLASSES

WHAT = ("frechet", "precision", "recall")


def pictures(style: str, num: int) -> list[tuple[Tensor, list[Condition]]]:
    """True pictures in batches, with what they show."""
    conditions = [Condition(i % len(CLASSES), CLASSES[i % len(CLASSES)]) for i in range(num)]
    images = true_pictures(style, "benchmark", num)
    return [(images[i : i + 64], conditions[i : i + 64]) for i in range(0, num, 64)]


def samples(name: str, num: int) -> list[tuple[Tensor, list[Condition]]]:
    """A model's own samples in batches, under the policy that it was trained with."""
    pipe = VARPipeline.from_pretrained(name)
    classes = pipe.all_conditions()
    seeds = [("measures", each.key) for each in classes]
    networks = pipe.transformer, pipe.tokenizer
    drawn = draw_batches(*networks, classes, seeds, num // len(classes), pipe.sampling, 64)
    return [(batch.images, batch.conditions) for batch in drawn]


def measured(realism: Realism, batches: list[tuple[Tensor, list[Condition]]]) -> dict[str, float]:
    """All measures of these images."""
    begin = time.perf_counter()
    judged = [judge_images(*batch) for batch in batches]
    features = [realism.features(*batch) for batch in batches]
    conditions = [each for _, part in batches for each in part]
    found = realism.measure(
        {kind: torch.cat([each[kind] for each in features]) for kind in KINDS}, conditions
    )
    found |= {name: torch.cat([each[name] for each in judged]).mean().item() for name in judged[0]}
    return found | {"seconds": time.perf_counter() - begin}


def row(name: str, style: str, found: dict[str, float]) -> str:
    cells = [f"{found[f'judge/{what}/{style}/{kind}']:.3g}" for kind in KINDS for what in WHAT]
    cells += [f"{found['judge/class_log_prob']:.3f}", f"{100 * found['judge/class_accuracy']:.1f} %"]
    return f"| {name} | " + " | ".join([*cells, f"{100 * found[f'judge/style/{style}']:.1f} %"]) + " |"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER", help="a trained model and its name")
    parser.add_argument("--num-images", type=int, default=NUM_TRUE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    realism, base = Realism(), VARPipeline.from_pretrained("toy")
    by_name = {"base": measured(realism, samples("toy", options.num_images))}
    for name, _, folder in (each.partition("=") for each in options.models):
        by_name[name] = measured(realism, samples(folder, options.num_images))
    for style in ("painting", "photo"):
        true = pictures(style, options.num_images)
        decoded = [(base.tokenizer.decode(base.tokenizer.encode(images)), each) for images, each in true]
        rows = {f"other true {style}s": true, "their reconstructions": decoded}
        columns = [f"{what}, {kind}" for kind in KINDS for what in ("Fréchet", *WHAT[1:])]
        columns += ["class log-prob", "class", style]
        print(f"\n| against true {style}s | " + " | ".join(columns) + " |")
        print("| --- |" + " --- |" * len(columns))
        for name, found in ({name: measured(realism, each) for name, each in rows.items()} | by_name).items():
            print(row(name, style, found), flush=True)
    num, seconds = options.num_images, by_name["base"]["seconds"]
    print(f"\n{num} images each; measuring them took {seconds:.1f} s, the first time")


if __name__ == "__main__":
    main()
