"""What earlier versions wrote is read, or refused with what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from nextscale.base.errors import CheckpointError
from nextscale.pipeline import VARPipeline
from nextscale.report.page import write_report
from nextscale.runs.checkpoint import list_checkpoints
from test_trainer import MakePipeline, make_trainer, metrics_of

FORMATS = Path(__file__).parent / "formats"
SMALL = {"depth": 1, "width": 16, "num_heads": 1, "codebook_size": 16, "scale_sizes": (1, 2)}
"""Sizes of the model of the kept runs."""


@pytest.mark.parametrize("name", ["run-2", "run-3"])
def test_a_kept_run_goes_on_as_if_it_had_never_stopped(
    name: str, make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    shutil.copytree(FORMATS / name, tmp_path / name)
    resumed, straight = make_pipeline(**SMALL), make_pipeline(**SMALL)
    options = {"max_steps": 3, "eval_steps": 2, "eval_num_images": 8}
    make_trainer(resumed, tmp_path / name, resume="auto", save_steps=3, save_total_limit=1, **options).train()
    make_trainer(straight, tmp_path / "straight", **options).train()
    assert [line["step"] for line in metrics_of(tmp_path / name)] == [0, 1, 2, 3]
    for ours, theirs in zip(resumed.transformer.parameters(), straight.transformer.parameters(), strict=True):
        # The machine that wrote the folder may have rounded otherwise.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    (newest,) = list_checkpoints(tmp_path / name / "checkpoints")
    assert json.loads((newest / "trainer_state.json").read_text())["format_version"] == 3
    assert write_report(tmp_path / name).is_file()


def test_a_kept_model_loads(make_pipeline: MakePipeline) -> None:
    pipe, expected = VARPipeline.from_pretrained(FORMATS / "model-1"), make_pipeline(**SMALL)
    assert pipe.transformer.schedule.sizes == (1, 2)
    for ours, theirs in zip(pipe.tokenizer.parameters(), expected.tokenizer.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("version", [0, 4, "3", None])
def test_a_checkpoint_of_another_version_is_refused(
    version: object, make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    shutil.copytree(FORMATS / "run-2", tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-000002" / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": version}))
    with pytest.raises(CheckpointError, match="step-000002' cannot be read: "):
        make_trainer(make_pipeline(**SMALL), tmp_path / "run", resume="auto", max_steps=3).train()
    assert file.is_file() and [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2]
