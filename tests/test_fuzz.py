"""Rubbish of all kinds, made at random: the outcome is a valid value or one sentence, in a moment.

NEXTSCALE_FUZZ sets how many cases there are in all, 500 if not set: `make fuzz` runs 10,000.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextscale.base.conditions import Condition
from nextscale.base.errors import NextscaleError
from nextscale.cli.main import main
from nextscale.config.files import read_mapping
from nextscale.config.recipe import load_recipe
from nextscale.pipeline import VARPipeline
from nextscale.prompts import read_prompts
from nextscale.rewards import score
from nextscale.rewards.remote import Remote
from nextscale.runs.manifest import write_manifest
from nextscale.trainer import GRPOTrainer
from test_formats import FORMATS, SMALL
from test_trainer import MakePipeline, make_trainer

CASES = int(os.environ.get("NEXTSCALE_FUZZ", "500"))
LONGEST = 10.0  # seconds; these machines pause at times
MOST = 64 * 2**20  # bytes of memory; no file here has 2 MB
PEAK = Path("/proc/self/clear_refs")  # of Linux: writing a 5 forgets how much memory was in use before


def cases(share: float) -> Callable[[Any], Any]:
    """So large a share of all cases, the same ones each time, but for a long run."""
    return settings(
        max_examples=max(round(CASES * share), 1),
        derandomize=CASES <= 500,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is written where it runs is seen."""
    monkeypatch.chdir(tmp_path)


def written() -> list[str]:
    """What is in the working folder, but for what hypothesis keeps there."""
    return [name for name in os.listdir() if name != ".hypothesis"]


@contextmanager
def answered() -> Iterator[None]:
    """What is inside succeeds, or fails by a sentence, in a moment and in little memory, and writes nothing
    where it runs."""
    begin, before = time.monotonic(), memory("VmRSS")
    try:
        yield
    except NextscaleError as error:
        assert str(error).strip()
        str(error).encode()  # a sentence that can be printed
    assert time.monotonic() - begin < LONGEST
    assert memory("VmHWM") - before < MOST
    assert not written()


def memory(key: str) -> int:
    """Bytes that are in use (VmRSS), from where a peak (VmHWM) is then counted; 0 where nothing tells."""
    if not PEAK.exists():
        return 0
    if key == "VmRSS":
        PEAK.write_text("5")
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


# ---- values of all kinds

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([10**30, -1, 0, 1e-320, 10**400, 2**63]))
WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "{label}", "{text}", "{0}", "{label.__class__}", "{", "../../x", "/dev/full", "nan", "~", "\x00"]
    ),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.recursive(
    LEAVES,
    lambda each: st.one_of(st.lists(each, max_size=3), st.dictionaries(WORDS, each, max_size=3)),
    max_leaves=6,
)


def paths_of(content: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value of a mapping of mappings."""
    found = [before] if before else []
    if isinstance(content, dict):
        for key, value in content.items():
            found += paths_of(value, (*before, key))
    return found


@st.composite
def changed(draw: st.DrawFn, content: dict[str, Any]) -> dict[str, Any]:
    """JSON or YAML, one to three of whose values are others, are missing, or have another name."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        paths = paths_of(content)
        if not paths:
            break
        *way, last = draw(st.sampled_from(paths))
        place = content
        for key in way:
            place = place[key]
        how = draw(st.sampled_from(["other", "other", "missing", "renamed", "wrapped"]))
        value = place.pop(last)
        if how == "other":
            place[last] = draw(VALUES)
        elif how == "renamed":
            place[draw(WORDS)] = value
        elif how == "wrapped":
            place[last] = draw(st.sampled_from([[value], {"a": value}, str(value)]))
    return content


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file that is cut, has other bytes, or more of them."""
    how = draw(st.sampled_from(["cut", "flipped", "inserted", "zeros", "doubled"]))
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    if how == "cut":
        return content[:at]
    if how == "inserted":
        return content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]
    if how == "zeros":
        return content[:at] + bytes(min(64, len(content) - at)) + content[at + 64 :]
    if how == "doubled":
        return content + content
    return content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]


# ---- recipes, overrides, prompts

RECIPES = {
    name: read_mapping(name)
    for name in ("toy-painting", "toy-constrained", "var-d16-combined", "toy-text-attributes")
}


@cases(0.24)
@given(data=st.data())
def test_recipes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = data.draw(changed(RECIPES[data.draw(st.sampled_from(sorted(RECIPES)))]))
    file = scratch(tmp_path_factory) / "recipe.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with answered():
        load_recipe(file)


@cases(0.1)
@given(data=st.data())
def test_bytes_of_recipes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = scratch(tmp_path_factory) / "recipe.yaml"
    file.write_bytes(data.draw(damaged(yaml.safe_dump(RECIPES["toy-constrained"]).encode())))
    with answered():
        load_recipe(file)


KEYS = st.sampled_from(
    [
        "--grpo.beta",
        "--run.seed",
        "--rewards.painting.weight",
        "--rewards",
        "--grpo",
        "--x",
        "--",
        "-",
        "--=",
        "--run.output_dir",
    ]
)


@pytest.fixture(scope="module")
def _imported() -> None:
    """What the first command imports takes seconds, which are not its answer's."""
    assert main(["plan", "toy-painting"]) == 0


@pytest.mark.usefixtures("_imported")
@cases(0.06)
@given(words=st.lists(st.one_of(KEYS, WORDS), max_size=4))
def test_overrides(words: list[str]) -> None:
    begin = time.monotonic()
    try:
        status = main(["plan", "toy-painting", *words])
    except SystemExit as stopped:  # of --help
        status = stopped.code
    assert status in (0, 2) and time.monotonic() - begin < LONGEST and not written()


@cases(0.1)
@given(data=st.data(), kind=st.sampled_from([".txt", ".jsonl", ".csv"]))
def test_prompts(data: st.DataObject, kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = scratch(tmp_path_factory) / f"prompts{kind}"
    good = {
        ".txt": "a red star\na blue moon\n",
        ".jsonl": '{"prompt": "a red star", "include": [{"class": "star"}]}\n{"prompt": "a blue moon"}\n',
        ".csv": 'prompt,count\n"a red star",1\n"a blue, old moon",2\n',
    }[kind]
    rows = st.dictionaries(st.sampled_from(["prompt", "text", "x"]), VALUES, max_size=3).map(json.dumps)
    content = st.one_of(damaged(good.encode()), st.binary(max_size=60), rows.map(str.encode))
    file.write_bytes(data.draw(content))
    with answered():
        for each in read_prompts(file):
            assert each.text.strip()


# ---- checkpoints and models


def scratch(factory: pytest.TempPathFactory) -> Path:
    """A folder of the test's own."""
    folder = factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def kept_trainer(make_pipeline: MakePipeline, tmp_path_factory: pytest.TempPathFactory) -> GRPOTrainer:
    """A trainer that may load the checkpoint of `run-3`."""
    trainer = make_trainer(make_pipeline(**SMALL), tmp_path_factory.mktemp("run"), max_steps=3)
    trainer.load(FORMATS / "run-3" / "checkpoints" / "step-000002")
    return trainer


def harmed(data: st.DataObject, source: Path, target: Path, names: list[str]) -> Path:
    """A copy of a folder one of whose files is not as it was."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    file = target / data.draw(st.sampled_from(names))
    how = data.draw(st.sampled_from(["damaged", "damaged", "content", "gone", "swapped", "folder"]))
    if how == "damaged":
        file.write_bytes(data.draw(damaged(file.read_bytes())))
    elif how == "content" and file.suffix == ".json":
        file.write_text(json.dumps(data.draw(changed(json.loads(file.read_text())))))
    elif how == "swapped":
        shutil.copyfile(target / data.draw(st.sampled_from(names)), target / ".other")
        (target / ".other").replace(file)
    else:
        file.unlink()
        if how == "folder":
            file.mkdir()
    return target


@cases(0.16)
@given(data=st.data())
def test_checkpoints(
    data: st.DataObject, kept_trainer: GRPOTrainer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = FORMATS / "run-3" / "checkpoints" / "step-000002"
    names = sorted(each.name for each in source.iterdir())
    folder = harmed(data, source, scratch(tmp_path_factory) / "step-000002", names)
    if data.draw(st.booleans()) and all(each.is_file() for each in folder.iterdir()):
        write_manifest(folder)  # that fits, of whoever means harm
    with answered():
        kept_trainer.load(folder)
    assert isinstance(kept_trainer.step_done, int) and kept_trainer.step_done >= 0


@cases(0.1)
@given(data=st.data())
def test_model_folders(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    names = ["config.json", "config.json", "transformer.safetensors", "tokenizer.safetensors"]
    folder = harmed(data, FORMATS / "model-1", scratch(tmp_path_factory) / "model", names)
    with answered():
        VARPipeline.from_pretrained(folder)


# ---- rewards, here and on a server


class Odd:
    """What is no number."""

    def __repr__(self) -> str:
        raise ValueError("no words")


ANSWERS = st.one_of(
    VALUES,
    st.lists(LEAVES, min_size=2, max_size=2),
    st.sampled_from(
        [
            Odd(),
            [Odd(), Odd()],
            object,
            lambda: 1,
            (),
            {1},
            b"12",
            range(2),
            np.array(["a", "b"]),
            np.ones((2, 1)),
        ]
    ),
    st.sampled_from(
        [torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.complex64), torch.ones(2, device="meta")]
    ),
    st.sampled_from(
        [torch.ones(2, requires_grad=True), torch.ones(1, 2), torch.tensor(1.0), torch.ones(2).bool()]
    ),
)
ENDS = st.sampled_from(
    [
        ValueError,
        KeyError(3),
        SystemExit(0),
        RecursionError,
        MemoryError,
        StopIteration,
        Odd,
        UnicodeDecodeError,
    ]
)


@cases(0.12)
@given(answer=ANSWERS, ends=st.one_of(st.none(), ENDS))
def test_rewards(answer: Any, ends: Any) -> None:
    def reward(images: Any, conditions: Any) -> Any:
        images.zero_()
        if ends is not None:
            raise ends
        return answer

    with answered():
        scores = score("odd", reward, torch.rand(2, 3, 4, 4), [Condition(0, "a")] * 2)
        assert scores.shape == (2,) and scores.dtype == torch.float32


class Server(BaseHTTPRequestHandler):
    """Answers what it is told to."""

    answer: tuple[int, dict[str, str], bytes] = 200, {}, b""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, headers, body = self.answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/score"
    server.shutdown()


HEADERS = st.sampled_from(
    [
        {},
        {"Content-Length": "5"},
        {"Content-Length": "999"},
        {"Content-Length": "-1"},
        {"Content-Encoding": "gzip"},
        {"Location": "file:///etc/passwd"},
        {"Location": "http://127.0.0.1:1/"},
        {"Retry-After": "x"},
        {"Retry-After": "1e9"},
        {"Transfer-Encoding": "chunked"},
        {"Content-Type": "text/plain; charset=utf-7"},
    ]
)
BODIES = st.one_of(
    st.binary(max_size=50),
    VALUES.map(lambda each: json.dumps({"scores": each}).encode()),
    st.lists(LEAVES, min_size=2, max_size=2).map(lambda each: json.dumps({"scores": each}).encode()),
    st.just(b'{"scores": ' + b"[" * 20000),
    st.just(b'{"scores": [0.5, null]}'),
)


@cases(0.12)
@given(
    status=st.sampled_from([200, 200, 200, 201, 204, 301, 307, 308, 400, 429, 500, 999]),
    headers=HEADERS,
    body=BODIES,
)
def test_answers_of_servers(status: int, headers: dict[str, str], body: bytes, url: str) -> None:
    Server.answer = status, headers, body
    reward = Remote(url, retries=0, request_timeout=2.0)
    with answered():
        scores = score("far", reward, torch.rand(2, 3, 4, 4), [Condition(0, "a")] * 2)
        assert scores.shape == (2,) and not scores.isinf().any()
