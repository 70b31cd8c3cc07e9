"""`nextscale plan`: compute what a recipe's run will need."""

from argparse import Namespace
from typing import Any

from nextscale.cli.arguments import add_recipe, load_recipe_of
from nextscale.cli.parser import add_command, complete_with
from nextscale.plan.gpus import GPUS


def add(commands: Any) -> None:
    examples = [
        "plan var-d16-aesthetic",
        "plan var-d30-combined --gpu a100-80gb --num-gpus 8",
        "plan var-d16-painting-lora --gpu rtx-4090-24gb --gpu-memory 20",
        "plan mine.yaml --run.per_device_train_batch_size 4 --run.gradient_checkpointing",
    ]
    summary = "compute the parameters, FLOPs, memory and time a recipe needs, without weights or a GPU"
    parser = add_command(commands, "plan", run, summary, examples)
    parser.usage = "nextscale plan RECIPE [--gpu TEXT] [--gpu-memory GB] [--num-gpus INT] [--KEY VALUE ...]"
    parser.description = f"{parser.description} 'nextscale train --help' lists the keys of a recipe."
    add_recipe(parser, shows_keys=False)
    names, shown = [*GPUS, "cpu"], "the one at hand; without any, h100-80gb, or the CPU for the miniature"
    complete_with(parser.option("--gpu", str, f"one of {', '.join(names)}", shown=shown), names)
    parser.option("--gpu-memory", float, "its memory in GB", shown="that of the data sheet")
    parser.option("--num-gpus", int, "number of GPUs, each with one process", 1)


def run(args: Namespace) -> int:
    recipe = load_recipe_of(args)
    from nextscale.config.rehearsal import plan_recipe
    from nextscale.plan.planning import describe

    print(describe(plan_recipe(recipe, args.gpu, args.num_gpus, args.gpu_memory)))
    return 0
