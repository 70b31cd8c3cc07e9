"""A run folder told as one self-contained HTML page, and as a few lines of plain words.

Reads files only: no model, no torch, no network. The page's frame and style are in template.html.
"""

import base64
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nextscale.base.errors import ConfigError
from nextscale.base.numbers import count, duration, number, pair, percent
from nextscale.report.charts import COLOURS, INK, PARTS, VARIABLES, charts, draw_chart, piece_length
from nextscale.report.text import Html, fill, join
from nextscale.runs.hacking import hacking_warning
from nextscale.runs.reader import Run, is_number, read_object, read_run

MAX_STRIP = 8  # grids shown between the first and the last
HACKING = "The trained reward rose while a judge that it never saw fell: a sign of reward hacking."


@dataclass(frozen=True)
class Fact:
    """One thing that happened: a sentence of the summary, a card of the page, or both."""

    sentence: str
    label: str = ""
    value: str = ""
    hint: str = ""


def write_report(folder: Path) -> Path:
    """Write `<folder>/report.html`, one page that needs nothing else, and return its path.

    Raises:
        ConfigError: when the folder is no run folder, or a file in it is broken.
    """
    run = read_run(Path(folder))
    piece = piece_length(len(run.values("reward")))
    thinned = f" Each point is the mean of {piece} steps; the pale area is their range." if piece > 1 else ""
    comments = re.match(r"(?:[ \t]*#.*\n|\s*\n)*", run.config_text)
    comment = re.sub(r"(?m)^[ \t]*#+ ?", "", comments[0] if comments else "").strip()
    judges = "" if run.names("eval_judge/(.+)") else "No judge looked at this run: the images are the check."
    loose = {key: value for key, value in run.config.items() if not isinstance(value, dict | list)}
    sections = {"recipe": loose, **{key: value for key, value in run.config.items() if key not in loose}}
    page = fill(
        "page",
        name=run.folder.resolve().name,
        verdict=_verdict(run),
        lead=fill("lead", text=run.config.get("description") or comment),
        warning=join(fill("warning", text=text) for text in _warnings(run)),
        notes=join(fill("note", text=note) for note in run.notes),
        cards=join(_card(fact) for fact in _facts(run) if fact.label),
        samples=_samples(run),
        thinned=thinned,
        charts=join(draw_chart(run, chart) for chart in charts(run)),
        cost=_cost(run),
        settings=join(_table(key, _flatten(value)) for key, value in sections.items() if value),
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
    warnings = (f"Warning: {text}" for text in _warnings(run))
    return "\n".join([*(fact.sentence for fact in _facts(run) if fact.sentence), *warnings])


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


def _warnings(run: Run) -> list[str]:
    """What a reader has to know first: the judges' fall, and what the last evaluation warned of."""
    found, reward = [HACKING] if _is_hacking(run) else [], run.ends("eval_reward")
    for name in run.names("eval_warnings/(.+)"):
        scores = run.ends(f"eval_rewards/{name}/mean")
        if run.values(f"eval_warnings/{name}")[-1:] == [1.0] and reward and scores:
            found.append(hacking_warning(name, reward, scores))
    return found


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
        says = f"the reward {verb} from {pair(before, after, ' to ')}"
    else:
        says = f"the reward {verb} by {size:.1f} times its standard deviation at the start"
    if accuracy:
        kept = accuracy[1] / accuracy[0] if accuracy[0] else math.nan
        held = "held" if kept >= 0.95 else "fell a little" if kept >= 0.85 else "fell"
        says += f", and the share of objects that a judge recognises {held} ({percent(accuracy[1])})"
    return f"In {count(run.num_steps, 'step')} {says}."


def _facts(run: Run) -> list[Fact]:
    """What happened, most important first; only what the run has the figures for."""
    facts, steps, change = [], count(run.num_steps, "step"), _reward_change(run)
    place = f" on {run.environment['device']}" if run.environment.get("device") else ""
    spent, images = sum(run.values("step_time")), _num_images(run)
    took = f" ({duration(spent)}{place})" if spent else ""
    source = "evaluation" if run.ends("eval_reward") else "training"
    if change:
        name = "reward" if source == "evaluation" else "training reward"
        hint = source + ("" if math.isnan(change[2]) else f", {(change[1] - change[0]) / change[2]:+.1f} sd")
        sentence = f"In {steps}{took} the {name} went from {pair(*change[:2], ' to ')}."
        facts.append(Fact(sentence, "Reward", pair(*change[:2]), hint))
    else:
        facts.append(Fact(f"After {steps}{took} too little was measured to compare rewards."))
    rewards = {name: run.ends(f"eval_rewards/{name}/mean") for name in run.names("eval_rewards/(.+)/mean")}
    if len(told := [f"{name} {pair(*ends, ' to ')}" for name, ends in rewards.items() if ends]) > 1:
        facts.append(Fact(f"By reward: {'; '.join(told)}."))
    facts += _constraint_facts(run)
    if styles := _moved_styles(run):
        (name, before, after), *others = styles
        told = f"{percent(after)} of the images {name} ({percent(before)} before)"
        told += "".join(f"; {name} {percent(b)} ({percent(a)} before)" for name, a, b in others)
        facts.append(Fact(f"The style judge, which no training ever saw, now calls {told}."))
        for name, a, b in styles:
            facts.append(Fact("", f"Judged {name}", f"{percent(a)} → {percent(b)}", "of the images"))
    if ends := run.ends("eval_judge/class_accuracy"):
        before, after = map(percent, ends)
        sentence = f"The class judge recognises the object in {after} ({before} before)."
        facts.append(Fact(sentence, "Object recognised", f"{before} → {after}", "of the images"))
    if ends := run.ends("eval_diversity"):
        before, after = pair(*ends).split(" → ")
        sentence = f"Diversity is {after} ({before} before)."
        facts.append(Fact(sentence, "Diversity", pair(*ends), "evaluation"))
    if kl := run.values("kl_per_image"):
        value = number(kl[-1])
        sentence = f"KL to the base model: {value} nats an image."
        facts.append(Fact(sentence, "KL to base", value, "nats an image"))
    if spent:
        facts.append(Fact("", "Training time", duration(spent), f"{steps}{place}"))
    if spent and images:
        rate, shares = number(images / spent), _shares(run)
        most = max(shares, key=shares.__getitem__)
        told = f"{rate} images a second, and {percent(shares[most])} of the time went into the {most}."
        facts.append(Fact(told, "Speed", rate, "images a second"))
    return facts


def _constraint_facts(run: Run) -> list[Fact]:
    """Where each constraint's bound is, and where its mean has come to."""
    facts = []
    for name in run.names("constraints/(.+)/bound"):
        means = run.values(f"eval_rewards/{name}/mean") or run.values(f"rewards/{name}/mean")
        bounds, multipliers = (run.values(f"constraints/{name}/{key}") for key in ("bound", "multiplier"))
        if means and bounds and multipliers:
            bound, mean = pair(bounds[-1], means[-1]).split(" → ")
            told = f"bound {bound}, multiplier {number(multipliers[-1])}"
            facts.append(
                Fact(f"The constraint on {name}: mean {mean}, {told}.", f"Constraint: {name}", mean, told)
            )
    return facts


def _card(fact: Fact) -> Html:
    was, arrow, now = fact.value.rpartition(" → ")
    return fill("card", label=fact.label, was=was + arrow.rstrip(), now=now, hint=fact.hint)


def _samples(run: Run) -> Html | str:
    """The first and the last grid side by side, and some of those between in a fold."""
    paths = (run.folder / "samples").glob("step-*.png")
    grids = {int(path.stem[5:]): path for path in paths if path.stem[5:].isdigit()}
    if not grids:
        return ""
    steps, classes = sorted(grids), read_object(run.folder / "samples" / "index.json").get("classes")
    shown = classes if isinstance(classes, list) and len(classes) <= 16 else []  # more would not be readable
    rows = join(fill("row", name=name) for name in shown)
    ends = []
    for step in dict.fromkeys((steps[0], steps[-1])):
        title = f"After {count(step, 'step')}" if step else "Before training"
        image = _image(grids[step], f"{title}: a grid of sampled images, a row for each class", 1_000_000)
        ends.append(fill("sample", title=title, rows=rows, image=image))
    between = steps[1:-1]
    places = np.linspace(0, len(between) - 1, min(MAX_STRIP, len(between))).round().astype(int)
    strip = [
        fill("sample", title=f"Step {step}", rows="", image=_image(grids[step], f"Step {step}", 120_000))
        for step in (between[i] for i in places)
    ]
    fold = fill("strip", number=count(len(strip), "grid"), grids=join(strip)) if strip else ""
    return fill("samples", pair=join(ends), strip=fold)


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
    return fill("image", look=look, source=source, width=width, height=height, alt=alt)


def _num_images(run: Run) -> int:
    """Images drawn in training: the metrics hold their rate, so a step's count is rounded to a whole one."""
    timed = [
        r for r in run.records if is_number(r.get("images_per_second")) and is_number(r.get("step_time"))
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
        "Training time": duration(sum(run.values("step_time"))),
        "Evaluation time": duration(sum(run.values("eval_time"))),
        "Groups of equal rewards, without a gradient": percent(float(np.mean(silent))) if silent else "0",
    }
    colours = dict(zip(PARTS, COLOURS, strict=False))
    parts = [(part, VARIABLES[colours.get(part, INK)], share) for part, share in _shares(run).items()]
    bar = join(fill("part", colour=colour, width=f"{100 * share:.2f}") for _, colour, share in parts)
    keys = join(fill("key", colour=colour, label=part, value=percent(share)) for part, colour, share in parts)
    above = fill("bar", bar=bar, keys=keys) if parts else ""
    shown = {key: value for key, value in rows.items() if value not in ("0", "0 s")}
    where = _table("Where it ran", _flatten(run.environment)) if run.environment else ""
    return join([_table("This run", shown, above), where])


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings, and lists of mappings, as rows with dotted names."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {position: item for position, item in enumerate(value, start=1)}
    if not isinstance(value, dict) or not value:
        plain = {None: "none", True: "true", False: "false"}
        return {prefix: plain[value] if value is None or isinstance(value, bool) else str(value)}
    inner = (_flatten(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in value.items())
    return {key: text for rows in inner for key, text in rows.items()}


def _table(title: str, rows: dict[str, str], above: Html | str = "") -> Html:
    body = join(fill("setting", key=key, value=value) for key, value in rows.items())
    return fill("table", title=title, above=above, rows=body)
