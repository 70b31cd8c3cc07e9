"""CLIP class: how sure a CLIP is that an image shows its own class and none of the others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.base.records import did_you_mean
from nextscale.models.class_names import imagenet_names
from nextscale.rewards.clip_score import DEFAULT_CLIP
from nextscale.rewards.networks.clip import load_clip
from nextscale.rewards.networks.prompts import DEFAULT_PROMPT, check_prompts
from nextscale.rewards.protocol import RewardConfig

IMAGENET = "imagenet"


class ClipClass:
    """Log-probability of the condition under a CLIP as a zero-shot classifier, in nats, at most 0.

    A CLIP score says how well an image fits one prompt: a shape that is no longer told from another one may
    still fit. This one falls as soon as another class would fit as well.

    Args:
        among: the classes to tell apart, among them all that are drawn; "imagenet" for its 1000.
        prompt: one template or several, whose mean logits count.
        clip: "toy", a folder, or a hub repository.

    Raises:
        ConfigError: fewer than two classes, a class given twice, or a prompt as in `ClipScore`.
        CheckpointError: the CLIP cannot be loaded.

    Source: CLIP (arXiv 2103.00020), section 3.1.2, with its own temperature.

    Shapes: B images · P prompts · K classes · E width of the embedding
    """

    def __init__(
        self,
        among: Sequence[str] | str,
        prompt: str | Sequence[str] = DEFAULT_PROMPT,
        clip: str | Path = DEFAULT_CLIP,
    ) -> None:
        if isinstance(among, str) and among != IMAGENET:
            raise ConfigError(f"clip_class needs a list of classes, or '{IMAGENET}', got '{among}'")
        self.names = imagenet_names() if among == IMAGENET else tuple(among)
        self._places = {name: place for place, name in enumerate(self.names)}
        if len(self.names) < 2 or len(self._places) < len(self.names):
            raise ConfigError(f"clip_class needs two classes or more, each once, got {', '.join(self.names)}")
        self.prompts = check_prompts(prompt, columns=False)
        self.clip = load_clip(clip)

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        own_B = torch.tensor([self.place(each) for each in conditions], device=images.device)
        image_BE = self.clip.embed_images(images)
        texts = [prompt.format(label=name, text=name) for prompt in self.prompts for name in self.names]
        text_PKE = self.clip.embed_texts(texts).unflatten(0, (len(self.prompts), -1))
        with torch.autocast(images.device.type, enabled=False):
            cosines_BK = image_BE @ text_PKE.mean(0).T
            logits_BK = self.clip.model.logit_scale.float().exp() * cosines_BK
        return logits_BK.log_softmax(-1).gather(1, own_B[:, None])[:, 0]

    def check_conditions(self, conditions: Sequence[Condition]) -> None:
        for each in conditions:
            self.place(each)

    def place(self, condition: Condition) -> int:
        """The condition's class, counted from 0.

        Raises:
            ConfigError: it is none of those.
        """
        if (place := self._places.get(condition.text)) is None:
            hint = did_you_mean(condition.text, self._places, f"it has {len(self.names)}")
            raise ConfigError(f"clip_class has no class '{condition.text}'{hint}; add it to `among`")
        return place


class ClipClassConfig(RewardConfig):
    """How sure a CLIP is of the class, among others."""

    main_option = "among"
    reward = ClipClass

    kind: Literal["clip_class"] = "clip_class"
    among: str | tuple[str, ...]
    """Classes to tell apart, among them all that are drawn; "imagenet" for its 1000."""
    prompt: str | tuple[str, ...] = DEFAULT_PROMPT
    """Prompt such as "a photo of a {label}"; for CLIP, also a list whose mean counts."""
    clip: str = DEFAULT_CLIP
    """CLIP: "toy", a folder or a hub repository; an aesthetic head comes with its own by default."""

    @property
    def backbone(self) -> str | None:
        return self.clip
