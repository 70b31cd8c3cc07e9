"""Bars on a terminal, of what takes long, and nowhere else."""

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from nextscale.base import progress
from nextscale.base.progress import bar_of
from nextscale.base.tensors import fingerprint
from nextscale.models.pretrained import loading
from nextscale.pipeline import VARPipeline


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """An error output that is a terminal, to be redirected to; everything takes long."""
    monkeypatch.setattr(progress, "DELAY", 0.0)
    return Terminal()


def test_it_is_of_what_takes_long(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 60.0)
    with redirect_stderr(terminal), bar_of(3, "short", "step") as bar:
        bar.update(3)
    assert terminal.getvalue() == ""


def test_it_is_of_the_first_process(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with redirect_stderr(terminal), bar_of(3, "other", "step") as bar:
        bar.update(3)
    assert terminal.getvalue() == ""


def test_it_is_shown_on_a_terminal_alone(terminal: Terminal) -> None:
    for stream, shown in ((io.StringIO(), False), (terminal, True)):
        with redirect_stderr(stream), bar_of(3, "some steps", "step") as bar:
            bar.update(3)
        assert ("some steps: " in stream.getvalue()) == shown


def test_sampling_counts_scales(terminal: Terminal, tiny_pipeline: VARPipeline) -> None:
    seen: list[int] = []
    with redirect_stderr(terminal):
        tiny_pipeline([0, 1, 2], batch_size=2, callback_on_scale_end=lambda _, k, __: seen.append(k))
    assert "sampling: " in terminal.getvalue() and "/8 [" in terminal.getvalue()  # two batches of four scales
    assert seen == [0, 1, 2, 3] * 2


def test_loading_and_moving_count_tensors_and_layers(
    terminal: Terminal, make_pipeline: Callable[..., VARPipeline], tmp_path: Path
) -> None:
    make_pipeline().save_pretrained(str(tmp_path))
    for dtype in ("float32", "bfloat16"):
        with redirect_stderr(terminal):
            VARPipeline.from_pretrained(str(tmp_path), dtype)
        assert "reading transformer.safetensors: " in terminal.getvalue()
        assert "reading tokenizer.safetensors: " in terminal.getvalue() and "to cpu: " in terminal.getvalue()
        terminal.truncate(0)
    with redirect_stderr(terminal):
        fingerprint(make_pipeline().transformer.state_dict())
    assert "hashing weights: " in terminal.getvalue()


def test_transformers_is_silent_but_for_downloads() -> None:
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils.logging import is_progress_bar_enabled

    for switch, is_off in ((enable_progress_bars, False), (disable_progress_bars, True)):
        switch()
        with loading("network", "somewhere"):
            assert are_progress_bars_disabled() == is_off and not is_progress_bar_enabled()
        assert are_progress_bars_disabled() == is_off and is_progress_bar_enabled()
    enable_progress_bars()
