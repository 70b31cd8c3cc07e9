"""`nextscale report`: show a run as one page."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from nextscale.cli.parser import add_command


def add(commands: Any) -> None:
    examples = ["report runs/toy-painting", "report runs/toy-painting --open"]
    summary = "show a run as one page, report.html in its folder"
    parser = add_command(commands, "report", run, summary, examples)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of a run")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(args: Namespace) -> int:
    from nextscale.report.page import summarize, write_report

    path = write_report(args.folder)
    print(f"{summarize(args.folder)}\n{path}")
    if args.open:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
    return 0
