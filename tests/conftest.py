"""Fixtures of all tests: the official code's data, and a random model small enough for a unit test."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nextscale.models.scales import ScaleSchedule
from nextscale.models.var import VAR, VARConfig
from nextscale.models.vqvae import VQVAE, VQVAEConfig
from nextscale.pipeline import VARPipeline

torch.set_num_threads(1)  # the models are tiny, and one thread gives the same bits on every machine

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What commands keep, of these tests alone."""
    os.environ["NEXTSCALE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def parity() -> Path:
    """The folder with the official code's weights and outputs (see its README.md)."""
    for root in (REPOSITORY.parent, REPOSITORY):
        folder = root / "shared" / "parity"
        if (folder / "golden.json").is_file():
            return folder
    pytest.skip(f"no parity data: expected {REPOSITORY.parent / 'shared' / 'parity'}")


@pytest.fixture(scope="session")
def golden(parity: Path) -> dict[str, Tensor]:
    """The official code's outputs; `golden_info` says what each is. Not to be changed in place."""
    return load_file(parity / "golden.safetensors")


@pytest.fixture(scope="session")
def golden_info(parity: Path) -> dict:
    """What each golden tensor is, and the settings it was made with."""
    return json.loads((parity / "golden.json").read_text())


@pytest.fixture(scope="session")
def official_shapes(parity: Path) -> dict:
    """Keys, shapes and dtypes of every official checkpoint."""
    return json.loads((parity / "official_shapes.json").read_text())


@pytest.fixture(scope="session")
def parity_pipeline(parity: Path) -> VARPipeline:
    """The pipeline of the golden data's weights. Shared: not to be changed."""
    return VARPipeline.from_official(parity / "var.pth", parity / "vae.pth")


@pytest.fixture(scope="session")
def make_pipeline() -> Callable[..., VARPipeline]:
    """Makes random small pipelines: `make_pipeline(seed=0, num_classes=4, class_names=None, ...)`."""
    return random_pipeline


@pytest.fixture
def tiny_pipeline() -> VARPipeline:
    """A random small pipeline: 4 classes, 48 codes, scales 1 to 4, images of 8 px. A test may change it."""
    return random_pipeline()


def random_pipeline(
    seed: int = 0,
    *,
    depth: int = 2,
    width: int = 64,
    num_heads: int = 2,
    num_classes: int = 4,
    codebook_size: int = 48,
    codebook_width: int = 8,
    scale_sizes: tuple[int, ...] = (1, 2, 3, 4),
    shared_adaln: bool = False,
    class_names: list[str] | None = None,
) -> VARPipeline:
    """A pipeline of random weights under which nothing is near zero: logits of std 1 to 2 that depend much on
    the class and on the coarser scales."""
    shared = dict(codebook_size=codebook_size, codebook_width=codebook_width, scale_sizes=scale_sizes)
    var_config = VARConfig(
        depth=depth,
        width=width,
        num_heads=num_heads,
        num_classes=num_classes,
        shared_adaln=shared_adaln,
        **shared,
    )
    vqvae_config = VQVAEConfig(base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, **shared)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer, tokenizer = VAR(var_config), VQVAE(vqvae_config)
        _randomise(transformer)
        _randomise(tokenizer)
    return VARPipeline(transformer, tokenizer, class_names)


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Linear and convolution weights of variance 1 / fan-in, embeddings of 1 or 1/4, all else about 0.1."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "scale_mul_1H11":
                parameter.uniform_(0.5, 2.5)
            elif isinstance(module, nn.GroupNorm) and name == "weight":
                parameter.normal_(1.0, 0.3)
            elif isinstance(module, (nn.Linear, nn.Conv2d)) and name == "weight":
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=0.3)
    if isinstance(model, VAR):
        model.class_emb.weight.normal_()
        model.word_embed.weight.normal_()
    else:
        model.quantize.embedding.weight.normal_(std=0.5)


@pytest.fixture
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without report and model card, half of a small run's time: for many that nobody looks at."""
    for name in ("nextscale.report.page.write_report", "nextscale.trainer.write_model_card"):
        monkeypatch.setattr(name, lambda *given, **options: None)


@pytest.fixture(scope="session")
def schedule() -> ScaleSchedule:
    """The scales of `tiny_pipeline`."""
    return ScaleSchedule((1, 2, 3, 4))
