"""`nextscale study`: run variants of recipes with several seeds, and compare them."""

import shlex
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from nextscale.base.errors import ConfigError
from nextscale.cli.parser import add_command


def add(commands: Any) -> None:
    examples = ["study docs/study/miniature.yaml --jobs 2", "study mine.yaml --experiment painting --dry-run"]
    summary = "run variants of recipes with several seeds, and compare them"
    parser = add_command(commands, "study", run, summary, examples)
    parser.add_argument("study", type=Path, metavar="FILE", help="YAML: seeds, and experiments with variants")
    parser.option("--runs", Path, "folder of the runs; what is done stays", Path("runs/study"))
    parser.option("--output", Path, "folder of the results", shown="beside FILE")
    parser.option("--experiment", str, "run this experiment alone", shown="all")
    parser.option("--jobs", int, "runs at once, each then with one thread", 1)
    parser.add_argument("--dry-run", action="store_true", help="list the commands, and run nothing")


def run(args: Namespace) -> int:
    from nextscale.study.plan import read_study, trials

    study = read_study(args.study)
    if args.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {args.jobs}")
    if args.experiment is not None and args.experiment not in study.experiments:
        known = ", ".join(study.experiments)
        raise ConfigError(f"unknown experiment '{args.experiment}'; '{args.study}' has {known}")
    every = trials(study, args.runs, args.study.parent)
    chosen = [each for each in every if args.experiment in (None, each.experiment)]
    if args.dry_run:
        for trial in chosen:
            print(shlex.join(["nextscale", *trial.words()]))
        return 0
    from nextscale.study.results import write_results
    from nextscale.study.runner import is_measured, run_trials

    failed = run_trials(study, chosen, args.jobs, partial(print, flush=True))
    done = [trial for trial in every if is_measured(study, trial)]
    if not done:
        raise ConfigError(f"no run has ended: {failed[0]}")
    for path in write_results(study, done, args.output or args.study.parent):
        print(path)
    return 2 if failed else 0
