"""A run folder told as one self-contained HTML page, and as a few lines of plain words.

Reads files only: no model, no torch, no network. What the page looks like stands in templates/.
"""

import base64
import io
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from nextscale.base.errors import ConfigError
from nextscale.base.files import write_text_aside
from nextscale.base.numbers import count, duration, percent
from nextscale.report import story
from nextscale.report.charts import COLOURS, INK, PARTS, VARIABLES, charts, draw_chart, piece_length
from nextscale.runs.reader import Run, read_run

MAX_STRIP = 8  # grids shown between the first and the last


def write_report(folder: Path) -> Path:
    """Write a run's page, which needs no other file, into its folder; returns the page's path.

    Raises:
        ConfigError: the folder is not a run folder, or a file in it is broken.
    """
    run = read_run(Path(folder))
    ends, between = _pictures(run)
    page = _templates().get_template("page.html").render(
        name=run.name,
        verdict=story.verdict(run),
        description=run.config.get("description") or _opening_comment(run.config_text),
        warnings=story.warnings(run),
        notes=run.notes,
        facts=story.facts(run),
        ends=ends,
        between=between,
        row_names=run.row_names(),
        steps_per_point=piece_length(len(run.values("reward"))),
        charts=[draw_chart(run, chart) for chart in charts(run)],
        cost=_cost(run),
        shares=_shares(run),
        environment=_flatten(run.environment),
        settings=_settings(run.config),
        config=run.config_text,
        is_judged=bool(run.names("eval_judge/(.+)")),
    )  # fmt: skip
    write_text_aside(run.paths.report, page)
    return run.paths.report


def summarize(folder: Path) -> str:
    """What happened in a run, in a few lines of plain words: those for which the run has the figures.

    Raises:
        ConfigError: the folder is not a run folder, or a file in it is broken.
    """
    run = read_run(Path(folder))
    sentences = [fact.sentence for fact in story.facts(run) if fact.sentence]
    return "\n".join([*sentences, *(f"Warning: {text}" for text in story.warnings(run))])


@cache
def _templates() -> Environment:
    # Names, prompts and settings come from files that anyone may have written: everything is escaped.
    templates = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    templates.loader = PackageLoader("nextscale.report")
    templates.filters["counted"] = count
    return templates


def _pictures(run: Run) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first and the last grid of samples, and some of those between."""
    grids = run.paths.grids()
    steps, between = list(grids), list(grids)[1:-1]
    ends = []
    for step in dict.fromkeys((steps[0], steps[-1]) if steps else ()):
        title = f"After {count(step, 'step')}" if step else "Before training"
        alt = f"{title}: a grid of sampled images, a row for each class"
        ends.append(_picture(grids[step], title, alt, 1_000_000))
    shown = np.linspace(0, len(between) - 1, min(MAX_STRIP, len(between))).round().astype(int)
    titles = {between[i]: f"Step {between[i]}" for i in shown}
    return ends, [_picture(grids[step], title, title, 120_000) for step, title in titles.items()]


def _picture(path: Path, title: str, alt: str, max_bytes: int) -> dict[str, Any]:
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
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    # The nearest pixel is for enlarging a small grid; it would break one that is shown smaller than it is.
    look = "pixel" if width <= 640 else "smooth"
    return {"title": title, "alt": alt, "source": source, "width": width, "height": height, "look": look}


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
        {"colour": VARIABLES[colours.get(part, INK)], "label": part, "value": percent(x), "width": f"{x:.2%}"}
        for part, x in shares.items()
    ]


def _settings(config: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The tables of the configuration: one of what stands alone, and one for each section."""
    alone = {key: value for key, value in config.items() if not isinstance(value, dict | list)}
    sections = {"recipe": alone, **{key: value for key, value in config.items() if key not in alone}}
    return {title: _flatten(section) for title, section in sections.items() if section}


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings, and lists of mappings, as rows with dotted names."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {position: item for position, item in enumerate(value, start=1)}
    if not isinstance(value, dict) or not value:
        plain = {None: "none", True: "true", False: "false"}
        return {prefix: plain[value] if value is None or isinstance(value, bool) else str(value)}
    inner = (_flatten(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in value.items())
    return {key: text for rows in inner for key, text in rows.items()}


def _opening_comment(text: str) -> str:
    """The comment that a YAML file begins with."""
    comments = re.match(r"(?:[ \t]*#.*\n|\s*\n)*", text)
    return re.sub(r"(?m)^[ \t]*#+ ?", "", comments[0] if comments else "").strip()
