"""One stage on one worker: load its operator, run it, commit the result. Knows no Ray."""

import os
import pickle
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from graftwork.operators.assignment import Assignment
from graftwork.operators.errors import GraftworkError, OutOfMemory, StageFailed
from graftwork.operators.stage import Operator
from graftwork.operators.store import Store


@dataclass(frozen=True, kw_only=True)
class Done:
    """Report of a worker about a stage; small, as ten thousand of them stay in the driver.

    Args:
        key: the stage's key.
        seconds: time the operator took, or had taken when the stage was found stored.
        bytes: size of the committed files.
        facts: facts of the operator's result.
        reused: it was stored meanwhile by another run, or by an attempt thought lost.
        worker: host and process that ran it.
        node: Ray's id of the node, if there is one.
    """

    key: str
    seconds: float
    bytes: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    reused: bool = False
    worker: str = ""
    node: str = ""


def run_stage(operator: Operator, work: Assignment, store: Store, *, threads: int = 1) -> Done:
    """Computes a stage and commits it, unless it is stored already.

    Args:
        operator: how the stage is computed. It travels with the order, so that the driver alone
            says what an operator's name means.
        work: the stage.
        store: where its inputs are and its result goes.
        threads: CPU threads that the stage may use.

    Returns:
        Facts about the stored stage.

    Raises:
        GraftworkError: the operator failed; an error of another kind arrives as `StageFailed`, or
            `OutOfMemory`, because its class may not exist or unpickle in the driver.
    """
    with errors_of(work):
        if store.has(work.operator, work.key):
            return done(store.manifest(work.operator, work.key), reused=True)
        use_threads(threads)
        start = time.perf_counter()
        result = operator.load()(work, store)
        return done(store.commit(work, result, time.perf_counter() - start))


@contextmanager
def errors_of(work: Assignment) -> Iterator[None]:
    """Makes every error of a stage one that arrives in the driver as it is.

    Raises:
        GraftworkError: as for `run_stage`.
    """
    try:
        yield
    except GraftworkError as error:
        if _survives_pickle(error):
            raise
        raise StageFailed(_failed(work, error)) from error
    except Exception as error:
        # By name: torch has its own class, which must not be imported for this.
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise OutOfMemory(_one_line(error)) from error
        raise StageFailed(_failed(work, error)) from error


def use_threads(count: int) -> None:
    """Lets torch and OpenMP use this many threads, in a process that outlives the stage."""
    count = max(1, count)
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != count:
        torch.set_num_threads(count)


def done(manifest: Mapping[str, Any], *, reused: bool = False) -> Done:
    """Report of a worker about a stored stage."""
    return Done(
        key=manifest["key"],
        seconds=manifest["seconds"],
        bytes=sum(entry["bytes"] for entry in manifest["files"].values()),
        facts=manifest["facts"],
        reused=reused,
        worker=f"{socket.gethostname()}:{os.getpid()}",
    )


def _failed(work: Assignment, error: Exception) -> str:
    return f"stage {work.label} failed: {_one_line(error)}; the same command resumes"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _survives_pickle(error: GraftworkError) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False
