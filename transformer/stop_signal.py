"""Ctrl-C and SIGTERM as a wish to stop, which the work looks at when it suits."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopSignal:
    """Inside the block, Ctrl-C (SIGINT) or SIGTERM only sets `requested`; a second one acts as it always does.

    Args:
        patient: a second one does nothing either: torchrun passes on what a terminal has sent to all of them already.
    """

    def __init__(self, patient: bool = False) -> None:
        self.requested, self._patient = False, patient
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._patient:
            self.__exit__()
