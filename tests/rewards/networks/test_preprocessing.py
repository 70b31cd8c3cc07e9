"""Preprocessing in torch: on photographs, what the networks' own processors make of them by PIL."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pil_processors import ImageProcessor, padded_by_pil, to_tensor
from torch import Tensor
from transformers import AutoImageProcessor

from nextscale.base.errors import CheckpointError
from nextscale.rewards.networks.preprocessing import (
    MEAN,
    STD,
    Preprocessing,
    clip_preprocessing,
    read_preprocessing,
)


def difference(ours: Tensor, theirs: Tensor, std: Tensor) -> Tensor:
    """Of pixels in [0, 1]."""
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    return (ours - theirs).abs() * std


@pytest.fixture(params=[0, 1, 2])
def photograph(request: pytest.FixtureRequest, photographs: list[Image.Image]) -> Image.Image:
    return photographs[request.param]


def test_clip_preprocessing_agrees_with_pil(photograph: Image.Image):
    theirs = ImageProcessor()(photograph, return_tensors="pt")["pixel_values"]
    ours = clip_preprocessing(224)(to_tensor(photograph))
    assert ours.shape == (1, 3, 224, 224)
    assert difference(ours, theirs, torch.tensor(STD).view(3, 1, 1)).mean() < 1 / 255


def test_the_longest_side_agrees_with_pil(photograph: Image.Image):
    for image in (photograph, photograph.rotate(90, expand=True)):
        ours = Preprocessing(size=224, edge="longest")(to_tensor(image))
        far = difference(ours, padded_by_pil(image, 224), torch.tensor(STD).view(3, 1, 1))
        assert ours.shape == (1, 3, 224, 224)
        assert far.mean() < 1 / 255 and far.max() < 6 / 255


def test_what_is_padded_is_black():
    ours = Preprocessing(size=8, edge="longest")(torch.ones(1, 3, 3, 8))
    black = (-torch.tensor(MEAN) / torch.tensor(STD)).view(3, 1)
    rows = [torch.allclose(ours[0, :, i], black.expand(3, 8)) for i in range(8)]
    assert rows == [True, True, False, False, False, True, True, True]


PROCESSORS: dict[str, dict[str, Any]] = {
    "stretched": {"image_processor_type": "ViTImageProcessor"},
    "stretched and cropped": {"image_processor_type": "DeiTImageProcessor"},
    "shortest side": {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": MEAN,
        "image_std": [0.2, 0.3, 0.4],
    },
    "by the model's type": {"size": {"height": 96, "width": 64}, "resample": 3},
    "share": {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 224},
        "crop_pct": 0.875,
    },
    "share, large": {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 384},
        "crop_pct": 1.0,
    },
    "not normalised": {"image_processor_type": "ViTImageProcessor", "do_normalize": False},
    "not cropped": {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False},
}


def written(folder: Path, processor: dict[str, Any]) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    return folder


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_model_s_own_preprocessing_is_read_and_agrees_with_pil(
    kind: str, photograph: Image.Image, tmp_path: Path
):
    folder = written(tmp_path, PROCESSORS[kind])
    prepare = read_preprocessing(folder)
    theirs = AutoImageProcessor.from_pretrained(folder)(photograph, return_tensors="pt")["pixel_values"]
    far = difference(prepare(to_tensor(photograph)), theirs, torch.tensor(prepare.std).view(3, 1, 1))
    assert far.mean() < 1 / 255


@pytest.mark.parametrize(
    "processor",
    [
        {"image_processor_type": "EfficientNetImageProcessor"},  # normalises twice
        {"image_processor_type": "ViTImageProcessor", "resample": 1},  # Lanczos
        {"image_processor_type": "ViTImageProcessor", "resample": 0},
        {"image_processor_type": "ViTImageProcessor", "do_rescale": False},
        {"image_processor_type": "ViTImageProcessor", "do_resize": False},
        {"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 256, "width": 256}},
        {"image_processor_type": "ViltImageProcessor"},  # keeps proportions, to a multiple of 32
    ],
)
def test_a_preprocessing_that_does_more_is_refused(processor: dict[str, Any], tmp_path: Path):
    with pytest.raises(CheckpointError, match="does not only resize, crop and normalise") as caught:
        read_preprocessing(written(tmp_path, processor))
    assert "\n" not in str(caught.value)


def test_a_missing_preprocessing_is_told(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"image processor '.*' cannot be loaded"):
        read_preprocessing(tmp_path)
