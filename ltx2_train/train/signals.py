"""Signals that ask a program to end, remembered until it is ready to."""

import signal
import time
from collections.abc import Collection
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GLANCE = 0.2  # s between two looks while waiting


class Signals:
    """Remembers signals instead of dying of them, while the context lasts.

    One of the kinds that are `insisting`, sent a second time, ends what is going on: KeyboardInterrupt.
    """

    def __init__(self, insisting: Collection[int] = (signal.SIGINT,)) -> None:
        self.received = False
        self._insisting = insisting
        self._seen: set[int] = set()

    def wait(self, seconds: float) -> None:
        """Until so many seconds are over or a signal has come."""
        deadline = time.monotonic() + seconds
        while not self.received and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, GLANCE))

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._note) for number in ASKING}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in self._insisting and number in self._seen:
            raise KeyboardInterrupt
        self._seen.add(number)
        self.received = True  # and nothing else: a handler may interrupt a write to the log
