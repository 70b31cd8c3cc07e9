"""`nextscale ui`: the studio, in the browser."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from nextscale.base.errors import ConfigError
from nextscale.cli.parser import add_command


def add(commands: Any) -> None:
    examples = ["ui", "ui runs/toy-painting/final --runs runs", "ui --host 0.0.0.0 --port 8080"]
    summary = "draw, score, browse runs and fine-tune in the browser"
    parser = add_command(commands, "ui", run, summary, examples)
    text = "models to offer besides the miniature, the published ones and those of the runs"
    parser.add_argument("models", metavar="MODEL", nargs="*", help=text)
    text = "CLIP to offer besides the miniature's and those of the hub: a folder; can be given several times"
    parser.add_argument("--clip", metavar="FOLDER", action="append", default=[], help=text)
    parser.option(
        "--runs", Path, "folder of runs: shown, offered, and where new ones are written", Path("runs")
    )
    parser.option("--host", str, "address to listen at; 0.0.0.0 lets others in", "127.0.0.1")
    parser.option("--port", int, "port to listen at", 7860)
    parser.option("--device", str, "device to draw on, such as cpu or cuda", shown="cuda if available")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(args: Namespace) -> int:
    if not 1 <= args.port <= 65535:
        raise ConfigError(f"--port must be between 1 and 65535, got {args.port}")
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ConfigError("the studio needs Gradio: pip install 'nextscale[ui]'") from None
    import torch

    from nextscale.studio.app import LOOK, build
    from nextscale.studio.models import Models

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    page = build(Models(args.runs.resolve(), args.models, device, args.clip))
    print(f"The studio will be at http://{args.host}:{args.port}; Ctrl-C ends it.", flush=True)
    try:
        page.queue(default_concurrency_limit=4).launch(
            server_name=args.host, server_port=args.port, inbrowser=args.open, quiet=True, **LOOK
        )
    except OSError as error:
        raise ConfigError(f"the studio cannot listen at {args.host}:{args.port}: {error}") from None
    return 0
