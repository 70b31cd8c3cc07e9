"""`nextscale sample`: draw images from a model."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from nextscale.base.errors import ConfigError
from nextscale.cli import arguments
from nextscale.cli.parser import add_command

MAX_ROWS = 8  # of a grid, if no classes are asked for
MAX_NAME = 80  # characters of a prompt in the name of a file


def add(commands: Any) -> None:
    examples = [
        "sample",
        "sample --model runs/toy-painting/final --classes star,3 --num-images 8 --output stars.png",
        "sample --classes fish --num-images 100 --separate fish",
        'sample --model var-d16 --classes "golden retriever,88"',
        "sample --model var_d16.pth --vae vae_ch160v4096z32.pth --classes volcano",
        'sample --model toy-text --prompt "a photo of a red star on sand in the middle"',
        "sample --model switti-512 --prompts prompts.txt --num-images 1",
        'sample --model toy-text --prompt "a red star" --negative-prompt "sand"',
    ]
    parser = add_command(commands, "sample", run, "draw images from a model", examples)
    parser.option("--model", str, arguments.MODEL, "toy")
    arguments.add_vae(parser)
    arguments.add_adapter(parser)
    parser.option("--classes", str, arguments.CLASSES, shown=f"the first {MAX_ROWS}")
    arguments.add_prompts(parser)
    parser.option("--negative-prompt", str, "of a text-conditional model, what guidance leads away from")
    parser.option("--num-images", int, "images per class or prompt", 4)
    arguments.add_drawing_options(parser, "the model's")
    text = "save all images in one picture, a row per class or prompt"
    parser.option("--output", Path, text, shown="samples.png")
    parser.option("--separate", Path, "save each image in a file of its own, in this folder")


def run(args: Namespace) -> int:
    from einops import rearrange

    from nextscale.base.images import to_pil

    if args.num_images < 1:
        raise ConfigError(f"--num-images must be at least 1, got {args.num_images}")
    if args.output:
        arguments.check_image_file(args.output)
    pipe = arguments.load_model(args)
    conditions = arguments.conditions_of(args, pipe)
    if conditions is None:
        conditions = pipe.conditions(range(min(pipe.num_classes, MAX_ROWS)))
    names = [condition.text for condition in conditions]
    labels = [condition.label for condition in conditions]
    drawn: Any = {"class_labels": labels} if pipe.num_classes else {"prompts": names}
    options = arguments.given_sampling(args) | {"negative_prompt": args.negative_prompt}
    out = pipe(**drawn, num_images_per_label=args.num_images, seed=args.seed, **options)
    if args.separate:
        for i, image in enumerate(out.pil()):
            row, column = divmod(i, args.num_images)
            name = re.sub(r"\W+", "-", names[row])[:MAX_NAME]
            arguments.save_image(image, args.separate / f"{row:03d}-{name}-{column:03d}.png")
        print(f"{len(out.images)} images in {args.separate}")
    if args.output or not args.separate:
        path = args.output or Path("samples.png")
        grid = rearrange(out.images, "(rows columns) c h w -> 1 c (rows h) (columns w)", rows=len(names))
        arguments.save_image(to_pil(grid)[0], path)
        print(f"{path}: rows {(', ' if pipe.num_classes else '; ').join(names)}")
    return 0
