"""Handling of Ctrl-C and SIGTERM, also while a library call runs for minutes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

EXIT_CODE = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME_KEY_SECONDS = 0.5  # for one Ctrl-C, the terminal and torchrun each send a signal

_received: list[int] = []


def raise_on_signals() -> None:
    """From now on Ctrl-C and SIGTERM raise KeyboardInterrupt."""
    for number in _SIGNALS:
        signal.signal(number, _raise)


def ignore_signals() -> None:
    """From now on Ctrl-C and SIGTERM do nothing: the process is ending."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_normally() -> None:
    """A signal was how the command ends: forget it, and ignore others from now on."""
    ignore_signals()
    _received.clear()


def was_raised() -> bool:
    """Whether a signal has raised KeyboardInterrupt, even if a library turned it into another exception."""
    return bool(_received)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    _received.append(number)
    raise KeyboardInterrupt


class Interruption:
    """In this context the first signal requests a stop (`requested`); the second ends the process with EXIT_CODE.

    `on_first` and `on_second` are called immediately, from a separate thread, because Python runs signal handlers only
    after the library call of the main thread has returned. Ending is safe: files are written to temporary files first.
    """

    def __init__(self, on_first: Callable[[], None], on_second: Callable[[], None]) -> None:
        self._on_first, self._on_second = on_first, on_second
        self._asked: float | None = None
        self._handled = False

    def requested(self) -> bool:
        """Whether a signal was received."""
        return self._handled or self._asked is not None  # on a busy machine the thread may come later

    def __enter__(self) -> Interruption:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._handled = True

    def _listen(self) -> None:
        while received := self._reader.recv(1):
            if received[0] not in _SIGNALS:
                continue
            if self._asked is None:
                self._asked = time.monotonic()
                self._on_first()
            elif time.monotonic() - self._asked > _SAME_KEY_SECONDS:
                self._on_second()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(EXIT_CODE)
