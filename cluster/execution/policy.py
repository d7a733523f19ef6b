"""Decisions about failed stages, as values; the executor acts on them. Without Ray.

Only what was not the stage's own fault is tried again. Ray's own retries are off: they repeat a
task that runs out of memory without end, and nobody is told.
"""

from dataclasses import dataclass
from enum import Enum

from graftwork.operators.errors import (
    ClusterLost,
    DamagedStage,
    GraftworkError,
    OutOfMemory,
    StageFailed,
)
from graftwork.operators.stage import Stage


class Kind(Enum):
    """Reason why an attempt at a stage ended without a result."""

    LOST = "worker lost"
    """Its worker process or node died."""
    MEMORY = "out of memory"
    """Ray stopped it because its node ran out of memory."""
    FAILED = "failed"
    """The operator raised an error."""
    DISCONNECTED = "cluster lost"
    """Ray itself does not answer."""


@dataclass(frozen=True)
class Failure:
    """One failed attempt.

    Args:
        kind: why it failed.
        message: one line, with the type of the error.
        error: the error that the operator raised, if it is one of ours.
    """

    kind: Kind
    message: str
    error: GraftworkError | None = None


@dataclass
class Tries:
    """Failed attempts at one stage so far."""

    lost: int = 0
    memory: int = 0
    repairs: int = 0


@dataclass(frozen=True)
class Retry:
    """Run the stage again.

    Args:
        after: seconds to wait.
    """

    after: float


@dataclass(frozen=True)
class Repair:
    """Set a stored stage aside, compute it again, then run the stage that reads it."""

    damage: DamagedStage


@dataclass(frozen=True)
class Raise:
    """Give up."""

    error: GraftworkError


Decision = Retry | Repair | Raise

SPEC_SECTION = {"features": "extract", "join": "extract", "predict": "extract"}
"""Operator -> its name under `resources` in a spec, for messages; otherwise the operator's own."""


def section(operator: str) -> str:
    """Key of an operator's resources in a spec, for messages."""
    return f"resources.{SPEC_SECTION.get(operator, operator)}"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Limits on trying again.

    Args:
        lost: times that a stage is repeated after its worker or node died.
        memory: times that it is repeated after Ray stopped it for want of memory.
        repairs: times that a stage may find stored inputs damaged.
        backoff: seconds before the first repetition; doubled each time, at most 30.
    """

    lost: int = 3
    memory: int = 2
    repairs: int = 3
    backoff: float = 0.5

    def decide(self, failure: Failure, stage: Stage, tries: Tries) -> Decision:
        """The decision about a failed attempt; counts it in `tries`.

        Args:
            failure: what happened.
            stage: the stage it happened to.
            tries: the stage's failed attempts before this one.
        """
        if failure.kind is Kind.DISCONNECTED:
            return Raise(ClusterLost(f"{failure.message}; the same command resumes"))
        if failure.kind is Kind.LOST:
            tries.lost += 1
            if tries.lost <= self.lost:
                return Retry(self._delay(tries.lost))
            return Raise(
                StageFailed(
                    f"stage {stage.label} failed: its worker died {tries.lost} times, last: "
                    f"{failure.message}; the same command resumes"
                )
            )
        if failure.kind is Kind.MEMORY:
            tries.memory += 1
            if tries.memory <= self.memory:
                return Retry(self._delay(tries.memory))
            return Raise(
                OutOfMemory(
                    f"stage {stage.label} ran out of memory {tries.memory} times"
                    f"{memory_hint(stage)}"
                )
            )
        if isinstance(failure.error, DamagedStage):
            tries.repairs += 1
            return Repair(failure.error) if tries.repairs <= self.repairs else Raise(failure.error)
        if isinstance(failure.error, OutOfMemory):
            return Raise(OutOfMemory(f"stage {stage.label}: {failure.message}{memory_hint(stage)}"))
        if failure.error is not None:
            return Raise(failure.error)
        return Raise(
            StageFailed(f"stage {stage.label} failed: {failure.message}; the same command resumes")
        )

    def _delay(self, failures: int) -> float:
        return min(30.0, self.backoff * 2.0 ** (failures - 1))


def memory_hint(stage: Stage) -> str:
    """Advice for the user about a stage that needs too much memory."""
    size = stage.hints.get("batch_size", stage.parameters.get("batch_size"))
    now = f" (now {size})" if size is not None else ""
    if stage.chain:  # what a method learns from at once is a property of the method
        return f"; lower the method's batch_size{now}, the same command resumes"
    return f"; lower {section(stage.operator)}.batch_size{now}, the same command resumes"
