"""Several runs beside each other: their numbers, curves and settings."""

import json

import numpy as np
import pytest
from filelock import FileLock
from test_page import CONFIG, Page, make_run, metrics, picture_of, training_line

from nextscale.base.errors import ConfigError
from nextscale.report.comparison import write_comparison
from nextscale.report.page import watch_report
from nextscale.runs.reader import read_run


def test_numbers_curves_and_differing_settings(tmp_path):
    lines = metrics()
    lines[-1] |= {"eval_reward_sem": 0.01, "eval_rewards/style/sem": 0.005}
    first = make_run(tmp_path / "first", lines)
    other = CONFIG.replace("beta: 0.02", "beta: 0.5").replace("# Paints", "description: x\n# Paints")
    second = make_run(tmp_path / "second", metrics(20), config=other, grids=(0, 20))
    path = write_comparison([first, second], tmp_path / "both.html")
    page = Page(path)
    assert not page.open and page.raw.count("<svg ") == page.raw.count('class="chart"')
    for text in (
        "steps 30 20",
        "images drawn in training 3,840 2,560",
        "training time 1 min 42 s 1 min 8 s",
        "reward 0.34 ± 0.02 0.34",
        "reward: style 0.75 ± 0.0098 0.75",
        "judge/class accuracy 88 % 88 %",
        "grpo.beta 0.02 0.5",
    ):
        assert text in page.text, text
    assert "description" not in page.text and "grpo.num_generations" not in page.text
    for unit in ("images", "seconds"):
        assert (
            f"reward, over {unit}" in page.text and f"KL to the base, nats an image, over {unit}" in page.text
        )
    last = [np.asarray(picture_of(image)) for image in page.images]
    assert len(last) == 2 and (last[0] != last[1]).any()  # after 30 steps, and after 20
    assert "KL to the base, nats an image, in the last step" in page.text
    assert "first: after 30 steps" in page.text and "second: after 20 steps" in page.text
    assert "All are from the same seeds" in page.text


def test_a_section_that_is_none_ends_in_no_traceback(tmp_path):
    """Of a configuration that was edited by hand."""
    runs = [make_run(tmp_path / name, metrics(20), grids=(0, 20)) for name in ("first", "second")]
    for run in runs:
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(
            "\n".join("run: 3" if line.startswith("run:") else line for line in text.split("\n"))
        )
    assert "All are from the same seeds" in Page(write_comparison(runs, tmp_path / "both.html")).text


def test_each_picture_has_its_own_runs_rows_and_time(tmp_path):
    names = [["star", "moon", "fish", "tree"], ["a red star", "a blue moon", "a fish", "a tree"]]
    folders = []
    for name, rows, grids in zip(("first", "second"), names, ((0, 30), (0,)), strict=True):
        folders.append(make_run(tmp_path / name, metrics()[: 31 if name == "first" else 14], grids=grids))
        index = json.loads((folders[-1] / "samples" / "index.json").read_text())
        (folders[-1] / "samples" / "index.json").write_text(json.dumps(index | {"classes": rows}))
    page = Page(write_comparison(folders, tmp_path / "both.html"))
    assert "first: after 30 steps" in page.text and "second: before training" in page.text
    for row in [*names[0], *names[1]]:
        assert page.raw.count(f'<li title="{row}">{row}</li>') == 1
    assert "the same seeds" not in page.text
    assert "second: The metrics end at step" in page.text


def test_a_curve_over_images_has_its_points_where_they_were_drawn(tmp_path, monkeypatch):
    from nextscale.report import comparison

    drawn = []
    monkeypatch.setattr(comparison, "draw_curves", lambda curves, unit: drawn.append((curves, unit)) or "")
    folders = [make_run(tmp_path / name, metrics(10), grids=()) for name in "ab"]
    write_comparison(folders, tmp_path / "page.html")
    (training, _), (over_seconds, unit), (evaluated, _) = drawn[0], drawn[3], drawn[2]
    assert training[0].x.tolist() == [128 * step for step in range(1, 11)]
    assert evaluated[0].x.tolist() == [0, 128 * 5, 128 * 10]
    assert unit == "seconds" and over_seconds[0].x.tolist() == pytest.approx([0, 3.4 * 5, 3.4 * 10])


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / study / "7", metrics(5), grids=()) for study in ("plain", "best")]
    assert "plain/7" in Page(write_comparison(folders, tmp_path / "new" / "page.html")).text
    with pytest.raises(ConfigError, match=r"run '.*7' is given twice"):
        write_comparison([folders[0], folders[0]], tmp_path / "page.html")
    with pytest.raises(ConfigError, match="2 to 8 runs, got 1"):
        write_comparison(folders[:1], tmp_path / "page.html")


def test_a_live_run_is_watched_to_its_end(tmp_path):
    folder = make_run(tmp_path / "run", metrics(5), grids=())
    assert not read_run(folder).is_open
    lock = FileLock(folder / ".lock")
    lock.acquire()
    assert read_run(folder).is_open
    watch = watch_report(folder, 1)
    seen = [next(watch).read_text("utf-8")]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(training_line(6, 30)) + "\n")
    seen.append(next(watch).read_text("utf-8"))
    lock.release()
    seen += [path.read_text("utf-8") for path in watch]
    assert len(seen) == 3 and "In 6 steps" in seen[1]  # as it was, a step later, and ended
    assert ['http-equiv="refresh"' in page for page in seen] == [True, True, False]
