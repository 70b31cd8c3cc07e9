"""GenEval's six tasks, on pictures drawn here, whose truth is known."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
)

from nextscale.base.conditions import Condition
from nextscale.base.errors import CheckpointError, ConfigError, RewardError
from nextscale.rewards.geneval import COLOURS, GenEval, relations
from nextscale.rewards.networks.detection import Detector, Found

RGB = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}


def drawn(*things: tuple[str, str, int, int]) -> Tensor:
    """(3, 64, 64): things of a shape ("cup": 8x8, "bench": 16x8) and colour with these upper left corners."""
    image = torch.ones(3, 64, 64)
    for shape, colour, x, y in things:
        width = 16 if shape == "bench" else 8
        image[:, y : y + 8, x : x + width] = torch.tensor(RGB[colour])[:, None, None]
    return image


def detect(images: Tensor) -> list[list[Found]]:
    """Finds what `drawn` draws, by its colour and outline."""
    found = []
    for image in images:
        of_image = []
        for colour in RGB.values():
            is_colour = (image == torch.tensor(colour)[:, None, None]).all(0)
            while is_colour.any():
                y, x = is_colour.nonzero()[0].tolist()
                width = 16 if x + 8 < 64 and is_colour[y, x + 8] else 8
                is_colour[y : y + 8, x : x + width] = False
                of_image.append(Found("bench" if width == 16 else "cup", 0.95, (x, y, x + width, y + 8)))
        found.append(of_image)
    return found


def name_colours(image: Tensor, objects: list[Found]) -> list[str]:
    pixels = [image[:, int(each.box[1]) + 2, int(each.box[0]) + 2] for each in objects]
    return [
        next(name for name, rgb in RGB.items() if torch.equal(pixel, torch.tensor(rgb))) for pixel in pixels
    ]


REWARD = GenEval(detect, name_colours)
CUP, BENCH = {"class": "cup", "count": 1}, {"class": "bench", "count": 1}


def asks(tag: str, *include: dict, exclude: tuple = ()) -> Condition:
    return Condition(None, tag, {"tag": tag, "include": list(include), "exclude": list(exclude)})


@pytest.mark.parametrize(
    ("condition", "right", "wrong"),
    [
        (asks("single_object", CUP), [("cup", "red", 4, 4)], [("bench", "red", 4, 4)]),
        (
            asks("two_object", CUP, BENCH),
            [("cup", "red", 4, 4), ("bench", "red", 40, 40)],
            [("cup", "red", 4, 4)],
        ),
        (
            asks("counting", CUP | {"count": 2}, exclude=(CUP | {"count": 3},)),
            [("cup", "red", 4, 4), ("cup", "red", 40, 4)],
            [("cup", "red", 4, 4), ("cup", "red", 40, 4), ("cup", "blue", 4, 40)],
        ),
        (asks("colors", CUP | {"color": "blue"}), [("cup", "blue", 4, 4)], [("cup", "green", 4, 4)]),
        (
            asks("position", CUP, BENCH | {"position": ["left of", 0]}),
            [("cup", "red", 40, 4), ("bench", "red", 4, 4)],
            [("cup", "red", 4, 4), ("bench", "red", 40, 4)],
        ),
        (
            asks("color_attr", CUP | {"color": "blue"}, BENCH | {"color": "red"}),
            [("cup", "blue", 4, 4), ("bench", "red", 40, 4)],
            [("cup", "red", 4, 4), ("bench", "blue", 40, 4)],
        ),
    ],
)
def test_the_six_tasks(condition: Condition, right: list, wrong: list) -> None:
    images = torch.stack([drawn(*right), drawn(*wrong)])
    assert REWARD(images, [condition, condition]).tolist() == [1.0, 0.0]


def test_partial_is_the_share_of_what_is_asked_for() -> None:
    image = drawn(("cup", "blue", 4, 4))[None]
    condition = asks("color_attr", CUP | {"color": "blue"}, BENCH | {"color": "red"})
    assert GenEval(detect, name_colours, partial=True)(image, [condition]).tolist() == [0.5]


def test_objects_that_detectors_call_otherwise() -> None:
    class Detects:
        names = ("mouse", "cup")

        def __call__(self, images: Tensor) -> list[list[Found]]:
            return [[Found("mouse", 0.95, (0, 0, 8, 8)), Found("cup", 0.95, (30, 0, 38, 8))] for _ in images]

    reward, image = GenEval(Detects(), name_colours), drawn()[None]
    mouse = {"class": "computer mouse", "count": 1}
    assert reward(image, [asks("two_object", mouse, CUP)]).tolist() == [1.0]
    assert reward(image, [asks("counting", mouse | {"count": 2})]).tolist() == [0.0]
    for unknown in ("computer keyboard", "bench"):  # of the first it knows neither name
        with pytest.raises(RewardError, match=f"the detector knows no '{unknown}'"):
            reward(image, [asks("single_object", {"class": unknown, "count": 1})])
        with pytest.raises(RewardError, match=f"the detector knows no '{unknown}'"):
            reward.check_conditions([asks("single_object", {"class": unknown, "count": 1})])
    reward.check_conditions([asks("two_object", mouse, CUP)])


def test_counting_needs_surer_objects_and_others_do_not() -> None:
    def unsure(images: Tensor) -> list[list[Found]]:
        return [[Found("cup", 0.5, (0, 0, 8, 8))] for _ in images]

    reward, image = GenEval(unsure, name_colours), drawn()[None]
    assert reward(image, [asks("single_object", CUP)]).tolist() == [1.0]
    assert reward(image, [asks("counting", CUP)]).tolist() == [0.0]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 20, 10, 30), {"left of"}),
        ((40, 20, 50, 30), {"right of"}),
        ((20, 0, 30, 10), {"above"}),
        ((20, 40, 30, 50), {"below"}),
        ((0, 0, 10, 10), {"left of", "above"}),
        ((21, 21, 31, 31), set()),  # within a tenth of both sides
    ],
)
def test_relations(box: tuple, expected: set) -> None:
    assert relations(Found("cup", 1.0, box), Found("cup", 1.0, (20, 20, 30, 30))) == expected


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"tag": "poems", "include": [CUP]},
        {"tag": "colors", "include": []},
        {"tag": "colors", "include": "no json"},
        {"tag": "colors", "include": [{"class": "cup"}]},
        {"tag": "colors", "include": [CUP | {"color": "mauve"}]},
        {"tag": "position", "include": [CUP, BENCH | {"position": ["near", 0]}]},
        {"tag": "position", "include": [BENCH | {"position": ["above", 0]}]},
    ],
)
def test_prompts_that_do_not_say_what_to_look_for(data: dict) -> None:
    with pytest.raises(RewardError, match="needs the columns tag, include and exclude"):
        REWARD(drawn()[None], [Condition(None, "a cup", data)])
    with pytest.raises(RewardError, match="the prompt 'a cup' does not say what geneval has to look for"):
        REWARD.check_conditions([Condition(None, "a cup", data)])


def test_more_objects_than_are_counted() -> None:
    """Sixteen are looked at, so that seventeen would never be found."""
    asked = {"tag": "counting", "include": [{"class": "cup", "count": 16}]}
    REWARD.check_conditions([Condition(None, "cups", asked)])
    asked["include"][0]["count"] = 17
    with pytest.raises(RewardError, match="'cups' asks for 17 of an object, and geneval counts up to 16"):
        REWARD.check_conditions([Condition(None, "cups", asked)])


def test_a_csv_files_columns_are_json() -> None:
    data = {"tag": "single_object", "include": json.dumps([CUP]), "exclude": ""}
    assert REWARD(drawn(("cup", "red", 4, 4))[None], [Condition(None, "a cup", data)]).tolist() == [1.0]


# Detectors of transformers


def yolos(folder: Path) -> Path:
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        num_detection_tokens=4, num_labels=2, id2label={0: "cup", 1: "bench"},
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    settings = {"image_processor_type": "YolosImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_a_detector_gives_boxes_in_pixels(tmp_path: Path) -> None:
    detector = Detector(yolos(tmp_path))
    found = detector(torch.rand(2, 3, 64, 48))
    assert detector.names == ["cup", "bench"] and not detector.has_masks
    for each in (one for of_image in found for one in of_image):
        left, top, right, bottom = each.box
        assert 0 <= left <= right <= 48 and 0 <= top <= bottom <= 64 and each.score >= 0.1
    output = detector.model(pixel_values=detector._prepared(torch.rand(1, 3, 64, 48)))
    assert output.logits.shape == (1, 4, 3)  # the last is "nothing"
    reward = GenEval(tmp_path, name_colours)
    with pytest.raises(RewardError, match="the detector knows no 'fork', which a prompt asks for"):
        reward(torch.rand(1, 3, 64, 48), [asks("single_object", CUP | {"class": "fork"})])


def test_a_detector_of_masks(tmp_path: Path) -> None:
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, num_queries=5, encoder_feedforward_dim=16,
        dim_feedforward=16, num_labels=2, id2label={0: "cup", 1: "bench"},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 64}}))
    detector = Detector(tmp_path)
    assert detector.has_masks
    for each in detector(torch.rand(1, 3, 64, 64))[0]:
        assert each.mask is not None and each.mask.shape == (64, 64)
        left, top, right, bottom = (int(side) for side in each.box)
        assert each.mask[top:bottom, left:right].sum() == each.mask.sum()


def test_colours_by_the_miniature_worlds_clip() -> None:
    reward = GenEval(detect, "toy")
    images = torch.stack([drawn(("cup", name, 20, 20)) for name in RGB])
    found = [reward.name_colours(image, detect(image[None])[0])[0] for image in images]
    assert all(each in COLOURS for each in found) and found[0] == "red"


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, ConfigError), match="cannot be loaded"):
        Detector(tmp_path)
