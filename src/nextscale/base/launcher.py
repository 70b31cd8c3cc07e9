"""What a process owes to the launcher that started it beside others: torchrun, or Accelerate's, which is made
of it."""

import hashlib
import os
import signal
import threading
import time
from pathlib import Path

OFTEN = 0.5  # seconds between two looks at who the parent is
THREAD = "nextscale-launcher"


def stop_with_launcher() -> None:
    """Have this process stopped once its launcher is gone. Does nothing without one, and the second time.

    A launcher stops its processes when one of them fails; one that is killed leaves them to wait for each
    other with the run's folder locked. So they do by themselves what it would have done: SIGTERM, after which
    the step in hand ends with a checkpoint, and SIGKILL for what is not over in time, such as a wait for a
    process that is gone.
    """
    # To have another parent is to be an orphan only for what a launcher has started.
    if "TORCHELASTIC_RUN_ID" in os.environ and THREAD not in {each.name for each in threading.enumerate()}:
        threading.Thread(target=_watch, args=(os.getppid(),), name=THREAD, daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(OFTEN)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")))  # torchrun's own patience
    os.kill(os.getpid(), signal.SIGKILL)


def is_first_to_say(sentence: str) -> bool:
    """Whether no other process that the launcher started on this machine has said this yet. What fails in one
    mostly fails in all, or is passed on to all."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # in a folder for each process, in one for all
    if not file:
        return True
    digest = hashlib.sha256(sentence.encode(errors="replace")).hexdigest()
    try:
        (Path(file).parents[1] / f"nextscale-{digest[:16]}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # rather twice than not at all
        return True
    return True
