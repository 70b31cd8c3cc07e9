"""Held-out prompts, drawn by a base model above and by a tuned one below, from the same seeds.

    nextscale train toy-text-attributes --run.seed 90
    python benchmarks/toy_text_pictures.py runs/toy-text-attributes/final --output docs/text_before_after.png
    nextscale train toy-text-painting --run.seed 90
    python benchmarks/toy_text_pictures.py runs/toy-text-painting/final --style painting \\
        --output docs/text_painting.png

Prompts are every 17th of the held-out ones, so that none is chosen by its pictures.
Both models are drawn with the tuned one's guidance.

Shapes: P prompts · n images of one prompt
"""

import argparse
import textwrap

from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

import nextscale as ns
from nextscale.base.images import to_pil
from nextscale.toy.prompts import prompts

COLUMNS, EACH = 8, 2  # prompts, and images of each prompt by each model
SIZE, GAP, HEAD, SIDE = 128, 8, 82, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tuned", help="a model, such as a run's folder final")
    parser.add_argument("--base", default="toy-text")
    parser.add_argument("--style", default="photo")
    parser.add_argument("--output", required=True, help="picture to write")
    args = parser.parse_args()

    texts = prompts(held_out=True, style=args.style)[::17][:COLUMNS]
    tuned = ns.VARPipeline.from_pretrained(args.tuned)
    models = {"base": ns.VARPipeline.from_pretrained(args.base), "tuned": tuned}
    guidance = tuned.sampling.guidance_scale
    font = ImageFont.load_default(14)
    width, row = SIDE + COLUMNS * (SIZE + GAP), EACH * (SIZE + 2) + GAP
    page = Image.new("RGB", (width, HEAD + len(models) * row), "white")
    pen = ImageDraw.Draw(page)
    for i, text in enumerate(texts):
        lines = "\n".join(textwrap.wrap(text, 18))
        pen.text((SIDE + i * (SIZE + GAP), 4), lines, "black", font)
    for j, (name, pipe) in enumerate(models.items()):
        top = HEAD + j * row
        pen.text((6, top + SIZE - 8), name, "black", font)
        out = pipe(prompts=texts, num_images_per_prompt=EACH, guidance_scale=guidance, seed=0)
        for i, images in enumerate(rearrange(out.images, "(P n) c h w -> P n c h w", n=EACH)):
            for k, image in enumerate(to_pil(images)):
                place = SIDE + i * (SIZE + GAP), top + k * (SIZE + 2)
                page.paste(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC), place)
    page.save(args.output)


if __name__ == "__main__":
    main()
