"""Operators for tests of the executor. Workers import them by name."""

import json
import os
import signal
import time
from pathlib import Path

from operators.errors import BadDataError, ConfigError, Diverged, OutOfMemory
from operators.stage import OPERATORS, Operator, Order, Result, Stage
from operators.store import Store

ERRORS = {
    "ValueError": ValueError("no good\nsecond line"),
    "Diverged": Diverged("loss is nan at step 3"),
    "BadDataError": BadDataError("cat.png: not an image"),
    "ConfigError": ConfigError("lr: must be positive"),
    "OutOfMemory": OutOfMemory("CUDA out of memory"),
    "MemoryError": MemoryError(),
}


class OddError(Exception):
    """Cannot be unpickled: its arguments are not those of `__init__`."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def work(order: Order, store: Store) -> Result:
    """Does what the hints say, and returns the sum of its inputs plus `value`.

    Hints: `seconds` to sleep; `log`, a folder that gets a file per attempt; `kill`, how many
    attempts kill their own process; `raises`, name of an error.
    """
    hints = order.hints
    attempt = 1
    if log := hints.get("log"):
        folder = Path(log)
        attempt = 1 + sum(1 for _ in folder.glob(f"{order.label}.*"))
        (folder / f"{order.label}.{time.time_ns()}").write_text(str(os.getpid()))
    if attempt <= hints.get("kill", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(hints.get("seconds", 0.0))
    if name := hints.get("raises"):
        raise OddError("a", "b") if name == "OddError" else ERRORS[name]
    total = order.parameters["value"] + sum(
        json.loads(store.read(operator, key, "value.json"))
        for operator, key in order.inputs("parts")
    )
    facts = {"images_forwarded": 1, "omp": os.environ.get("OMP_NUM_THREADS", "")}
    return Result(files={"value.json": json.dumps(total).encode()}, facts=facts)


WORK = Operator(version=1, function="tests.ray_operators:work")


def stage(label: str, value: int = 1, parts: tuple[Stage, ...] = (), **hints: object) -> Stage:
    """A stage that adds."""
    OPERATORS["work"] = WORK
    return Stage(
        operator="work",
        parameters={"value": value, "label": label},
        inputs={"parts": parts} if parts else {},
        hints=hints,
        label=label,
    )
