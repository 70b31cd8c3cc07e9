"""What processes do without their launcher, and say only once."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from nextscale.base.launcher import is_first_to_say

CHILD = """
import os, signal, sys, time
from pathlib import Path
from nextscale.base.launcher import stop_with_launcher

folder = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (folder / "asked").touch())  # and goes on waiting
stop_with_launcher()
(folder / "child").write_text(str(os.getpid()))
time.sleep(60)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


def start(folder: Path, **settings: str) -> tuple[subprocess.Popen, psutil.Process]:
    """A launcher and its child."""
    command = [sys.executable, "-c", LAUNCHER, "-c", CHILD, str(folder)]
    launcher = subprocess.Popen(command, env=os.environ | settings)
    (child,) = wait_for(lambda: psutil.Process(launcher.pid).children())
    wait_for((folder / "child").exists)
    return launcher, child


def wait_for(found: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def test_who_does_not_stop_when_the_launcher_is_gone_is_killed(tmp_path: Path) -> None:
    launcher, child = start(tmp_path, TORCHELASTIC_RUN_ID="x", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="0.5")
    launcher.kill()
    launcher.wait()
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() and (tmp_path / "asked").exists()


def test_without_a_launcher_a_parent_may_end(tmp_path: Path) -> None:
    """As a shell does, of what runs on under nohup."""
    launcher, child = start(tmp_path)
    launcher.kill()
    launcher.wait()
    with pytest.raises(psutil.TimeoutExpired):
        child.wait(timeout=2)
    assert not (tmp_path / "asked").exists()
    child.kill()


def test_what_several_processes_say_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    said = []
    for rank in range(2):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        said.append([is_first_to_say("no such file"), is_first_to_say(f"it is mine alone: {rank}")])
    assert said == [[True, True], [False, True]]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "0" / "error.json"))
    assert is_first_to_say("no such file")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert is_first_to_say("no such file") and is_first_to_say("no such file")
