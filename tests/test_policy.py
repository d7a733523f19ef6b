"""Decisions about failures, as values."""

import pytest

from graftwork.cluster.execution.policy import Failure, Kind, Policy, Raise, Repair, Retry, Tries
from graftwork.operators.errors import (
    ClusterLost,
    DamagedStage,
    Diverged,
    GraftworkError,
    OutOfMemory,
    StageFailed,
)
from graftwork.operators.stage import Stage

STAGE = Stage(operator="features", parameters={}, hints={"batch_size": 512}, label="features 3/20")


def decisions(failure: Failure, times: int, policy: Policy) -> list[object]:
    tries = Tries()
    return [policy.decide(failure, STAGE, tries) for _ in range(times)]


def test_lost_workers_are_replaced_three_times_with_growing_waits() -> None:
    *retries, last = decisions(Failure(Kind.LOST, "WorkerCrashedError: gone"), 4, Policy())
    assert retries == [Retry(0.5), Retry(1.0), Retry(2.0)]
    assert isinstance(last, Raise)
    assert isinstance(last.error, StageFailed)
    assert str(last.error) == (
        "stage features 3/20 failed: its worker died 4 times, last: WorkerCrashedError: gone; "
        "the same command resumes"
    )


def test_waits_have_an_end() -> None:
    waits = decisions(Failure(Kind.LOST, "gone"), 9, Policy(lost=9))
    assert waits[-1] == Retry(30.0)


def test_memory_has_its_own_limit_and_says_what_to_lower() -> None:
    *retries, last = decisions(Failure(Kind.MEMORY, "OutOfMemoryError: ..."), 3, Policy())
    assert retries == [Retry(0.5), Retry(1.0)]
    assert isinstance(last, Raise)
    assert last.error.exit_code == 10
    assert str(last.error) == (
        "stage features 3/20 ran out of memory 3 times; lower resources.extract.batch_size "
        "(now 512), the same command resumes"
    )


def test_operator_out_of_memory_is_not_tried_again() -> None:
    failure = Failure(Kind.FAILED, "CUDA out of memory", OutOfMemory("CUDA out of memory"))
    (decision,) = decisions(failure, 1, Policy())
    assert isinstance(decision, Raise)
    assert isinstance(decision.error, OutOfMemory)
    assert "stage features 3/20: CUDA out of memory; lower" in str(decision.error)


@pytest.mark.parametrize("error", [Diverged("loss is nan"), StageFailed("stage x failed")])
def test_errors_of_ours_are_passed_on(error: GraftworkError) -> None:
    assert decisions(Failure(Kind.FAILED, str(error), error), 1, Policy()) == [Raise(error)]


def test_other_errors_name_the_stage() -> None:
    (decision,) = decisions(Failure(Kind.FAILED, "ImportError: no timm"), 1, Policy())
    assert isinstance(decision, Raise)
    assert str(decision.error) == (
        "stage features 3/20 failed: ImportError: no timm; the same command resumes"
    )


def test_damage_is_repaired_a_few_times() -> None:
    damage = DamagedStage("dataset", "ab" * 32, "images is missing")
    found = decisions(Failure(Kind.FAILED, str(damage), damage), 3, Policy(repairs=2))
    assert found == [Repair(damage), Repair(damage), Raise(damage)]


def test_a_lost_cluster_ends_the_run_at_once() -> None:
    (decision,) = decisions(Failure(Kind.DISCONNECTED, "no answer"), 1, Policy())
    assert isinstance(decision, Raise)
    assert isinstance(decision.error, ClusterLost)
    assert "the same command resumes" in str(decision.error)
