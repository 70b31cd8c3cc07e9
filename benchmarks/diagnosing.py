"""Train the miniature in four ways, three of them with a fault, and draw their curves side by side.

    python benchmarks/diagnosing.py --runs DIR

Writes docs/diagnosing.png for docs/diagnosing.md, and prints what the page's tables say. Runs that are in DIR
already are not made again. About six minutes on two cores.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import torch.nn.functional as F

from nextscale.config.build import build_trainer
from nextscale.config.recipe import load_recipe

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAGE = Path(__file__).resolve().parents[1] / "docs" / "diagnosing.png"
SHORT = ["--run.eval_steps", "10", "--run.eval_num_images", "256"]
# What is said above a column, the recipe, and what is changed of it.
CASES = {
    "healthy": ("healthy", ["toy-painting", "--run.seed", "42"]),
    "flat": ("reward stays flat", ["toy-painting", "--grpo.credit", "none", "--run.seed", "41"]),
    "collapse": ("collapse, and hacking", ["toy-collapse", "--run.seed", "42"]),
    "too-fast": (
        "steps too large",
        ["toy-painting", "--run.seed", "42", "--optimizer.learning_rate", "8e-3"],
    ),
}
STYLES = ("-", "--", ":")
ROWS = (
    ("reward", ("reward",)),
    ("judges: class, painting", ("eval_judge/class_accuracy", "eval_judge/style/painting")),
    ("diversity, of the base's", ("eval_diversity",)),
    ("KL, nats an image", ("kl_per_image",)),
    ("entropy of scales 1, 3, 6", ("entropy/scale_1", "entropy/scale_3", "entropy/scale_6")),
    ("norm of the gradient", ("grad_norm",)),
)


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def drifting(folder: Path) -> list[float]:
    """Mean difference of log-probs between sampler and trainer, in three steps of toy-painting with a dropout
    of 0.1 that somebody left in each feed-forward network, on while drawing, too."""
    recipe = load_recipe("toy-painting", {"run.output_dir": str(folder), "run.overwrite": "true"})
    trainer = build_trainer(recipe)
    for block in trainer.pipe.transformer.blocks:
        block.ffn.fc2.register_forward_hook(lambda layer, inputs, output: F.dropout(output, 0.1))
    steps = [trainer.step(step) for step in (1, 2, 3)]
    return [each["sampling/sampling_logp_difference/mean"] for each in steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    given = parser.parse_args()
    for name, (_, words) in CASES.items():
        folder = given.runs / name
        if (folder / "final").exists():
            continue
        options = [*SHORT, *words[1:], "--run.output_dir", str(folder), "--run.disable_tqdm", "true"]
        command = [sys.executable, "-m", "nextscale", "train", words[0], *options, "--run.overwrite", "true"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print("drift, nats a token", [round(each, 3) for each in drifting(given.runs / "drift")])
    figure, axes = plt.subplots(len(ROWS), len(CASES), figsize=(2.7 * len(CASES), 1.7 * len(ROWS)))
    for column, (name, (title, _)) in enumerate(CASES.items()):
        lines = lines_of(given.runs / name)
        for row, (label, keys) in enumerate(ROWS):
            axis = axes[row][column]
            for key, style in zip(keys, STYLES[: len(keys)], strict=True):
                points = [(line["step"], line[key]) for line in lines if key in line]
                steps, values = zip(*points, strict=True)
                if key == "eval_diversity":
                    values = [value / values[0] for value in values]
                marker = "o" if key.startswith("eval_") else None
                axis.plot(steps, values, style, marker=marker, markersize=3, linewidth=1.3)
            if keys[0].startswith("eval_"):
                axis.set_ylim(-0.05, 1.25)
            elif keys[0] in ("kl_per_image", "grad_norm"):
                axis.set_ylim(bottom=0)
            axis.tick_params(labelsize=7)
            axis.set_title(f"{title}\n{label}" if row == 0 else label, fontsize=8)
        axes[-1][column].set_xlabel("step", fontsize=8)
        last = lines[-1] | {key: each for line in lines for key, each in line.items()}
        wanted = [key for _, keys in ROWS for key in keys if key in last]
        print(name, {key: round(last[key], 3) for key in wanted})
    figure.tight_layout()
    figure.savefig(PAGE, dpi=80)


if __name__ == "__main__":
    main()
