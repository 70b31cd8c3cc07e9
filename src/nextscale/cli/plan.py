"""`nextscale plan`: compute what a recipe's run will need."""

from argparse import Namespace
from typing import Any

from nextscale.cli.arguments import add_recipe, load_recipe_of
from nextscale.cli.parser import add_command, complete_with
from nextscale.plan.gpus import DEFAULT_GPU, GPUS


def add(commands: Any) -> None:
    examples = [
        "plan var-d16-aesthetic",
        "plan var-d30-combined --gpu a100-80gb --num-gpus 8",
        "plan mine.yaml --run.per_device_train_batch_size 4 --run.gradient_checkpointing",
    ]
    summary = "compute the parameters, FLOPs, memory and time a recipe needs, without weights or a GPU"
    parser = add_command(commands, "plan", run, summary, examples)
    parser.usage = "nextscale plan RECIPE [--gpu TEXT] [--num-gpus INT] [--KEY VALUE ...]"
    parser.description = f"{parser.description} 'nextscale train --help' lists the keys of a recipe."
    add_recipe(parser, shows_keys=False)
    complete_with(parser.option("--gpu", str, f"one of {', '.join(GPUS)}", DEFAULT_GPU), GPUS)
    parser.option("--num-gpus", int, "number of GPUs, each with one process", 1)


def run(args: Namespace) -> int:
    recipe = load_recipe_of(args)
    from nextscale.config.rehearsal import plan_recipe
    from nextscale.plan.planning import describe

    print(describe(plan_recipe(recipe, args.gpu, args.num_gpus)))
    return 0
