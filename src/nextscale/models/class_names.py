"""Class names: those of ImageNet, and the label that a name, a synonym or a number stands for."""

import difflib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from nextscale.base.errors import ConfigError

IMAGENET_FILE = Path(__file__).with_name("imagenet_classes.txt")
NUM_CLOSEST = 5


@cache
def imagenet_spellings() -> tuple[tuple[str, ...], ...]:
    """For each of ImageNet's 1000 classes its name, which is unique, and its synonyms.

    Source: see the first lines of imagenet_classes.txt.
    """
    lines = IMAGENET_FILE.read_text(encoding="utf-8").splitlines()
    return tuple(tuple(line.split(", ")) for line in lines if not line.startswith("#"))


@cache
def imagenet_names() -> tuple[str, ...]:
    """The names of ImageNet's 1000 classes, indexed by label: 207 is "golden retriever"."""
    return tuple(name for name, *_ in imagenet_spellings())


def find_class(word: str, names: Sequence[str], num_classes: int) -> int:
    """The label of a class, given by name, by number or by one of ImageNet's synonyms, in any case.

    Args:
        names: the model's class names by label; empty if they are unknown.
        num_classes: number of classes, for the error message; the range of a number is not checked.

    Raises:
        ConfigError: the word stands for no class, or for more than one.
    """
    if word not in names and re.fullmatch(r"[-+]?\d+", word):
        return int(word)
    named = [[name] for name in names]
    spelt = imagenet_spellings() if tuple(names) == imagenet_names() else named
    wanted = word.lower()
    # Names come before synonyms: "partridge" is the name of one class and a synonym of another.
    for found in (
        [label for label, name in enumerate(names) if name == word],
        [label for label, name in enumerate(names) if name.lower() == wanted],
        [label for label, each in enumerate(spelt) if wanted in map(str.lower, each)],
    ):
        if len(found) > 1:
            told = " or ".join(f"{label} ({names[label]})" for label in found)
            raise ConfigError(f"class '{word}' is ambiguous: it may be {told}; give the number")
        if found:
            return found[0]
    raise ConfigError(f"the model has no class '{word}'{_hint(wanted, names, spelt, num_classes)}")


def _hint(wanted: str, names: Sequence[str], spelt: Sequence[Sequence[str]], num_classes: int) -> str:
    """The end of the error message: the class names closest to a word."""
    labels = {spelling.lower(): label for label, each in enumerate(spelt) for spelling in each}
    holding = [spelling for spelling in labels if re.search(rf"\b{re.escape(wanted)}\b", spelling)]
    near = difflib.get_close_matches(wanted, labels, n=NUM_CLOSEST, cutoff=0.6)
    closest = list(dict.fromkeys(names[labels[spelling]] for spelling in [*holding, *near]))[:NUM_CLOSEST]
    if not closest:
        return f"; give a name, or a number of 0 to {num_classes - 1}"
    *others, last = [f"'{name}'" for name in closest]
    return f"; did you mean {', '.join(others)}{' or ' if others else ''}{last}?"
