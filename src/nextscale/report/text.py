"""The report's markup, from the fragments of template.html."""

import html
import re
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any


class Html(str):
    """Text that is markup already; any other text is escaped where it enters the page."""


@cache
def _fragments() -> dict[str, Template]:
    """The pieces of the template by name."""
    text = files("nextscale.report").joinpath("template.html").read_text(encoding="utf-8")
    _, *pieces = re.split(r"<!-- fragment: (\w+) -->\n", text)
    return {name: Template(piece.strip()) for name, piece in zip(pieces[::2], pieces[1::2], strict=True)}


def fill(fragment: str, **values: Any) -> Html:
    """A piece of the template with its gaps filled; what is not Html is escaped."""
    safe = {
        key: value if isinstance(value, Html) else html.escape(str(value)) for key, value in values.items()
    }
    return Html(_fragments()[fragment].substitute(safe))


def join(pieces: Iterable[str]) -> Html:
    """Pieces of markup, one after the other."""
    return Html("\n".join(pieces))
