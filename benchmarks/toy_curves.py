"""Plot the curves of the runs of `benchmarks/toy_results.py` to docs/toy_results.png.

python benchmarks/toy_curves.py
"""

import json

import matplotlib
from toy_results import RECIPES, ROOT, RUNS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Title, key of the metric, and whether it is logged at every step or in evaluations only.
ROWS = (
    ("Reward of the rollouts, share of its rise", "reward", True),
    ("Class judge", "eval_judge/class_accuracy", False),
    ("Judged painting", "eval_judge/style/painting", False),
    ("Diversity, of the base's", "eval_diversity", False),
    ("KL, nats an image", "kl_per_image", True),
)


def main() -> None:
    figure, axes = plt.subplots(
        len(ROWS), len(RECIPES), figsize=(3.2 * len(RECIPES), 2.1 * len(ROWS)), squeeze=False
    )
    for column, recipe in enumerate(RECIPES):
        for path in sorted(RUNS.glob(f"{recipe}-[0-9]/metrics.jsonl")):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for row, (title, key, by_step) in enumerate(ROWS):
                points = [(line["step"], line[key]) for line in lines if key in line]
                steps, values = zip(*points, strict=True)
                first, last = values[0], values[-1]
                if key == "reward":
                    values = [(value - first) / (last - first) for value in values]
                elif key == "eval_diversity":
                    values = [value / first for value in values]
                axis = axes[row][column]
                axis.plot(steps, values, "-" if by_step else "o-", linewidth=1.2, markersize=4)
                axis.set_title(f"{recipe}\n{title}" if row == 0 else title, fontsize=9)
                axis.tick_params(labelsize=8)
                if key.startswith("eval_"):
                    axis.set_ylim(-0.03, 1.08)
        axes[-1][column].set_xlabel("step", fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "toy_results.png", dpi=80)


if __name__ == "__main__":
    main()
