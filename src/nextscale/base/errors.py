"""Errors for users. Each carries one sentence: what was found, what was expected, what to do."""

import re


class NextscaleError(ValueError):
    """An input cannot be used. The command line prints the message and exits with status 2."""


class ConfigError(NextscaleError):
    """A recipe, an option or a combination of options that cannot be used."""


class CheckpointError(NextscaleError):
    """A model file or folder that is missing, broken, or not of the expected shape."""


class RewardError(NextscaleError):
    """A reward that raised, or that returned something other than one number per image."""


class TrainingError(NextscaleError):
    """Training that cannot go on, such as one whose gradients are not finite."""


def in_words(error: BaseException) -> str:
    """An error's class and message; the class alone where it has none, or making one fails."""
    try:
        text = str(error)
    except Exception:  # of a user's own class, whatever it does
        text = ""
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def first_sentence(error: BaseException) -> str:
    """The first sentence of another library's error message."""
    text = str(getattr(error, "reason", error)).strip()  # a URLError wraps its own in brackets
    return re.split(r"\.\s|\n", text)[0].rstrip(".")[:200] if text else type(error).__name__
