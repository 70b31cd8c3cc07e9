"""What the pages name exists: files, folders, links, and the listing of the package in CONTRIBUTING.md."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "nextscale"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
PATH = re.compile(r"(?<![\w/.-])(?:(?:src|docs|tests|benchmarks|examples)/[\w./-]*[\w/]|(?:\w+/)+\w+\.py\b)")
TO_BE_WRITTEN = {"src/nextscale/rewards/redness.py"}  # an example of a file to add, in docs/rewards.md


def missing(page: Path) -> list[str]:
    """Links and paths of a page that lead nowhere; a path starts at the root, at src/ or in the package."""
    text = page.read_text(encoding="utf-8")
    links = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    starts = (ROOT, ROOT / "src", PACKAGE)
    paths = set(PATH.findall(LINK.sub("", text))) - TO_BE_WRITTEN
    return links + sorted(path for path in paths if not any((start / path).exists() for start in starts))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_every_path_exists(page):
    assert missing(page) == []


def test_what_is_missing_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "[a](gone.md) [b](https://x.org/docs/no.md) [c](#here) `src/nextscale/no.py` `models/no.py` "
        "`models/var.py` `nextscale/policy.py` `tests/models/` /home/me/no.py",
        encoding="utf-8",
    )
    assert missing(page) == ["gone.md", "models/no.py", "src/nextscale/no.py"]


def test_contributing_lists_the_package():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listing = text.split("```\nsrc/nextscale/\n")[1].split("```")[0]
    listed = [line.split()[0] for line in listing.splitlines()]
    present = [each for each in PACKAGE.iterdir() if each.name != "__pycache__"]
    assert sorted(listed) == sorted(each.name + "/" * each.is_dir() for each in present)
