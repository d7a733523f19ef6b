"""Computes what is missing of a graph, and nothing else.

The loop below knows what to start, when to start it again and when to give up; a `Pool` knows how a
stage reaches a worker. Every result is in the store before the loop hears of it, so that a run may
end at any moment and the next one continues.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

from graftwork.cluster.execution.chain_worker import Progress
from graftwork.cluster.execution.graph import Plan, needed
from graftwork.cluster.execution.policy import Failure, Kind, Policy, Raise, Repair, Retry, Tries
from graftwork.cluster.execution.schedule import Schedule
from graftwork.cluster.execution.worker import Done
from graftwork.cluster.sessions.session import Session, connect
from graftwork.cluster.sessions.signals import polled
from graftwork.operators.errors import GraftworkError
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store
from graftwork.operators.store.lease import held

POLL = 0.2
"""Seconds between two looks at signals."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a stage.

    Args:
        kind: `cached` (no need to compute it), `started`, `progress`, `finished`, `retried`
            (failed, starts again), `damaged` (found damaged in the store and set aside), `failed`
            (for good).
        stage: the stage.
        seconds: time that its operator took, for `finished`.
        message: what went wrong, one line.
        done: what the worker told, for `finished`.
        live: what the operator said, for `progress`, see `operators/live.py`.
    """

    kind: Literal["cached", "started", "progress", "finished", "retried", "damaged", "failed"]
    stage: Stage
    seconds: float = 0.0
    message: str = ""
    done: Done | None = None
    live: Mapping[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> Mapping[str, Any]:
        """Facts of the operator's result if finished, the last ones it reported if in progress."""
        return self.done.facts if self.done else self.live


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Summary of a run: `total == computed + cached` when it succeeded.

    Args:
        total: distinct stages of the graph.
        computed: stages computed by this run, each counted once.
        cached: stages found stored, or not needed because all of their readers are.
        retries: attempts lost with a worker.
        repairs: stored stages that were damaged and computed again.
        done: key -> what the worker told, for the computed stages.
    """

    total: int
    computed: int
    cached: int
    retries: int = 0
    repairs: int = 0
    done: Mapping[str, Done] = field(default_factory=dict)

    def fact(self, name: str) -> float:
        """Sum of a number over the facts of the stages that this run computed."""
        return sum(d.facts.get(name, 0) for d in self.done.values() if not d.reused)


class Pool(Protocol):
    """Workers that compute stages."""

    @property
    def slots(self) -> int:
        """Stages that may be handed over at once."""
        ...

    def submit(self, stage: Stage) -> None:
        """Hands a stage over; never blocks."""
        ...

    def wait(self, timeout: float) -> Sequence[tuple[str, Done | Failure | Progress]]:
        """Keys and results of attempts that ended, and news of others, as soon as there are any."""
        ...

    def cancel(self) -> None:
        """Asks everything handed over to stop."""
        ...


OnEvent = Callable[[Event], None]
Connect = Callable[[], AbstractContextManager[Session]]


def execute(
    targets: Sequence[Stage],
    store: Store,
    *,
    connect: Connect = partial(connect, None),  # noqa: B008 (opens nothing yet)
    on_event: OnEvent = lambda event: None,
    max_in_flight: int | None = None,
    policy: Policy = Policy(),  # noqa: B008 (frozen)
    grace: float = 10.0,
    wait_for_resources: bool = False,
) -> Outcome:
    """Computes the targets on Ray, as far as they are not stored.

    Args:
        targets: the stages whose results are wanted.
        store: where results are looked for and go to.
        connect: opens a Ray session; called only when something must be computed.
        on_event: called in this thread for every event; what it raises ends the run.
        max_in_flight: stages handed to Ray at once; 4 per CPU of the cluster, at least 16, when
            None. Bounds the driver's memory.
        policy: when to try again.
        grace: seconds that running stages get to finish after another one failed for good.
        wait_for_resources: wait for nodes with enough CPUs and GPUs (an autoscaler) instead of
            refusing a stage that fits on no node.

    Raises:
        ConfigError: a stage asks for more than any node has, or Ray cannot be reached.
        GraftworkError: a stage failed for good; the others are kept.
        RunHeld: another run trains one of the chains.
        Interrupted: Ctrl-C or SIGTERM.
    """
    listed: dict[str, set[str]] = {}

    def stored(stage: Stage) -> bool:
        if stage.operator not in listed:
            listed[stage.operator] = store.keys(stage.operator)
        return stage.key in listed[stage.operator]

    plan = needed(targets, stored)
    for stage in plan.cached:
        on_event(Event(kind="cached", stage=stage))
    if not plan.compute:
        return Outcome(total=len(plan.stages), computed=0, cached=len(plan.stages))
    schedule = Schedule(plan)
    with (
        held(store, chain_leases(plan)),
        connect() as session,
        polled() as check_signals,
    ):
        # Only now: importing Ray takes longer than looking up a stored graph.
        from graftwork.cluster.execution.pool import RayPool
        from graftwork.cluster.execution.preflight import check_resources, check_store

        if not wait_for_resources:
            check_resources(plan.compute, session.nodes)
        if not session.local:
            check_store(store, session.nodes)
        slots = max_in_flight or max(16, 4 * int(session.cpus))
        with closing(RayPool(store, session, slots, plan)) as pool:
            return run(schedule, store, pool, policy, on_event, check_signals, grace)


def chain_leases(plan: Plan) -> dict[str, str]:
    """Lease names, for chains with something to compute -> what people call these chains.

    A chain goes by the key of its first stage in the graph, whether that is stored or not.
    """
    first: dict[str, str] = {}
    for stage in plan.stages:
        if stage.chain:
            first.setdefault(stage.chain, stage.key)
    return {first[stage.chain]: stage.chain for stage in plan.compute if stage.chain}


def run(
    schedule: Schedule,
    store: Store,
    pool: Pool,
    policy: Policy,
    on_event: OnEvent = lambda event: None,
    check_signals: Callable[[], None] = lambda: None,
    grace: float = 10.0,
) -> Outcome:
    """Brings a schedule to its end on a pool. Arguments and errors as for `execute`."""
    planned = schedule.open_keys()
    tries: dict[str, Tries] = {}
    done: dict[str, Done] = {}
    retries = repairs = 0
    error: GraftworkError | None = None
    deadline = float("inf")
    try:
        while not schedule.done if error is None else schedule.running:
            check_signals()
            now = time.monotonic()
            if now > deadline:
                break
            while error is None and len(schedule.running) < pool.slots:
                stage = schedule.take(now)
                if stage is None:
                    break
                pool.submit(stage)
                on_event(Event(kind="started", stage=stage))
            for key, result in pool.wait(POLL):
                stage = schedule.stages[key]
                if isinstance(result, Progress):
                    on_event(Event(kind="progress", stage=stage, live=result.facts))
                    continue
                if isinstance(result, Done):
                    schedule.finish(key)
                    done[key] = result
                    on_event(
                        Event(kind="finished", stage=stage, seconds=result.seconds, done=result)
                    )
                    continue
                decision = policy.decide(result, stage, tries.setdefault(key, Tries()))
                if isinstance(decision, Repair):
                    decision = _repair(decision, schedule, key, store, tries, policy, on_event)
                    repairs += isinstance(decision, Repair)
                if isinstance(decision, Raise):
                    schedule.abandon(key)
                    on_event(Event(kind="failed", stage=stage, message=str(decision.error)))
                    if decision.error is not result.error:
                        decision.error.__cause__ = result.error  # the traceback, for --debug
                    if error is None:
                        error, deadline = decision.error, time.monotonic() + grace
                    if result.kind is Kind.DISCONNECTED:
                        deadline = 0.0
                elif isinstance(decision, Retry):
                    retries += 1
                    schedule.retry(key, time.monotonic() + decision.after)
                    on_event(Event(kind="retried", stage=stage, message=result.message))
    finally:
        if schedule.running:
            pool.cancel()
    if error is not None:
        raise error
    total = len(schedule.stages)
    computed = len(done.keys() | planned)
    return Outcome(
        total=total,
        computed=computed,
        cached=total - computed,
        retries=retries,
        repairs=repairs,
        done=done,
    )


def _repair(
    decision: Repair,
    schedule: Schedule,
    reader: str,
    store: Store,
    tries: dict[str, Tries],
    policy: Policy,
    on_event: OnEvent,
) -> Repair | Retry | Raise | None:
    """Has a damaged stage computed again before its reader.

    Returns:
        Repair: the damaged stage was set aside. None: another reader had it set aside, the reader
        waits for it. Retry: it was computed again while the reader ran. Raise: it is no stage of
        this graph, or comes out damaged again and again.
    """
    damage = decision.damage
    stage = schedule.stages.get(damage.stage_key)
    if stage is None:
        return Raise(damage)
    if schedule.is_open(stage.key):
        schedule.wait_for(reader, stage.key)
        return None
    if schedule.finished_since_start(stage.key, reader):
        return Retry(0.0)
    count = tries.setdefault(f"repairs of {stage.key}", Tries())
    count.repairs += 1
    if count.repairs > policy.repairs:
        return Raise(damage)
    store.quarantine(stage.operator, stage.key)
    on_event(Event(kind="damaged", stage=stage, message=str(damage)))
    again = needed(
        [stage], lambda s: schedule.is_open(s.key) or store.has(s.operator, s.key)
    ).compute
    schedule.add(again)
    schedule.wait_for(reader, stage.key)
    return decision
