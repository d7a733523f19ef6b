"""A chain of stages on the workers of one group, stored one by one. Knows no Ray.

Every rank of the group runs `run_chain` with the same stages. An operator is called on all of them
at once and may use torch.distributed; rank 0 alone looks into the store and commits.
"""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.cluster.execution.worker import Done, done, errors_of, use_threads
from graftwork.operators import live
from graftwork.operators.assignment import Assignment
from graftwork.operators.errors import GraftworkError
from graftwork.operators.stage import Operator
from graftwork.operators.store import Store


@dataclass(frozen=True)
class Progress:
    """News of how far a stage is.

    Args:
        key: the stage's key.
        facts: what its operator said, see `operators/live.py`.
    """

    key: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Broken:
    """A stage failed on one rank.

    Args:
        key: the stage's key.
        error: what went wrong, with the traceback as a note.
        peer_lost: only because another rank is gone.
    """

    key: str
    error: GraftworkError
    peer_lost: bool


Report = Callable[[Done | Progress | Broken], None]


def run_chain(
    work: Sequence[tuple[Operator, Assignment]], store: Store, threads: int, report: Report
) -> None:
    """Computes the stages of a chain in order, each stored before the next one begins.

    Args:
        work: the stages, each with how it is computed.
        store: where inputs are and results go.
        threads: CPU threads of this process.
        report: called on rank 0 for what an operator says and for each stored stage, on every
            rank for an error.

    Raises:
        GraftworkError: as for `run_stage`, after it was reported; the stages before it are stored.
    """
    for operator, assignment in work:
        try:
            with errors_of(assignment):
                stored = _run(operator, assignment, store, threads, report)
        except GraftworkError as error:
            error.add_note(traceback.format_exc())
            report(Broken(assignment.key, error, _peer_lost(error.__cause__)))
            raise
        if stored is not None:
            report(stored)


def _run(
    operator: Operator, work: Assignment, store: Store, threads: int, report: Report
) -> Done | None:
    """Runs one stage on this rank; rank 0 gets the report of the stored stage."""
    group = _group()
    leads = group is None or group.get_rank() == 0
    # Rank 0 gets here when it has stored the stage before: the others wait for that, too.
    if _agreed(group, leads and store.has(work.operator, work.key)):
        return done(store.manifest(work.operator, work.key), reused=True) if leads else None
    use_threads(threads)
    start = time.perf_counter()
    if not leads:
        operator.load()(work, store)
        return None
    with live.sink(lambda facts: report(Progress(work.key, facts))):
        result = operator.load()(work, store)
    return done(store.commit(work, result, time.perf_counter() - start))


def _group() -> Any:
    """torch.distributed if this process belongs to a group of several, otherwise None."""
    import torch.distributed

    # Ray Train makes a group of one, too.
    here = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed if here and torch.distributed.get_world_size() > 1 else None


def _agreed(group: Any, decision: bool) -> bool:
    """The decision of rank 0."""
    if group is None:
        return decision
    import torch

    # NCCL moves tensors that are on a GPU.
    flag = torch.tensor(int(decision), device="cuda" if group.get_backend() == "nccl" else "cpu")
    group.broadcast(flag, src=0)
    return bool(flag.item())


def _peer_lost(cause: BaseException | None) -> bool:
    """Tells whether torch.distributed failed: its ranks do so when one of them dies.

    gloo reports that in a `RuntimeError` like any other, which names its source file.
    """
    if type(cause).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    return isinstance(cause, RuntimeError) and "/gloo/" in str(cause)
