"""`nextscale train`: fine-tune a model, or rehearse it."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from nextscale.base.errors import RewardError, TrainingError
from nextscale.base.interrupt import Interrupted
from nextscale.cli.arguments import add_recipe, load_recipe_of
from nextscale.cli.parser import add_command, forget_stdout

if TYPE_CHECKING:
    from nextscale.config.recipe import Recipe


def add(commands: Any) -> None:
    examples = [
        "train toy-painting",
        "train toy-painting --grpo.beta 0.05 --run.max_steps 20 --run.output_dir runs/short",
        "train mine.yaml --rewards.painting.weight 0.5 --dry-run",
        "train toy-painting --run.resume auto",
    ]
    parser = add_command(commands, "train", run, "fine-tune a model as a recipe says", examples)
    parser.usage = "nextscale train RECIPE [--dry-run] [--KEY VALUE ...]"
    add_recipe(parser, shows_keys=True)
    text = "check everything and print the resolved recipe with its plan, without running it"
    parser.add_argument("--dry-run", action="store_true", help=text)


def run(args: Namespace) -> int:
    recipe = load_recipe_of(args)
    if args.dry_run:
        return _rehearse(recipe)
    from nextscale.config.build import build_trainer
    from nextscale.report.page import summarize

    trainer = build_trainer(recipe, args.words)
    try:
        folder = trainer.train().folder
    except (Interrupted, RewardError, TrainingError):  # which end all processes, and together
        trainer.accelerator.end_training()
        raise
    if trainer.accelerator.is_main_process:
        try:
            print(f"{summarize(folder)}\n{folder}", flush=True)
        except BrokenPipeError:  # the run is whole, whether or not somebody reads of it
            forget_stdout()
    trainer.accelerator.end_training()
    return 0


def _rehearse(recipe: "Recipe") -> int:
    """Check a recipe, and print it with its plan in comments."""
    from nextscale.config.build import resolve
    from nextscale.config.recipe import to_yaml
    from nextscale.config.rehearsal import plan_recipe, rehearse
    from nextscale.plan.planning import describe
    from nextscale.runs.launch import asks_for_fsdp, started_processes

    num_processes = started_processes()
    recipe = resolve(recipe)
    missing = rehearse(recipe, num_processes)
    print(to_yaml(recipe), end="")
    run = recipe.run.replace(fsdp=asks_for_fsdp(recipe.run))
    plan = describe(plan_recipe(recipe.replace(run=run), num_gpus=num_processes))
    print("\n".join(f"# {line}" for line in ["", "Plan:", *plan.splitlines()]))
    if missing:
        print(f"# Not checked: the weights of {', '.join(missing)}, which were not found on this machine.")
    return 0
