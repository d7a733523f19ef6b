"""Operators for tests of the executor. Workers import them by name."""

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.operators import live
from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.errors import BadDataError, ConfigError, Diverged, OutOfMemory
from graftwork.operators.stage import OPERATORS, Operator, Resources, Stage
from graftwork.operators.store import Store
from graftwork.operators.store.memo import Memo

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


def work(work: Assignment, store: Store) -> Result:
    """Does what the hints say, and returns the sum of its inputs plus `value`.

    Hints: `seconds` to sleep; `log`, a folder that gets a file per attempt; `kill`, how many
    attempts kill their own process; `raises`, name of an error.
    """
    hints = work.hints
    attempt = 1
    if log := hints.get("log"):
        folder = Path(log)
        attempt = 1 + sum(1 for _ in folder.glob(f"{work.label}.*"))
        (folder / f"{work.label}.{time.time_ns()}").write_text(str(os.getpid()))
    if attempt <= hints.get("kill", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(hints.get("seconds", 0.0))
    if name := hints.get("raises"):
        raise OddError("a", "b") if name == "OddError" else ERRORS[name]
    total = work.parameters["value"] + sum(
        json.loads(store.read(operator, key, "value.json"))
        for operator, key in work.inputs("parts")
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


def train(work: Assignment, store: Store) -> Result:
    """A task of a counter that is trained: the count so far, plus `value` from every rank.

    Called on all ranks of a worker group. Hints as for `work`, with `rank`, the only one that dies
    or fails; `wait_for`, a file, and `seconds` at most to wait until it is there.
    """
    import torch
    import torch.distributed as dist

    hints = work.hints
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    attempt = 1
    if log := hints.get("log"):
        folder = Path(log)
        attempt = 1 + sum(1 for _ in folder.glob(f"{work.label}.{rank}.*"))
        (folder / f"{work.label}.{rank}.{time.time_ns()}").write_text(str(os.getpid()))
    live.say(task=work.parameters["task"], ranks=ranks)
    if rank == hints.get("rank", 0):
        if attempt <= hints.get("kill", 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if name := hints.get("raises"):
            raise ERRORS[name]
    if wait_for := hints.get("wait_for"):
        deadline = time.monotonic() + hints["seconds"]
        while not Path(wait_for).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    count = torch.tensor(work.parameters["value"])
    if ranks > 1:
        dist.all_reduce(count)
    total = int(count) + sum(
        json.loads(store.read(operator, key, "value.json"))
        for operator, key in work.inputs("previous")
    )
    facts = {
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "tunables": os.environ.get("GLIBC_TUNABLES"),
    }
    return Result(files={"value.json": json.dumps(total).encode()}, facts=facts)


TRAIN = Operator(version=1, function="tests.ray_operators:train")


def chain(
    name: str, tasks: int, workers: int = 1, per_task: dict[int, dict[str, object]] | None = None
) -> list[Stage]:
    """The stages of a chain; task n adds n + 1 per worker.

    Args:
        per_task: hints of some of its tasks.
    """
    OPERATORS["count"] = TRAIN
    stages: list[Stage] = []
    for task in range(tasks):
        stages.append(
            Stage(
                operator="count",
                parameters={"task": task, "value": task + 1, "name": name},
                inputs={"previous": (stages[-1],)} if stages else {},
                hints=(per_task or {}).get(task, {}),
                resources=Resources(workers=workers),
                label=f"{name} {task}",
                chain=name,
            )
        )
    return stages


def advised_megabytes() -> tuple[str | None, int]:
    """What a worker was started with; memory of a new tensor that may be in huge pages."""
    import torch

    kept = torch.ones(64 * 2**18)  # 64 MiB
    size, total = 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Rss:"):
            size = int(line.split()[1])
        if line.startswith("VmFlags:") and " hg" in line:
            total += size
    assert kept.sum() > 0
    return os.environ.get("GLIBC_TUNABLES"), total // 1024


@dataclass(frozen=True)
class DeadlyMemo(Memo):
    """A memo that kills the first process but this one that writes to it; `log` gets its id."""

    log: str
    owner: int = field(default_factory=os.getpid)

    def put(self, preimage: Mapping[str, Any], content: bytes) -> None:
        if os.getpid() != self.owner:
            try:
                with open(self.log, "x") as file:
                    file.write(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
        super().put(preimage, content)
