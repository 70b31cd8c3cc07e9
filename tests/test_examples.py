"""The examples do what they say."""

import runpy
from pathlib import Path

import pytest
import torch

import nextscale as ns

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_grpo_in_one_file_moves_the_miniature() -> None:
    example = runpy.run_path(str(EXAMPLES / "grpo_in_one_file.py"))
    pipe = ns.VARPipeline.from_pretrained("toy")
    reward = ns.rewards.ClipScore("a painting of a {label}", clip="toy")

    def scores() -> torch.Tensor:
        images = pipe(range(8), 8, guidance_scale=1.5, seed=7).images
        return torch.as_tensor(reward(images, pipe.conditions(torch.arange(8).repeat_interleave(8))))

    before = scores()
    example["train"](pipe, num_steps=7, seed=0)
    gain = scores() - before  # of each image, from the same random numbers
    assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5


def test_its_parts_are_those_of_the_package() -> None:
    example = runpy.run_path(str(EXAMPLES / "grpo_in_one_file.py"))
    lengths = ns.VARPipeline.from_pretrained("toy").transformer.schedule.lengths
    grpo = ns.GRPOConfig(train_scales=example["TRAINED_SCALES"])
    from nextscale.advantages import group_advantages
    from nextscale.losses import clipped_surrogate, loss_weights

    ours = loss_weights(lengths, grpo)[0]
    theirs = example["token_weights"](list(lengths))
    assert torch.equal(theirs[: len(ours)], ours) and not theirs[len(ours) :].any()
    rewards = torch.randn(3, 5)
    expected = group_advantages(rewards)
    assert (example["group_advantages"](rewards) - expected).abs().max() < 1e-3
    log_probs, old, advantages = torch.randn(4, 7), torch.randn(4, 7), torch.randn(4)
    surrogate = clipped_surrogate((log_probs - old).exp(), advantages[:, None], 0.2).objective_BL
    weights = torch.full((7,), 1 / 7)
    loss = example["grpo_loss"](log_probs, old, log_probs, advantages, weights)  # the KL is 0
    torch.testing.assert_close(loss, -surrogate.mean())


def test_the_space_shows_the_studio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gradio = pytest.importorskip("gradio", reason="Gradio, of the extra ui, is not installed")
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(EXAMPLES / "app.py"))  # as another name than __main__: it does not launch
    assert isinstance(example["demo"], gradio.Blocks) and not list(tmp_path.iterdir())


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    committed = [cell.source for cell in notebook.cells if cell.get("outputs")]
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    outputs = {cell.source: cell.outputs for cell in notebook.cells if cell.get("outputs")}
    assert set(committed) <= set(outputs)  # a reader sees what it shows without running it
    pictures = [each for found in outputs.values() for each in found if "image/png" in each.get("data", {})]
    (said,) = [found[0].text for source, found in outputs.items() if source.startswith("after = ")]
    before, after = map(float, said.removeprefix("a painting: ").split(" -> "))
    assert len(pictures) == 2 and after > before + 0.1
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
