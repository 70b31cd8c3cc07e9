"""A run folder told as one self-contained HTML page, and as a few lines of plain words.

Reads files only: no model, no torch, no network. The page's frame and style are in report_template.html.
"""

import base64
import html
import io
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import matplotlib as mpl
import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from nextscale.errors import ConfigError

PARTS: tuple[str, ...] = ("rollout", "decode", "reward", "update")
MAX_POINTS = 300  # of a curve; a longer run is averaged in equal pieces, so that the page stays small
MAX_STRIP = 8  # grids shown between the first and the last
HACKING = "The trained reward rose while a judge that it never saw fell: a sign of reward hacking."
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
}


@dataclass(frozen=True)
class Run:
    """What a run folder says. `records` holds one mapping a step, in the order of the steps."""

    folder: Path
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    records: list[dict[str, Any]]
    notes: list[str]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric, where it is a finite number."""
        found = [(record["step"], record[key]) for record in self.records if _is_number(record.get(key))]
        return np.array([step for step, _ in found]), np.array([value for _, value in found], dtype=float)

    def values(self, key: str) -> list[float]:
        return self.series(key)[1].tolist()

    def ends(self, key: str) -> tuple[float, float] | None:
        """The first and the last value of a metric, or None where it was measured less than twice."""
        values = self.values(key)
        return (values[0], values[-1]) if len(values) > 1 else None

    def names(self, pattern: str) -> list[str]:
        """What the group in `pattern` stands for, over all metrics, in their own order."""
        keys = dict.fromkeys(key for record in self.records for key in record)
        return [match[1] for key in keys if (match := re.fullmatch(pattern, key))]

    @property
    def num_steps(self) -> int:
        return self.records[-1]["step"]


@dataclass(frozen=True)
class Line:
    """A curve. `band` names the metric of its half width; `measured` marks values taken now and then."""

    key: str
    label: str
    colour: str = COLOURS[0]
    band: str = ""
    measured: bool = False


@dataclass(frozen=True)
class Chart:
    title: str
    says: str
    lines: list[Line]
    kind: str = ""  # "", "percent", "log" or "stacked"


@dataclass(frozen=True)
class Fact:
    """One thing that happened: a sentence of the summary, a card of the page, or both."""

    sentence: str
    label: str = ""
    value: str = ""
    hint: str = ""


class Html(str):
    """Text that is markup already; any other text is escaped where it enters the page."""


def write_report(folder: Path) -> Path:
    """Write `<folder>/report.html`, one page that needs nothing else, and return its path.

    Raises:
        ConfigError: when the folder is no run folder, or a file in it is broken.
    """
    run = read_run(Path(folder))
    piece = _piece(len(run.values("reward")))
    thinned = f" Each point is the mean of {piece} steps; the pale area is their range." if piece > 1 else ""
    comments = re.match(r"(?:[ \t]*#.*\n|\s*\n)*", run.config_text)
    comment = re.sub(r"(?m)^[ \t]*#+ ?", "", comments[0] if comments else "").strip()
    judges = "" if run.names("eval_judge/(.+)") else "No judge looked at this run: the images are the check."
    loose = {key: value for key, value in run.config.items() if not isinstance(value, dict | list)}
    sections = {"recipe": loose, **{key: value for key, value in run.config.items() if key not in loose}}
    page = _fill(
        "page",
        name=run.folder.resolve().name,
        verdict=_verdict(run),
        lead=_fill("lead", text=run.config.get("description") or comment),
        warning=_fill("warning", text=HACKING) if _is_hacking(run) else "",
        notes=_join(_fill("note", text=note) for note in run.notes),
        cards=_join(_card(fact) for fact in _facts(run) if fact.label),
        samples=_samples(run),
        thinned=thinned,
        charts=_join(_chart(run, chart) for chart in _charts(run)),
        cost=_cost(run),
        settings=_join(_table(key, _flatten(value)) for key, value in sections.items() if value),
        config=run.config_text,
        judges=judges,
    )
    path = run.folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def summarize(folder: Path) -> str:
    """What happened in a run, in a few lines of plain words: those for which the run has the figures.

    Raises:
        ConfigError: when the folder is no run folder, or a file in it is broken.
    """
    run = read_run(Path(folder))
    warning = [f"Warning: {HACKING}"] if _is_hacking(run) else []
    return "\n".join([*(fact.sentence for fact in _facts(run) if fact.sentence), *warning])


def read_run(folder: Path) -> Run:
    """The run in a folder; raises as write_report does."""
    advice = "give the folder that a training run wrote"
    if not folder.is_dir():
        raise ConfigError(f"the run folder {folder} does not exist; {advice}")
    if not any(folder.iterdir()):
        raise ConfigError(f"the run folder {folder} is empty; {advice}")
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} is no run folder, for it has no {name}; {advice}")
    records, notes = _read_metrics(folder / "metrics.jsonl")
    text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = (
            error.problem_mark.line + 1
            if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark
            else 1
        )
        raise ConfigError(
            f"{folder / 'config.yaml'}, line {line}, is not valid YAML; restore the file"
        ) from None
    if not isinstance(config, dict):
        raise ConfigError(
            f"{folder / 'config.yaml'} must be a mapping of sections such as grpo; restore the file"
        )
    planned = config["run"].get("max_steps") if isinstance(config.get("run"), dict) else None
    if isinstance(planned, int) and records[-1]["step"] < planned:
        notes.append(
            f"The metrics end at step {records[-1]['step']} of {planned}: still running, or stopped early."
        )
    environment = _read_object(folder / "environment.json")
    return Run(folder, config, text, environment, records, notes)


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """One record a step, and notes. Steps done again after a resume replace their first attempt."""
    records: list[dict[str, Any]] = []
    notes, num_redone = [], 0
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):  # no newline ends it: the writer was interrupted
                notes.append(f"The last line of metrics.jsonl (line {number}) was cut short and is left out.")
                break
            raise ConfigError(
                f"{path}, line {number}, is not valid JSON; restore or delete that line"
            ) from None
        step = record.get("step") if isinstance(record, dict) else None
        if not isinstance(step, int):
            raise ConfigError(
                f"{path}, line {number}, has no whole number 'step'; restore or delete that line"
            )
        if records and step < records[-1]["step"]:
            kept = [known for known in records if known["step"] < step]
            num_redone, records = num_redone + len(records) - len(kept), kept
        if records and step == records[-1]["step"]:
            records[-1] |= record
        else:
            records.append(record)
    if not records:
        raise ConfigError(f"{path} is empty, so there is nothing to report; run at least one step")
    if num_redone:
        notes.append(f"The run was resumed: the first attempt at {num_redone} of its steps is left out.")
    return records, notes


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that may be missing."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is no JSON object; restore or delete it")
    return found


def _reward_change(run: Run) -> tuple[float, float, float] | None:
    """Reward before, after, and its sd before training (NaN where unknown).

    From the evaluations where there are two; else from the first and the last tenth of the training steps.
    """
    prefix = "eval_" if run.ends("eval_reward") else ""
    values, sd = run.values(f"{prefix}reward"), [*run.values(f"{prefix}reward_std"), math.nan][0]
    if len(values) < 2:
        return None
    n = 1 if prefix else max(1, len(values) // 10)
    return float(np.mean(values[:n])), float(np.mean(values[-n:])), sd or math.nan


def _is_hacking(run: Run) -> bool:
    change, accuracy = _reward_change(run), run.ends("eval_judge/class_accuracy")
    if change is None or accuracy is None:
        return False
    return change[1] - change[0] > change[2] and accuracy[1] < 0.85 * accuracy[0]


def _moved_styles(run: Run) -> list[tuple[str, float, float]]:
    """The style whose share rose most and the one whose share fell most: name, first share, last share."""
    names = run.names(r"eval_judge/style/(.+)")
    styles = [(name, *ends) for name in names if (ends := run.ends(f"eval_judge/style/{name}"))]
    styles.sort(key=lambda style: style[1] - style[2])
    return styles if len(styles) < 2 else [styles[0], styles[-1]]


def _verdict(run: Run) -> str:
    change, accuracy = _reward_change(run), run.ends("eval_judge/class_accuracy")
    if change is None:
        return "Too little was measured to say what the training did."
    before, after, sd = change
    size, verb = abs(after - before) / sd, "rose" if after > before else "fell"
    if after == before or size < 0.1:
        says = "the reward hardly moved"
    elif math.isnan(size):
        says = f"the reward {verb} from {_pair(before, after, ' to ')}"
    else:
        says = f"the reward {verb} by {size:.1f} times its standard deviation at the start"
    if accuracy:
        kept = accuracy[1] / accuracy[0] if accuracy[0] else math.nan
        held = "held" if kept >= 0.95 else "fell a little" if kept >= 0.85 else "fell"
        says += f", and the share of objects that a judge recognises {held} ({_percent(accuracy[1])})"
    return f"In {_count(run.num_steps, 'step')} {says}."


def _facts(run: Run) -> list[Fact]:
    """What happened, most important first; only what the run has the figures for."""
    facts, steps, change = [], _count(run.num_steps, "step"), _reward_change(run)
    place = f" on {run.environment['device']}" if run.environment.get("device") else ""
    spent, images = sum(run.values("step_time")), _num_images(run)
    took = f" ({_duration(spent)}{place})" if spent else ""
    source = "evaluation" if run.ends("eval_reward") else "training"
    if change:
        name = "reward" if source == "evaluation" else "training reward"
        hint = source + ("" if math.isnan(change[2]) else f", {(change[1] - change[0]) / change[2]:+.1f} sd")
        sentence = f"In {steps}{took} the {name} went from {_pair(*change[:2], ' to ')}."
        facts.append(Fact(sentence, "Reward", _pair(*change[:2]), hint))
    else:
        facts.append(Fact(f"After {steps}{took} too little was measured to compare rewards."))
    rewards = {name: run.ends(f"eval_rewards/{name}/mean") for name in run.names("eval_rewards/(.+)/mean")}
    if len(told := [f"{name} {_pair(*ends, ' to ')}" for name, ends in rewards.items() if ends]) > 1:
        facts.append(Fact(f"By reward: {'; '.join(told)}."))
    if styles := _moved_styles(run):
        (name, before, after), *others = styles
        told = f"{_percent(after)} of the images {name} ({_percent(before)} before)"
        told += "".join(f"; {name} {_percent(b)} ({_percent(a)} before)" for name, a, b in others)
        facts.append(Fact(f"The style judge, which no training ever saw, now calls {told}."))
        for name, a, b in styles:
            facts.append(Fact("", f"Judged {name}", f"{_percent(a)} → {_percent(b)}", "of the images"))
    if ends := run.ends("eval_judge/class_accuracy"):
        before, after = map(_percent, ends)
        sentence = f"The class judge recognises the object in {after} ({before} before)."
        facts.append(Fact(sentence, "Object recognised", f"{before} → {after}", "of the images"))
    if ends := run.ends("eval_diversity"):
        before, after = _pair(*ends).split(" → ")
        sentence = f"Diversity is {after} ({before} before)."
        facts.append(Fact(sentence, "Diversity", _pair(*ends), "evaluation"))
    if kl := run.values("kl_per_image"):
        value = _number(kl[-1])
        sentence = f"KL to the base model: {value} nats an image."
        facts.append(Fact(sentence, "KL to base", value, "nats an image"))
    if spent:
        facts.append(Fact("", "Training time", _duration(spent), f"{steps}{place}"))
    if spent and images:
        rate, shares = _number(images / spent), _shares(run)
        most = max(shares, key=shares.__getitem__)
        told = f"{rate} images a second, and {_percent(shares[most])} of the time went into the {most}."
        facts.append(Fact(told, "Speed", rate, "images a second"))
    return facts


def _card(fact: Fact) -> Html:
    was, arrow, now = fact.value.rpartition(" → ")
    return _fill("card", label=fact.label, was=was + arrow.rstrip(), now=now, hint=fact.hint)


def _samples(run: Run) -> Html | str:
    """The first and the last grid side by side, and some of those between in a fold."""
    paths = (run.folder / "samples").glob("step-*.png")
    grids = {int(path.stem[5:]): path for path in paths if path.stem[5:].isdigit()}
    if not grids:
        return ""
    steps, classes = sorted(grids), _read_object(run.folder / "samples" / "index.json").get("classes")
    shown = classes if isinstance(classes, list) and len(classes) <= 16 else []  # more would not be readable
    rows = _join(_fill("row", name=name) for name in shown)
    pair = []
    for step in dict.fromkeys((steps[0], steps[-1])):
        title = f"After {_count(step, 'step')}" if step else "Before training"
        image = _image(grids[step], f"{title}: a grid of sampled images, a row for each class", 1_000_000)
        pair.append(_fill("sample", title=title, rows=rows, image=image))
    between = steps[1:-1]
    places = np.linspace(0, len(between) - 1, min(MAX_STRIP, len(between))).round().astype(int)
    strip = [
        _fill("sample", title=f"Step {step}", rows="", image=_image(grids[step], f"Step {step}", 120_000))
        for step in (between[i] for i in places)
    ]
    fold = _fill("strip", number=_count(len(strip), "grid"), grids=_join(strip)) if strip else ""
    return _fill("samples", pair=_join(pair), strip=fold)


def _image(path: Path, alt: str, max_bytes: int) -> Html:
    """The PNG as it is, or, where it is larger than `max_bytes`, the largest JPEG of it that is not."""
    try:
        with Image.open(path) as image:
            data, kind, (width, height) = path.read_bytes(), "png", image.size
            scale = min(1.0, 1600 / width)
            while len(data) > max_bytes:
                size = max(1, round(width * scale)), max(1, round(height * scale))
                image.convert("RGB").resize(size).save(buffer := io.BytesIO(), "JPEG", quality=85)
                data, kind, scale = buffer.getvalue(), "jpeg", scale * 0.8
    except OSError:
        raise ConfigError(f"{path} is no readable image; restore or delete it") from None
    # The nearest pixel is for enlarging a small grid; it would break one that is shown smaller than it is.
    look = "pixel" if width <= 640 else "smooth"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return _fill("image", look=look, source=source, width=width, height=height, alt=alt)


def _charts(run: Run) -> list[Chart]:
    """Every chart that the run has figures for."""
    c = COLOURS
    judged = [Line("eval_judge/class_accuracy", "class accuracy", INK, measured=True)]
    for i, name in enumerate(run.names("eval_judge/style/(.+)")):
        judged.append(Line(f"eval_judge/style/{name}", name, c[i % 8], measured=True))
    seen = Line("eval_reward", "evaluation, fixed seeds", c[1], measured=True)
    reward = [Line("reward", "training", c[0], "reward_std"), seen]
    charts = [Chart("Reward", "Mean and spread (1 sd).", reward)]
    names = dict.fromkeys(run.names("(?:eval_)?rewards/(.+)/mean"))
    for name in names if len(names) > 1 else ():
        lines = [Line(f"rewards/{name}/mean", "training", c[0], f"rewards/{name}/std")]
        seen = Line(f"eval_rewards/{name}/mean", "evaluation", c[1], measured=True)
        charts.append(Chart(f"Reward: {name}", "Mean and spread (1 sd), before weighting.", [*lines, seen]))
    entropy = [Line("entropy", "training", c[0]), Line("eval_entropy", "evaluation", c[1], measured=True)]
    clipped = [Line(f"clip_ratio/{k}_mean", k, c[i]) for i, k in enumerate(("region", "low", "high"))]
    gap = "sampling/sampling_logp_difference"
    gaps = [Line(f"{gap}/{k}", k, c[i]) for i, k in enumerate(("mean", "max"))]
    diversity = [Line("eval_diversity", "diversity", measured=True)]
    times = [Line(f"time/{part}", part, c[i]) for i, part in enumerate(PARTS)]
    charts += [
        Chart("Judges", "Share of images. No training ever saw these judges.", judged, "percent"),
        Chart("KL to the base model", "Nats an image.", [Line("kl_per_image", "KL")]),
        Chart("Entropy", "Nats a token. A fall to zero is collapse.", entropy),
        Chart("Diversity", "How much images of one evaluation differ.", diversity),
        Chart("Gradient norm", "Before clipping.", [Line("grad_norm", "norm")]),
        Chart("Clip ratio", "Share of tokens whose ratio was clipped.", clipped, "percent"),
        Chart("Sampled against recomputed", "Gap of log-probabilities. It should be tiny.", gaps, "log"),
        Chart("Time of a step", "Seconds.", times, "stacked"),
    ]
    for chart in charts:
        chart.lines[:] = [line for line in chart.lines if run.values(line.key)]
    return [chart for chart in charts if chart.lines]


def _chart(run: Run, chart: Chart) -> Html:
    show = _percent if chart.kind == "percent" else _number
    keys, told = [], []
    for line in chart.lines:
        first, *_, last = 2 * run.values(line.key)
        keys.append(_fill("key", colour=VARIABLES[line.colour], label=line.label, value=show(last)))
        told.append(f"{line.label} from {show(first)} to {show(last)}")
    alt = f"{chart.title} over the steps: {'; '.join(told)}."
    return _fill(
        "chart", title=chart.title, says=chart.says, keys=_join(keys), alt=alt, svg=_draw(run, chart)
    )


def _draw(run: Run, chart: Chart) -> Html:
    """The curves of a chart as the inside of an svg element."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 2.1), layout="constrained")
        axes = figure.add_subplot(xlabel="step")
        floor: Any = 0.0
        common = np.array([])  # the steps that the layers of a stack share
        for line in chart.lines:
            steps, values, low, high = _thin(*run.series(line.key))
            if chart.kind == "stacked":
                common = common if len(common) else steps
                top = floor + np.interp(common, steps, values)
                axes.fill_between(common, floor, top, color=line.colour, linewidth=0)
                floor = top
                continue
            if line.band and len(run.values(line.band)) == len(run.values(line.key)):
                spread = _thin(*run.series(line.band))[1]
                low, high = values - spread, values + spread
            if not line.measured:
                axes.fill_between(steps, low, high, color=line.colour, alpha=0.16, linewidth=0)
            axes.plot(steps, values, "-o" if line.measured or len(values) == 1 else "-", color=line.colour)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        if chart.kind == "log" and all(min(run.values(line.key)) > 0 for line in chart.lines):
            axes.set_yscale("log")
        elif chart.kind == "percent":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        axes.margins(x=0.02)
        figure.savefig(buffer := io.StringIO(), format="svg", transparent=True)
    return _inner_svg(buffer.getvalue())


def _inner_svg(text: str) -> Html:
    """What the svg element holds, in the page's font and colours, without metadata."""
    text = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL).replace("xlink:href", "href")
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 var(--sans)", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return Html(text)


def _piece(length: int) -> int:
    return max(1, math.ceil(length / MAX_POINTS))


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, means, least and greatest values of equal pieces, at most MAX_POINTS of them."""
    starts = np.arange(0, len(values), _piece(len(values)))
    counts = np.diff(np.append(starts, len(values)))
    means = [np.add.reduceat(series, starts) / counts for series in (steps, values)]
    return means[0], means[1], np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)


def _num_images(run: Run) -> int:
    """Images drawn in training: the metrics hold their rate, so a step's count is rounded to a whole one."""
    timed = [
        r for r in run.records if _is_number(r.get("images_per_second")) and _is_number(r.get("step_time"))
    ]
    return sum(round(record["images_per_second"] * record["step_time"]) for record in timed)


def _shares(run: Run) -> dict[str, float]:
    """The share of the training time that each part of a step took; what is left is the "rest"."""
    spent = {part: sum(run.values(f"time/{part}")) for part in PARTS}
    total = max(sum(run.values("step_time")), sum(spent.values()))
    spent["rest"] = total - sum(spent.values())
    return {part: time / total for part, time in spent.items() if time > 0}


def _cost(run: Run) -> Html:
    num_tokens, silent = [0, *run.values("num_tokens")][-1], run.values("frac_reward_zero_std")
    rows = {
        "Steps": f"{run.num_steps:,}",
        "Images drawn in training": f"{_num_images(run):,}",
        "Tokens": f"{num_tokens:,.0f}",
        "Training time": _duration(sum(run.values("step_time"))),
        "Evaluation time": _duration(sum(run.values("eval_time"))),
        "Groups of equal rewards, without a gradient": _percent(float(np.mean(silent))) if silent else "0",
    }
    colours = dict(zip(PARTS, COLOURS, strict=False))
    parts = [(part, VARIABLES[colours.get(part, INK)], share) for part, share in _shares(run).items()]
    bar = _join(_fill("part", colour=colour, width=f"{100 * share:.2f}") for _, colour, share in parts)
    keys = _join(
        _fill("key", colour=colour, label=part, value=_percent(share)) for part, colour, share in parts
    )
    above = _fill("bar", bar=bar, keys=keys) if parts else ""
    shown = {key: value for key, value in rows.items() if value not in ("0", "0 s")}
    where = _table("Where it ran", _flatten(run.environment)) if run.environment else ""
    return _join([_table("This run", shown, above), where])


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings, and lists of mappings, as rows with dotted names."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {number: item for number, item in enumerate(value, start=1)}
    if not isinstance(value, dict) or not value:
        plain = {None: "none", True: "true", False: "false"}
        return {prefix: plain[value] if value is None or isinstance(value, bool) else str(value)}
    inner = (_flatten(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in value.items())
    return {key: text for rows in inner for key, text in rows.items()}


def _table(title: str, rows: dict[str, str], above: Html | str = "") -> Html:
    body = _join(_fill("setting", key=key, value=value) for key, value in rows.items())
    return _fill("table", title=title, above=above, rows=body)


@cache
def _fragments() -> dict[str, Template]:
    """The pieces of the template by name."""
    text = files("nextscale").joinpath("report_template.html").read_text(encoding="utf-8")
    _, *pieces = re.split(r"<!-- fragment: (\w+) -->\n", text)
    return {name: Template(piece.strip()) for name, piece in zip(pieces[::2], pieces[1::2], strict=True)}


def _fill(fragment: str, **values: Any) -> Html:
    safe = {
        key: value if isinstance(value, Html) else html.escape(str(value)) for key, value in values.items()
    }
    return Html(_fragments()[fragment].substitute(safe))


def _join(pieces: Iterable[str]) -> Html:
    """Pieces of markup, one after the other."""
    return Html("\n".join(pieces))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _number(value: float) -> str:
    """Three significant digits, without an exponent where that reads well."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:,.{min(digits, 2 if abs(value) >= 0.1 else digits)}f}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def _pair(before: float, after: float, arrow: str = " → ") -> str:
    """Two values with as many decimals as their difference needs."""
    change = abs(after - before)
    if change == 0 or change < 1e-5:
        return f"{_number(before)}{arrow}{_number(after)}"
    largest = max(abs(before), abs(after))
    decimals = max(math.ceil(-math.log10(change / 2)), 2 if largest < 10 else 1 if largest < 100 else 0)
    return f"{before:,.{decimals}f}{arrow}{after:,.{decimals}f}"


def _percent(share: float) -> str:
    decimals = 1 if 0 < share < 0.01 or 0.99 < share < 1 else 0
    return f"{100 * share:.{decimals}f} %"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{_number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
