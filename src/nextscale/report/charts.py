"""The charts of a report: which of them a run has figures for, and each drawn as SVG.

Matplotlib draws them. Each takes its figures along, by which templates/charts.js lets a reader zoom.
"""

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from nextscale.base.numbers import number, percent
from nextscale.runs.config import MAX_DRIFT
from nextscale.runs.reader import Run

PARTS: tuple[str, ...] = ("rollout", "decode", "reward", "credit", "update")
DASHES = {"solid": "-", "dashed": "--", "dotted": ":", "double": "-."}
"""How the lines of a chart differ besides their colour: as CSS and as Matplotlib call it."""
MAX_POINTS = 300  # of a curve; a longer run is averaged in equal pieces, so that the page stays small
# Matplotlib draws in placeholders, which the page replaces by CSS variables that follow light and dark mode.
INK, GRID, *COLOURS = (f"#fe02{i:02x}" for i in range(10))
VARIABLES = dict(
    zip((INK, GRID, *COLOURS), ("--soft", "--grid", *(f"--s{i}" for i in range(8))), strict=True)
)
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), GRID),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size", "ytick.minor.size"), 0),
    **{"svg.fonttype": "none", "svg.hashsalt": "nextscale", "font.size": 9.5, "axes.axisbelow": True},
    **{"axes.grid": True, "axes.formatter.useoffset": False, "lines.linewidth": 1.6, "lines.markersize": 4},
    "path.simplify": False,  # what is left out would show where one zooms in
}
WIDTH, HEIGHT = 259.2, 151.2  # of a chart, in points
# Left, below, right and above of the plot: the same for all, so that plots stand in line. A layout that fits
# them to the labels takes as long as the drawing, and knows another font than the reader's.
MARGINS = 42, 28, 6, 10


@dataclass(frozen=True)
class Line:
    """A curve of a chart."""

    key: str  # the metric
    label: str
    colour: str = COLOURS[0]
    band: str = ""  # the metric that is half the height of a band around the curve
    measured: bool = False  # only now and then, so that each value is marked


@dataclass(frozen=True)
class Chart:
    """Curves with one pair of axes, and how to show them."""

    title: str
    says: str
    lines: list[Line]
    kind: str = ""  # "", "percent", "log" or "stacked"


def charts(run: Run) -> list[Chart]:
    """The charts that the run has figures for."""
    c = COLOURS
    judged = [Line("eval_judge/class_accuracy", "class accuracy", INK, measured=True)]
    for i, name in enumerate(run.names("eval_judge/style/(.+)")):
        judged.append(Line(f"eval_judge/style/{name}", name, c[i % 8], measured=True))
    distances, precision, recall = (
        _measured(run, f"eval_judge/{name}/") for name in ("frechet", "precision", "recall")
    )
    sure = [Line("eval_judge/class_log_prob", "class judge", measured=True)]
    seen = Line("eval_reward", "evaluation, fixed seeds", c[1], measured=True)
    reward = [Line("reward", "training", c[0], "reward_std"), seen]
    found = [Chart("Reward", "Mean and spread (1 sd).", reward)]
    names = dict.fromkeys(run.names("(?:eval_)?rewards/(.+)/mean"))
    for name in names if len(names) > 1 else ():
        lines = [
            Line(f"rewards/{name}/mean", "training", c[0], f"rewards/{name}/std"),
            Line(f"eval_rewards/{name}/mean", "evaluation", c[1], measured=True),
            Line(f"constraints/{name}/bound", "bound", INK),
        ]
        title, says = f"Reward: {name}", "Mean and spread (1 sd), before weighting."
        if run.values(f"eval_warnings/{name}"):
            title, says = f"Held out: {name}", "Mean on fixed seeds. Measured, never trained on."
        elif run.values(lines[-1].key):
            title, says = f"Constraint: {name}", "Mean and spread (1 sd), and what the mean is kept to."
        found.append(Chart(title, says, lines))
    constraints = run.names("constraints/(.+)/multiplier")
    weights = [Line(f"constraints/{name}/multiplier", name, c[i % 8]) for i, name in enumerate(constraints)]
    entropy = [Line("entropy", "training", c[0]), Line("eval_entropy", "evaluation", c[1], measured=True)]
    clipped = [Line(f"clip_ratio/{k}_mean", k, c[i]) for i, k in enumerate(("region", "low", "high"))]
    gap = "sampling/sampling_logp_difference"
    gaps = [Line(f"{gap}/{k}", k, c[i]) for i, k in enumerate(("mean", "max"))]
    kl, by_scale = [Line("kl_per_image", "KL")], {name: _by_scale(run, name) for name in ("kl", "entropy")}
    diversity = [Line("eval_diversity", "diversity", measured=True)]
    times = [Line(f"time/{part}", part, c[i]) for i, part in enumerate(PARTS)]
    as_asked = [
        Line(f"eval_judge/{name}_right", name, INK if name == "all" else c[i % 8], measured=True)
        for i, name in enumerate(run.names("eval_judge/(.+)_right"))
    ]
    found += [
        Chart("Multipliers", "What each constraint weighs. It grows while the bound is broken.", weights),
        Chart("Judges", "Share of images. No training ever saw these judges.", judged, "percent"),
        Chart("As prompted", "Share of images with what the prompt names, by judges.", as_asked, "percent"),
        Chart("Distance to true pictures", "Fréchet distance, in a judge's features.", distances, "log"),
        Chart("Precision", "Share of images among the true pictures.", precision, "percent"),
        Chart("Recall", "Share of true pictures among the images.", recall, "percent"),
        Chart("Log-probability of the class", "Nats. It falls before the class judge errs.", sure),
        Chart(f"KL to {run.kl_to}", "Nats an image.", kl),
        Chart("KL by scale", "Nats a token. Scale 1 is the coarsest.", by_scale["kl"]),
        Chart("Entropy", "Nats a token. A fall to zero is collapse.", entropy),
        Chart("Entropy by scale", "Nats a token. A scale at zero draws the same again.", by_scale["entropy"]),
        Chart("Diversity", "How much images of one evaluation differ.", diversity),
        Chart("Gradient norm", "Before clipping.", [Line("grad_norm", "norm")]),
        Chart("Clip ratio", "Share of tokens whose ratio was clipped.", clipped, "percent"),
        Chart("Sampled against recomputed", _gap_in_words(run, f"{gap}/mean"), gaps, "log"),
        Chart("Time of a step", "Seconds.", times, "stacked"),
    ]
    for chart in found:
        chart.lines[:] = [line for line in chart.lines if run.values(line.key)]
    return [chart for chart in found if chart.lines]


def _by_scale(run: Run, name: str) -> list[Line]:
    """A line for each scale of a metric."""
    scales = run.names(f"{name}/scale_(.+)")
    return [Line(f"{name}/scale_{each}", each, COLOURS[i % 8]) for i, each in enumerate(scales)]


def _gap_in_words(run: Run, key: str) -> str:
    """Whether sampler and trainer ran the same policy, as far as the run's precision can tell."""
    settings = run.config.get("run")
    asked = settings.get("mixed_precision", "no") if isinstance(settings, dict) else "no"
    precision = str(run.environment.get("mixed_precision", asked))  # what "auto" came to
    largest, says = max(run.values(key), default=0.0), "Gap of log-probabilities, in nats a token."
    if precision not in MAX_DRIFT:
        return says
    name = {"no": "float32"}.get(precision, precision)
    return f"{says} It is {'normal' if largest <= MAX_DRIFT[precision] else 'too large'} for {name}."


def _measured(run: Run, prefix: str) -> list[Line]:
    """A line for each metric of evaluations that begins so, named by what follows it: a style and a judge."""
    return [
        Line(f"{prefix}{name}", f"{name.replace('/', ', ')} judge", COLOURS[i % 8], measured=True)
        for i, name in enumerate(run.names(f"{prefix}(.+)"))
    ]


def draw_chart(run: Run, chart: Chart) -> dict[str, Any]:
    """A chart as the page's template takes it: drawn, and in words for those who cannot see it."""
    show = percent if chart.kind == "percent" else number
    keys, told = [], []
    for i, line in enumerate(chart.lines):
        first, *_, last = 2 * run.values(line.key)
        dash = "" if chart.kind == "stacked" else [*DASHES][i % len(DASHES)]
        key = {"colour": VARIABLES[line.colour], "label": line.label, "value": show(last), "dash": dash}
        keys.append(key)
        told.append(f"{line.label} from {show(first)} to {show(last)}")
    alt = f"{chart.title} over the steps: {'; '.join(told)}."
    return {"title": chart.title, "says": chart.says, "keys": keys, "alt": alt, "svg": _draw(run, chart)}


def _draw(run: Run, chart: Chart) -> Markup:
    """The curves of a chart as the inside of an svg element."""
    with mpl.rc_context(STYLE):
        axes = _axes("step")
        floor: Any = 0.0
        common, curves = np.array([]), []  # the steps that the layers of a stack share; what is drawn
        for i, line in enumerate(chart.lines):
            steps, values, low, high = _thin(*run.series(line.key))
            style = [*DASHES][i % len(DASHES)]
            curves.append(Curve(steps, values, line.colour, style, line.label))
            if chart.kind == "stacked":
                common = common if len(common) else steps
                top = floor + np.interp(common, steps, values)
                _fill(axes, i, common, floor + 0 * common, top, 1.0, line.colour)
                floor = top
                continue
            if line.band and len(run.values(line.band)) == len(run.values(line.key)):
                spread = _thin(*run.series(line.band))[1]
                low, high = values - spread, values + spread
            if not line.measured:
                _fill(axes, i, steps, low, high, 0.16, line.colour)
            marker = "o" if line.measured or len(values) == 1 else ""
            axes.plot(
                steps, values, gid=f"curve-{i}", marker=marker, linestyle=DASHES[style], color=line.colour
            )
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        if chart.kind == "log" and all(min(run.values(line.key)) > 0 for line in chart.lines):
            axes.set_yscale("log")
        elif chart.kind == "percent":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        if not any(any(run.values(line.key)) for line in chart.lines):
            axes.set_ylim(0, 1)  # a flat zero lies on the ground
        return _as_svg(axes, curves, chart.kind)


@dataclass(frozen=True)
class Curve:
    """A curve as it is drawn."""

    x: np.ndarray
    y: np.ndarray
    colour: str
    style: str
    """One of DASHES."""
    label: str


def draw_curves(curves: Sequence[Curve], xlabel: str) -> Markup:
    """Curves of several runs as the inside of an svg element."""
    with mpl.rc_context(STYLE):
        axes = _axes(xlabel)
        thinned = [replace(each, x=x, y=y) for each in curves for x, y, _, _ in [_thin(each.x, each.y)]]
        for i, each in enumerate(thinned):
            marker = "o" if len(each.y) <= 12 else ""
            looks = {"marker": marker, "markersize": 3, "linestyle": DASHES[each.style], "color": each.colour}
            axes.plot(each.x, each.y, gid=f"curve-{i}", **looks)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _as_svg(axes, thinned)


def _axes(xlabel: str) -> Axes:
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
    left, bottom, right, top = MARGINS
    figure.subplots_adjust(left / WIDTH, bottom / HEIGHT, 1 - right / WIDTH, 1 - top / HEIGHT)
    return figure.add_subplot(xlabel=xlabel)


def _fill(
    axes: Axes, i: int, x: np.ndarray, low: np.ndarray, high: np.ndarray, alpha: float, colour: str
) -> None:
    """The area between two curves, as one path."""
    outline = np.append(x, x[::-1]), np.append(low, high[::-1])
    axes.fill(*outline, gid=f"curve-{i}", color=colour, alpha=alpha, linewidth=0)


def _as_svg(axes: Axes, curves: Sequence[Curve], kind: str = "") -> Markup:
    """The inside of an svg element, in the page's font and colours; its metadata has the figures, as JSON."""
    axes.margins(x=0.02)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.savefig(buffer := io.StringIO(), format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL).replace("xlink:href", "href")
    text = re.sub(r'<g id="curve-(\d+)"', r'<g data-curve="\1"', text)
    text = re.sub(r'<g id="([xy])tick_\d+"', r'<g class="tick \1"', text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    (left, bottom), (right, top) = axes.get_position().get_points()
    plot = {
        "box": [WIDTH * left, HEIGHT * (1 - top), WIDTH * right, HEIGHT * (1 - bottom)],
        "x": axes.get_xlim(),
        "y": axes.get_ylim(),
        "unit": axes.get_xlabel(),
        "kind": "log" if axes.get_yscale() == "log" else "" if kind == "log" else kind,
        "curves": [
            {"label": each.label, "colour": VARIABLES[each.colour]}
            | {"x": _rounded(each.x), "y": _rounded(each.y)}
            for each in curves
        ],
    }
    return Markup(text) + Markup("<metadata>{}</metadata>").format(json.dumps(plot))


def _rounded(values: np.ndarray) -> list[float]:
    """To what a reader can use, so that the page stays small."""
    return [float(f"{value:.5g}") for value in values]


def piece_length(length: int) -> int:
    """The number of steps that one point of a curve is the mean of, where it has `length` values."""
    return max(1, math.ceil(length / MAX_POINTS))


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean step, mean, least and greatest value of each of at most MAX_POINTS equal pieces of a curve."""
    starts = np.arange(0, len(values), piece_length(len(values)))
    counts = np.diff(np.append(starts, len(values)))
    means = [np.add.reduceat(series, starts) / counts for series in (steps, values)]
    return means[0], means[1], np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
