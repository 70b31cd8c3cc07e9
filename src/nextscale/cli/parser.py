"""An argument parser that answers a mistake in one sentence, and the frame of every command."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from argcomplete.completers import FilesCompleter

from nextscale.base.errors import ConfigError
from nextscale.base.records import did_you_mean

TYPE_NAMES = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}


class Parser(argparse.ArgumentParser):
    """Raises one sentence instead of printing the whole usage; accepts no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see '{self.prog} --help'")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = "/".join(action.option_strings) or str(action.metavar).lower()
            raise ConfigError(f"unknown {name} '{value}'{did_you_mean(value, action.choices)}")

    def option(
        self, name: str, kind: type, text: str, default: Any = None, shown: str | None = None
    ) -> argparse.Action:
        """Add an option with a value; `shown` is its default as the help calls it, if not by its value."""
        shown = shown or (None if default is None else str(default))
        text = f"{text} (default: {shown})" if shown else text
        return self.add_argument(name, type=kind, default=default, metavar=TYPE_NAMES[kind], help=text)

    def unknown(self, word: str) -> ConfigError:
        """The error for a word that is none of the arguments."""
        name = word.split("=")[0]
        kind = "option" if name.startswith("-") else "argument"
        hint = did_you_mean(name, self._option_string_actions, f"see '{self.prog} --help'")
        return ConfigError(f"unknown {kind} '{name}'{hint}")


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, examples: list[str]
) -> Parser:
    """Add a command to what `add_subparsers` returned; `run` returns the exit status."""
    epilog = "\n".join(["examples:", *(f"  nextscale {each}" for each in examples)])
    description = f"{summary[0].upper()}{summary[1:]}."
    parser = commands.add_parser(name, help=summary, description=description, epilog=epilog)
    parser.set_defaults(run=run, parser=parser)
    return parser


def complete_with(action: argparse.Action, words: Iterable[str], extension: str | None = None) -> None:
    """Let the shell complete a value with these words, and with files of an extension; others stay valid."""

    def completer(prefix: str, **_: Any) -> list[str]:
        return [*words, *(FilesCompleter(extension)(prefix) if extension else ())]

    action.completer = completer  # pyright: ignore[reportAttributeAccessIssue]


def forget_stdout() -> None:
    """Write to nowhere from now on: the reader of the standard output has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
