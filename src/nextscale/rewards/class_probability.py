"""Class probability: how sure an image classifier is that an image shows the requested class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import transformers
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.base.records import did_you_mean
from nextscale.models.pretrained import follow, load_frozen
from nextscale.rewards.networks.preprocessing import read_preprocessing
from nextscale.rewards.protocol import RewardConfig

Match = Literal["name", "label"]
DEFAULT_MATCH: Match = "name"


class ClassProbability:
    """Softmax probability of the condition's class under an image classifier, in [0, 1].

    Args:
        classifier: an image classifier of transformers: a folder, or a hub repository such as
            "google/vit-base-patch16-224".
        match: how the classifier's class is found: by the condition's "name" (the whole name, or one of
            several separated by commas, ignoring case), or by its "label", if both number classes alike.

    Raises:
        CheckpointError: the classifier cannot be loaded, or needs a preprocessing that is not supported.
    """

    def __init__(self, classifier: str | Path, match: Match = DEFAULT_MATCH) -> None:
        self.classifier = str(classifier)
        self.model = load_frozen(transformers.AutoModelForImageClassification, "classifier", classifier)
        self.prepare = read_preprocessing(classifier)
        self.match = match
        names = self.model.config.id2label
        self.names = [str(names[i]) for i in range(len(names))]
        self._indices: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            for each in dict.fromkeys(map(_plain, [name, *name.split(",")])):
                self._indices.setdefault(each, []).append(i)

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        indices = torch.tensor([self.index(condition) for condition in conditions], device=images.device)
        follow(self.model, images)
        logits = self.model(pixel_values=self.prepare(images)).logits
        return logits.float().softmax(-1).gather(1, indices[:, None]).squeeze(1)

    def check_conditions(self, conditions: Sequence[Condition]) -> None:
        for each in conditions:
            self.index(each)

    def index(self, condition: Condition) -> int:
        """The classifier's class for a condition.

        Raises:
            ConfigError: the classifier has no such class, or more than one.
        """
        if self.match == "label":
            if condition.label is None or not 0 <= condition.label < len(self.names):
                raise ConfigError(
                    f"classifier '{self.classifier}' has no class {condition.label}: it has {len(self.names)}"
                )
            return condition.label
        found = self._indices.get(_plain(condition.text), [])
        if condition.label in found:  # such as the two cranes of ImageNet
            return condition.label
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(
                f"classifier '{self.classifier}' has several classes '{condition.text}' ({found}), and none "
                f"is the condition's label {condition.label}; match by label"
            )
        otherwise = f"it has {len(self.names)}, such as '{self.names[0]}'"
        hint = did_you_mean(_plain(condition.text), self._indices, otherwise)
        raise ConfigError(
            f"classifier '{self.classifier}' has no class '{condition.text}'{hint}; where its classes count "
            "as the model's do, match by label"
        )


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


class ClassProbabilityConfig(RewardConfig):
    """Probability of the requested class under an image classifier."""

    main_option = "classifier"
    reward = ClassProbability

    kind: Literal["class_probability"] = "class_probability"
    classifier: str
    """Image classifier of transformers: a folder or a hub repository."""
    match: Match = DEFAULT_MATCH
    """How the classifier's class is found: by the condition's "name", or by its "label"."""

    @property
    def backbone(self) -> str | None:
        return self.classifier
