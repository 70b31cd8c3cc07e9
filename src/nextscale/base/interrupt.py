"""Signals that let a step end."""

import contextlib
import signal
import time
from types import FrameType
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
# seconds: a launcher passes on the Ctrl-C that its processes got from the terminal as well
ONE_KEYSTROKE = 1.0


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop, and did so after a checkpoint.

    Attributes:
        signal_number: the signal that asked.
    """

    def __init__(self, sentence: str, signal_number: int) -> None:
        super().__init__(sentence)
        self.signal_number = signal_number


class StopOnSignal:
    """The first Ctrl-C, SIGTERM or SIGHUP (of a terminal that closes) lets the step in hand end, so that its
    state can be saved; the second ends the process at once.

    Attributes:
        requested: the signal that asked to stop; 0 while none has.
    """

    requested = 0

    def __enter__(self) -> "StopOnSignal":
        self._previous: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # not in the main thread: the signals are not ours to take
            for each in SIGNALS:
                if each.name == "SIGHUP" and signal.getsignal(each) == signal.SIG_IGN:  # as `nohup` has it
                    continue
                self._previous[each] = signal.signal(each, self._request)
        return self

    def _request(self, number: int, _: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._begin = number, time.monotonic()
        elif time.monotonic() - self._begin > ONE_KEYSTROKE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
