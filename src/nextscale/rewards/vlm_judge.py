"""A vision-language model as the judge, behind any server with OpenAI's chat completions API."""

import concurrent.futures
import logging
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import pydantic
import torch
from pydantic import Field
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.base.images import to_pil
from nextscale.base.records import FREE_ON_RESUME
from nextscale.rewards.asking.client import RequestConfig, ScoringClient, png_base64
from nextscale.rewards.asking.waiting import start_thread
from nextscale.rewards.networks.prompts import COLUMN, FIELDS, fill

QUESTION = "How good is this picture of a {label}?"
SCORE_RANGE = (0.0, 10.0)
CONCURRENCY = 8

FIELD = re.compile(r"\{(\w*|data\[[^\[\]]*\])\}")

logger = logging.getLogger(__name__)


class _Message(pydantic.BaseModel):
    content: str


class _Choice(pydantic.BaseModel):
    message: _Message


class _Completion(pydantic.BaseModel):
    choices: list[_Choice] = pydantic.Field(min_length=1)


class VlmJudge:
    """The number that a vision-language model gives when it is shown an image and asked a question.

    A malformed answer is requested again; an image that never gets a valid one counts as not scored.

    Args:
        url: base URL of the API, such as http://localhost:8000/v1; "/chat/completions" is appended.
        vlm_model: name under which the server knows the model.
        question: what the model is asked; fields as in `ClipScore`.
        score_range: lowest and highest score; the model is told, and its answers are checked.
        concurrency: number of simultaneous requests.
        request: further options of `ScoringClient`; its `retries` are those of malformed answers, too.

    Raises:
        ConfigError: the URL, the question, the range or the environment variable cannot be used.
    """

    has_gradient = False

    def __init__(
        self,
        url: str,
        *,
        vlm_model: str,
        question: str = QUESTION,
        score_range: tuple[float, float] = SCORE_RANGE,
        concurrency: int = CONCURRENCY,
        **request: Any,
    ) -> None:
        low, high = score_range
        if not vlm_model:
            raise ConfigError("a judge needs vlm_model, the name that its server knows the model by")
        if not low < high:
            raise ConfigError(f"score_range is {low:g} to {high:g}, expected the lower number first")
        for field in FIELD.findall(question):
            if field not in FIELDS and not COLUMN.fullmatch(field):
                raise ConfigError(
                    f"question '{question}' has the field {{{field}}}, expected {{label}} or {{text}} alone, "
                    "or {data[NAME]} for a column of the prompts' file"
                )
        self.client = ScoringClient(f"{url.rstrip('/')}/chat/completions", **request)
        self.vlm_model, self.question, self.concurrency = vlm_model, question, concurrency
        self.instruction = f'Answer with JSON alone: {{"score": a number from {low:g} to {high:g}}}.'
        self.judgement: type[pydantic.BaseModel] = pydantic.create_model(
            "Judgement",
            __config__=pydantic.ConfigDict(extra="forbid", strict=True),
            score=(float, pydantic.Field(ge=low, le=high, allow_inf_nan=False)),
        )

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        bodies = [
            self._body(png_base64(image), self._asked(condition))
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
                self.client.name,
                len(malformed),
                len(bodies),
                self.client.excerpt(malformed[-1]),
            )
        return torch.tensor(scores)

    def check_conditions(self, conditions: Sequence[Condition]) -> None:
        for each in conditions:
            self._asked(each)

    def _asked(self, condition: Condition) -> str:
        """The question about an image. It may hold other braces, such as those of JSON."""
        return FIELD.sub(lambda match: fill(match[0], [condition])[0], self.question)

    def _body(self, png: str, question: str) -> dict[str, Any]:
        text = f"{question}\n{self.instruction}"
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
        """A score, NaN if no try gives one, and the last answer."""
        answer = b""
        for _ in range(self.client.retries + 1):
            answer = self.client.post(body)
            try:
                text = _Completion.model_validate_json(answer).choices[0].message.content
                return self.judgement.model_validate_json(text).model_dump()["score"], answer
            except pydantic.ValidationError:
                continue
        return math.nan, answer


class VlmJudgeConfig(RequestConfig):
    """Vision-language model that rates each image."""

    main_option = "url"
    reward = VlmJudge

    kind: Literal["vlm_judge"] = "vlm_judge"
    url: str
    """URL to POST to (remote), or base URL of an OpenAI-compatible API such as http://localhost:8000/v1."""
    vlm_model: str
    """Name under which the server knows the model."""
    question: str = QUESTION
    """What the model is asked about each image, such as "How well drawn is this {label}?"."""
    score_range: tuple[float, float] = SCORE_RANGE
    """Lowest and highest score that the model may give."""
    concurrency: int = Field(default=CONCURRENCY, ge=1, json_schema_extra=FREE_ON_RESUME)
    """Number of simultaneous requests."""
