"""Parts of a model by name: which of its layers or parameters a pattern means."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from nextscale.base.errors import ConfigError
from nextscale.base.records import did_you_mean


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The dotted names that hold the pattern as whole words, from one dot to another.

    So "proj" means "blocks.0.attn.proj" and "blocks.0.attn.proj.weight", but not "projection"; `*` stands for
    anything, as in "blocks.*.ffn".
    """
    return [name for name in names if fnmatchcase(f".{name}.", f"*.{pattern}.*")]


def require_match(key: str, pattern: str, names: Iterable[str], kind: str) -> list[str]:
    """What `matching` finds.

    Args:
        key: the option that gives the pattern, for the error message.
        kind: what the names are of, such as "linear layer".

    Raises:
        ConfigError: nothing matches; names the nearest word of the names, or all of their words.
    """
    names = list(names)
    if found := matching(pattern, names):
        return found
    words = dict.fromkeys(word for name in names for word in name.split(".") if not word.isdigit())
    raise ConfigError(f"{key}: '{pattern}' matches no {kind}{did_you_mean(pattern, words)}")
