"""The command line: `nextscale train | sample | evaluate | report | toy`.

What takes long to import is imported inside the commands, so that help and mistakes are answered at once.
"""

import json
import os
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextscale import __version__
from nextscale.errors import ConfigError, NextscaleError
from nextscale.options import Parser, list_recipe_options, nearest, take_overrides
from nextscale.records import suggest

if TYPE_CHECKING:
    from nextscale.config import Recipe, RewardConfig
    from nextscale.pipeline import VARPipeline
    from nextscale.policy import SamplingConfig

MODEL = '"toy", or a folder that nextscale wrote'
CLASS_LIST = "names or numbers, separated by commas"
GUIDANCE = 1.5
MAX_ROWS = 8  # of a grid, where no classes are asked for
INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended


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
    rest, overrides = take_overrides(words) if command == "train" else (words, {})
    args, unknown = _parser(lists_recipe_options=command == "train").parse_known_args(rest)
    if unknown:
        raise args.parser.unknown(unknown[0])
    args.overrides, args.words = overrides, ["nextscale", *words]
    return args.function(args)


# ------------------------------------------------------------------------------------------------ the parsers


def _parser(lists_recipe_options: bool) -> Parser:
    parser = Parser(
        prog="nextscale",
        description="Fine-tune next-scale visual autoregressive image models with reinforcement learning.",
        epilog="Start with:  nextscale train toy-painting && nextscale report runs/toy-painting",
    )
    parser.add_argument("--version", action="version", version=f"nextscale {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    train = _add_train(commands)
    if lists_recipe_options:  # asks the records, which takes seconds to import
        list_recipe_options(train)
    _add_sample(commands)
    _add_evaluate(commands)
    _add_report(commands)
    _add_toy(commands)
    return parser


def _add(commands: Any, name: str, function: Any, summary: str, examples: list[str]) -> Parser:
    epilog = "\n".join(["examples:", *(f"  nextscale {each}" for each in examples)])
    description = f"{summary[0].upper()}{summary[1:]}."
    parser = commands.add_parser(name, help=summary, description=description, epilog=epilog)
    parser.set_defaults(function=function, parser=parser)
    return parser


def _add_train(commands: Any) -> Parser:
    examples = [
        "train toy-painting",
        "train toy-painting --grpo.beta 0.05 --run.max_steps 20 --run.output_dir runs/short",
        "train mine.yaml --rewards.painting.weight 0.5 --dry-run",
        "train toy-painting --run.resume auto",
    ]
    parser = _add(commands, "train", _train, "fine-tune a model as a recipe says", examples)
    parser.usage = "nextscale train RECIPE [--dry-run] [--KEY VALUE ...]"
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged recipe")
    text = "check everything and print the configuration, but run nothing"
    parser.add_argument("--dry-run", action="store_true", help=text)
    return parser


def _add_sample(commands: Any) -> None:
    examples = [
        "sample",
        "sample --model runs/toy-painting/final --classes star,3 --num-images 8 --output stars.png",
        "sample --classes fish --num-images 100 --separate fish",
    ]
    parser = _add(commands, "sample", _sample, "draw images from a model", examples)
    parser.option("--model", str, MODEL, "toy")
    parser.option("--classes", str, CLASS_LIST, shown=f"the first {MAX_ROWS}")
    parser.option("--num-images", int, "images of a class", 4)
    _add_drawing_options(parser, has_recipe=False)
    parser.option("--output", Path, "one picture with a row for each class", shown="samples.png")
    parser.option("--separate", Path, "a folder for each image in a file of its own")


def _add_evaluate(commands: Any) -> None:
    examples = [
        "evaluate toy",
        "evaluate runs/toy-painting/final --recipe toy-painting --num-images 1024",
        'evaluate runs/mine/final --reward "clip_score=a photo of a {label}" --reward python=my.py:f',
        "evaluate toy --json > before.json",
    ]
    summary = "score a model with rewards, judges and diversity on fixed seeds"
    parser = _add(commands, "evaluate", _evaluate, summary, examples)
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    which = parser.add_mutually_exclusive_group()
    text = "its rewards and its sampling (default for the miniature world: toy-combined)"
    which.add_argument("--recipe", metavar="RECIPE", help=text)
    text = "aesthetic=, clip_score= or python=; may be repeated"
    which.add_argument("--reward", action="append", metavar="KIND=VALUE", help=text)
    parser.option("--clip", str, "the CLIP of the rewards given by --reward, and of the diversity")
    parser.option("--classes", str, CLASS_LIST, shown="those of the recipe, or all")
    parser.option("--num-images", int, "at least", 512)
    _add_drawing_options(parser, has_recipe=True)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.option("--output", Path, "write JSON to a file as well")


def _add_drawing_options(parser: Parser, has_recipe: bool) -> None:
    """How images are drawn; None leaves it to the recipe."""
    options = (
        (
            "--guidance-scale",
            float,
            "classifier-free guidance at the last scale; 0 switches it off",
            GUIDANCE,
        ),
        ("--temperature", float, "divides the logits", 1.0),
        ("--top-k", int, "keep the k likeliest tokens; 0 keeps all", 0),
        ("--top-p", float, "keep the likeliest tokens that hold this share; 1 keeps all", 1.0),
    )
    for name, kind, text, default in options:
        shown = f"the recipe's, or {default}" if has_recipe else None
        parser.option(name, kind, text, None if has_recipe else default, shown)
    parser.option("--seed", int, "of the images", 0)
    parser.option("--device", str, "such as cpu or cuda", shown="cuda where there is one")


def _add_report(commands: Any) -> None:
    examples = ["report runs/toy-painting", "report runs/toy-painting --open"]
    summary = "tell a run as one page, report.html in its folder"
    parser = _add(commands, "report", _report, summary, examples)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of a run")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def _add_toy(commands: Any) -> None:
    parser = commands.add_parser("toy", help="the miniature world: look at it, or rebuild its models")
    parser.description = "64x64 pictures of eight objects in five styles, drawn by a program."
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    show = _add(actions, "show", _toy_show, "draw every class in every style", ["toy show"])
    show.option("--output", Path, "the picture", Path("world.png"))
    show.option("--seed", int, "of the scenes", 0)
    examples = ["toy train --output build/toy", "toy train --output build/quick --steps-factor 0.01"]
    summary = "train the models of the miniature world from nothing; takes about an hour on a CPU"
    train = _add(actions, "train", _toy_train, summary, examples)
    train.add_argument("--output", type=Path, required=True, metavar="PATH", help="the folder to write")
    train.option("--seed", int, "of everything", 0)
    train.option("--steps-factor", float, "share of the steps that the shipped models had", 1.0)


# ----------------------------------------------------------------------------------------------- the commands


def _train(args: Namespace) -> int:
    from nextscale.build import build_parts, build_trainer
    from nextscale.config import load_recipe, to_yaml

    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run:
        build_parts(recipe)
        print(to_yaml(recipe), end="")
        return 0
    from nextscale.report import summarize

    trainer = build_trainer(recipe, args.words)
    folder = trainer.train()
    if trainer.step_done < recipe.run.max_steps:
        return INTERRUPTED
    if trainer.accelerator.is_main_process:
        print(f"{summarize(folder)}\n{folder}")
    return 0


def _sample(args: Namespace) -> int:
    from einops import rearrange

    from nextscale.pipeline import to_pil

    pipe = _pipeline(args)
    labels = _labels(args, pipe)
    if labels is None:
        labels = list(range(min(pipe.num_classes, MAX_ROWS)))
    sampling = {name: getattr(args, name) for name in ("guidance_scale", "top_k", "top_p", "temperature")}
    out = pipe(labels, args.num_images, seed=args.seed, **sampling)
    if args.separate:
        conditions = pipe.conditions(labels)
        for i, image in enumerate(out.pil()):
            row, column = divmod(i, args.num_images)
            name = re.sub(r"\W+", "-", conditions[row].text)
            _save_image(image, args.separate / f"{row:03d}-{name}-{column:03d}.png")
        print(f"{len(out.images)} images in {args.separate}")
    if args.output or not args.separate:
        path = args.output or Path("samples.png")
        grid = rearrange(out.images, "(rows columns) c h w -> 1 c (rows h) (columns w)", rows=len(labels))
        _save_image(to_pil(grid)[0], path)
        rows = ", ".join(condition.text for condition in pipe.conditions(labels))
        print(f"{path}: rows {rows}")
    return 0


def _evaluate(args: Namespace) -> int:
    from nextscale.build import embedder, is_miniature, judges_for, make_rewards
    from nextscale.config import load_recipe
    from nextscale.evaluation import evaluate

    if args.num_images < 2:
        raise ConfigError(f"--num-images must be at least 2, got {args.num_images}")
    pipe = _pipeline(args)
    if args.reward:
        clip = args.clip or ("toy" if is_miniature(pipe) else None)
        recipe, rewards = None, _rewards_of_words(args.reward, clip)
    elif args.recipe or is_miniature(pipe):
        recipe = load_recipe(args.recipe or "toy-combined")
        clip, rewards = args.clip or recipe.run.diversity_clip, recipe.rewards
    else:
        raise ConfigError("no rewards given: say which with --recipe or --reward")
    labels = _labels(args, pipe)
    if labels is None and recipe:
        labels = recipe.grpo.class_labels
    if labels is not None:
        pipe.conditions(labels)
    result = evaluate(
        pipe,
        make_rewards(rewards),
        _sampling(args, recipe),
        num_images=args.num_images,
        seed=args.seed,
        labels=labels,
        judges=judges_for(pipe),
        embed=embedder(clip),
    )
    text = json.dumps(result.metrics, indent=2)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")
    if args.json:
        print(text)
    else:
        width = max(map(len, result.metrics))
        for name, value in result.metrics.items():
            print(f"{name:{width}}  {value:10.4f}".rstrip("0").rstrip("."))
    return 0


def _report(args: Namespace) -> int:
    from nextscale.report import summarize, write_report

    path = write_report(args.folder)
    print(f"{summarize(args.folder)}\n{path}")
    if args.open:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
    return 0


def _toy_show(args: Namespace) -> int:
    import torch
    from einops import rearrange

    from nextscale.pipeline import to_pil
    from nextscale.seeding import generator_for
    from nextscale.toy.world import CLASSES, STYLES, render, sample_scenes

    labels = torch.arange(len(CLASSES)).repeat_interleave(len(STYLES))
    styles = torch.arange(len(STYLES)).repeat(len(CLASSES))
    scenes = sample_scenes(len(labels), generator_for("show", args.seed), labels, styles)
    grid = rearrange(render(scenes), "(rows columns) c h w -> 1 c (rows h) (columns w)", rows=len(CLASSES))
    _save_image(to_pil(grid)[0], args.output)
    print(f"{args.output}: rows {', '.join(CLASSES)}; columns {', '.join(STYLES)}")
    return 0


def _toy_train(args: Namespace) -> int:
    if not 0 < args.steps_factor < float("inf"):
        raise ConfigError(f"--steps-factor must be above 0, got {args.steps_factor}")
    from nextscale.toy.train import train_all

    train_all(args.output, args.seed, args.steps_factor)
    return 0


# ------------------------------------------------------------------------------------------------ small tools


def _pipeline(args: Namespace) -> "VARPipeline":
    import torch

    from nextscale.build import load_pipeline

    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_pipeline(args.model)
    try:
        return pipe.to(name)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by device and build
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device '{name}' cannot be used: {reason}") from None


def _labels(args: Namespace, pipe: "VARPipeline") -> list[int] | None:
    """The classes asked for, by number or name; None where none are."""
    if args.classes is None:
        return None
    labels = [_label(word.strip(), pipe) for word in args.classes.split(",") if word.strip()]
    pipe.conditions(labels)
    return labels


def _label(word: str, pipe: "VARPipeline") -> int:
    names = list(pipe.class_names or ())
    if word in names:
        return names.index(word)
    if re.fullmatch(r"[-+]?\d+", word):
        return int(word)
    lowered = {name.lower(): name for name in names}
    if word.lower() in lowered:
        return names.index(lowered[word.lower()])
    hint = nearest(word, names, f"give a name, or a number of 0 to {pipe.num_classes - 1}")
    raise ConfigError(f"the model has no class '{word}'{hint}")


def _sampling(args: Namespace, recipe: "Recipe | None") -> "SamplingConfig":
    from nextscale.policy import SamplingConfig

    given = {
        name: getattr(args, name) for name in SamplingConfig.model_fields if getattr(args, name) is not None
    }
    return (recipe.sampling if recipe else SamplingConfig(guidance_scale=GUIDANCE)).replace(**given)


def _rewards_of_words(words: list[str], clip: str | None) -> "dict[str, RewardConfig]":
    from nextscale.config import REWARD_KINDS, RewardConfig

    rewards: dict[str, RewardConfig] = {}
    for word in words:
        kind, equals, value = word.partition("=")
        if kind not in REWARD_KINDS or not equals:
            hint = suggest(kind, [f"{each}=VALUE" for each in REWARD_KINDS])
            raise ConfigError(f"--reward '{word}' must be of the form KIND=VALUE{hint}")
        options = {"clip": clip} if clip and "clip" in REWARD_KINDS[kind].options else {}
        name = kind if kind not in rewards else f"{kind}_{len(rewards) + 1}"
        rewards[name] = RewardConfig.from_mapping({kind: value, **options})
    return rewards


def _save_image(image: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        image.save(path)
    except ValueError:
        raise ConfigError(f"'{path}' has no ending of an image file: use one such as .png") from None
