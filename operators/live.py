"""Live progress of a running operator: facts for people, never part of a result.

An operator tells how far it is with `say`; its caller may listen with `sink`. Without a listener
nothing happens, so that an operator need not know its caller.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Facts = dict[str, Any]
"""JSON-able facts: task, tasks, epoch, epochs, step, steps, loss, images_per_second."""

INTERVAL = 0.5
"""Seconds between two facts that a sink hears of."""


class _Throttle:
    """Passes facts on, not too often: the newest wins, the last is never lost."""

    def __init__(self, function: Callable[[Facts], None], interval: float) -> None:
        self._function = function
        self._interval = interval
        self._passed = float("-inf")
        self._held: Facts | None = None

    def say(self, facts: Facts) -> None:
        self._held = facts
        if time.monotonic() - self._passed >= self._interval:
            self.flush()

    def flush(self) -> None:
        if self._held is not None:
            facts, self._held = self._held, None
            self._passed = time.monotonic()
            self._function(facts)


_sinks: list[_Throttle] = []


def say(**facts: Any) -> None:
    """Tells how far the running operator is; cheap enough for every step.

    Args:
        facts: JSON-able values, for example `task=3, tasks=10, loss=0.41`.
    """
    if _sinks:
        _sinks[-1].say(facts)


@contextmanager
def sink(function: Callable[[Facts], None], interval: float = INTERVAL) -> Iterator[None]:
    """Listens to what this process reports within a `with` block.

    Args:
        function: called with the newest facts, and with the last ones when the block ends.
        interval: seconds between two calls.
    """
    throttle = _Throttle(function, interval)
    _sinks.append(throttle)
    try:
        yield
    finally:
        _sinks.remove(throttle)
        throttle.flush()
