"""The command line: `nextscale train | plan | sample | evaluate | report | export | toy`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nextscale import __version__
from nextscale.base.errors import NextscaleError
from nextscale.cli import commands
from nextscale.cli.commands import INTERRUPTED, MAX_ROWS
from nextscale.cli.options import Parser, list_recipe_options, take_overrides
from nextscale.plan.gpus import DEFAULT_GPU, GPUS

MODEL = '"toy", a published model such as "var-d16", or a folder or hub repository that nextscale wrote'
CLASS_LIST = "names or numbers, separated by commas"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _run(words)
        finally:
            sys.stdout.flush()  # here, where a reader that has gone is no error
    except BrokenPipeError:  # the reader, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except NextscaleError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"'{error.filename}': {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        return INTERRUPTED


def _fail(sentence: str) -> int:
    print(f"nextscale: error: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


def _run(words: list[str]) -> int:
    command = next((word for word in words if not word.startswith("-")), None)
    rest, overrides = take_overrides(words) if command in ("train", "plan") else (words, {})
    args, unknown = _parser(lists_recipe_options=command == "train").parse_known_args(rest)
    if unknown:
        raise args.parser.unknown(unknown[0])
    args.overrides, args.words = overrides, ["nextscale", *words]
    return args.function(args)


def _parser(lists_recipe_options: bool) -> Parser:
    parser = Parser(
        prog="nextscale",
        description="Fine-tune next-scale visual autoregressive image models with reinforcement learning.",
        epilog="Start with:  nextscale train toy-painting && nextscale report runs/toy-painting",
    )
    parser.add_argument("--version", action="version", version=f"nextscale {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    train = _add_train(subparsers)
    if lists_recipe_options:  # asks the records, which takes seconds to import
        list_recipe_options(train)
    _add_plan(subparsers)
    _add_sample(subparsers)
    _add_evaluate(subparsers)
    _add_report(subparsers)
    _add_export(subparsers)
    _add_toy(subparsers)
    return parser


def _add(subparsers: Any, name: str, function: Any, summary: str, examples: list[str]) -> Parser:
    epilog = "\n".join(["examples:", *(f"  nextscale {each}" for each in examples)])
    description = f"{summary[0].upper()}{summary[1:]}."
    parser = subparsers.add_parser(name, help=summary, description=description, epilog=epilog)
    parser.set_defaults(function=function, parser=parser)
    return parser


def _add_train(subparsers: Any) -> Parser:
    examples = [
        "train toy-painting",
        "train toy-painting --grpo.beta 0.05 --run.max_steps 20 --run.output_dir runs/short",
        "train mine.yaml --rewards.painting.weight 0.5 --dry-run",
        "train toy-painting --run.resume auto",
    ]
    parser = _add(subparsers, "train", commands.train, "fine-tune a model as a recipe says", examples)
    parser.usage = "nextscale train RECIPE [--dry-run] [--KEY VALUE ...]"
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged recipe")
    text = "check everything, print the configuration and the plan, but run nothing"
    parser.add_argument("--dry-run", action="store_true", help=text)
    return parser


def _add_plan(subparsers: Any) -> None:
    examples = [
        "plan var-d16-aesthetic",
        "plan var-d30-combined --gpu a100-80gb --num-gpus 8",
        "plan mine.yaml --run.per_device_train_batch_size 4 --run.gradient_checkpointing",
    ]
    summary = "compute what a recipe needs: parameters, operations, memory and time; needs no weights, no GPU"
    parser = _add(subparsers, "plan", commands.plan, summary, examples)
    parser.usage = "nextscale plan RECIPE [--gpu TEXT] [--num-gpus INT] [--KEY VALUE ...]"
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged recipe")
    parser.option("--gpu", str, f"one of {', '.join(GPUS)}", DEFAULT_GPU)
    parser.option("--num-gpus", int, "with one process each", 1)


def _add_sample(subparsers: Any) -> None:
    examples = [
        "sample",
        "sample --model runs/toy-painting/final --classes star,3 --num-images 8 --output stars.png",
        "sample --classes fish --num-images 100 --separate fish",
        'sample --model var-d16 --classes "golden retriever,88"',
        "sample --model var_d16.pth --vae vae_ch160v4096z32.pth --classes volcano",
    ]
    parser = _add(subparsers, "sample", commands.sample, "draw images from a model", examples)
    parser.option("--model", str, MODEL, "toy")
    _add_vae(parser)
    parser.option("--classes", str, CLASS_LIST, shown=f"the first {MAX_ROWS}")
    parser.option("--num-images", int, "images of a class", 4)
    _add_drawing_options(parser, "recommended for the model")
    parser.option("--output", Path, "one picture with a row for each class", shown="samples.png")
    parser.option("--separate", Path, "a folder for each image in a file of its own")


def _add_evaluate(subparsers: Any) -> None:
    examples = [
        "evaluate toy",
        "evaluate runs/toy-painting/final --recipe toy-painting --num-images 1024",
        'evaluate runs/mine/final --reward "clip_score=a photo of a {label}" --reward python=my.py:f',
        "evaluate toy --json > before.json",
    ]
    summary = "score a model with rewards, judges and diversity on fixed seeds"
    parser = _add(subparsers, "evaluate", commands.evaluate, summary, examples)
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    _add_vae(parser)
    which = parser.add_mutually_exclusive_group()
    text = "its rewards and its sampling (default for the miniature world: toy-combined)"
    which.add_argument("--recipe", metavar="RECIPE", help=text)
    text = "such as aesthetic=, clip_score=, pixels= or python=; may be repeated"
    which.add_argument("--reward", action="append", metavar="KIND=VALUE", help=text)
    parser.option("--clip", str, "the CLIP of the rewards given by --reward, and of the diversity")
    parser.option("--classes", str, CLASS_LIST, shown="those of the recipe, or all")
    parser.option("--num-images", int, "at least", 512)
    _add_drawing_options(parser, "the recipe's, or recommended for the model")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.option("--output", Path, "write JSON to a file as well")


def _add_vae(parser: Parser) -> None:
    text = "the tokenizer's file, where the model is a file such as var_d16.pth"
    parser.option("--vae", str, text)


def _add_drawing_options(parser: Parser, otherwise: str) -> None:
    """How images are drawn; None leaves it to the recipe or the model."""
    options = (
        ("--guidance-scale", float, "classifier-free guidance at the last scale; 0 switches it off"),
        ("--temperature", float, "divides the logits"),
        ("--top-k", int, "keep the k likeliest tokens; 0 keeps all"),
        ("--top-p", float, "keep the likeliest tokens that hold this share; 1 keeps all"),
    )
    for name, kind, text in options:
        parser.option(name, kind, text, shown=otherwise)
    parser.option("--seed", int, "of the images", 0)
    parser.option("--device", str, "such as cpu or cuda", shown="cuda where there is one")


def _add_report(subparsers: Any) -> None:
    examples = ["report runs/toy-painting", "report runs/toy-painting --open"]
    summary = "tell a run as one page, report.html in its folder"
    parser = _add(subparsers, "report", commands.report, summary, examples)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of a run")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def _add_export(subparsers: Any) -> None:
    examples = [
        "export runs/toy-painting --output painter",
        "export runs/mine --output mine --format official --dtype bfloat16",
        "export runs/mine --output mine --push-to-hub owner/name --private",
    ]
    summary = "write a run's final model, or any other, with its model card, for others to load"
    parser = _add(subparsers, "export", commands.export, summary, examples)
    parser.add_argument("model", metavar="MODEL", help=f"the folder of a run, or {MODEL}")
    _add_vae(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="the folder to write")
    text = "nextscale's own files, or those of VAR's official code (default: nextscale)"
    parser.add_argument("--format", choices=("nextscale", "official"), default="nextscale", help=text)
    text = "of the stored tensors (default: as they are)"
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=text)
    text = "push the folder to this repository of the hub too"
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help=text)
    parser.add_argument("--private", action="store_true", help="a new repository is for its owner only")


def _add_toy(subparsers: Any) -> None:
    parser = subparsers.add_parser("toy", help="the miniature world: look at it, or rebuild its models")
    parser.description = "64x64 pictures of eight objects in five styles, drawn by a program."
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    show = _add(actions, "show", commands.toy_show, "draw every class in every style", ["toy show"])
    show.option("--output", Path, "the picture", Path("world.png"))
    show.option("--seed", int, "of the scenes", 0)
    examples = ["toy train --output build/toy", "toy train --output build/quick --steps-factor 0.01"]
    summary = "train the models of the miniature world from nothing; takes about an hour on a CPU"
    train = _add(actions, "train", commands.toy_train, summary, examples)
    train.add_argument("--output", type=Path, required=True, metavar="PATH", help="the folder to write")
    train.option("--seed", int, "of everything", 0)
    train.option("--steps-factor", float, "share of the steps that the shipped models had", 1.0)
