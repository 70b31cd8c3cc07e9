"""What runs on a server at each change and at night: nothing but targets of the Makefile."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
WORKFLOWS = REPOSITORY / ".github" / "workflows"

pytestmark = pytest.mark.skipif(not WORKFLOWS.is_dir(), reason="a source distribution has no workflows")


def jobs_of(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load((WORKFLOWS / name).read_text())["jobs"].values())


def commands_of(job: dict[str, Any]) -> list[str]:
    """What a job runs, for each value of its matrix."""
    commands = [step["run"] for step in job["steps"] if "run" in step]
    for key, values in job["strategy"]["matrix"].items():
        word = "${{ matrix." + key + " }}"
        commands = [each.replace(word, value) for each in commands for value in values]
    return list(dict.fromkeys(commands))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ci.yml", ["make lint", "make test", "make package"]),
        ("nightly.yml", ["make fuzz", "make drill", "make audit"]),
    ],
)
def test_what_is_run_are_targets_of_the_makefile(name: str, expected: list[str]) -> None:
    assert [command for job in jobs_of(name) for command in commands_of(job)] == expected
    targets = re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert {each.removeprefix("make ") for each in expected} <= set(targets)


def test_the_oldest_python_is_the_one_that_the_package_asks_for() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (job,) = jobs_of("ci.yml")
    assert project["requires-python"] == f">={job['strategy']['matrix']['python'][0]}"
