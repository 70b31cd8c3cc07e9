"""Measure the miniature world's models: reconstructions, base samples, CLIP, aesthetic head, judges.

    python benchmarks/toy_models.py                       # the shipped models
    python benchmarks/toy_models.py --assets build/toy    # others, trained by `nextscale toy train`

All images come from seeds that no training used.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from nextscale.base.seeding import generator_for
from nextscale.models.zoo import TOY_ASSETS
from nextscale.pipeline import VARPipeline
from nextscale.rewards.aesthetic import load_head
from nextscale.rewards.networks.clip import Clip
from nextscale.toy.judges import Judge, load_judge
from nextscale.toy.world import CLASSES, STYLES, beauty, caption, ratings, render, sample_scenes


def judge(network: Judge, images: Tensor) -> Tensor:
    """(B,) the kind that a judge sees."""
    with torch.no_grad():
        return network(images).argmax(1)


def shares(hits: Tensor) -> str:
    return f"{100 * hits.float().mean():.1f} %"


def measure_reconstructions(assets: Path, num: int) -> None:
    """PSNR, judges and CLIP on reconstructions of fresh images, by style."""
    pipe = VARPipeline.from_pretrained(assets / "pipeline")
    judges = {kind: load_judge(kind, assets / "judges") for kind in ("class", "style")}
    clip, head = Clip.from_pretrained(assets / "clip"), load_head(assets / "aesthetic_head.safetensors")
    texts = clip.embed_texts([caption(label, style) for style in STYLES for label in CLASSES])
    print(
        "| style | PSNR | class judge, original | class judge | style judge | CLIP style | CLIP class | r |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    everything: list[tuple[Tensor, Tensor]] = []
    for index, style in enumerate(STYLES):
        generator = generator_for("measure", style)
        scenes = sample_scenes(num, generator, styles=torch.full((num,), index))
        images = render(scenes)
        decoded = torch.cat(
            [pipe.tokenizer.decode(pipe.tokenizer.encode(each)) for each in images.split(128)]
        )
        psnr = -10 * (images - decoded).square().mean((1, 2, 3)).log10()
        embeddings = clip.embed_images(decoded)
        best = (embeddings @ texts.T).argmax(1)
        predicted, rated = head(embeddings), ratings(scenes, generator)
        everything.append((predicted, rated))
        print(
            f"| {style} | {psnr.mean():.1f} dB | {shares(judge(judges['class'], images) == scenes.label)} "
            f"| {shares(judge(judges['class'], decoded) == scenes.label)} "
            f"| {shares(judge(judges['style'], decoded) == index)} | {shares(best // 8 == index)} "
            f"| {shares(best % 8 == scenes.label)} | {correlation(predicted, rated):.2f} "
            f"(beauty {correlation(predicted, beauty(scenes)):.2f}; mean {predicted.mean():.2f}) |"
        )
    predicted, rated = (torch.cat(each) for each in zip(*everything, strict=True))
    print(f"\naesthetic head, all styles: r = {correlation(predicted, rated):.2f} with ratings")


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def measure_samples(assets: Path, num: int) -> None:
    """The judges' verdicts on the base model's samples, with and without guidance."""
    pipe = VARPipeline.from_pretrained(assets / "pipeline")
    judges = {kind: load_judge(kind, assets / "judges") for kind in ("class", "style")}
    labels = torch.arange(len(CLASSES)).repeat_interleave(num // len(CLASSES))
    print("\n| guidance | class judge right | style judge says photo |\n| --- | --- | --- |")
    for guidance in (0.0, 1.5, 3.0):
        output = pipe(range(len(CLASSES)), num // len(CLASSES), guidance_scale=guidance, seed=12345)
        right = judge(judges["class"], output.images) == labels
        photo = judge(judges["style"], output.images) == STYLES.index("photo")
        print(f"| {guidance} | {shares(right)} | {shares(photo)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", type=Path, default=TOY_ASSETS)
    parser.add_argument("--num-images", type=int, default=1024)
    options = parser.parse_args()
    measure_reconstructions(options.assets, options.num_images)
    measure_samples(options.assets, options.num_images)


if __name__ == "__main__":
    main()
