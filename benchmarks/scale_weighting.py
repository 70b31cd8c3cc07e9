"""KL and entropy by scale where two scales have no weight in `scale_weighting`: docs/scale_weighting.png.

    python benchmarks/scale_weighting.py    # runs what is missing under runs/scale_weighting/

Each run is toy-painting, whose advantages do not count in the two finest scales. "before" is how the loss was
when KL and entropy shared the weights of the surrogate; its 1e-6 stands for 0, with which a floor is refused.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "scale_weighting"
SEEDS, STEPS, SCALES = (0, 1), 16, range(1, 7)
SHARED = "[1, 1, 1, 1, 1e-6, 1e-6]"
OPTIONS = {
    "before": {"kl_scale_weighting": SHARED, "entropy_scale_weighting": SHARED},
    "after": {},
}
AS_IT_WAS = {  # toy-painting, when this was measured
    "num_groups": 8,
    "beta": 0.01,
    "credit": "none",
    "entropy_coef": 0.02,
    "entropy_floor": 0.5,
    "entropy_floor_rate": 0.35,
    "multi_objective_aggregation": "normalize_then_sum",
}
ROWS = (
    ("KL, nats a token", "kl"),
    ("Entropy, nats a token", "entropy"),
    ("Bonus of the entropy floor", "entropy_floor"),
)


def lines_of(name: str, seed: int) -> list[dict[str, float]]:
    """The metrics of a run, trained unless it is done."""
    folder = RUNS / f"{name}-{seed}"
    if not (folder / "final" / "config.json").exists():
        options = AS_IT_WAS | {"scale_weighting": "[1, 1, 1, 1, 0, 0]"} | OPTIONS[name]
        keys = {f"grpo.{key}": value for key, value in options.items()} | {
            "rewards.diversity.weight": 0.3,
            "run.seed": seed,
            "run.max_steps": STEPS,
            "run.eval_steps": 0,
            "run.output_dir": folder,
            "run.overwrite": "true",
            "run.disable_tqdm": "true",
        }
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "nextscale", "train", "toy-painting", *words]
        subprocess.run(command, check=True, cwd=ROOT)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    runs = {name: [lines_of(name, seed) for seed in SEEDS] for name in OPTIONS}
    figure, axes = plt.subplots(len(ROWS), len(OPTIONS), figsize=(7.6, 7.2), sharex=True, sharey="row")
    for column, (name, seeds) in enumerate(runs.items()):
        for row, (title, key) in enumerate(ROWS):
            axis = axes[row][column]
            for lines in seeds:
                for scale in SCALES:
                    values = [line[f"{key}/scale_{scale}"] for line in lines]
                    label = f"scale {scale}" if lines is seeds[0] else None
                    axis.plot(range(1, STEPS + 1), values, color=f"C{scale - 1}", linewidth=1.1, label=label)
            axis.set_title(f"{name}: {title}", fontsize=9)
            axis.tick_params(labelsize=8)
        axes[-1][column].set_xlabel("step", fontsize=8)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "scale_weighting.png", dpi=70)

    print("| step 16, mean of seeds | " + " | ".join(f"scale {scale}" for scale in SCALES) + " |")
    print("| --- |" + " --- |" * len(SCALES))
    for title, key in ROWS:
        for name, seeds in runs.items():
            ends = [statistics.mean(lines[-1][f"{key}/scale_{scale}"] for lines in seeds) for scale in SCALES]
            print(f"| {title}, {name} | " + " | ".join(f"{end:.3g}" for end in ends) + " |")
    for name, seeds in runs.items():
        print(name, "reward", [round(lines[-1]["reward"], 3) for lines in seeds])


if __name__ == "__main__":
    main()
