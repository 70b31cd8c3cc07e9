"""Ctrl-C that lets a step end."""

import contextlib
import signal
from collections.abc import Callable


class StopOnInterrupt:
    """The first Ctrl-C lets the step in hand end, so that its state can be saved; the second is immediate."""

    requested = False

    def __enter__(self) -> "StopOnInterrupt":
        self._previous: Callable | int | None = None
        with contextlib.suppress(ValueError):  # not in the main thread: the interrupt is not ours to take
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def _request(self, *_: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
