"""`nextscale export`: write a model for others to load."""

import json
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

from nextscale.base.errors import CheckpointError, ConfigError
from nextscale.base.files import with_files, write_text_aside
from nextscale.cli.arguments import MODEL, add_adapter, add_vae
from nextscale.cli.parser import add_command


def add(commands: Any) -> None:
    examples = [
        "export runs/toy-painting --output painter",
        "export runs/mine --output mine --format official --dtype bfloat16",
        "export var-d16 --adapter runs/mine/final/adapter --output mine",
        "export runs/mine --output mine --push-to-hub owner/name --private",
    ]
    summary = "write the final model of a run, or any other model, with its model card"
    parser = add_command(commands, "export", run, summary, examples)
    parser.add_argument("model", metavar="MODEL", help=f"folder of a run, or {MODEL}")
    add_vae(parser)
    add_adapter(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="folder to write to")
    text = "file format: nextscale's own, or that of VAR's official code (default: nextscale)"
    parser.add_argument("--format", choices=("nextscale", "official"), default="nextscale", help=text)
    text = "data type of the stored tensors (default: unchanged)"
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=text)
    text = "also upload the folder to this repository of the Hugging Face hub"
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help=text)
    parser.add_argument("--private", action="store_true", help="make a new hub repository private")


def run(args: Namespace) -> int:
    if args.private and not args.push_to_hub:
        raise ConfigError(
            "--private has no effect without --push-to-hub OWNER/NAME: add that, or leave it out"
        )
    is_written = args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir()))
    pending = args.output.with_name(f".pushing-{args.output.name}.json")  # there while a push is not done
    if is_written and not (args.push_to_hub and pending.is_file()):
        raise ConfigError(f"'{args.output}' exists and is not an empty folder: choose another --output")
    import torch

    from nextscale.config.build import load_pipeline
    from nextscale.models import hub
    from nextscale.models.official import official_files
    from nextscale.report.model_card import write_model_card
    from nextscale.runs.reader import find_run

    run, model = find_run(args.model)
    if args.adapter:  # of a run's final/ or of anyone
        run, _ = find_run(str(Path(args.adapter).parent))
    what = json.dumps(with_files([model, args.vae, args.adapter, args.format, args.dtype]))
    if is_written and pending.read_text(encoding="utf-8") != what:
        raise ConfigError(
            f"'{args.output}' holds another export, whose push is not done: choose another --output"
        )
    pipe = load_pipeline(model, args.vae, adapter=args.adapter)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    is_official = args.format == "official"
    save = pipe.save_official if is_official else pipe.save_pretrained
    if not is_written:
        save(args.output, dtype)
    write_model_card(
        args.output,
        run,
        sampling=pipe.sampling,
        base=pipe.source,
        repository=args.push_to_hub,
        adapter=args.adapter,
        official=official_files(pipe.transformer) if is_official else None,
        is_prompted=not pipe.num_classes,
    )
    print(args.output)
    if args.push_to_hub:
        write_text_aside(pending, what)
        try:
            print(hub.upload(args.push_to_hub, args.output, args.private))
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; then push what is written in '{args.output}' by the same command again: "
                f"{shlex.join(args.words)}"
            ) from None
        pending.unlink(missing_ok=True)
    return 0
