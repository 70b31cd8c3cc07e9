"""Reward behind HTTP: images go out as PNG in JSON, scores come back in JSON (protocol: docs/rewards.md)."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import pydantic
import torch
from pydantic import Field
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import RewardError
from nextscale.base.images import to_pil
from nextscale.base.records import FREE_ON_RESUME
from nextscale.rewards.asking.client import RequestConfig, ScoringClient, png_base64

BATCH_SIZE = 32


class _Answer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    scores: list[float | None]


class Remote:
    """Scores of a server of yours, in whatever range it returns them.

    Args:
        url: where to POST.
        batch_size: images per request.
        request: further options of `ScoringClient`.

    Raises:
        ConfigError: the URL is malformed, or the environment variable is not set.
    """

    has_gradient = False

    def __init__(self, url: str, *, batch_size: int = BATCH_SIZE, **request: Any) -> None:
        self.client = ScoringClient(url, **request)
        self.batch_size = batch_size

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        scores: list[float | None] = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            scores += self._ask(images[part], conditions[part])
        return torch.tensor([math.nan if each is None else each for each in scores])

    def _ask(self, images: Tensor, conditions: Sequence[Condition]) -> list[float | None]:
        content = {
            "images": [png_base64(image) for image in to_pil(images)],
            "conditions": [_plain(condition) for condition in conditions],
        }
        answer = self.client.post(content)
        try:
            scores = _Answer.model_validate_json(answer).scores
        except pydantic.ValidationError:
            raise RewardError(
                f"{self.client.name} answered {self.client.excerpt(answer)}, expected JSON such as "
                f'{{"scores": [0.5, null]}} with {len(images)} numbers'
            ) from None
        if len(scores) != len(images):
            raise RewardError(
                f"{self.client.name} answered {len(scores)} scores, expected {len(images)}, one an image"
            )
        return scores


def _plain(condition: Condition) -> dict[str, Any]:
    """A condition as the protocol has it; other columns of a prompt's file where there are any."""
    values = asdict(condition)
    return values if condition.data else {name: values[name] for name in ("label", "text")}


class RemoteConfig(RequestConfig):
    """Server of yours that scores images (docs/rewards.md has the protocol)."""

    main_option = "url"
    reward = Remote

    kind: Literal["remote"] = "remote"
    url: str
    """URL to POST to (remote), or base URL of an OpenAI-compatible API such as http://localhost:8000/v1."""
    batch_size: int = Field(default=BATCH_SIZE, ge=1, json_schema_extra=FREE_ON_RESUME)
    """Images per request."""
