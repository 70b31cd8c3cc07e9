"""What a study found: a row for each run, a table, and plots."""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nextscale.base.errors import ConfigError
from nextscale.base.numbers import without_nan
from nextscale.base.records import did_you_mean
from nextscale.runs.reader import BASE_MODEL, images_of, read_run
from nextscale.study.plan import Experiment, Study, Trial

# Two-sided 95 % quantiles of Student's t, by degrees of freedom; the last also stands for more, and is wider.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
COLUMNS: dict[str, tuple[str, float]] = {
    r"judge/style/(painting)": ("judged {} %", 100),
    r"judge/class_accuracy": ("class %", 100),
    r"judge/class_log_prob": ("class log-prob", 1),
    r"diversity": ("diversity", 1),
    r"rewards/(.+)/mean": ("reward: {}", 1),
    r"judge/frechet/(.+)/(.+)": ("Fréchet to {}s, {}", 1),
    r"kl": ("KL, nats an image", 1),
    r"seconds": ("seconds of training", 1),
    r"images": ("images", 1),
}
"""Pattern of a measure's name to the heading of its column, and what it is multiplied by."""


KL_LEVELS = (25.0, 50.0, 100.0, 200.0, 400.0)  # nats an image, at which variants are compared


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        measures: those of its evaluation, and `kl`, `seconds` and `images` of its training. The KL is of all
            scales, to the base model; where training measured another one, it is left out.
        curve: at each step: images so far, seconds so far, the aim of the experiment, the KL of an image.
    """

    experiment: str
    variant: str
    seed: int
    measures: dict[str, float]
    curve: list[tuple[float, float, float, float]]


def read_row(trial: Trial, aim: str = "reward") -> Row:
    """What a finished trial found.

    Args:
        aim: metric of the curve.

    Raises:
        ConfigError: training logged no such metric.
    """
    measured = json.loads(trial.evaluation.read_text(encoding="utf-8"))
    measures = {name: float(value) for name, value in measured.items() if isinstance(value, int | float)}
    curve, images, seconds = [], 0.0, 0.0
    run = read_run(trial.folder)
    for record in run.records:
        if "step_time" in record:
            images, seconds = images + images_of(record), seconds + record["step_time"]
            if aim not in record:
                known = [name for name, value in record.items() if isinstance(value, int | float)]
                raise ConfigError(
                    f"the run in '{trial.folder}' logged no metric '{aim}', the aim of experiment "
                    f"'{trial.experiment}'{did_you_mean(aim, known)}; what was run is kept"
                )
            kl = record.get("kl_per_image") if run.kl_to == BASE_MODEL else None
            curve.append((images, seconds, _or_nan(record[aim]), _or_nan(kl)))
    last = {"images": images, "seconds": seconds}
    if not math.isnan(kl := curve[-1][3]):
        last["kl"] = kl
    return Row(trial.experiment, trial.variant, trial.seed, measures | last, curve)


def _or_nan(value: float | None) -> float:
    """A logged number; None stands for one that was not finite."""
    return math.nan if value is None else value


def at_kl(row: Row, level: float) -> float | None:
    """The aim where the KL of an image first comes to this level, between two steps in proportion; None for a
    run that stays below it."""
    before = None
    for _, _, aim, kl in row.curve:
        if kl >= level:
            if before is None:
                return aim
            aim_before, kl_before = before
            return aim_before + (aim - aim_before) * (level - kl_before) / (kl - kl_before)
        if not math.isnan(kl):
            before = aim, kl
    return None


def images_until(row: Row, aim: float) -> float | None:
    """Images after which a run's rollouts first had this aim; None if they never did."""
    return next((images for images, _, reached, _ in row.curve if reached >= aim), None)


def comparison(rows: Sequence[Row], experiment: Experiment) -> str:
    """A Markdown table of one experiment: the aim at equal KL, and the images it took until the aim was where
    the runs of the first variant ended, in the mean."""
    variants = list(experiment.variants)
    levels = [each for each in KL_LEVELS if any(at_kl(row, each) is not None for row in rows)]
    ends = [row.curve[-1][2] for row in rows if row.variant == variants[0]]
    ends = [each for each in ends if not math.isnan(each)]
    end = statistics.fmean(ends) if ends else math.nan
    head = [f"{experiment.aim}, training", *(f"at {level:g} nats" for level in levels)]
    head += [f"images until {end:.3g}"] if ends else []
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for variant in variants:
        mine = [row for row in rows if row.variant == variant]
        cells = [_of_those_that_did(mine, [at_kl(row, level) for row in mine]) for level in levels]
        cells += [_of_those_that_did(mine, [images_until(row, end) for row in mine])] if ends else []
        if mine:
            lines.append(" | ".join([variant, *cells]))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _of_those_that_did(rows: Sequence[Row], values: Sequence[float | None]) -> str:
    """Mean and interval of the runs that came there, and how many did if not all."""
    found = [each for each in values if each is not None and not math.isnan(each)]
    if not found:
        return "-"
    return _cell(found) + (f" ({len(found)} of {len(rows)})" if len(found) < len(rows) else "")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval by Student's t; NaN for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    degrees = min(len(values) - 1, len(T95))
    return mean, T95[degrees - 1] * statistics.stdev(values) / len(values) ** 0.5


def table(rows: Sequence[Row], variants: Sequence[str]) -> str:
    """A Markdown table of one experiment: a line for each variant, mean ± 95 % interval over its seeds."""
    shown: dict[str, tuple[str, float]] = {}
    for pattern, (heading, factor) in COLUMNS.items():
        for name in dict.fromkeys(name for row in rows for name in row.measures):
            if found := re.fullmatch(pattern, name):
                shown[name] = heading.format(*found.groups()), factor
    head = ["variant", "seeds", *(heading for heading, _ in shown.values())]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for variant in variants:
        mine = [row for row in rows if row.variant == variant]
        cells = [variant, " ".join(str(row.seed) for row in mine)]
        for name, (_, factor) in shown.items():
            values = [row.measures[name] * factor for row in mine if name in row.measures]
            cells.append(_cell(values) if values else "")
        if mine:
            lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _cell(values: Sequence[float]) -> str:
    mean, half = interval(values)
    shown = f"{mean:.3g}" if abs(mean) < 1000 else f"{mean:,.0f}"
    return shown + ("" if math.isnan(half) else f" ± {half:.2g}")


def write_results(study: Study, done: Sequence[Trial], folder: Path) -> list[Path]:
    """Write results.json, results.md, and a picture of each experiment; returns their paths."""
    rows = [read_row(trial, study.experiments[trial.experiment].aim) for trial in done]
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "results.json", folder / "results.md"
    content = {"study": study.model_dump(), "rows": [asdict(row) for row in rows]}
    data.write_text(json.dumps(without_nan(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    paths, sections = [data, page], []
    for name, experiment in study.experiments.items():
        mine = [row for row in rows if row.experiment == name]
        if not mine:
            continue
        tables = table(mine, list(experiment.variants)) + "\n" + comparison(mine, experiment)
        sections.append(f"## {name}\n\n{tables}\n![{name}](<{name}.png>)\n")
        paths.append(draw(mine, experiment, folder / f"{name}.png"))
    page.write_text("\n".join(sections), encoding="utf-8")
    return paths


def draw(rows: Sequence[Row], experiment: Experiment, path: Path) -> Path:
    """The aim over images, over seconds and over the KL, a line for each run; and against diversity, a mark
    for each run whose diversity was measured."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes: Any = figure.subplots(2, 2)
    panels, judged = (axes[0, 0], axes[0, 1], axes[1, 0]), axes[1, 1]
    measure = experiment.against_diversity or experiment.aim
    variants = [each for each in experiment.variants if any(row.variant == each for row in rows)]
    for i, variant in enumerate(variants):
        look: dict[str, Any] = {"color": f"C{i % 10}", "label": variant}
        for row in (row for row in rows if row.variant == variant):
            images, seconds, aim, kl = zip(*row.curve, strict=True)
            for panel, places in zip(panels, (images, seconds, kl), strict=True):
                panel.plot(places, aim, alpha=0.6, linewidth=1, linestyle=("-", "--")[i // 10 % 2], **look)
            if "diversity" in row.measures and measure in row.measures:
                at = row.measures["diversity"], row.measures[measure]
                judged.scatter(*at, marker="os^Dv"[i % 5], **look)
    for panel, label in zip(panels, ("images", "seconds of training", "KL, nats an image"), strict=True):
        panel.set(xlabel=label, ylabel=f"{experiment.aim}, training")
    judged.set(xlabel="diversity", ylabel=measure)
    handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    for each in axes.flat:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return path
