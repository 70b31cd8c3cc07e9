"""The newest checkpoint that is whole: whatever happened to others, and whenever a process was killed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nextscale.base.errors import CheckpointError
from nextscale.base.files import discard_folder, put_in_place, replacing_folder
from nextscale.runs.checkpoint import list_checkpoints
from nextscale.runs.manifest import find_damage, write_manifest
from test_trainer import MakePipeline, make_trainer, metrics_of, redness


class Killed(BaseException):
    """In place of SIGKILL: nothing of ours catches it."""


@pytest.fixture(scope="module")
def straight(make_pipeline: MakePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps that nothing happened to. Shared: not to be changed."""
    folder = tmp_path_factory.mktemp("straight")
    make_trainer(make_pipeline(), folder, max_steps=3, save_steps=1, save_total_limit=3).train()
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def link_away(file: Path) -> None:
    elsewhere = file.parents[2] / file.name
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("model.safetensors", flip),
        ("optimizer.safetensors", cut),
        ("random-0.safetensors", link_away),
        ("trainer_state.json", Path.unlink),
        ("manifest.json", cut),
        ("manifest.json", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    harm: Callable[[Path], Any],
    name: str,
    make_pipeline: MakePipeline,
    straight: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options: dict[str, Any] = {"save_steps": 1, "save_total_limit": 3}
    make_trainer(make_pipeline(), tmp_path, max_steps=2, **options).train()
    newest = tmp_path / "checkpoints" / "step-000002"
    harm(newest / name)
    capsys.readouterr()
    make_trainer(make_pipeline(), tmp_path, max_steps=3, resume="auto", **options).train()
    told = capsys.readouterr().err
    assert f"Warning: checkpoint '{newest}' cannot be read: " in told
    assert "'step-000001', an earlier one, is taken" in told
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (
            load_file(each / "checkpoints" / "step-000003" / file) for each in (tmp_path, straight)
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 3]
    assert find_damage(newest) is None  # written anew


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    make_trainer(make_pipeline(), tmp_path, max_steps=2, save_steps=1, save_total_limit=2).train()
    path = tmp_path / "checkpoints" / "step-000001"
    flip(path / "model.safetensors")
    trainer = make_trainer(make_pipeline(), tmp_path, max_steps=3, resume=str(path))
    with pytest.raises(
        CheckpointError, match=r"'model\.safetensors' is not what was written; go on from another"
    ):
        trainer.train()
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[1]",
        '{"format_version": 1}',
        '{"format_version": 1, "files": {"a": 1}}',
        '{"format_version": 2, "files": {}}',
        '{"format_version": 1, "files": {"../a": {"size": 0, "sha256": ""}}}',
        "[" * 10**5,
    ],
)
def test_a_manifest_that_is_none_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert find_damage(tmp_path) is not None


def stand_in(folder: Path, content: str) -> Path:
    """What the finder takes for a checkpoint."""
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(content)
    (folder / "model.safetensors").write_text(content)
    write_manifest(folder)
    return folder


def killed_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Kill at the number-th change of a name or removal of a folder from now on."""
    calls = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise Killed
            return original(*args, **options)

        return call

    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr("shutil.rmtree", counted(__import__("shutil").rmtree))


@pytest.mark.parametrize("number", range(1, 8))
def test_no_moment_is_without_a_whole_checkpoint(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    final = stand_in(tmp_path / "step-000005", "old")
    aside = stand_in(tmp_path / ".writing-step-000005", "new")
    with monkeypatch.context() as patched:
        killed_at(patched, number)
        try:
            put_in_place(aside, final)
        except Killed:
            pass
        else:
            assert number > 3
    (found,) = list_checkpoints(tmp_path)
    assert find_damage(found) is None

    # The next one is written as ever.
    put_in_place(stand_in(tmp_path / ".writing-another", "newest"), final)
    (found,) = list_checkpoints(tmp_path)
    assert found == final and (found / "model.safetensors").read_text() == "newest"


def test_a_run_that_was_killed_while_it_replaced_its_last_checkpoint_goes_on(
    make_pipeline: MakePipeline, straight: Path, tmp_path: Path
) -> None:
    make_trainer(make_pipeline(), tmp_path, max_steps=2, save_steps=1).train()
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-000002").rename(checkpoints / ".replaced-step-000002")
    make_trainer(make_pipeline(), tmp_path, max_steps=2, save_steps=1, resume="auto").train()
    assert sorted(each.name for each in checkpoints.iterdir()) == ["step-000001", "step-000002"]
    make_trainer(make_pipeline(), tmp_path, max_steps=3, save_steps=1, resume="auto").train()
    ours, theirs = (load_file(each / "final" / "transformer.safetensors") for each in (tmp_path, straight))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_folder_that_vanishes_is_told_and_what_was_saved_is_whole(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    calls = 0

    def moves(images: Tensor, conditions: list) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            (tmp_path / "run").rename(tmp_path / "elsewhere")
        return redness(images, conditions)

    trainer = make_trainer(make_pipeline(), tmp_path / "run", moves, max_steps=5, save_steps=1)
    with pytest.raises(FileNotFoundError) as caught:
        trainer.train()
    assert str(caught.value.filename).endswith("metrics.jsonl")
    *_, newest = list_checkpoints(tmp_path / "elsewhere" / "checkpoints")
    assert newest.name == "step-000002" and find_damage(newest) is None


def test_a_removal_that_is_cut_short_leaves_nothing_that_looks_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = stand_in(tmp_path / "step-000001", "old")
    monkeypatch.setattr(
        "shutil.rmtree", lambda path, **_: [] if not path.exists() else (_ for _ in ()).throw(Killed)
    )
    with pytest.raises(Killed):
        discard_folder(old)
    assert list_checkpoints(tmp_path) == []


def test_leftovers_go_with_the_next_checkpoint(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    stand_in(checkpoints / ".writing-step-000007", "half")
    stand_in(checkpoints / ".replaced-step-000001", "former")
    (tmp_path / ".lock").touch()  # of the run that was killed
    make_trainer(make_pipeline(), tmp_path, max_steps=1, save_steps=1).train()
    assert [each.name for each in checkpoints.iterdir()] == ["step-000001"]


def test_what_a_killed_process_did_not_come_to_remove_goes_when_the_run_goes_on(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"save_steps": 1, "max_steps": 3}
    make_trainer(make_pipeline(), tmp_path, save_total_limit=3, **options).train()
    stand_in(tmp_path / "checkpoints" / ".writing-step-000004", "half")
    make_trainer(make_pipeline(), tmp_path, save_total_limit=1, resume="auto", **options).train()
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_a_run_that_went_back_leaves_no_later_checkpoints(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"save_steps": 1, "save_total_limit": 2}
    make_trainer(make_pipeline(), tmp_path, max_steps=2, **options).train()
    stand_in(tmp_path / "checkpoints" / "step-000009", "later")
    resume = str(tmp_path / "checkpoints" / "step-000001")
    make_trainer(make_pipeline(), tmp_path, max_steps=3, resume=resume, **options).train()
    names = sorted(each.name for each in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000003"]
    # And that as soon as it goes on: what it would have to fall back on is what it began with.
    resume = str(tmp_path / "checkpoints" / "step-000002")
    trainer = make_trainer(make_pipeline(), tmp_path, max_steps=2, resume=resume, **options)
    trainer.train()
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert [each["step"] for each in metrics_of(tmp_path)] == [1, 2]


def test_a_model_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "final"
    for content in ("first", "second"):
        with replacing_folder(path) as aside:
            (aside / "model").write_text(content)
        assert [each.name for each in tmp_path.iterdir()] == ["final"]
        assert (path / "model").read_text() == content
