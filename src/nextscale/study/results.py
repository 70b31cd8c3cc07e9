"""What a study found: a row for each run, a table, and plots."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nextscale.runs.reader import read_run
from nextscale.study.plan import Study, Trial

# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
COLUMNS: dict[str, tuple[str, float]] = {
    "judge/style/painting": ("painted %", 100),
    "judge/class_accuracy": ("class %", 100),
    "judge/class_log_prob": ("class log-prob", 1),
    "diversity": ("diversity", 1),
    "rewards/painting/mean": ("CLIP painting", 1),
    "rewards/aesthetic/mean": ("aesthetic", 1),
    "judge/frechet/painting/class": ("Fréchet to paintings, class", 1),
    "judge/frechet/painting/style": ("Fréchet to paintings, style", 1),
    "judge/frechet/photo/class": ("Fréchet to photos, class", 1),
    "judge/frechet/photo/style": ("Fréchet to photos, style", 1),
    "kl": ("KL, nats an image", 1),
    "seconds": ("seconds of training", 1),
    "images": ("images", 1),
}
"""Measure to its heading, and what it is multiplied by."""


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        measures: those of its evaluation, and `kl`, `seconds` and `images` of its training.
        curve: at each step: images so far, seconds so far, the training reward, the KL of an image.
    """

    experiment: str
    variant: str
    seed: int
    measures: dict[str, float]
    curve: list[tuple[float, float, float, float]]


def read_row(trial: Trial) -> Row:
    """What a finished trial found."""
    measured = json.loads(trial.evaluation.read_text(encoding="utf-8"))
    measures = {name: float(value) for name, value in measured.items() if isinstance(value, int | float)}
    steps = [record for record in read_run(trial.folder).records if "step_time" in record]
    curve, images, seconds = [], 0.0, 0.0
    for record in steps:
        images += round(record["images_per_second"] * record["step_time"])
        seconds += record["step_time"]
        curve.append((images, seconds, record["reward"], record.get("kl_per_image", math.nan)))
    last = {"images": images, "seconds": seconds, "kl": curve[-1][3]}
    return Row(trial.experiment, trial.variant, trial.seed, measures | last, curve)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval by Student's t; NaN for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    degrees = min(len(values) - 1, len(T95))
    return mean, T95[degrees - 1] * statistics.stdev(values) / len(values) ** 0.5


def table(rows: Sequence[Row], variants: Sequence[str]) -> str:
    """A Markdown table of one experiment: a line for each variant, mean ± 95 % interval over its seeds."""
    shown = [name for name in COLUMNS if any(name in row.measures for row in rows)]
    head = ["variant", "seeds", *(COLUMNS[name][0] for name in shown)]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for variant in variants:
        mine = [row for row in rows if row.variant == variant]
        cells = [variant, str(len(mine))]
        for name in shown:
            values = [row.measures[name] * COLUMNS[name][1] for row in mine if name in row.measures]
            cells.append(_cell(values) if values else "")
        if mine:
            lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _cell(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.3g}" + ("" if math.isnan(half) else f" ± {half:.2g}")


def write_results(study: Study, done: Sequence[Trial], folder: Path) -> list[Path]:
    """Write results.json, results.md, and a picture of each experiment; returns their paths."""
    rows = [read_row(trial) for trial in done]
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "results.json", folder / "results.md"
    content = {"study": study.model_dump(), "rows": [asdict(row) for row in rows]}
    data.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    paths, sections = [data, page], []
    for name, experiment in study.experiments.items():
        mine = [row for row in rows if row.experiment == name]
        if not mine:
            continue
        sections.append(f"## {name}\n\n{table(mine, list(experiment.variants))}\n![{name}]({name}.png)\n")
        paths.append(draw(mine, list(experiment.variants), folder / f"{name}.png"))
    page.write_text("\n".join(sections), encoding="utf-8")
    return paths


def draw(rows: Sequence[Row], variants: Sequence[str], path: Path) -> Path:
    """Reward over images and over seconds, reward against KL, and style or reward against diversity."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes: Any = figure.subplots(2, 2)
    by_variant: Mapping[str, list[Row]] = {
        each: found for each in variants if (found := [row for row in rows if row.variant == each])
    }
    style = "judge/style/painting"
    aim = style if any(row.measures.get(style, 0) > 0.01 for row in rows) else "reward"
    for i, (name, mine) in enumerate(by_variant.items()):
        look: dict[str, Any] = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
        for row in mine:
            images, seconds, reward, kl = zip(*row.curve, strict=True)
            axes[0, 0].plot(images, reward, alpha=0.6, linewidth=1, **look)
            axes[0, 1].plot(seconds, reward, alpha=0.6, linewidth=1, **look)
            axes[1, 0].plot(kl, reward, alpha=0.6, linewidth=1, **look)
        points = [(row.measures["diversity"], row.measures[aim]) for row in mine]
        axes[1, 1].scatter(
            *zip(*points, strict=True), color=look["color"], marker="os^Dv"[i // 10], label=name
        )
    titles = ("training reward over images", "training reward over seconds", "training reward over KL")
    for each, title in zip((axes[0, 0], axes[0, 1], axes[1, 0]), titles, strict=True):
        each.set(title=title)
    axes[1, 1].set(title=f"{aim.rpartition('/')[2]} against diversity, one mark a seed", xlabel="diversity")
    figure.legend(*axes[1, 1].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    for each in axes.flat:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return path
