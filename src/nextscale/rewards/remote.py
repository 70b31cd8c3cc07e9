"""A reward behind HTTP: images out as PNG in JSON, scores back in JSON. docs/rewards.md has the protocol."""

import math
from collections.abc import Sequence
from dataclasses import asdict

import pydantic
import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import RewardError
from nextscale.base.images import to_pil
from nextscale.rewards.asking.client import Server, png_base64


class _Answer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    scores: list[float | None]


class Remote:
    """Scores of a server of yours, in whatever range it gives them.

    Args:
        url: where to POST.
        batch_size: images of one request.
        request_timeout: seconds that a request waits for a word from the server.
        retries: further tries after a lost connection, a timeout, or an answer 429 or 5xx.
        api_key_env: the environment variable that holds a bearer token, where the server wants one.

    Raises:
        ConfigError: the URL is none, or there is no such variable.
    """

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 32,
        request_timeout: float = 60.0,
        retries: int = 3,
        api_key_env: str | None = None,
    ) -> None:
        self.server = Server(url, request_timeout, retries, api_key_env)
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
            "conditions": [asdict(condition) for condition in conditions],
        }
        answer = self.server.post(content)
        try:
            scores = _Answer.model_validate_json(answer).scores
        except pydantic.ValidationError:
            raise RewardError(
                f"{self.server.name} answered {self.server.excerpt(answer)}, expected JSON such as "
                f'{{"scores": [0.5, null]}} with {len(images)} numbers'
            ) from None
        if len(scores) != len(images):
            raise RewardError(
                f"{self.server.name} answered {len(scores)} scores, expected {len(images)}, one an image"
            )
        return scores
