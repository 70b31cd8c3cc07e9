"""Arguments that several commands share, and what they stand for: a recipe, a model, its classes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextscale.base.errors import ConfigError, first_sentence
from nextscale.cli.parser import Parser, complete_with
from nextscale.config.files import packaged_recipes, read_mapping
from nextscale.config.overrides import apply_overrides
from nextscale.config.schema import Schema, recipe_sections, type_name, words_of

if TYPE_CHECKING:
    from nextscale.base.conditions import Condition
    from nextscale.config.recipe import Recipe
    from nextscale.pipeline import VARPipeline

MODEL = '"toy", a published model such as "var-d16", or a folder or hub repository that nextscale wrote'
CLASSES = "class names or numbers, separated by commas"


def add_recipe(parser: Parser, shows_keys: bool) -> None:
    """Add RECIPE, and every key of a recipe for the help and completion; `take_overrides` reads them."""
    names = packaged_recipes()
    parser.description = f"{parser.description}\n\nPackaged recipes: {', '.join(names)}."
    recipe = parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or name of a packaged recipe")
    complete_with(recipe, names, "yaml")
    for title, (text, keys) in recipe_sections().items():
        group = parser.add_argument_group(title, text) if shows_keys else parser
        for key, schema in keys.items():
            _add_key(group, key, schema, shows_keys)


def _add_key(group: Any, key: str, schema: Schema, is_shown: bool) -> None:
    is_boolean, default = schema.get("type") == "boolean", schema.get("default")
    text = " ".join(schema.get("description", "").split()).replace("%", "%%")
    if default not in (None, ""):
        text = f"{text} (default: {str(default).lower() if is_boolean else default})"
    group.add_argument(
        f"--{key}",
        metavar=type_name(schema),
        choices=["true", "false"] if is_boolean else words_of(schema) or None,
        nargs="?" if is_boolean else None,
        help=text if is_shown else argparse.SUPPRESS,
    )


def load_recipe_of(args: argparse.Namespace) -> "Recipe":
    """The recipe of a command with the overrides that were given."""
    # First without the records: a wrong name or key is answered before the seconds of importing torch.
    apply_overrides(read_mapping(args.recipe), args.overrides)
    from nextscale.config.recipe import load_recipe

    return load_recipe(args.recipe, args.overrides)


def add_vae(parser: Parser) -> None:
    parser.option("--vae", str, "tokenizer file, if the model is a file such as var_d16.pth")


def add_adapter(parser: Parser) -> None:
    text = "LoRA adapter to merge into the model: a folder such as runs/mine/final/adapter, or a repository"
    parser.option("--adapter", str, text)


def add_drawing_options(parser: Parser, otherwise: str) -> None:
    """Add how images are drawn; None leaves it to the recipe or the model."""
    options = (
        ("--guidance-scale", float, "classifier-free guidance at the last scale; 0 turns it off"),
        ("--temperature", float, "sampling temperature"),
        ("--top-k", int, "sample from the k likeliest tokens; 0 means all"),
        ("--top-p", float, "sample from the likeliest tokens that hold this probability mass; 1 means all"),
    )
    for name, kind, text in options:
        parser.option(name, kind, text, shown=otherwise)
    parser.option("--seed", int, "seed of the images", 0)
    parser.option("--device", str, "device to run on, such as cpu or cuda", shown="cuda if available")


def load_model(args: argparse.Namespace) -> "VARPipeline":
    """The model that was asked for, on its device.

    Raises:
        NextscaleError: it cannot be loaded, or the device cannot be used.
    """
    import torch

    from nextscale.config.build import load_pipeline

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] == "meta":  # torch's device of tensors without numbers
        raise ConfigError(
            f"device '{device}' cannot be used: it holds no weights; use one such as cpu or cuda"
        )
    return load_pipeline(args.model, args.vae, device=device, adapter=args.adapter)


def add_prompts(parser: Parser) -> None:
    which = parser.add_mutually_exclusive_group()
    text = "of a text-conditional model, what to draw; can be given several times"
    which.add_argument("--prompt", action="append", metavar="TEXT", help=text)
    text = "file of prompts: .txt, .jsonl or .csv, or hf://datasets/OWNER/NAME/FILE"
    which.add_argument("--prompts", metavar="FILE", help=text)


def conditions_of(args: argparse.Namespace, pipe: "VARPipeline") -> "list[Condition] | None":
    """The classes or prompts that were asked for; None where none were, and the model draws by classes.

    Raises:
        ConfigError: both were asked for, or what the model does not draw by, or no prompts.
    """
    from nextscale.prompts import read_prompts

    classes = classes_of(args)
    if classes is not None and (args.prompt or args.prompts):
        raise ConfigError("--classes has no effect beside prompts: give one of them")
    if args.prompt or args.prompts:
        return pipe.prompted(args.prompt or read_prompts(args.prompts))
    if classes is None and not pipe.num_classes:
        raise ConfigError("the model draws by prompts: say what to draw with --prompt or --prompts")
    return None if classes is None else pipe.conditions(classes)


def classes_of(args: argparse.Namespace) -> list[str] | None:
    """The classes that were asked for, by number or name; None if `--classes` was not given."""
    if args.classes is None:
        return None
    return [word.strip() for word in args.classes.split(",") if word.strip()]


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The options of sampling that were given, by name."""
    names = ("guidance_scale", "temperature", "top_k", "top_p")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def check_image_file(path: Path) -> None:
    """Check that an image can be written to a file of this name.

    Raises:
        ConfigError: its extension is none of images'.
    """
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ConfigError(f"'{path}' has no image file extension: use one such as .png")


def save_image(image: Any, path: Path) -> None:
    """Write an image; one that is too large for its kind of file as PNG beside it.

    Raises:
        ConfigError: it was too large.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        image.save(path)
    except (ValueError, OSError) as error:
        kept, size = path.with_suffix(".png"), f"{image.width} x {image.height}"
        if kept == path or getattr(error, "errno", None) is not None:  # the system's, such as a full disk
            raise
        path.unlink(missing_ok=True)  # what was begun
        image.save(kept)
        raise ConfigError(
            f"'{path}' cannot hold {size} pixels ({first_sentence(error)}): they were written to '{kept}'"
        ) from None
