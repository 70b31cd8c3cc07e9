"""`nextscale toy`: look at the miniature world, or rebuild its models."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from nextscale.base.errors import ConfigError
from nextscale.cli.arguments import check_image_file, save_image
from nextscale.cli.parser import add_command


def add(commands: Any) -> None:
    parser = commands.add_parser("toy", help="look at the miniature world, or rebuild its models")
    parser.description = "64x64 pictures of eight objects in five styles, drawn by a program."
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    draw = add_command(actions, "show", show, "draw every class in every style", ["toy show"])
    draw.option("--output", Path, "image file to write", Path("world.png"))
    draw.option("--seed", int, "seed of the scenes", 0)
    examples = ["toy train --output build/toy", "toy train --output build/quick --steps-factor 0.01"]
    examples += ["toy train --output build/toy --only text"]
    summary = "train the models of the miniature world from scratch; takes about an hour on a CPU"
    build = add_command(actions, "train", train, summary, examples)
    build.add_argument("--output", type=Path, required=True, metavar="PATH", help="folder to write to")
    build.option("--seed", int, "seed of all random draws", 0)
    build.option("--steps-factor", float, "number of training steps, as a share of the shipped models'", 1.0)
    text = "train one part again, in a folder that has the others: text, the model of prompts"
    build.add_argument("--only", choices=["text"], help=text)
    summary = "draw the true pictures again that images are compared with, for the judges in a folder"
    refer = add_command(actions, "references", references, summary, ["toy references --models build/toy"])
    refer.add_argument("--models", type=Path, required=True, metavar="PATH", help="folder of 'toy train'")


def show(args: Namespace) -> int:
    import torch
    from einops import rearrange

    from nextscale.base.images import to_pil
    from nextscale.base.seeding import generator_for
    from nextscale.toy.world import CLASSES, STYLES, render, sample_scenes

    check_image_file(args.output)
    labels = torch.arange(len(CLASSES)).repeat_interleave(len(STYLES))
    styles = torch.arange(len(STYLES)).repeat(len(CLASSES))
    scenes = sample_scenes(len(labels), generator_for("show", args.seed), labels, styles)
    grid = rearrange(render(scenes), "(rows columns) c h w -> 1 c (rows h) (columns w)", rows=len(CLASSES))
    save_image(to_pil(grid)[0], args.output)
    print(f"{args.output}: rows {', '.join(CLASSES)}; columns {', '.join(STYLES)}")
    return 0


def train(args: Namespace) -> int:
    if not 0 < args.steps_factor < float("inf"):
        raise ConfigError(f"--steps-factor must be above 0, got {args.steps_factor}")
    if args.only and not (args.output / "clip_text").is_dir():
        raise ConfigError(
            f"'{args.output}' has no text tower: give a folder that 'nextscale toy train' wrote"
        )
    from nextscale.toy.train import train_all, train_text

    (train_text if args.only else train_all)(args.output, args.seed, args.steps_factor)
    return 0


def references(args: Namespace) -> int:
    if not (args.models / "judges").is_dir():
        raise ConfigError(f"'{args.models}' has no judges: give a folder that 'nextscale toy train' wrote")
    from nextscale.toy.train import refer

    refer(args.models)
    return 0
