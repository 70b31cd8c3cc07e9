"""Run the miniature world's recipes with several seeds and write the tables of docs/results.md.

    python benchmarks/toy_results.py                      # every recipe, seeds 0 1 2
    python benchmarks/toy_results.py --recipes toy-painting --seeds 0

Each run is `nextscale train RECIPE --run.seed SEED` in its own folder under runs/results/; completed runs are
not repeated. All numbers are from the last evaluation, never the best.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "results"
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
RECIPES = ("toy-aesthetic", "toy-painting", "toy-combined", "toy-collapse")


def run(recipe: str, seed: int) -> Path:
    """Train, unless already done; returns the run's folder."""
    folder = RUNS / f"{recipe}-{seed}"
    if not (folder / "final" / "config.json").exists():
        command = [sys.executable, "-m", "nextscale", "train", recipe, "--run.seed", str(seed)]
        command += ["--run.output_dir", str(folder), "--run.overwrite", "true", "--run.disable_tqdm", "true"]
        subprocess.run(command, check=True, cwd=ROOT)
    return folder


def figures(folder: Path) -> dict[str, float]:
    """The first and last evaluations of a run compared."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval_reward" in line]
    base, last = evaluated[0], evaluated[-1]
    trained = [line for line in lines if "step_time" in line]
    found = {
        "steps": last["step"],
        "reward": last["eval_reward"],
        "reward, base": base["eval_reward"],
        "painting %": 100 * last["eval_judge/style/painting"],
        "painting %, base": 100 * base["eval_judge/style/painting"],
        "photo %": 100 * last["eval_judge/style/photo"],
        "class judge": last["eval_judge/class_accuracy"],
        "class judge / base": last["eval_judge/class_accuracy"] / base["eval_judge/class_accuracy"],
        "diversity / base": last["eval_diversity"] / base["eval_diversity"],
        "KL, nats an image": trained[-1]["kl_per_image"],
        "seconds a step": statistics.median(line["step_time"] for line in trained),
        "minutes": sum(line["step_time"] for line in trained) / 60,
    }
    if "eval_rewards/aesthetic/mean" in base:
        rise = last["eval_rewards/aesthetic/mean"] - base["eval_rewards/aesthetic/mean"]
        found["aesthetic, base sd"] = rise / base["eval_rewards/aesthetic/std"]
    return found


def table(recipe: str, by_seed: dict[int, dict[str, float]]) -> str:
    """A table with one column per seed, then mean ± sd."""
    seeds = list(by_seed)
    rows = [
        f"### {recipe}",
        "",
        "| figure | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean ± sd |",
    ]
    rows.append("| --- |" + " --- |" * (len(seeds) + 1))
    for name in by_seed[seeds[0]]:
        values = [by_seed[seed][name] for seed in seeds]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells = " | ".join(f"{value:.3g}" for value in values)
        rows.append(f"| {name} | {cells} | {statistics.mean(values):.3g} ± {spread:.2g} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/results.md")
    options = parser.parse_args()
    parts = []
    for recipe in options.recipes:
        parts.append(table(recipe, {seed: figures(run(recipe, seed)) for seed in options.seeds}))
        print(parts[-1], flush=True)
    if options.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(parts) + f"\n{END}{after}")


if __name__ == "__main__":
    main()
