"""The command line: `nextscale train | plan | sample | evaluate | report | export | study | ui | toy`.

What takes long to import is imported when a command runs, so that help and mistakes are answered at once.
"""

import signal
import sys
from collections.abc import Sequence

import argcomplete

from nextscale import __version__
from nextscale.base.errors import NextscaleError
from nextscale.base.interrupt import Interrupted
from nextscale.base.launcher import is_first_to_say, stop_with_launcher
from nextscale.cli import evaluate, export, plan, report, sample, study, toy, train, ui
from nextscale.cli.parser import Parser, forget_stdout
from nextscale.config.overrides import take_overrides

COMMANDS = (train, plan, sample, evaluate, report, export, study, ui, toy)
"""A new command is one file with `add` (its arguments) and `run` (what it does), and a word in this table."""


LONGEST_SENTENCE = 2000
"""Characters; what a file holds may be in it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    stop_with_launcher()  # before the imports, which take long enough to lose it
    try:
        try:
            return _run(words)
        finally:
            sys.stdout.flush()  # here, where a reader that has gone is no error
    except BrokenPipeError:  # the reader, such as `head`, has gone; of a run, it has ended training
        forget_stdout()
        return 128 + signal.SIGPIPE if "train" in words else 0
    except NextscaleError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"'{error.filename}': {error.strerror}" if error.filename else str(error))
    except Interrupted as stopped:
        _say(str(stopped))
        return 128 + stopped.signal_number  # as shells report it
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _fail(sentence: str) -> int:
    told = " ".join(sentence.split())
    told = told if len(told) <= LONGEST_SENTENCE else f"{told[:LONGEST_SENTENCE]}..."
    _say(f"nextscale: error: {told}")
    return 2


def _say(sentence: str) -> None:
    """Tell the user something, once however many processes there are."""
    if is_first_to_say(sentence):
        print(sentence, file=sys.stderr)


def _run(words: list[str]) -> int:
    parser = _parser()
    argcomplete.autocomplete(parser, print_suppressed=True)  # answers and exits if it is the shell that asks
    command = next((word for word in words if not word.startswith("-")), None)
    rest, overrides = take_overrides(words) if command in ("train", "plan") else (words, {})
    args, unknown = parser.parse_known_args(rest)
    if unknown:
        raise args.parser.unknown(unknown[0])
    args.overrides, args.words = overrides, ["nextscale", *words]
    return args.run(args)


def _parser() -> Parser:
    parser = Parser(
        prog="nextscale",
        description="Fine-tune next-scale visual autoregressive image models with reinforcement learning.",
        epilog="Start with:  nextscale train toy-painting && nextscale report runs/toy-painting",
    )
    parser.add_argument("--version", action="version", version=f"nextscale {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser
