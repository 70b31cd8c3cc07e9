"""GenEval: whether an image has the objects, numbers, colours and positions that its prompt asks for.

The prompts' file says what is asked for, in GenEval's own columns: `tag`, one of its six tasks
(single_object, two_object, counting, colors, position, color_attr), `include` and `exclude`.

Source: GenEval (arXiv 2310.11513) and its code, `evaluation/evaluate_images.py`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import RewardError
from nextscale.rewards.clip_score import DEFAULT_CLIP
from nextscale.rewards.networks.clip import load_clip
from nextscale.rewards.networks.detection import Detector, Found
from nextscale.rewards.protocol import RewardConfig

DEFAULT_DETECTOR = "facebook/mask2former-swin-small-coco-instance"
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
COLOUR_PROMPTS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}",
                  "a photo of a {colour} object")  # fmt: skip
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
"""Least confidence of an object: higher where objects are counted, lest parts be counted too."""
MOST_OBJECTS = 16
"""Of a class, the surest so many are looked at."""
POSITION_MARGIN = 0.1
"""Share of both objects' sides by which their centres have to be apart before one is beside the other."""
BACKGROUND = 0.6
"""Grey that what is around an object becomes, where its mask is known: GenEval's #999."""

COCO_NAMES = {"computer keyboard": "keyboard", "computer mouse": "mouse", "tv remote": "remote"}
"""What detectors call objects that GenEval's prompts call otherwise."""

Detect = Callable[[Tensor], list[list[Found]]]
NameColours = Callable[[Tensor, Sequence[Found]], list[str]]
"""Names of the colours of objects in a (3, H, W) image."""


class GenEval:
    """1 for an image that has all that is asked for, else 0; or the share of it that it has.

    Args:
        detector: a detector of transformers that knows the classes asked for, as a folder, a hub repository
            or a function of images.
        clip: names the colours: a folder, a hub repository, or a function of an image and its objects.
        partial: give the share of the requirements that are met, which tells more to learn from. GenEval's
            own score is without.

    Raises:
        CheckpointError: a network cannot be loaded.
    """

    has_gradient = False

    def __init__(
        self,
        detector: str | Path | Detect = DEFAULT_DETECTOR,
        clip: str | Path | NameColours = DEFAULT_CLIP,
        partial: bool = False,
    ) -> None:
        self.detect: Detect = detector if callable(detector) else Detector(detector)
        self.name_colours: NameColours = clip if callable(clip) else ClipColours(clip)
        self.partial = partial

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        asked = [read_requirements(condition) for condition in conditions]
        renamed = [self._renamed(requirements) for requirements in asked]
        scores = []
        parts = zip(images, self.detect(images), asked, renamed, strict=True)
        for image, found, requirements, names in parts:
            found = [replace(each, name=names.get(each.name, each.name)) for each in found]
            met = requirements.met_by(found, lambda some, of=image: self.name_colours(of, some))
            scores.append(sum(met) / len(met) if self.partial else float(all(met)))
        return torch.tensor(scores)

    def check_conditions(self, conditions: Sequence[Condition]) -> None:
        for each in conditions:
            self._renamed(read_requirements(each))

    def _renamed(self, requirements: "Requirements") -> dict[str, str]:
        """The detector's names of what a prompt calls otherwise, to the prompt's.

        Raises:
            RewardError: it does not know what is asked for.
        """
        known, renamed = getattr(self.detect, "names", None), {}
        for name in requirements.names():
            if known is None or name in known:
                continue
            if (theirs := COCO_NAMES.get(name)) not in known:
                raise RewardError(
                    f"the detector knows no '{name}', which a prompt asks for; it knows "
                    f"{', '.join(known[:5])} and {max(len(known) - 5, 0)} others"
                )
            renamed[theirs] = name
        return renamed


class Requirements:
    """What a prompt asks for.

    Args:
        tag: one of `TASKS`.
        include: objects that have to be there: `class`, `count`, and `color` or `position`, the latter as a
            relation and the number of the object that it is to.
        exclude: `class` and `count`, which has to stay below that.
    """

    def __init__(
        self, tag: str, include: Sequence[Mapping[str, Any]], exclude: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.tag, self.include, self.exclude = tag, include, exclude

    def names(self) -> list[str]:
        """The classes of all objects that are mentioned."""
        return [each["class"] for each in [*self.include, *self.exclude]]

    def met_by(
        self, found: Sequence[Found], name_colours: Callable[[Sequence[Found]], list[str]]
    ) -> list[bool]:
        """Which of the requirements are met, in order.

        Args:
            found: the objects in the image.
            name_colours: the colours of some of them.
        """
        least = COUNTING_THRESHOLD if self.tag == "counting" else THRESHOLD
        surest = sorted((each for each in found if each.score > least), key=lambda each: -each.score)
        of_class: dict[str, list[Found]] = {}
        for each in surest:
            if len(of_class.setdefault(each.name, [])) < MOST_OBJECTS:
                of_class[each.name].append(each)
        met, matched = [], []
        for each in self.include:
            objects = of_class.get(each["class"], [])[: each["count"]]
            is_met = len(objects) == each["count"]
            if is_met and "color" in each:
                is_met = name_colours(objects).count(each["color"]) >= each["count"]
            if is_met and "position" in each:
                relation, target = each["position"]
                others = matched[target] or []
                is_met = bool(others) and all(relation in relations(a, b) for a in objects for b in others)
            met.append(is_met)
            matched.append(objects if is_met else None)
        return met + [len(of_class.get(each["class"], [])) < each["count"] for each in self.exclude]


def relations(one: Found, other: Found) -> set[str]:
    """Where one object is as seen from another: of `RELATIONS`; none where they are too near to tell."""
    (left, top, right, bottom), (left_2, top_2, right_2, bottom_2) = one.box, other.box
    offsets = [(left + right - left_2 - right_2) / 2, (top + bottom - top_2 - bottom_2) / 2]
    sides = [right - left + right_2 - left_2, bottom - top + bottom_2 - top_2]
    apart = [
        math.copysign(max(abs(offset) - POSITION_MARGIN * side, 0.0), offset)
        for offset, side in zip(offsets, sides, strict=True)
    ]
    if all(abs(each) < 1e-3 for each in apart):
        return set()
    across, down = (each / math.hypot(*offsets) for each in apart)
    is_so = (across < -0.5, across > 0.5, down < -0.5, down > 0.5)
    return {name for name, so in zip(RELATIONS, is_so, strict=True) if so}


def read_requirements(condition: Condition) -> Requirements:
    """What the columns of a prompt ask for; in a CSV file, `include` and `exclude` are JSON.

    Raises:
        RewardError: there are none, they are not GenEval's, or they ask for more objects than are counted.
    """
    data: dict[str, Any] = {key: condition.data.get(key) for key in ("tag", "include", "exclude")}
    try:
        for key in ("include", "exclude"):
            if isinstance(data[key], str):
                data[key] = json.loads(data[key] or "[]")
            data[key] = list(data[key] or [])
        if data["tag"] not in TASKS or not data["include"]:
            raise ValueError
        for i, each in enumerate([*data["include"], *data["exclude"]]):
            is_whole = isinstance(each["class"], str) and isinstance(each["count"], int) and each["count"] > 0
            relation, target = each.get("position", (RELATIONS[0], 0))
            is_whole &= relation in RELATIONS and ("position" not in each or 0 <= target < i)
            if not is_whole or each.get("color", COLOURS[0]) not in COLOURS:
                raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise RewardError(
            f"the prompt '{condition.text}' does not say what geneval has to look for: its file needs the "
            "columns tag, include and exclude as in GenEval's evaluation_metadata.jsonl"
        ) from None
    if (most := max(each["count"] for each in data["include"])) > MOST_OBJECTS:
        raise RewardError(
            f"the prompt '{condition.text}' asks for {most} of an object, "
            f"and geneval counts up to {MOST_OBJECTS}"
        )
    return Requirements(**data)


class ClipColours:
    """The colour of an object by a CLIP that sees it alone, among `COLOURS`."""

    def __init__(self, clip: str | Path) -> None:
        self.clip = load_clip(clip)

    @torch.no_grad()
    def __call__(self, image: Tensor, objects: Sequence[Found]) -> list[str]:
        crops = []
        for each in objects:
            seen = image if each.mask is None else torch.where(each.mask, image, BACKGROUND)
            left, top = (math.floor(side) for side in each.box[:2])
            right, bottom = max(math.ceil(each.box[2]), left + 1), max(math.ceil(each.box[3]), top + 1)
            crops.append(self.clip.embed_images(seen[None, :, top:bottom, left:right]))
        name = objects[0].name
        of_colours = []
        for colour in COLOURS:
            texts = [prompt.format(colour=colour, name=name) for prompt in COLOUR_PROMPTS]
            of_colours.append(F.normalize(self.clip.embed_texts(texts).mean(0), dim=0))
        best = (torch.cat(crops) @ torch.stack(of_colours).T).argmax(-1)
        return [COLOURS[i] for i in best.tolist()]


class GenEvalConfig(RewardConfig):
    """Whether an image has the objects, numbers, colours and positions asked for, by GenEval's protocol."""

    main_option = "detector"
    reward = GenEval

    kind: Literal["geneval"] = "geneval"
    detector: str = DEFAULT_DETECTOR
    """Object detector of transformers: a folder or a hub repository."""
    clip: str = DEFAULT_CLIP
    """CLIP: "toy", a folder or a hub repository; an aesthetic head comes with its own by default."""
    partial: bool = False
    """Give the share of what is asked for that is there; GenEval's own score is 1 for all of it, else 0."""

    @property
    def backbone(self) -> str | None:
        return self.detector

    @property
    def networks(self) -> tuple[str | None, ...]:
        return self.detector, self.clip
