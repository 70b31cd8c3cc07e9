"""A run folder told as one self-contained HTML page, and as a few lines of plain words.

Reads files only: no model, no torch, no network. What the page looks like stands in templates/.
"""

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nextscale.base.files import write_text_aside
from nextscale.base.numbers import count, duration, percent
from nextscale.report import pictures, story
from nextscale.report.charts import COLOURS, INK, PARTS, VARIABLES, charts, draw_chart, piece_length
from nextscale.runs.paths import RunPaths
from nextscale.runs.reader import Run, read_run

SCHEMA = "config/recipe.schema.json"


def write_report(folder: Path, *, refresh: int | None = None) -> Path:
    """Write a run's page into its folder; returns the page's path.

    Args, raises: as `render_report`.
    """
    path = RunPaths(Path(folder)).report
    write_text_aside(path, render_report(folder, refresh=refresh))
    return path


def render_report(folder: Path, *, refresh: int | None = None) -> str:
    """A run's page, which needs no other file, as HTML.

    Args:
        refresh: seconds after which a browser that shows the page loads it anew; by default it does not.

    Raises:
        ConfigError: the folder is not a run folder, or a file in it is broken.
    """
    run = read_run(Path(folder))
    ends, between = pictures.ends_and_between(run)
    script, script_hash = inline_script("page.js", "charts.js")
    page = templates().get_template("page.html").render(
        name=run.name,
        refresh=refresh,
        script=script,
        script_hash=script_hash,
        verdict=story.verdict(run),
        description=run.config.get("description") or _opening_comment(run.config_text),
        warnings=story.warnings(run),
        notes=run.notes,
        facts=story.facts(run),
        ends=ends,
        between=between,
        row_names=run.row_names(),
        panels=pictures.class_panels(run),
        max_panels=pictures.MAX_PANELS,
        film=pictures.film(run),
        scales=pictures.scale_by_scale(run),
        extremes=pictures.by_reward(run),
        steps_per_point=piece_length(len(run.values("reward"))),
        charts=[draw_chart(run, chart) for chart in charts(run)],
        cost=_cost(run),
        shares=_shares(run),
        environment=flatten(run.environment),
        settings=_settings(run.config),
        changed=_changed(run.config),
        command=run.environment.get("command") or "",
        config=run.config_text,
        is_judged=bool(run.names("eval_judge/(.+)")),
    )  # fmt: skip
    return page


def watch_report(folder: Path, seconds: int) -> Iterator[Path]:
    """Write a run's page anew whenever the run has logged something, until it has ended; yields its path each
    time.

    Args:
        seconds: between two looks; the page in a browser follows as often.

    Raises:
        ConfigError: as `write_report` does.
    """
    seen = None
    while True:
        run = read_run(Path(folder))
        is_over = not run.is_open
        now = run.paths.metrics.stat().st_mtime_ns, is_over
        if now != seen:
            seen = now
            yield write_report(folder, refresh=None if is_over else seconds)
        if is_over:
            return
        time.sleep(seconds)


def summarize(folder: Path) -> str:
    """What happened in a run, in a few lines of plain words: those for which the run has the figures.

    Raises:
        ConfigError: the folder is not a run folder, or a file in it is broken.
    """
    run = read_run(Path(folder))
    sentences = [fact.sentence for fact in story.facts(run) if fact.sentence]
    return "\n".join([*sentences, *(f"Warning: {text}" for text in story.warnings(run))])


@cache
def templates() -> Environment:
    """The templates of the pages."""
    # Names, prompts and settings come from files that anyone may have written: everything is escaped.
    templates = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    templates.loader = PackageLoader("nextscale.report")
    templates.filters["counted"] = count
    return templates


def _cost(run: Run) -> dict[str, str]:
    num_tokens, silent = [0, *run.values("num_tokens")][-1], run.values("frac_reward_zero_std")
    rows = {
        "Steps": f"{run.num_steps:,}",
        "Images drawn in training": f"{run.num_images:,}",
        "Tokens": f"{num_tokens:,.0f}",
        "Training time": duration(sum(run.values("step_time"))),
        "Evaluation time": duration(sum(run.values("eval_time"))),
        "Groups of equal rewards, without a gradient": percent(float(np.mean(silent))) if silent else "0",
    }
    return {key: value for key, value in rows.items() if value not in ("0", "0 s")}


def _shares(run: Run) -> list[dict[str, str]]:
    """Where the training time went: a piece of the bar and an entry of its key for each part of a step."""
    colours, shares = dict(zip(PARTS, COLOURS, strict=False)), story.time_shares(run)
    return [
        {
            "colour": VARIABLES[colours.get(part, INK)],
            "label": part,
            "value": percent(x),
            "width": f"{x:.2%}",
            "dash": "",
        }
        for part, x in shares.items()
    ]


def _settings(config: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The tables of the configuration: one of what stands alone, and one for each section."""
    alone = {key: value for key, value in config.items() if not isinstance(value, dict | list)}
    sections = {"recipe": alone, **{key: value for key, value in config.items() if key not in alone}}
    return {title: flatten(section) for title, section in sections.items() if section}


def _changed(config: dict[str, Any]) -> dict[str, str]:
    """The settings that differ from the defaults; what has none, such as the rewards, is among them."""
    content = json.loads((files("nextscale") / SCHEMA).read_text(encoding="utf-8"))["properties"]
    defaults = {key: value["default"] for key, value in content.items() if "default" in value}
    ours, theirs = flatten(config), flatten(defaults)
    skipped = ("description", "run.output_dir")
    return {
        key: f"{value}  (default {theirs[key]})" if key in theirs else value
        for key, value in ours.items()
        if value != theirs.get(key) and key not in skipped
    }


@cache
def inline_script(*names: str) -> tuple[Markup, str]:
    """Scripts of templates/ as one, as it stands between its tags, and the hash that lets it run: it is over
    every character."""
    folder = files("nextscale.report") / "templates"
    script = "".join(f"\n{(folder / name).read_text(encoding='utf-8').strip()}\n" for name in names)
    return Markup(script), base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings, and lists of mappings, as rows with dotted names."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {position: item for position, item in enumerate(value, start=1)}
    if not isinstance(value, dict) or not value:
        plain = {None: "none", True: "true", False: "false"}
        return {prefix: plain[value] if value is None or isinstance(value, bool) else str(value)}
    inner = (flatten(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in value.items())
    return {key: text for rows in inner for key, text in rows.items()}


def _opening_comment(text: str) -> str:
    """The comment that a YAML file begins with."""
    comments = re.match(r"(?:[ \t]*#.*\n|\s*\n)*", text)
    return re.sub(r"(?m)^[ \t]*#+ ?", "", comments[0] if comments else "").strip()
