"""A vision-language model as the judge, against a real server on this machine that plays the model."""

import base64
import json
import logging
import threading
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from http_server import Answer, FakeServer, Request
from PIL import Image

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError, RewardError
from nextscale.rewards import VlmJudge, score
from nextscale.rewards.asking import client as client_module

# Image i is plain, of brightness i / 10, so that a score tells which image it belongs to.
IMAGES = (torch.arange(6.0) / 10).view(6, 1, 1, 1).expand(6, 3, 8, 8)
CONDITIONS = [Condition(i, name) for i, name in enumerate(("star", "heart", "moon", "fish", "tree", "hare"))]


def shown(request: Request) -> float:
    """The brightness of the image of a request, in [0, 1]."""
    url = request.content["messages"][0]["content"][0]["image_url"]["url"]
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(BytesIO(base64.b64decode(data)))).mean() / 255


def asked(request: Request) -> str:
    return request.content["messages"][0]["content"][1]["text"]


def says(text: Any) -> Answer:
    """A chat completion in which the model says this; a dict is said as JSON."""
    content = json.dumps(text) if isinstance(text, dict) else text
    message = {"role": "assistant", "content": content}
    return Answer({"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


def brightness(request: Request) -> Answer:
    return says({"score": round(10 * shown(request), 3)})


def judge(server: FakeServer, **options: Any) -> VlmJudge:
    return VlmJudge(f"{server.url}/v1", **{"vlm_model": "judge-7b", "retries": 1} | options)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT", 0.0)


@pytest.mark.parametrize("concurrency", [1, 4, 64])
def test_every_image_gets_the_score_of_its_own_answer(fake_server: FakeServer, concurrency: int):
    fake_server.answer = brightness
    scores = score("judge", judge(fake_server, concurrency=concurrency), IMAGES, CONDITIONS)
    assert scores.tolist() == pytest.approx([0, 1, 2, 3, 4, 5], abs=0.05)
    assert len(fake_server.requests) == 6


def test_the_request_is_that_of_chat_completions(fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame-17")
    fake_server.answer = brightness
    options = {"question": "Is this {label} {label}-like?", "score_range": (-1, 5.5), "concurrency": 1}
    judge(fake_server, api_key_env="JUDGE_KEY", **options)(IMAGES[:2], CONDITIONS[:2])
    first, second = fake_server.requests
    assert first.path == "/v1/chat/completions" and first.headers["Authorization"] == "Bearer sesame-17"
    assert first.content["model"] == "judge-7b" and first.content["temperature"] == 0
    assert asked(first).splitlines()[0] == "Is this star star-like?"
    assert asked(second).splitlines()[0] == "Is this heart heart-like?"
    assert "-1 to 5.5" in asked(first)
    wanted = first.content["response_format"]
    assert wanted["type"] == "json_schema" and wanted["json_schema"]["strict"] is True
    schema = wanted["json_schema"]["schema"]
    assert (schema["required"], schema["additionalProperties"]) == (["score"], False)
    assert {"type": "number", "minimum": -1, "maximum": 5.5}.items() <= schema["properties"]["score"].items()


def test_columns_are_asked_about_and_texts_stay_as_they_are(fake_server: FakeServer):
    fake_server.answer = brightness
    question = 'Does the {label} say "{data[says]}"? Not {"a": 1}.'
    reward = judge(fake_server, question=question, concurrency=1)
    signs = [Condition(None, "a {text} sign", {"says": "OPEN"})]
    reward.check_conditions(signs)
    reward(IMAGES[:1], signs)
    (request,) = fake_server.requests
    assert asked(request).splitlines()[0] == 'Does the a {text} sign say "OPEN"? Not {"a": 1}.'
    with pytest.raises(ConfigError, match="column 'says', and the prompt 'star' has no such column"):
        reward.check_conditions(CONDITIONS)


def test_requests_are_under_way_at_once(fake_server: FakeServer):
    """As many as asked for: none is answered before three are there, and never are there more."""
    barrier = threading.Barrier(3, timeout=60)
    lock, under_way, most = threading.Lock(), 0, 0

    def answer(request: Request) -> Answer:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        barrier.wait()
        with lock:
            under_way -= 1
        return brightness(request)

    fake_server.answer = answer
    scores = judge(fake_server, concurrency=3)(IMAGES, CONDITIONS)
    assert scores.tolist() == pytest.approx([0, 1, 2, 3, 4, 5], abs=0.05) and most == 3


MALFORMED: list[Any] = [
    {"score": 10.5},
    {"score": -0.1},
    {"score": "7"},
    {"score": None},
    {"score": 7, "reason": "nice"},
    {},
    "7",
    "I cannot judge people.",
    '```json\n{"score": 7}\n```',
    '{"score": NaN}',
    None,
]


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_answer_is_asked_for_again_and_then_not_scored(
    fake_server: FakeServer, text: Any, caplog: pytest.LogCaptureFixture
):
    fake_server.answer = lambda request: says(text) if "moon" in asked(request) else brightness(request)
    with caplog.at_level(logging.WARNING):
        scores = score("judge", judge(fake_server, retries=2), IMAGES, CONDITIONS)
    assert scores.isnan().tolist() == [False, False, True, False, False, False]
    assert len(fake_server.requests) == 5 + 3
    assert "1 of 6 images are not scored, for the answers are malformed; the last: '" in caplog.text


def first_time(failing: Callable[[Request], Answer]) -> Callable[[Request], Answer]:
    """Fails once for each question, and then answers."""
    seen: set[str] = set()

    def answer(request: Request) -> Answer:
        if asked(request) in seen:
            return brightness(request)
        seen.add(asked(request))
        return failing(request)

    return answer


@pytest.mark.parametrize(
    "failing",
    [
        says("well"),
        Answer({"choices": []}),
        Answer({"error": "x"}),
        Answer(b"{"),
        Answer(b"", 500),
        Answer(b"", 429),
    ],
)
def test_a_second_try_may_do(fake_server: FakeServer, failing: Answer, caplog: pytest.LogCaptureFixture):
    fake_server.answer = first_time(lambda request: failing)
    scores = judge(fake_server, retries=1)(IMAGES, CONDITIONS)
    assert scores.tolist() == pytest.approx([0, 1, 2, 3, 4, 5], abs=0.05)
    assert len(fake_server.requests) == 12 and not caplog.text


def test_nothing_but_malformed_answers_is_told(fake_server: FakeServer):
    fake_server.answer = lambda request: says("sorry")
    with pytest.raises(RewardError, match="reward 'judge' returned NaN for all 6 images"):
        score("judge", judge(fake_server), IMAGES, CONDITIONS)


def test_a_slow_server_is_given_up(fake_server: FakeServer):
    over = threading.Event()

    def answer(request: Request) -> Answer:
        over.wait(60)
        return brightness(request)

    fake_server.answer = answer
    told = rf"^reward 'judge': {fake_server.url}/v1/chat/completions gave no .* 2 tries; .*ReadTimeout"
    with pytest.raises(RewardError, match=told):
        score("judge", judge(fake_server, request_timeout=0.5), IMAGES, CONDITIONS)
    over.set()


def test_a_refusal_of_the_server_is_told_without_the_key(
    fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JUDGE_KEY", "sesame-17")
    fake_server.answer = lambda request: Answer({"error": "bad key sesame-17"}, 401)
    with pytest.raises(RewardError, match=r"answered 401 Unauthorized .*bad key \*\*\*") as caught:
        score("judge", judge(fake_server, api_key_env="JUDGE_KEY", concurrency=1), IMAGES, CONDITIONS)
    assert "sesame" not in str(caught.value) and len(fake_server.requests) == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"vlm_model": ""}, "needs vlm_model"),
        ({"score_range": (5, 5)}, "score_range is 5 to 5, expected the lower number first"),
        ({"question": "a {lable}?"}, r"has the field \{lable\}, expected \{label\} or \{text\} alone"),
        ({"api_key_env": "NO_SUCH_KEY"}, "variable NO_SUCH_KEY is not set"),
    ],
)
def test_options_that_cannot_be_used_are_told(fake_server: FakeServer, options: dict, told: str):
    with pytest.raises(ConfigError, match=told):
        judge(fake_server, **options)
