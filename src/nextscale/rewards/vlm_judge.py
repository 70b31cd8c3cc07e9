"""A vision-language model as the judge, behind any server that speaks OpenAI's chat completions."""

import concurrent.futures
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import pydantic
import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.base.images import to_pil
from nextscale.rewards.asking.client import Server, png_base64
from nextscale.rewards.asking.waiting import start_thread

logger = logging.getLogger(__name__)


class _Message(pydantic.BaseModel):
    content: str


class _Choice(pydantic.BaseModel):
    message: _Message


class _Completion(pydantic.BaseModel):
    choices: list[_Choice] = pydantic.Field(min_length=1)


class VlmJudge:
    """What a vision-language model answers when it is shown an image and asked for a number.

    An answer that is not the JSON asked for is asked for again; an image without one counts as not scored.

    Args:
        url: of the API, such as http://localhost:8000/v1; "/chat/completions" is added.
        vlm_model: the name the server knows the model by.
        question: what is asked; "{label}" becomes the condition's text.
        score_range: the lowest and the highest score, told to the model and checked.
        concurrency: requests under way at once.
        request_timeout: seconds that a request waits for a word from the server.
        retries: further tries after a lost connection, a timeout, an answer 429 or 5xx; and after an answer
            that is not the JSON asked for.
        api_key_env: the environment variable that holds the API key, where the server wants one.

    Raises:
        ConfigError: something of this cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        vlm_model: str = "",
        question: str = "How good is this picture of a {label}?",
        score_range: tuple[float, float] = (0.0, 10.0),
        concurrency: int = 8,
        request_timeout: float = 60.0,
        retries: int = 3,
        api_key_env: str | None = None,
    ) -> None:
        low, high = score_range
        if not vlm_model:
            raise ConfigError("a judge needs vlm_model, the name that its server knows the model by")
        if not low < high:
            raise ConfigError(f"score_range is {low:g} to {high:g}, expected the lower number first")
        for field in re.findall(r"\{(\w*)\}", question):
            if field != "label":
                raise ConfigError(
                    f"question '{question}' has the field {{{field}}}, expected {{label}} alone"
                )
        self.server = Server(f"{url.rstrip('/')}/chat/completions", request_timeout, retries, api_key_env)
        self.vlm_model, self.question, self.concurrency = vlm_model, question, concurrency
        self.instruction = f'Answer with JSON alone: {{"score": a number from {low:g} to {high:g}}}.'
        self.judgement: type[pydantic.BaseModel] = pydantic.create_model(
            "Judgement",
            __config__=pydantic.ConfigDict(extra="forbid", strict=True),
            score=(float, pydantic.Field(ge=low, le=high, allow_inf_nan=False)),
        )

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        bodies = [
            self._body(png_base64(image), condition.text)
            for image, condition in zip(to_pil(images), conditions, strict=True)
        ]
        scores, malformed = [math.nan] * len(bodies), []

        def ask_each(indices: range) -> None:
            for i in indices:
                scores[i], answer = self._ask(bodies[i])
                if math.isnan(scores[i]):
                    malformed.append(answer)

        threads = min(self.concurrency, len(bodies))
        futures = [start_thread(ask_each, range(i, len(bodies), threads)) for i in range(threads)]
        for future in concurrent.futures.as_completed(futures):
            future.result()  # raises what its thread did
        if malformed:
            logger.warning(
                "%s: %d of %d images are not scored, for the answers are malformed; the last: %s",
                self.server.name,
                len(malformed),
                len(bodies),
                self.server.excerpt(malformed[-1]),
            )
        return torch.tensor(scores)

    def _body(self, png: str, label: str) -> dict[str, Any]:
        text = f"{self.question.replace('{label}', label)}\n{self.instruction}"
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}},
            {"type": "text", "text": text},
        ]
        schema = {"name": "judgement", "strict": True, "schema": self.judgement.model_json_schema()}
        return {
            "model": self.vlm_model,
            "messages": [{"role": "user", "content": content}],
            "response_format": {"type": "json_schema", "json_schema": schema},
            "temperature": 0,
        }

    def _ask(self, body: dict[str, Any]) -> tuple[float, bytes]:
        """A score, NaN where no try gives one, and the last answer."""
        answer = b""
        for _ in range(self.server.retries + 1):
            answer = self.server.post(body)
            try:
                text = _Completion.model_validate_json(answer).choices[0].message.content
                return self.judgement.model_validate_json(text).model_dump()["score"], answer
            except pydantic.ValidationError:
                continue
        return math.nan, answer
