"""`nextscale report`: show a run as one page, or several."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from nextscale.base.errors import ConfigError
from nextscale.cli.parser import add_command


def add(commands: Any) -> None:
    examples = [
        "report runs/toy-painting",
        "report runs/toy-painting --open",
        "report runs/toy-painting --watch",
        "report runs/a runs/b runs/c --output abc.html",
    ]
    summary = "show a run as one page, report.html in its folder; or several runs beside each other"
    parser = add_command(commands, "report", run, summary, examples)
    parser.add_argument("folders", type=Path, metavar="FOLDER", nargs="+", help="folder of a run")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    text = "while the run goes on, write the page anew every so many seconds (default: 10)"
    parser.add_argument("--watch", type=int, nargs="?", const=10, metavar="SECONDS", help=text)
    text = "where to write the page of several runs (default: comparison.html)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=text)


def run(args: Namespace) -> int:
    if len(args.folders) > 1:
        return _compare(args)
    if args.output:
        raise ConfigError("--output is for several runs: the page of one run is report.html in its folder")
    from nextscale.report.page import summarize, watch_report, write_report

    (folder,) = args.folders
    if args.watch is None:
        path = write_report(folder)
        print(f"{summarize(folder)}\n{path}")
        _open(args, path)
        return 0
    if args.watch < 1:
        raise ConfigError(f"--watch must be at least 1 second, got {args.watch}")
    for number, path in enumerate(watch_report(folder, args.watch)):
        if not number:
            print(path, flush=True)
            _open(args, path)
    print(summarize(folder))
    return 0


def _compare(args: Namespace) -> int:
    from nextscale.report.comparison import write_comparison

    if args.watch is not None:
        raise ConfigError("--watch is for one run: give one folder")
    path = write_comparison(args.folders, args.output or Path("comparison.html"))
    print(path)
    _open(args, path)
    return 0


def _open(args: Namespace, path: Path) -> None:
    if args.open:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
