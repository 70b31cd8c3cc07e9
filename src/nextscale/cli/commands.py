"""What each command of the command line does, from its parsed arguments to its exit status.

What takes long to import is imported inside the commands, so that help and mistakes are answered at once.
"""

import json
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextscale.base.errors import ConfigError
from nextscale.base.records import did_you_mean
from nextscale.models.class_names import find_class

if TYPE_CHECKING:
    from nextscale.config.recipe import Recipe
    from nextscale.pipeline import VARPipeline
    from nextscale.policy import SamplingConfig
    from nextscale.rewards.protocol import RewardConfig

MAX_ROWS = 8  # of a grid, where no classes are asked for
INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended


def train(args: Namespace) -> int:
    from nextscale.config.build import build_trainer
    from nextscale.config.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run:
        return _rehearse(recipe)
    from nextscale.report.page import summarize

    trainer = build_trainer(recipe, args.words)
    folder = trainer.train()
    if trainer.step_done < recipe.run.max_steps:
        return INTERRUPTED
    if trainer.accelerator.is_main_process:
        print(f"{summarize(folder)}\n{folder}")
    return 0


def _rehearse(recipe: "Recipe") -> int:
    """Check a recipe, and print it with its plan in comments."""
    from nextscale.config.build import plan_recipe, rehearse
    from nextscale.config.recipe import to_yaml
    from nextscale.plan.planning import describe

    num_processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun and accelerate launch
    missing = rehearse(recipe, num_processes)
    print(to_yaml(recipe), end="")
    plan = describe(plan_recipe(recipe, num_gpus=num_processes))
    print("\n".join(f"# {line}" for line in ["", "Plan:", *plan.splitlines()]))
    if missing:
        print(f"# Not checked: the weights of {', '.join(missing)}, which were not found on this machine.")
    return 0


def plan(args: Namespace) -> int:
    from nextscale.config.build import plan_recipe
    from nextscale.config.recipe import load_recipe
    from nextscale.plan.planning import describe

    print(describe(plan_recipe(load_recipe(args.recipe, args.overrides), args.gpu, args.num_gpus)))
    return 0


def sample(args: Namespace) -> int:
    from einops import rearrange

    from nextscale.base.images import to_pil

    pipe = _pipeline(args)
    labels = _labels(args, pipe)
    if labels is None:
        labels = list(range(min(pipe.num_classes, MAX_ROWS)))
    out = pipe(labels, args.num_images, seed=args.seed, **_sampling(args, None).model_dump())
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


def evaluate(args: Namespace) -> int:
    from nextscale import evaluation
    from nextscale.config.build import embedder, is_miniature, judges_for, make_rewards
    from nextscale.config.recipe import load_recipe

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
    labels = _labels(args, pipe) or (recipe.grpo.class_labels if recipe else None)
    result = evaluation.evaluate(
        pipe,
        make_rewards(rewards),
        _sampling(args, recipe),
        num_images=args.num_images,
        seed=args.seed,
        conditions=pipe.conditions(labels) if labels else None,
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


def report(args: Namespace) -> int:
    from nextscale.report.page import summarize, write_report

    path = write_report(args.folder)
    print(f"{summarize(args.folder)}\n{path}")
    if args.open:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
    return 0


def export(args: Namespace) -> int:
    import torch

    from nextscale.config.build import load_pipeline
    from nextscale.models import hub
    from nextscale.report.model_card import write_model_card
    from nextscale.runs.reader import find_run

    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ConfigError(f"'{args.output}' exists and is no empty folder: choose another --output")
    run, model = find_run(args.model)
    pipe = load_pipeline(model, args.vae)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    save = pipe.save_official if args.format == "official" else pipe.save_pretrained
    save(args.output, dtype)
    is_official = args.format == "official"
    write_model_card(args.output, run, base=pipe.source, repository=args.push_to_hub, is_official=is_official)
    print(args.output)
    if args.push_to_hub:
        print(hub.upload(args.push_to_hub, args.output, args.private))
    return 0


def toy_show(args: Namespace) -> int:
    import torch
    from einops import rearrange

    from nextscale.base.images import to_pil
    from nextscale.base.seeding import generator_for
    from nextscale.toy.world import CLASSES, STYLES, render, sample_scenes

    labels = torch.arange(len(CLASSES)).repeat_interleave(len(STYLES))
    styles = torch.arange(len(STYLES)).repeat(len(CLASSES))
    scenes = sample_scenes(len(labels), generator_for("show", args.seed), labels, styles)
    grid = rearrange(render(scenes), "(rows columns) c h w -> 1 c (rows h) (columns w)", rows=len(CLASSES))
    _save_image(to_pil(grid)[0], args.output)
    print(f"{args.output}: rows {', '.join(CLASSES)}; columns {', '.join(STYLES)}")
    return 0


def toy_train(args: Namespace) -> int:
    if not 0 < args.steps_factor < float("inf"):
        raise ConfigError(f"--steps-factor must be above 0, got {args.steps_factor}")
    from nextscale.toy.train import train_all

    train_all(args.output, args.seed, args.steps_factor)
    return 0


def _pipeline(args: Namespace) -> "VARPipeline":
    import torch

    from nextscale.config.build import load_pipeline

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_pipeline(args.model, args.vae, device=device)


def _labels(args: Namespace, pipe: "VARPipeline") -> list[int] | None:
    """The classes asked for, by number or name; None where none are."""
    if args.classes is None:
        return None
    words = [word.strip() for word in args.classes.split(",") if word.strip()]
    labels = [find_class(word, pipe.class_names or (), pipe.num_classes) for word in words]
    pipe.conditions(labels)
    return labels


def _sampling(args: Namespace, recipe: "Recipe | None") -> "SamplingConfig":
    from nextscale.models.zoo import recommended_sampling

    sampling = recipe.sampling if recipe else recommended_sampling(args.model)
    given = {name: getattr(args, name) for name in type(sampling).model_fields}
    return sampling.replace(**{name: value for name, value in given.items() if value is not None})


def _rewards_of_words(words: list[str], clip: str | None) -> "dict[str, RewardConfig]":
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


def _save_image(image: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        image.save(path)
    except ValueError:
        raise ConfigError(f"'{path}' has no ending of an image file: use one such as .png") from None
