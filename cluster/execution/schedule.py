"""State machine over a plan: which stages may start now. Without Ray and without a clock."""

import heapq
from collections.abc import Iterable

from graftwork.cluster.execution.graph import Plan, inputs_of
from graftwork.operators.stage import Stage


class Schedule:
    """Hands out stages whose inputs are done, lowest rank first.

    A stage's rank is its place in the graph's order, so that two runs of one graph start their
    stages in the same order, and a stage that continues a begun result goes before a new one.
    """

    def __init__(self, plan: Plan) -> None:
        self.stages = {stage.key: stage for stage in plan.stages}
        self._rank = {key: rank for rank, key in enumerate(self.stages)}
        self._unmet: dict[str, set[str]] = {}
        self._readers: dict[str, set[str]] = {}
        self._ready: list[tuple[int, str]] = []
        self._paused: list[tuple[float, int, str]] = []
        self._open: set[str] = set()
        self.running: dict[str, int] = {}
        """Key of each running stage -> tick of its start."""
        self._tick = 0
        self._finished: dict[str, int] = {}
        self.add(plan.compute)

    @property
    def done(self) -> bool:
        """Tells whether nothing is left to compute."""
        return not self._open

    def is_open(self, key: str) -> bool:
        """Tells whether a stage waits or runs."""
        return key in self._open

    def open_keys(self) -> set[str]:
        """Keys of all stages that wait or run."""
        return set(self._open)

    def add(self, stages: Iterable[Stage]) -> None:
        """Adds stages to compute: the first ones, or some again whose result was lost."""
        added = [stage.key for stage in stages]
        self._open.update(added)
        # All open stages, not only the added ones: one that was ready is not any more when what it
        # reads is computed again.
        for key in self._open - self.running.keys():
            unmet = {child.key for child in inputs_of(self.stages[key])} & self._open
            self._unmet.setdefault(key, set()).update(unmet)
            for child in unmet:
                self._readers.setdefault(child, set()).add(key)
        for key in added:
            if not self._unmet[key]:
                heapq.heappush(self._ready, (self._rank[key], key))

    def take(self, now: float) -> Stage | None:
        """The next stage to start, None when all that is left waits or runs.

        Args:
            now: time on the clock that `retry` was given; only its differences matter.
        """
        while self._paused and self._paused[0][0] <= now:
            _, rank, key = heapq.heappop(self._paused)
            heapq.heappush(self._ready, (rank, key))
        while self._ready:
            _, key = heapq.heappop(self._ready)
            if key in self._open and key not in self.running and not self._unmet[key]:
                self._tick += 1
                self.running[key] = self._tick
                return self.stages[key]
        return None

    def finish(self, key: str) -> None:
        """A running stage is done: its readers may start."""
        self._tick += 1
        self._finished[key] = self._tick
        self._open.discard(key)
        self.running.pop(key, None)
        for reader in self._readers.pop(key, ()):
            self._unmet[reader].discard(key)
            if not self._unmet[reader]:
                heapq.heappush(self._ready, (self._rank[reader], reader))

    def retry(self, key: str, at: float) -> None:
        """A running stage failed and starts again, at the earliest at a time."""
        self.running.pop(key)
        heapq.heappush(self._paused, (at, self._rank[key], key))

    def abandon(self, key: str) -> None:
        """A running stage failed for good; what reads it never starts."""
        self.running.pop(key)

    def wait_for(self, key: str, other: str) -> None:
        """A stage starts (again) after another, open one."""
        self.running.pop(key, None)
        self._unmet[key].add(other)
        self._readers.setdefault(other, set()).add(key)

    def finished_since_start(self, key: str, reader: str) -> bool:
        """Tells whether a stage was computed after its reader, which runs, had started."""
        return self._finished.get(key, 0) > self.running[reader]
