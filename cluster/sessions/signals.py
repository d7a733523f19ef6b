"""Ctrl-C and SIGTERM while Ray runs. Ray installs a handler of its own at `ray.init`, so ours come
after it."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from graftwork.operators.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], None]


@contextmanager
def _handling(handler: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only, which has its own handlers
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def raising() -> Iterator[None]:
    """A signal raises `Interrupted` wherever the main thread is."""

    def handler(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handling(handler):
        yield


@contextmanager
def polled() -> Iterator[Callable[[], None]]:
    """A signal is kept until the loop asks for it; a second one ends the process at once.

    Yields:
        A function that raises `Interrupted` when a signal has come.
    """
    received: list[int] = []

    def handler(number: int, _frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)

    def check() -> None:
        if received:
            raise Interrupted(received[0])

    with _handling(handler):
        yield check
