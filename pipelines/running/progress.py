"""Progress of a run on stderr: a live display on a terminal, plain lines elsewhere."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from graftwork.cluster.execution.executor import Event
from graftwork.operators import live

SECONDS_BETWEEN_LINES = 10.0
"""Fewest seconds between two plain lines, so that a log stays readable."""


class Display:
    """Display of a run while it goes on."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.quiet = quiet
        self._counts: Counter[str] = Counter()
        self._images = 0
        self._first_image = 0.0
        self._total = self._remaining_images = 0
        self._last_line = 0.0
        self._bar: Progress | None = None
        self._row = TaskID(0)
        self._lines: Progress | None = None
        self._chains: dict[str, TaskID] = {}

    def say(self, message: str) -> None:
        """One line, at once."""
        if not self.quiet:
            self.console.print(message, markup=False, soft_wrap=True)

    @contextmanager
    def stages(self, total: int, images: int) -> Iterator[None]:
        """Shows progress through `total` stages, of which features of `images` images."""
        self._total, self._remaining_images = total, images
        if self.quiet or not self.console.is_terminal:
            yield
            return
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._bar, self._row = bar, bar.add_task("stages", total=total, note="")
        self._lines = Progress(TextColumn("{task.description}", markup=False))
        try:
            with Live(Group(bar, self._lines), console=self.console, transient=True):
                yield
        finally:
            self._bar = self._lines = None
            self._chains.clear()

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Shows how far a count is, on a terminal; gives the function to call with (done, all)."""
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        ) as bar:
            row = bar.add_task(what)
            yield lambda done, total: bar.update(row, completed=done, total=total)

    @contextmanager
    def indexing(self) -> Iterator[None]:
        """Shows how far the examination of images is, from the first one that has to be read."""
        if self.quiet:
            yield
            return
        before, started, spoken = 0, 0.0, 0.0
        bar: Callable[[int, int], None] | None = None

        def hear(facts: Mapping[str, Any]) -> None:
            nonlocal before, started, spoken, bar
            done, total, now = facts["examined"], facts["images"], time.monotonic()
            if done < before or not started:  # another data set
                started = now
                spoken = spoken or now
            before = done
            if self.console.is_terminal:
                bar = bar or stack.enter_context(self.counting("images indexed"))
                bar(done, total)
            elif now - spoken > SECONDS_BETWEEN_LINES:
                spoken = now
                rate = done / max(now - started, 0.001)
                left = f", {_duration((total - done) / rate)} left" if rate else ""
                self.say(f"{done}/{total} images indexed, {rate:.0f} images/s{left}")

        with ExitStack() as stack:
            stack.enter_context(live.sink(hear))
            yield

    def event(self, event: Event) -> None:
        """Takes note of an executor's event."""
        if event.kind in ("retried", "damaged", "failed"):
            self.say(f"{event.kind}: {event.stage.label}: {event.message}")
        self._follow_chain(event)
        if event.kind not in ("cached", "finished"):
            return
        self._counts[event.kind] += 1
        images = int(event.facts.get("images_forwarded", 0))
        if images and not self._images:
            # The first shard's own time is part of the rate: start counting where it started.
            self._first_image = time.monotonic() - event.seconds
        self._images += images
        self._remaining_images -= images
        if self._bar is not None:
            self._bar.update(self._row, completed=self._done, note=self._note())
        elif self._done == self._total or (
            event.kind == "finished"
            # A task that was trained is worth a line, however soon it comes.
            and (event.stage.chain or time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES)
        ):
            self._last_line = time.monotonic()
            self.say(f"{self._done}/{self._total} stages, {event.stage.label}{self._note(', ')}")

    def _follow_chain(self, event: Event) -> None:
        """One line for each chain that is being trained, below the bar of all stages."""
        lines, chain = self._lines, event.stage.chain
        if lines is None or not chain:
            return
        if event.kind != "progress":  # its next stage brings it back
            if chain in self._chains:
                lines.remove_task(self._chains.pop(chain))
            return
        text = live_line(chain, event.facts)
        if chain in self._chains:
            lines.update(self._chains[chain], description=text)
        else:
            self._chains[chain] = lines.add_task(text)

    @property
    def _done(self) -> int:
        return self._counts["cached"] + self._counts["finished"]

    def _note(self, prefix: str = "") -> str:
        elapsed = time.monotonic() - self._first_image
        if not self._images or elapsed <= 0:
            return ""
        rate = self._images / elapsed
        left = self._remaining_images / rate
        note = f"{rate:.0f} images/s"
        return prefix + note + (f", {_duration(left)} left" if left >= 1 else "")


def live_line(chain: str, facts: Mapping[str, Any]) -> str:
    """Facts of an operator, for people: `l2p seed 0 · task 3/10 · epoch 2/5 · loss 0.412`."""
    parts = [chain]
    for one, all_ in (("task", "tasks"), ("epoch", "epochs")):
        if one in facts:
            parts.append(f"{one} {facts[one]}" + (f"/{facts[all_]}" if all_ in facts else ""))
    if "loss" in facts:
        parts.append(f"loss {facts['loss']:.3f}")
    if "images_per_second" in facts:
        parts.append(f"{facts['images_per_second']:.0f} img/s")
    return " · ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
