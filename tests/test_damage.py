"""Files and answers that are damaged or made to harm: one sentence each, and nothing lost."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from nextscale.base import tensors
from nextscale.base.errors import CheckpointError, ConfigError, RewardError
from nextscale.cli.main import LONGEST_SENTENCE, main
from nextscale.config.files import parse_yaml
from nextscale.pipeline import VARPipeline
from nextscale.rewards import score
from nextscale.runs.manifest import write_manifest
from nextscale.runs.writer import RunFolder
from test_trainer import make_trainer, metrics_of

MakePipeline = Callable[..., VARPipeline]


def laughs(levels: int) -> str:
    """A few lines that stand for 9^levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 5000, "is nested too deeply"),
        ("a: " + "{b: " * 3000 + "1" + "}" * 3000, "is nested too deeply"),
        (laughs(40), "stands for .* values, more than the 20,000"),
        ("a: &a [*a]", "has an alias within what it stands for"),
        ("a: !!int [1]", "is not valid YAML"),
        ("a: !!bool abc", "is not valid YAML"),
        ("a: !!float {b: 1}", "is not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "is not valid YAML"),
        ('a: "\\UFFFFFFFF"', "is not valid YAML"),
        (f"a: {'9' * 6000}", "is not valid YAML"),
        ("? [1]\n: 2", "is not valid YAML"),
    ],
)
def test_a_recipe_made_to_harm_is_told_in_a_moment(text: str, says: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=f"^recipe 'x'.*{says}") as caught:
        parse_yaml(text, "recipe 'x'")
    assert len(str(caught.value)) < 400
    assert time.monotonic() - begin < 5


def test_aliases_may_be_used() -> None:
    found = parse_yaml("a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}, e: *a}", "it")
    assert found["b"] == [1, 2] and found["c"]["e"] == [1, 2]


def test_a_sentence_is_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(f"rewards: {{a: {{python: '{'x' * 100_000}:f'}}}}\nmodel: toy\n")
    assert main(["train", str(tmp_path / "r.yaml"), "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and len(err) < LONGEST_SENTENCE + 100


class Wordless(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def raises_wordless(images: Any, conditions: Any) -> Any:
    raise Wordless


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (lambda images, conditions: [10**400, 1], "returned list, expected 2 numbers"),
        (
            lambda images, conditions: torch.ones(2, dtype=torch.complex64),
            "returned Tensor, expected 2 numbers",
        ),
        (lambda images, conditions: torch.ones(2).to_sparse(), "returned Tensor, expected 2 numbers"),
        (raises_wordless, r"raised Wordless \(.*test_damage\.py:\d+\)$"),
    ],
)
def test_a_rewards_odd_answer_is_told(reward: Any, says: str) -> None:
    with pytest.raises(RewardError, match=f"^reward 'odd' {says}"):
        score("odd", reward, torch.rand(2, 3, 4, 4), [])


@pytest.mark.parametrize("line", ["null", "7", '{"step": "two"}', "[" * 3000, "\xff\xfe", '{"loss": 1}'])
def test_a_damaged_line_of_the_metrics_is_told_and_nothing_is_lost(tmp_path: Path, line: str) -> None:
    folder = RunFolder(tmp_path)
    good = ['{"step": 0}', '{"step": 1}', line, '{"step": 2}']
    content = "\n".join(good).encode("latin-1") + b"\n"
    folder.metrics.write_bytes(content)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 3, is damaged: restore or delete it"):
        folder.keep_steps(2)
    assert folder.metrics.read_bytes() == content


def test_blank_lines_hide_nothing_and_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 0}\n\n{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    folder.keep_steps(1)
    assert metrics_of(tmp_path) == [{"step": 0}, {"step": 1}]


@pytest.fixture
def stopped(make_pipeline: MakePipeline, tmp_path: Path) -> Path:
    """A run with a checkpoint after its first step."""
    make_trainer(make_pipeline(), tmp_path / "run", max_steps=1, target_kl=5.0, beta=0.1).train()
    return tmp_path / "run"


@pytest.mark.parametrize(
    "change",
    [
        {"step": "one"},
        {"step": -1},
        {"step": True},
        {"step": None},
        {"seconds": "long"},
        {"seconds": 10**400},
        {"num_skipped": 1.5},
        {"step_evaluated": [0]},
        {"controllers": {}},
        {"controllers": [1]},
        {"scheduler": 3},
        {"optimizer": [{"lr": "fast", "params": []}]},
        {"optimizer": "none"},
    ],
)
def test_a_damaged_state_is_told_and_left_as_it_is(
    make_pipeline: MakePipeline, stopped: Path, change: dict[str, Any]
) -> None:
    state = stopped / "checkpoints" / "step-000001" / "trainer_state.json"
    text = json.dumps(json.loads(state.read_text()) | change)
    state.write_text(text)
    write_manifest(state.parent)
    trainer = make_trainer(make_pipeline(), stopped, max_steps=2, resume="auto", target_kl=5.0, beta=0.1)
    with pytest.raises(CheckpointError, match=r"checkpoint '.*step-000001' cannot be read"):
        trainer.train()
    assert state.read_text() == text and metrics_of(stopped)[-1]["step"] == 1


def test_a_broken_random_state_is_told(make_pipeline: MakePipeline, stopped: Path) -> None:
    file = stopped / "checkpoints" / "step-000001" / "random-0.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    write_manifest(file.parent)
    trainer = make_trainer(make_pipeline(), stopped, max_steps=2, resume="auto", target_kl=5.0, beta=0.1)
    with pytest.raises(CheckpointError, match=r"step-000001' cannot be read"):
        trainer.train()


def test_a_full_disk_during_a_save_is_one_sentence_and_the_last_checkpoint_stays(
    make_pipeline: MakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer(make_pipeline(), tmp_path / "run", max_steps=1, save_steps=1).train()
    write = tensors.save_file

    def full(content: Any, path: Path, metadata: Any = None) -> None:
        if path.name == "optimizer.safetensors":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        write(content, path, metadata)

    monkeypatch.setattr(tensors, "save_file", full)
    trainer = make_trainer(make_pipeline(), tmp_path / "run", max_steps=2, save_steps=1, resume="auto")
    with pytest.raises(OSError, match="No space left on device") as caught:
        trainer.train()
    assert caught.value.filename and "optimizer.safetensors" in caught.value.filename
    monkeypatch.undo()
    names = [each.name for each in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert names == ["step-000001"]
    again = make_trainer(make_pipeline(), tmp_path / "run", max_steps=2, save_steps=1, resume="auto")
    assert again.train().step == 2
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing-*"))
