"""The wheel and the source distribution hold all that the package needs."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def build(what: str, source: Path, target: Path) -> Path:
    """Build a wheel or a source distribution by the backend that pyproject.toml names."""
    code = f"import sys; from hatchling.build import {what}; print({what}(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", REPOSITORY, tmp_path_factory.mktemp("dist"))


def test_the_wheel_runs_by_itself(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    code = (
        "import nextscale, sys; from nextscale.cli.main import main; print(nextscale.__file__); "
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ["train", "toy-text-attributes", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "model: toy-text" in done.stdout and "Not checked" not in done.stdout


def test_the_source_distribution_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    archive = build("build_sdist", REPOSITORY, tmp_path)
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    again = build("build_wheel", source, tmp_path)
    ours, theirs = (zipfile.ZipFile(each) for each in (wheel, again))
    assert sorted(ours.namelist()) == sorted(theirs.namelist())
    assert all(
        ours.read(name) == theirs.read(name) for name in ours.namelist() if not name.endswith("RECORD")
    )
    assert (source / "tests" / "formats" / "run-3").is_dir()
    assert (source / "drills" / "kill.py").is_file()
