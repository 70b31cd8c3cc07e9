"""Several runs told as one page: curves over images and seconds, the same seeds side by side, what differs.

Reads files only, as page.py does.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from nextscale.base.errors import ConfigError
from nextscale.base.files import write_text_aside
from nextscale.base.numbers import duration, number, percent
from nextscale.report import pictures
from nextscale.report.charts import COLOURS, DASHES, VARIABLES, Curve, draw_curves
from nextscale.report.page import flatten, inline_script, templates
from nextscale.runs.reader import BASE_MODEL, Run, images_of, read_run
from nextscale.runs.result import NOT_SHOWN

MAX_RUNS = len(COLOURS)


def write_comparison(folders: Sequence[Path], output: Path) -> Path:
    """Write one page about several runs, which needs no other file; returns its path.

    Args:
        output: its folder is made if need be.

    Raises:
        ConfigError: fewer than two runs or more than eight, a folder that is no run folder or is given twice,
            or a broken file.
    """
    if not 2 <= len(folders) <= MAX_RUNS:
        raise ConfigError(f"a comparison shows 2 to {MAX_RUNS} runs, got {len(folders)}")
    runs = _named([read_run(Path(each)) for each in folders])
    keys = [
        {"colour": VARIABLES[COLOURS[i]], "label": name, "value": "", "dash": [*DASHES][i % len(DASHES)]}
        for i, name in enumerate(runs)
    ]
    script, script_hash = inline_script("charts.js")
    page = templates().get_template("comparison.html").render(
        script=script,
        script_hash=script_hash,
        names=list(runs),
        keys=keys,
        notes=[f"{name}: {note}" for name, run in runs.items() for note in run.notes],
        ends=[
            picture | {"title": f"{name}: {_begun(picture['title'])}", "names": run.row_names()}
            for name, run in runs.items()
            for picture in pictures.ends_and_between(run)[0][-1:]
        ],
        is_same=_draws_alike(list(runs.values())),
        charts=_charts(runs),
        numbers=_numbers(runs),
        settings=_differing(runs),
    )  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text_aside(output, page)
    return output


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by the shortest names that tell them apart: their folder's, or with the folder above."""
    for depth in (1, 2, 3, None):
        names = ["/".join(run.paths.path.resolve().parts[-depth if depth else 0 :]) for run in runs]
        if len(set(names)) == len(names):
            return dict(zip(names, runs, strict=True))
    raise ConfigError(f"the run '{runs[0].paths.path}' is given twice: give each run once")


def _draws_alike(runs: Sequence[Run]) -> bool:
    """Whether the pictures of the runs are of the same conditions, from the same seeds."""
    options = [run.config.get("run") for run in runs]
    seeds = [each.get("eval_seed") if isinstance(each, dict) else None for each in options]
    drawn = [(run.row_names(), seed) for run, seed in zip(runs, seeds, strict=True)]
    return all(each == drawn[0] for each in drawn)


def _begun(sentence: str) -> str:
    """A sentence as the rest of another."""
    return sentence[0].lower() + sentence[1:]


def _spent(run: Run) -> dict[str, np.ndarray]:
    """For each record, the images drawn and the seconds trained until then."""
    images = list(accumulate(map(images_of, run.records)))
    seconds = list(accumulate(float(record.get("step_time") or 0) for record in run.records))
    return {"images": np.array(images, float), "seconds": np.array(seconds)}


def _charts(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """A chart over images and one over seconds of each metric of the evaluations that most runs have, and of
    the KL."""
    found = []
    for key in ["reward", "eval_reward", *_metrics(runs), "kl_per_image"]:
        for unit in ("images", "seconds"):
            curves = []
            for i, (name, run) in enumerate(runs.items()):
                steps, values = run.series(key)
                places = {record["step"]: x for record, x in zip(run.records, _spent(run)[unit], strict=True)}
                if len(values):
                    x = np.array([places[step] for step in steps])
                    curves.append(Curve(x, values, COLOURS[i], [*DASHES][i % len(DASHES)], name))
            if len(curves) > 1:
                title = f"{_title(runs, key)}, over {unit}"
                svg = draw_curves(curves, unit)
                told = [f"{each.label} from {number(each.y[0])} to {number(each.y[-1])}" for each in curves]
                alt = f"{title}: {'; '.join(told)}"
                found.append({"title": title, "says": "", "keys": [], "alt": alt, "svg": svg})
    return found


def _metrics(runs: Mapping[str, Run]) -> list[str]:
    """The means of the evaluations that at least two runs have, but the reward."""
    names = [
        name
        for run in runs.values()
        for name in dict.fromkeys(f"eval_{each}" for each in run.names("eval_(.+)"))
        if not name.endswith(NOT_SHOWN) and "warnings/" not in name
    ]
    shared = dict.fromkeys(name for name in names if names.count(name) > 1)
    return [name for name in shared if name != "eval_reward"]


def _title(runs: Mapping[str, Run], key: str) -> str:
    is_alike = all(run.kl_to == BASE_MODEL for run in runs.values())
    to = "the base" if is_alike else "each run's own reference"
    own = {"kl_per_image": f"KL to {to}, nats an image", "reward": "reward in training"}
    if key in own:
        return own[key]
    return key.removeprefix("eval_").removesuffix("/mean").replace("rewards/", "reward: ").replace("_", " ")


def _numbers(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """A row for each measure: what each run came to, with the 95 % interval where it is known."""
    rows: list[dict[str, Any]] = [
        {"label": "steps", "values": [f"{run.num_steps:,}" for run in runs.values()]},
        {"label": "images drawn in training", "values": [f"{run.num_images:,}" for run in runs.values()]},
        {
            "label": "training time",
            "values": [duration(sum(run.values("step_time"))) for run in runs.values()],
        },
    ]
    for key in ["eval_reward", *_metrics(runs), "kl_per_image"]:
        label = _title(runs, key) + (", in the last step" if key == "kl_per_image" else "")
        rows.append({"label": label, "values": [_last(run, key) for run in runs.values()]})
    return rows


def _last(run: Run, key: str) -> str:
    values = run.values(key)
    if not values:
        return ""
    is_share = "judge/style" in key or key.endswith("class_accuracy")
    errors = run.values(f"{key.removesuffix('/mean')}{'/sem' if key.endswith('/mean') else '_sem'}")
    told = percent(values[-1]) if is_share else number(values[-1])
    return f"{told} ± {1.96 * errors[-1]:.2g}" if errors else told


def _differing(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """The settings in which the runs differ."""
    flat = [flatten(run.config) for run in runs.values()]
    keys = dict.fromkeys(key for each in flat for key in each)
    skipped = ("description", "run.output_dir")
    return [
        {"label": key, "values": [each.get(key, "") for each in flat]}
        for key in keys
        if key not in skipped and len({each.get(key) for each in flat}) > 1
    ]
