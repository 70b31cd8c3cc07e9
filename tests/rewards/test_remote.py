"""A reward behind HTTP, against a real server on this machine."""

import base64
import gzip
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from http_server import Answer, FakeServer, Request
from PIL import Image

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError, RewardError
from nextscale.rewards import Remote, score
from nextscale.rewards.asking import client as client_module

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "reward_server.py"
IMAGES = torch.rand(5, 3, 8, 12, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
CONDITIONS = [Condition(i, name) for i, name in enumerate(("star", "heart", "moon", "fish", "tree"))]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were to be waited between tries, which a test does not."""
    asked: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", asked.append)
    return asked


def pixels(request: Request) -> torch.Tensor:
    """The images of a request, (B, 3, H, W) in [0, 1]."""
    opened = [Image.open(BytesIO(base64.b64decode(each))) for each in request.content["images"]]
    assert all(image.format == "PNG" and image.mode == "RGB" for image in opened)
    return torch.stack([torch.tensor(np.array(image)).permute(2, 0, 1) / 255 for image in opened])


def answer_red(request: Request) -> Answer:
    scores = pixels(request)[:, 0].mean((1, 2)).tolist()
    return Answer(
        {
            "scores": [
                None if c["text"] == "moon" else s
                for s, c in zip(scores, request.content["conditions"], strict=True)
            ]
        }
    )


def in_turn(*answers: Answer) -> Any:
    """Each request is given the next answer."""
    left = list(answers)
    return lambda request: left.pop(0)


def test_images_and_conditions_go_there_and_scores_come_back(fake_server: FakeServer):
    fake_server.answer = answer_red
    scores = score("red", Remote(f"{fake_server.url}/score?v=2", batch_size=2), IMAGES, CONDITIONS)
    expected = IMAGES[:, 0].mean((1, 2))
    assert scores.isnan().tolist() == [False, False, True, False, False]
    assert torch.allclose(scores[[0, 1, 3, 4]], expected[[0, 1, 3, 4]], atol=1e-6)
    assert [len(each.content["images"]) for each in fake_server.requests] == [2, 2, 1]
    assert torch.allclose(torch.cat([pixels(each) for each in fake_server.requests]), IMAGES)
    assert fake_server.requests[1].content["conditions"] == [
        {"label": 2, "text": "moon"},
        {"label": 3, "text": "fish"},
    ]
    first = fake_server.requests[0]
    assert first.path == "/score?v=2" and first.headers["Content-Type"] == "application/json"
    assert "Authorization" not in first.headers


def test_it_tries_again_with_growing_waits(fake_server: FakeServer, waits: list[float]):
    busy, good = Answer(b"busy", 503), Answer({"scores": [1, 2, 3, 4, 5.5]})
    fake_server.answer = in_turn(Answer(b"", 500), busy, busy, good)
    assert Remote(fake_server.url, retries=3)(IMAGES, CONDITIONS).tolist() == [1, 2, 3, 4, 5.5]
    assert waits == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("status", [429, 503])
def test_it_waits_as_long_as_it_is_asked_to(fake_server: FakeServer, waits: list[float], status: int):
    good = Answer({"scores": [0.0] * 5})
    dated = formatdate(time.time() + 58, usegmt=True)
    slow_down = [Answer(b"", status, {"Retry-After": each}) for each in ("7", dated, "soon")]
    fake_server.answer = in_turn(*slow_down, good)
    Remote(fake_server.url)(IMAGES, CONDITIONS)
    first, second, third = waits
    assert first == 7
    assert 14 < second <= 58  # more than twice the first, and however long this machine took until here
    assert third == min(2 * second, 60)


def test_it_does_not_wait_for_hours(fake_server: FakeServer, waits: list[float]):
    fake_server.answer = in_turn(Answer(b"quota", 429, {"Retry-After": "3600"}))
    with pytest.raises(RewardError, match=r"answered 429 .*'quota' and asks to wait 3600 s, more than 60 s"):
        Remote(fake_server.url)(IMAGES, CONDITIONS)
    assert waits == []


def test_a_server_that_stays_ill_is_given_up(fake_server: FakeServer, waits: list[float]):
    fake_server.answer = lambda request: Answer(b"out of\nmemory", 500)
    told = (
        f"^reward 'far': {fake_server.url}/score gave no scores in 3 tries; the last time: 500 .* 'out of mem"
    )
    with pytest.raises(RewardError, match=told):
        score("far", Remote(f"{fake_server.url}/score", retries=2), IMAGES, CONDITIONS)
    assert len(fake_server.requests) == 3 and len(waits) == 2


def test_a_server_that_is_silent_is_given_up(fake_server: FakeServer, waits: list[float]):
    over = threading.Event()

    def answer_late(request: Request) -> Answer:
        over.wait(60)
        return Answer()

    fake_server.answer = answer_late
    with pytest.raises(RewardError, match="gave no scores in 2 tries; the last time: ReadTimeout"):
        Remote(fake_server.url, request_timeout=0.5, retries=1)(IMAGES, CONDITIONS)
    over.set()


def test_an_answer_a_byte_a_moment_is_given_up(fake_server: FakeServer):
    """Each byte comes in time, and the whole never does."""
    fake_server.answer = lambda request: Answer(b" " * 1000, pause=0.1)
    begin = time.monotonic()
    with pytest.raises(
        RewardError, match=r"in 1 tries; the last time: the answer was not whole after 0\.5 s"
    ):
        Remote(fake_server.url, request_timeout=0.5, retries=0)(IMAGES, CONDITIONS)
    assert time.monotonic() - begin < 10


def test_an_answer_is_neither_compressed_nor_huge(fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch):
    bomb = gzip.compress(bytes(1_000_000))
    fake_server.answer = lambda request: Answer(bomb, headers={"Content-Encoding": "gzip"})
    with pytest.raises(RewardError, match="answered in the encoding 'gzip', which was not asked for"):
        Remote(fake_server.url)(IMAGES, CONDITIONS)
    assert fake_server.requests[-1].headers["Accept-Encoding"] == "identity"
    monkeypatch.setattr(client_module, "LARGEST_ANSWER", 2_000_000)
    fake_server.answer = lambda request: Answer(bytes(4_000_000))
    with pytest.raises(RewardError, match="answered with more than 2 MB, expected a number an image"):
        Remote(fake_server.url)(IMAGES, CONDITIONS)


def test_a_server_that_is_not_there_is_told(waits: list[float]):
    with pytest.raises(RewardError, match="gave no scores in 4 tries; the last time: ConnectError"):
        Remote("http://localhost:1/score")(IMAGES, CONDITIONS)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer({"scores": [1.0, 2.0]}), "answered 2 scores, expected 5, one an image"),
        (Answer({"scores": [1.0] * 6}), "answered 6 scores, expected 5"),
        (Answer({"scores": ["1.0"] * 5}), r"answered '{\"scores\": \[\"1.0\", .*expected JSON such as"),
        (Answer({"scores": [True] * 5}), "expected JSON such as .* with 5 numbers"),
        (Answer({"scores": 1.0}), "expected JSON such as"),
        (Answer({"score": [1.0] * 5}), "expected JSON such as"),
        (Answer([1.0] * 5), r"answered '\[1.0, 1.0, 1.0, 1.0, 1.0\]', expected JSON such as"),
        (Answer(b"<html>" + 1000 * b"x"), r"answered '<html>x{194}\.\.\.', expected JSON such as"),
        (Answer(b"\x80\x04\x95."), "expected JSON such as"),  # a pickle
        (Answer(b""), "answered '', expected JSON such as"),
        (Answer(b"no such\npath", 404), "answered 404 Not Found 'no such path'"),
        (Answer(b"", 301, {"Location": "/elsewhere"}), "answered 301"),
    ],
)
def test_an_answer_that_is_none_is_told_at_once(fake_server: FakeServer, answer: Answer, told: str):
    fake_server.answer = lambda request: answer
    with pytest.raises(RewardError, match=rf"(?s)^reward 'far': {fake_server.url}/score .*{told}") as caught:
        score("far", Remote(f"{fake_server.url}/score"), IMAGES, CONDITIONS)
    assert len(fake_server.requests) == 1 and "\n" not in str(caught.value)


def test_a_key_is_sent_and_told_nowhere(fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", "sesame-17")
    fake_server.answer = lambda request: Answer(b"wrong key sesame-17", 401)
    with pytest.raises(RewardError, match=r"401 Unauthorized 'wrong key \*\*\*'"):
        Remote(fake_server.url, api_key_env="MY_KEY")(IMAGES, CONDITIONS)
    assert fake_server.requests[0].headers["Authorization"] == "Bearer sesame-17"
    with_password = fake_server.url.replace("//", "//me:sesame-18@") + "/score?token=sesame-19"
    with pytest.raises(RewardError) as caught:
        Remote(with_password)(IMAGES, CONDITIONS)
    assert "sesame-18" not in str(caught.value) and "sesame-19" not in str(caught.value)
    # As a file ends, such as a mounted secret; and what no header can hold.
    monkeypatch.setenv("MY_KEY", "sesame-17\n")
    with pytest.raises(RewardError, match=r"401 Unauthorized 'wrong key \*\*\*'"):
        Remote(fake_server.url, api_key_env="MY_KEY")(IMAGES, CONDITIONS)
    assert fake_server.requests[-1].headers["Authorization"] == "Bearer sesame-17"
    for key in ("sesame\n17", "sésame"):
        monkeypatch.setenv("MY_KEY", key)
        with pytest.raises(ConfigError, match="variable MY_KEY is no API key") as refused:
            Remote(fake_server.url, api_key_env="MY_KEY")
        assert "same" not in str(refused.value)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ConfigError, match="the environment variable MY_KEY is not set"):
        Remote(fake_server.url, api_key_env="MY_KEY")


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host/score", "http://", "/score", "http://a\nb"]
)
def test_what_is_no_url_is_told(url: str):
    with pytest.raises(ConfigError, match="is no URL"):
        Remote(url)


def test_the_example_server_scores():
    command = [sys.executable, str(EXAMPLE), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            reward = Remote(process.stdout.readline().strip(), batch_size=2)
            red, green, blue = IMAGES.mean((2, 3)).T
            expected = red - (green + blue) / 2
            assert torch.allclose(score("red", reward, IMAGES, CONDITIONS), expected, atol=1e-5)
        finally:
            process.terminate()
