"""Feed a reader with files that are made to reach new code in it (by atheris, guided by coverage).

    pip install 'nextscale[fuzz]'
    python drills/fuzz_files.py recipe --seconds 600

Begins with good files. Whatever the bytes, the outcome is a value or one sentence, within 10 s and 2 GB of
memory; else the file is kept as `crash-...` (or `timeout-...`, `oom-...`) in the working folder, and the exit
status is not 0. What was found becomes a case of the tests.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["nextscale", "yaml"]):
    from nextscale.base.errors import NextscaleError
    from nextscale.config.files import RECIPES
    from nextscale.config.recipe import json_schema, load_recipe
    from nextscale.models.folder import read_config
    from nextscale.prompts import read_prompts
    from nextscale.runs.manifest import find_damage
    from nextscale.runs.reader import read_run

REPOSITORY = Path(__file__).parents[1]
FORMATS = REPOSITORY / "tests" / "formats"

Reader = tuple[str, Callable[[Path], object], list[Path]]
READERS: dict[str, Reader] = {
    "recipe": ("recipe.yaml", load_recipe, sorted(RECIPES.glob("*.yaml"))),
    "prompts": ("prompts.jsonl", read_prompts, []),
    "table": ("prompts.csv", read_prompts, []),
    "metrics": ("metrics.jsonl", lambda file: read_run(file.parent), sorted(FORMATS.rglob("metrics.jsonl"))),
    "manifest": (
        "manifest.json",
        lambda file: find_damage(file.parent),
        sorted(FORMATS.rglob("manifest.json")),
    ),
    "model": ("config.json", lambda file: read_config(file.parent), sorted(FORMATS.glob("*/config.json"))),
}
"""The name of a file, what reads it, and good ones; what lies beside the last of these is there as well."""


def words_of(schema: object) -> Iterator[str]:
    """All keys and values of a schema."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            yield key
            yield from words_of(value)
    elif isinstance(schema, list):
        for each in schema:
            yield from words_of(each)
    elif isinstance(schema, str) and len(schema) < 40:
        yield schema


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--seconds", type=int, default=600)
    args = parser.parse_args()
    name, read, good = READERS[args.reader]
    with tempfile.TemporaryDirectory() as scratch:
        file, corpus, dictionary = (Path(scratch) / each for each in (f"read/{name}", "corpus", "words"))
        if good:
            shutil.copytree(good[-1].parent, file.parent)
        else:
            file.parent.mkdir()
        corpus.mkdir()
        for i, each in enumerate(good):
            (corpus / str(i)).write_bytes(each.read_bytes())
        found = set(words_of(json_schema())) - {""}
        words = sorted(each for each in found if each.isascii() and each.isprintable())
        dictionary.write_text("".join(f"{json.dumps(each)}\n" for each in words))

        def case(content: bytes) -> None:
            file.write_bytes(content)
            try:
                read(file)
            except NextscaleError as error:
                str(error).encode()  # a sentence that can be printed

        options = [f"-max_total_time={args.seconds}", "-timeout=10", "-rss_limit_mb=2048", "-max_len=8192"]
        atheris.Setup([sys.argv[0], str(corpus), f"-dict={dictionary}", *options], case)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
