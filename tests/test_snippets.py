"""Every python and bash snippet of README.md and docs/ runs, as for a user who copies one after the other.

Trainings and evaluations are shortened. What cannot run here stands below a comment that says why:

    <!-- not run: needs weights -->

A snippet whose first line is the name of a file (`# my_rewards.py`) is that file, for all pages. A run in
`runs/` that a command reads but no earlier one wrote is a run that the reader is taken to have. A row of a
table that begins with a command counts as a snippet.
"""

import re
import shlex
import shutil
import subprocess
import textwrap
import webbrowser
from pathlib import Path
from typing import NamedTuple

import pytest

from nextscale.cli.main import main
from nextscale.grpo import GRPOConfig
from nextscale.runs.config import RunConfig
from nextscale.trainer import GRPOTrainer

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
FENCE = r"^(?P<indent> *)```(?P<kind>\w+)\n(?P<text>.*?)^(?P=indent)```$"
ROW = r"^\| `(?P<command>nextscale [^`]+)` \|"
SNIPPET = re.compile(f"{FENCE}|{ROW}", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->\s*\Z")
FILE_NAME = re.compile(r"# ([\w./-]+\.(?:py|yaml))\n")

SHORT_RUN = {"max_steps": 1, "eval_num_images": 16, "save_steps": 1, "report_to": "none"}
SHORT_RUN |= {"disable_tqdm": True}
SHORT_GRPO = {"num_groups": 1, "num_generations": 2}
# Constant, so that a resumed run may have more steps than the one it continues.
SHORT = {f"run.{key}": value for key, value in SHORT_RUN.items()}
SHORT |= {f"grpo.{key}": value for key, value in SHORT_GRPO.items()}
SHORT |= {"optimizer.lr_scheduler_type": "constant_with_warmup"}
OPTIONS = {"evaluate": ["--num-images", "16"], "sample": ["--num-images", "1"]}


class Snippet(NamedTuple):
    kind: str
    text: str
    line: int
    is_run: bool


def snippets(page: str) -> list[Snippet]:
    """The fenced snippets of a page, and the commands in its tables, in order."""
    return [
        Snippet(
            kind=match["kind"] or "bash",
            text=textwrap.dedent(match["text"] or match["command"]),
            line=page.count("\n", 0, match.start()) + 1,
            is_run=match["kind"] in ("python", "bash", None) and not NOT_RUN.search(page[: match.start()]),
        )
        for match in SNIPPET.finditer(page)
    ]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """A finished run of the reader's own."""
    folder = tmp_path_factory.mktemp("snippets") / "run"
    assert main(["train", "toy-painting", *shortened(), "--run.output_dir", str(folder)]) == 0
    return folder


def shortened(**changes):
    return [word for key, value in (SHORT | changes).items() for word in (f"--{key}", str(value).lower())]


def run_python(snippet, names, monkeypatch, where):
    make = GRPOTrainer.__init__

    def make_short(self, pipe, rewards, grpo=None, *, run=None, **rest):
        grpo = (grpo or GRPOConfig()).replace(**SHORT_GRPO)
        make(self, pipe, rewards, grpo, run=(run or RunConfig()).replace(**SHORT_RUN), **rest)

    with monkeypatch.context() as patched:
        patched.setattr(GRPOTrainer, "__init__", make_short)
        exec(compile(snippet.text, where, "exec"), names)


def run_bash(snippet, a_run, capsys, where):
    for line in snippet.text.replace("\\\n", " ").splitlines():
        match shlex.split(line, comments=True):
            case []:
                pass
            case ["make", *targets]:
                subprocess.run(["make", "-n", *targets], cwd=REPOSITORY, check=True, capture_output=True)
            case ["pip", "install", *_]:
                pass  # done already, or this test would not run
            case ["nextscale", command, *words] if not {"|", ">", "&", "&&"} & set(words):
                run_command(command, words, a_run)
                assert not capsys.readouterr().err, f"{where}: {line}"
            case _:
                pytest.fail(f"{where}: no rule for '{line}'; write '<!-- not run: REASON -->' above it")


def run_command(command, words, a_run):
    for read in re.findall(r"(?<!output_dir )\bruns/[\w-]+", " ".join(words)):
        if not Path(read).exists():
            shutil.copytree(a_run, read)
    if command == "train":
        steps = 2 if "--run.resume" in words else 1
        words = [*words, *shortened(**{"run.max_steps": steps})]
    assert main([command, *words, *OPTIONS.get(command, [])]) == 0


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_snippets_run(path, a_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(webbrowser, "open", lambda url: True)
    monkeypatch.setattr("gradio.Blocks.launch", lambda self, **options: None)  # it would wait for visitors
    for snippet in (each for page in PAGES for each in snippets(page.read_text())):
        if named := FILE_NAME.match(snippet.text):
            Path(named[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(named[1]).write_text(snippet.text)
    names = {"__name__": "snippet"}
    for snippet in snippets(path.read_text()):
        where = f"{path.name}:{snippet.line}"
        if snippet.is_run and snippet.kind == "python":
            run_python(snippet, names, monkeypatch, where)
        elif snippet.is_run:
            run_bash(snippet, a_run, capsys, where)


def test_what_is_taken_from_a_page():
    page = """```bash
a
```
<!-- not run: b -->

```python
b
```
1. x

   ```python
   c
   ```
```json
{}
```
| `nextscale d` | does d |
"""
    found = [(each.kind, each.text, each.line, each.is_run) for each in snippets(page)]
    assert found == [
        ("bash", "a\n", 1, True),
        ("python", "b\n", 6, False),
        ("python", "c\n", 11, True),
        ("json", "{}\n", 14, False),
        ("bash", "nextscale d", 17, True),
    ]


def test_the_quick_start_is_run():
    assert any(each.is_run and each.kind == "python" for each in snippets(PAGES[0].read_text()))
