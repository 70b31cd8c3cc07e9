"""The hub's client: what is asked of it, and a hub that does not answer. No test reaches the network."""

import socket
import time

import huggingface_hub
import pytest
from huggingface_hub import constants

from nextscale.base.errors import CheckpointError
from nextscale.models import hub


@pytest.fixture
def calls(monkeypatch):
    """What was asked of the hub's client, in order."""
    calls = []

    class HfApi:
        def __init__(self, token=None):
            self.token = token

        def __getattr__(self, name):
            return lambda *words, **keywords: calls.append((name, words, keywords | {"token": self.token}))

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    return calls


def test_upload_passes_its_keywords_on(calls, tmp_path):
    page = hub.upload("a/b", tmp_path, True, token="secret", revision="v1", commit_message="Better")
    assert page == "https://huggingface.co/a/b"
    create, branch, upload = calls
    assert create == ("create_repo", ("a/b",), dict(private=True, exist_ok=True, token="secret"))
    assert branch == ("create_branch", ("a/b",), dict(branch="v1", exist_ok=True, token="secret"))
    message = dict(commit_message="Better", revision="v1", token="secret")
    assert upload == ("upload_folder", (), dict(repo_id="a/b", folder_path=tmp_path) | message)


def test_upload_makes_no_branch_unasked(calls, tmp_path):
    hub.upload("a/b", tmp_path)
    assert [name for name, _, _ in calls] == ["create_repo", "upload_folder"]


def test_download_asks_with_the_token_and_at_the_revision(calls, monkeypatch, tmp_path):
    (tmp_path / "x").touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **keywords: str(tmp_path))
    assert hub.download("a/b", ["x"], token="secret", revision="v1") == tmp_path
    assert calls == [("model_info", ("a/b",), dict(revision="v1", timeout=hub.TIMEOUT, token="secret"))]


@pytest.fixture
def silent_hub(monkeypatch, tmp_path):
    """A hub that accepts connections and never answers; an empty cache."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(hub, "TIMEOUT", 0.2)
        yield tmp_path


def test_a_silent_hub_is_given_up(silent_hub):
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"https://huggingface\.co/a/b cannot be read \("):
        hub.download("a/b", ["x"])
    assert time.monotonic() - start < 5


def test_what_is_cached_stands_in_for_a_silent_hub(silent_hub):
    snapshot = silent_hub / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "x").touch()
    (silent_hub / "models--a--b" / "refs").mkdir()
    (silent_hub / "models--a--b" / "refs" / "main").write_text("0" * 40)
    assert hub.download("a/b", ["x"]) == snapshot
    with pytest.raises(CheckpointError, match="cannot be read"):
        hub.download("a/b", ["x", "y"])


@pytest.mark.parametrize("name", ["a--b/c", "a/b..c", "a/" + 100 * "b"])
def test_a_name_that_the_hub_does_not_allow(name):
    with pytest.raises(CheckpointError, match="cannot be read"):
        hub.download(name, ["x"])
