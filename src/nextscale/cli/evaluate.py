"""`nextscale evaluate`: score a model with rewards, judges and diversity."""

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextscale.base.errors import ConfigError
from nextscale.base.records import did_you_mean
from nextscale.cli import arguments
from nextscale.cli.parser import add_command, complete_with
from nextscale.config.files import find_recipe, packaged_recipes

if TYPE_CHECKING:
    from nextscale.config.recipe import Recipe
    from nextscale.rewards.protocol import RewardConfig


def add(commands: Any) -> None:
    examples = [
        "evaluate toy",
        "evaluate runs/toy-painting/final --recipe toy-painting --num-images 1024",
        'evaluate runs/mine/final --reward "clip_score=a photo of a {label}" --reward python=my.py:f',
        "evaluate toy --json > before.json",
    ]
    summary = "score a model with rewards, judges and diversity, on images of fixed seeds"
    parser = add_command(commands, "evaluate", run, summary, examples)
    parser.add_argument("model", metavar="MODEL", help=arguments.MODEL)
    arguments.add_vae(parser)
    arguments.add_adapter(parser)
    which = parser.add_mutually_exclusive_group()
    text = "use this recipe's rewards, classes and sampling (default in the miniature world: toy-combined's "
    text += "rewards)"
    complete_with(which.add_argument("--recipe", metavar="RECIPE", help=text), packaged_recipes(), "yaml")
    text = "use this reward, such as aesthetic=, clip_score=, pixels= or python=; can be given several times"
    which.add_argument("--reward", action="append", metavar="KIND=VALUE", help=text)
    parser.option("--clip", str, "CLIP model for diversity and for the rewards given by --reward")
    parser.option("--classes", str, arguments.CLASSES, shown="those of the recipe, or all")
    parser.option("--num-images", int, "minimum number of images", 512)
    arguments.add_drawing_options(parser, "the recipe's, or the model's")
    text = "precision of all networks (default: the recipe's, or that of the run that trained the model)"
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), help=text)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.option("--output", Path, "also write the JSON to this file")


def run(args: Namespace) -> int:
    if args.num_images < 2:
        raise ConfigError(f"--num-images must be at least 2, got {args.num_images}")
    if args.recipe:
        find_recipe(args.recipe)  # a wrong name is answered before the seconds that importing torch takes
    import torch

    from nextscale import evaluation
    from nextscale.config.build import embedder, is_miniature, judges_for, make_rewards, measures_for
    from nextscale.config.recipe import load_recipe
    from nextscale.runs.config import RunConfig
    from nextscale.runs.launch import join_processes

    processes = join_processes(args.device)
    if processes.num_processes > 1:  # they share the images
        args.device = str(processes.device)
    pipe = arguments.load_model(args)
    if args.reward:
        clip = args.clip or ("toy" if is_miniature(pipe) else None)
        recipe, rewards = None, rewards_of_words(args.reward, clip)
    elif args.recipe or is_miniature(pipe):
        recipe = load_recipe(args.recipe or "toy-combined")
        clip, rewards = args.clip or recipe.run.diversity_clip, recipe.rewards
    else:
        raise ConfigError("no rewards given: say which with --recipe or --reward")
    recipe = recipe if args.recipe else None  # else it was for its rewards alone: the model says the rest
    given = recipe.sampling.model_dump(exclude_unset=True) if recipe else {}
    sampling = pipe.sampling.replace(**given | arguments.given_sampling(args))
    classes = arguments.classes_of(args)
    if classes is None and recipe:
        classes = recipe.grpo.class_labels
    precision = _precision(args, recipe)
    with torch.autocast(pipe.device.type, torch.bfloat16, enabled=precision == "bf16"):
        result = evaluation.evaluate(
            pipe,
            make_rewards(rewards),
            sampling,
            num_images=args.num_images,
            seed=args.seed,
            conditions=None if classes is None else pipe.conditions(classes),
            judges=judges_for(pipe),
            measures=measures_for(pipe),
            embed=embedder(clip),
            batch_size=(recipe.run if recipe else RunConfig()).per_device_eval_batch_size,
        )
    settings = {
        "model": args.model,
        **({"adapter": args.adapter} if args.adapter else {}),
        "sampling": sampling.model_dump(),
        "mixed_precision": precision,
        "seed": args.seed,
    }
    is_main = processes.is_main_process
    processes.destroy_process_group()
    if not is_main:
        return 0
    text = json.dumps(settings | result.metrics, indent=2)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")
    if args.json:
        print(text)
    else:
        drawn = ", ".join(f"{name} {value:g}" for name, value in sampling.model_dump().items())
        width = max(map(len, [*settings, *result.metrics]))
        for name, value in (settings | {"sampling": drawn}).items():
            print(f"{name:{width}}  {value}")
        for name, value in result.metrics.items():
            print(f"{name:{width}}  {value:10.4f}".rstrip("0").rstrip("."))
    return 0


def _precision(args: Namespace, recipe: "Recipe | None") -> str:
    """As asked for, or as the recipe says, or as the run did that trained the model."""
    from nextscale.runs.reader import find_run, read_run

    if args.mixed_precision:
        return args.mixed_precision
    if recipe and "mixed_precision" in recipe.run.model_fields_set:
        return recipe.run.mixed_precision
    run, _ = find_run(str(Path(args.adapter).parent) if args.adapter else args.model)
    settings = read_run(run).config.get("run") if run else None
    return settings.get("mixed_precision", "no") if isinstance(settings, dict) else "no"


def rewards_of_words(words: list[str], clip: str | None) -> "dict[str, RewardConfig]":
    """The rewards that `--reward KIND=VALUE` asks for, by name.

    Args:
        clip: the CLIP of those that need one and do not name their own.
    """
    from nextscale.models.zoo import AESTHETIC_HEADS
    from nextscale.rewards.kinds import REWARD_KINDS, read_reward

    rewards: dict[str, RewardConfig] = {}
    for word in words:
        kind, equals, value = word.partition("=")
        if kind not in REWARD_KINDS or not equals:
            hint = did_you_mean(kind, [f"{each}=VALUE" for each in REWARD_KINDS])
            raise ConfigError(f"--reward '{word}' must be of the form KIND=VALUE{hint}")
        has_own = "clip" not in REWARD_KINDS[kind].model_fields or value in AESTHETIC_HEADS
        options = {"clip": clip} if clip and not has_own else {}
        name = kind if kind not in rewards else f"{kind}_{len(rewards) + 1}"
        rewards[name] = read_reward({kind: value, **options})
    return rewards
