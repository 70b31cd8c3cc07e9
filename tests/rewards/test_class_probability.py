"""Class probability: what transformers' classifier gives the class that a condition names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from pil_processors import to_tensor
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, ViTForImageClassification

from nextscale.base.conditions import Condition
from nextscale.base.errors import CheckpointError, ConfigError
from nextscale.rewards import ClassProbability


def test_the_score_is_the_probability_of_the_class(classifier_folder: Path, photographs: list[Image.Image]):
    model = ViTForImageClassification.from_pretrained(classifier_folder)
    processor = AutoImageProcessor.from_pretrained(classifier_folder)
    reward = ClassProbability(classifier_folder, match="label")
    for photograph in photographs:
        with torch.no_grad():
            expected = model(**processor(photograph, return_tensors="pt")).logits[0].softmax(-1)
        images = to_tensor(photograph).expand(6, -1, -1, -1)
        scores = reward(images, [Condition(i, "whatever") for i in range(6)])
        assert expected.max() > 2 * expected.min()
        torch.testing.assert_close(scores, expected, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(scores.sum(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("condition", "index"),
    [
        (Condition(5, "neon moon"), 1),
        (Condition(None, "Neon  Moon"), 1),
        (Condition(0, "star"), 5),
        (Condition(9, "orange heart"), 4),
        (Condition(None, "tench"), 0),
        (Condition(None, "tinca tinca"), 0),
        (Condition(None, "tench, Tinca tinca"), 0),
        (Condition(2, "crane"), 2),
        (Condition(3, "crane"), 3),
    ],
)
def test_a_class_is_found_by_its_name(condition: Condition, index: int, classifier_folder: Path):
    assert ClassProbability(classifier_folder).index(condition) == index


def test_a_class_is_found_by_its_label(classifier_folder: Path):
    assert ClassProbability(classifier_folder, match="label").index(Condition(2, "star")) == 2


@pytest.mark.parametrize(
    ("condition", "match", "told"),
    [
        (Condition(0, "neon moo"), "name", "no class 'neon moo'; did you mean 'neon moon'"),
        (
            Condition(0, "xyzzy"),
            "name",
            "no class 'xyzzy'; it has 6, such as 'tench, Tinca tinca'; where its",
        ),
        (
            Condition(0, "crane"),
            "name",
            r"several classes 'crane' \(\[2, 3\]\), and none is the condition's label 0",
        ),
        (Condition(6, "star"), "label", "no class 6: it has 6"),
        (Condition(-1, "star"), "label", "no class -1"),
        (Condition(None, "star"), "label", "no class None"),
    ],
)
def test_a_class_that_is_not_found_is_told(
    condition: Condition, match: str, told: str, classifier_folder: Path
):
    reward = ClassProbability(classifier_folder, match)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=told):
        reward(torch.zeros(1, 3, 64, 64), [condition])


def test_a_network_that_is_no_classifier_is_told(classifier_folder: Path, clip_folder: Path, tmp_path: Path):
    folder = tmp_path / "headless"
    shutil.copytree(classifier_folder, folder)
    state = load_file(folder / "model.safetensors")
    del state["classifier.weight"]  # transformers would fill it with random numbers
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"classifier '.*' cannot be loaded: it has no 'classifier\.weight'"
    ):
        ClassProbability(folder)
    with pytest.raises(CheckpointError, match=r"classifier '.*none' cannot be loaded"):
        ClassProbability(tmp_path / "none")


def test_a_classifier_that_needs_more_than_ours_is_told(classifier_folder: Path, tmp_path: Path):
    folder = tmp_path / "efficient"
    shutil.copytree(classifier_folder, folder)
    processor = {"image_processor_type": "EfficientNetImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(CheckpointError, match=r"EfficientNetImageProcessor.* does not only resize"):
        ClassProbability(folder)
