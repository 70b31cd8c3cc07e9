"""What is found in a run folder, beside what the report's tests see of it."""

import json
from pathlib import Path

import pytest

from nextscale.base.errors import ConfigError
from nextscale.runs.paths import RunPaths, by_step, step_name
from nextscale.runs.reader import find_run, is_number, read_object, read_run


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run of one step with a final model."""
    paths = RunPaths(tmp_path / "run")
    for folder in (paths.final, paths.samples):
        folder.mkdir(parents=True)
    paths.config.write_text("model: toy\n")
    paths.metrics.write_text('{"step": 1}\n')
    (paths.final / "config.json").touch()
    return paths


def test_a_model_is_found_by_its_run_or_by_its_folder(paths: RunPaths) -> None:
    found = (paths.path, str(paths.final))
    assert find_run(str(paths.path)) == found and find_run(str(paths.final)) == found


def test_the_best_model_is_its_runs_as_well(paths: RunPaths) -> None:
    assert find_run(str(paths.best)) == (None, str(paths.best))
    paths.best.mkdir()
    (paths.best / "config.json").touch()
    assert find_run(str(paths.best)) == (paths.path, str(paths.best))
    assert find_run(str(paths.path)) == (paths.path, str(paths.final))


def test_what_is_no_run_is_left_as_it_is(paths: RunPaths) -> None:
    for source in ("toy", str(paths.samples), str(paths.path.parent)):
        assert find_run(source) == (None, source)
    paths.metrics.unlink()
    assert find_run(str(paths.path)) == (None, str(paths.path))


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    steps = [2, 10, 999_999, 1_000_000]
    for step in reversed(steps):
        (tmp_path / f"{step_name(step)}.png").touch()
    (tmp_path / "step-last.png").touch()
    (tmp_path / ".writing-step-000003.png").touch()
    assert list(by_step(tmp_path, ".png")) == steps
    assert by_step(tmp_path, ".png")[2].name == "step-000002.png"


@pytest.mark.parametrize(("num_rows", "num_named"), [(0, 0), (16, 16), (17, 0)])
def test_rows_are_named_where_they_are_few(paths: RunPaths, num_rows: int, num_named: int) -> None:
    paths.samples_index.write_text(json.dumps({"classes": [f"class {i}" for i in range(num_rows)]}))
    assert len(read_run(paths.path).row_names()) == num_named


def test_json_that_is_nested_without_end_is_damage(paths: RunPaths) -> None:
    deep = "[" * 100_000
    paths.metrics.write_text(f'{{"step": 1}}\n{deep}\n')
    with pytest.raises(ConfigError, match="line 2, is not valid JSON"):
        read_run(paths.path)
    paths.environment.write_text(deep)
    with pytest.raises(ConfigError, match="is no JSON object"):
        read_object(paths.environment)


def test_a_number_that_no_float_can_be_is_none() -> None:
    assert is_number(3) and is_number(-1e308)
    assert not any(map(is_number, (10**400, -(10**400), float("nan"), float("inf"), True, "3")))
