"""The pictures of a report, from the files of a run: before and after, class by class, over training, scale
by scale, and by reward.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nextscale.base.errors import ConfigError
from nextscale.base.numbers import count, number
from nextscale.runs.paths import by_step
from nextscale.runs.reader import Run, read_object

MAX_STRIP = 8  # grids shown between the first and the last
MAX_FILM = 10  # steps of the film
FILM_ROWS = 6
TILE = 96  # CSS pixels that a small image is enlarged to at most
BYTES = 1_000_000  # of a picture; a larger one becomes the largest JPEG that is not
PANEL_BYTES = 3_000_000  # of all panels together
MAX_PANELS = 400
SMALLEST = 16  # side of a JPEG below which its header is most of it

Shown = dict[str, Any]
"""A picture as the page's template takes it."""


def ends_and_between(run: Run) -> tuple[list[Shown], list[Shown]]:
    """The first and the last grid of samples, and some of those between."""
    grids = run.paths.grids()
    steps, between, columns = list(grids), list(grids)[1:-1], _num_columns(run)
    ends = []
    for step in dict.fromkeys((steps[0], steps[-1]) if steps else ()):
        title = _when(step)
        if step and step == steps[-1] < run.num_steps:  # it was stopped, or goes on
            title += f", of {run.num_steps:,} done"
        alt = f"{title}: a grid of sampled images, a row for each class or prompt"
        ends.append(_shown(read_picture(grids[step]), title, alt, columns, BYTES, grids[step]))
    chosen = np.linspace(0, len(between) - 1, min(MAX_STRIP, len(between))).round().astype(int)
    titles = {between[i]: f"Step {between[i]}" for i in chosen}
    strip = [
        _shown(read_picture(grids[step]), title, title, columns, BYTES // 8, grids[step])
        for step, title in titles.items()
    ]
    return ends, strip


def class_panels(run: Run) -> list[Shown]:
    """For each class or prompt, its name, and its images before and after, one above the other: of all that
    were kept, or else of the rows of the grids."""
    files, names, columns = run.paths.grids(), run.row_names(), _num_columns(run)
    kept = by_step(run.paths.samples, ".png", "all-")
    if len(kept) > 1:
        first, last = (read_object(kept[step].with_suffix(".json")) for step in (min(kept), max(kept)))
        if first == last and isinstance(first.get("names"), list):  # else they are of different prompts
            files, names, columns = kept, list(map(str, first["names"])), int(first.get("num_columns", 0))
    if len(files) < 2 or not names:
        return []
    ends, panels = [read_picture(files[step]) for step in (min(files), max(files))], []
    for i, name in enumerate(names[:MAX_PANELS]):
        rows = [_row(each, i, len(names)) for each in ends]
        alt = f"{name}: images of the same seeds, before training above, after it below"
        most = min(BYTES // 8, PANEL_BYTES // min(len(names), MAX_PANELS))
        panels.append(_shown(_stacked(rows), name, alt, columns, most))
    return panels


def film(run: Run) -> Shown | None:
    """The first image of some rows, of every step that there is a grid of, or of some of these."""
    grids, names, columns = run.paths.grids(), run.row_names(), _num_columns(run)
    if len(grids) < 3 or not names or not columns:
        return None
    chosen = np.linspace(0, len(grids) - 1, min(MAX_FILM, len(grids))).round().astype(int)
    steps = [list(grids)[i] for i in chosen]
    rows = min(len(names), FILM_ROWS)
    strips = []
    for step in steps:
        grid = read_picture(grids[step])
        width, height = grid.width // columns, grid.height // len(names)
        strips.append(grid.crop((0, 0, width, height * rows)))
    whole = Image.new("RGB", (sum(each.width for each in strips), strips[0].height))
    for i, each in enumerate(strips):
        whole.paste(each, (i * strips[0].width, 0))
    told = ", ".join(map(str, steps))
    alt = f"One image of each of {rows} classes or prompts, of the same seeds, after the steps {told}"
    shown = _shown(whole, "", alt, len(steps), BYTES)
    return shown | {"rows": names[:rows], "columns": ["before", *(str(step) for step in steps[1:])]}


def scale_by_scale(run: Run) -> list[Shown]:
    """How images came to be, before and after training."""
    found = []
    for step in _first_and_last(run, "scales-"):
        path = run.paths.pictures("scales", step)
        picture, rows = read_picture(path), read_object(path.with_suffix(".json")).get("names")
        if not isinstance(rows, list) or not rows:
            continue
        num = round(picture.width / (picture.height / len(rows)))  # of square images
        alt = f"{_when(step)}: images decoded from their first scale alone, from the first two, and so on"
        shown = _shown(picture, _when(step), alt, num, BYTES)
        found.append(shown | {"rows": list(map(str, rows)), "columns": [str(k + 1) for k in range(num)]})
    return found


def by_reward(run: Run) -> list[Shown]:
    """The best, the middle and the worst images by reward, before and after training."""
    found = []
    for step in _first_and_last(run, "extremes-"):
        path = run.paths.pictures("extremes", step)
        rewards = read_object(path.with_suffix(".json")).get("rewards")
        if not isinstance(rewards, list) or len(rewards) != 3 or not all(rewards):
            continue
        names = ("best", "middle", "worst")
        rows = [f"{name}: {number(row[0])}" for name, row in zip(names, rewards, strict=True)]
        alt = f"{_when(step)}: the images with the {', '.join(rows)} of the reward"
        found.append(_shown(read_picture(path), _when(step), alt, len(rewards[0]), BYTES) | {"rows": rows})
    return found


def _first_and_last(run: Run, before: str) -> list[int]:
    steps = list(by_step(run.paths.samples, ".png", before))
    return list(dict.fromkeys((steps[0], steps[-1]))) if steps else []


def _when(step: int) -> str:
    return f"After {count(step, 'step')}" if step else "Before training"


def _num_columns(run: Run) -> int:
    found = read_object(run.paths.samples_index).get("num_columns")
    return found if isinstance(found, int) and found > 0 else 0


def read_picture(path: Path) -> Image.Image:
    """A picture of a run.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, Image.DecompressionBombError):
        raise ConfigError(f"{path} is no readable image; restore or delete it") from None


def _row(grid: Image.Image, i: int, num_rows: int) -> Image.Image:
    height = grid.height // num_rows
    return grid.crop((0, i * height, grid.width, (i + 1) * height))


def _stacked(parts: Sequence[Image.Image]) -> Image.Image:
    gap = max(parts[0].height // 16, 1)
    size = max(each.width for each in parts), sum(each.height for each in parts) + gap * (len(parts) - 1)
    whole, top = Image.new("RGB", size, "white"), 0
    for each in parts:
        whole.paste(each, (0, top))
        top += each.height + gap
    return whole


def _shown(
    picture: Image.Image, title: str, alt: str, columns: int, max_bytes: int, file: Path | None = None
) -> Shown:
    """A picture for the page: as PNG, or where that is larger than `max_bytes`, as the largest JPEG that is
    not (or of some pixels); and not shown larger than makes sense for so many columns of images.

    Args:
        file: what the picture was read from, whole, where it is a PNG.
    """
    if file is None:
        picture.save(buffer := io.BytesIO(), "PNG")
    data = buffer.getvalue() if file is None else file.read_bytes()
    kind, scale = "png", min(1.0, 1600 / picture.width)
    while len(data) > max_bytes and scale * max(picture.size) > SMALLEST:
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        picture.resize(size).save(buffer := io.BytesIO(), "JPEG", quality=85)
        data, kind, scale = buffer.getvalue(), "jpeg", scale * 0.8
    # The nearest pixel is for enlarging small images; it would break one that is shown smaller than it is.
    return {
        "title": title,
        "alt": alt,
        "source": f"data:image/{kind};base64,{base64.b64encode(data).decode()}",
        "width": picture.width,
        "height": picture.height,
        "most": max(columns * TILE, picture.width) if columns else max(picture.width, 640),
        "look": "pixel" if picture.width <= 640 else "smooth",
    }
