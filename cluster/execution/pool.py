"""Stages as Ray tasks, chains of them as worker groups: where a stage becomes remote."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray import exceptions

from graftwork.cluster.execution.chain_groups import Chains
from graftwork.cluster.execution.chain_worker import Progress
from graftwork.cluster.execution.graph import Plan
from graftwork.cluster.execution.policy import Failure, Kind
from graftwork.cluster.execution.train_group import Running
from graftwork.cluster.execution.worker import Done, run_stage
from graftwork.cluster.sessions.head import Head
from graftwork.cluster.sessions.session import Session
from graftwork.operators.assignment import Assignment
from graftwork.operators.errors import GraftworkError
from graftwork.operators.stage import OPERATORS, Operator, Stage
from graftwork.operators.store import Store

LOST = (
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.TaskCancelledError,
)


def run_on_ray(operator: Operator, work: Assignment, store: Store, threads: int) -> Done:
    """Runs `run_stage`, and notes the node."""
    done = run_stage(operator, work, store, threads=threads)
    return replace(done, node=ray.get_runtime_context().get_node_id())


# Ray's own retries are off: the policy decides, and can see that memory was the reason.
REMOTE = ray.remote(max_retries=0, retry_exceptions=False)(run_on_ray)


class RayPool:
    """A `Pool` on the Ray that this process is connected to.

    Args:
        store: travels with every stage.
        session: the connection, to watch over.
        slots: stages handed to Ray at once, besides those of chains.
        plan: what is computed, to know what follows in a chain.
    """

    def __init__(self, store: Store, session: Session, slots: int, plan: Plan) -> None:
        self._slots = slots
        self._store = store
        self._session = session
        self._stages: dict[ray.ObjectRef[Any], str] = {}
        self.chains: Chains[Running] = Chains(
            plan, session.cpus, session.gpus, lambda stages: Running(stages, store)
        )
        self._head = Head(session)

    @property
    def slots(self) -> int:
        """Stages that may be handed over at once: those of chains wait here and not in Ray."""
        return self._slots + len(self.chains.waiting)

    def submit(self, stage: Stage) -> None:
        """Hands a stage to Ray, or waits for it if it belongs to a chain."""
        if stage.chain:
            self.chains.submit(stage)
            return
        cpus, gpus = stage.resources.cpus, stage.resources.gpus
        task = REMOTE.options(num_cpus=cpus, num_gpus=gpus, name=stage.label or stage.operator)
        # Ray's stubs do not follow a function through `options`.
        ref: Any = task.remote(  # pyright: ignore[reportCallIssue]
            OPERATORS[stage.operator], stage.assignment(), self._store, int(cpus)
        )
        self._stages[ref] = stage.key

    def wait(self, timeout: float) -> Sequence[tuple[str, Done | Failure | Progress]]:
        """Results of the attempts that ended, within `timeout` seconds, and news of chains."""
        groups = {group.messages: group for group in self.chains.groups}
        refs = [*self._stages, *groups]
        ended = self.chains.results()  # reported before the stage was handed out
        if not refs:
            time.sleep(0.0 if ended else timeout)
            return ended
        try:
            ready, _ = ray.wait(refs, num_returns=1, timeout=0 if ended else timeout)
            if ready and len(refs) > 1:
                ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        except (exceptions.RaySystemError, ConnectionError) as error:
            return [self._disconnected(f"Ray at {self._session.address}: {_line(error)}")]
        news: list[tuple[str, Done | Failure | Progress]] = []
        for ref in ready:
            if ref in groups:
                news += self._hear(groups[ref])
                continue
            ended.append((self._stages.pop(ref), self._result(ref)))
            if isinstance(ended[-1][1], Done):
                self.chains.finished(ended[-1][0])
        ended += self.chains.results()
        # Also when attempts end: with the head gone they all end, with the same error.
        if not self._head.answers():
            lost = Failure(Kind.DISCONNECTED, self._head.silent)
            if not ended:
                return [self._disconnected(self._head.silent)]
            return [(key, r if isinstance(r, Done) else lost) for key, r in ended]
        return news + ended

    def cancel(self) -> None:
        """Raises KeyboardInterrupt in the workers, which removes what they have half written."""
        for ref in self._stages:
            ray.cancel(ref, force=False)
        self.close()

    def close(self) -> None:
        """Ends the worker groups: one may be ahead of what was asked for."""
        for group in self.chains.groups:
            group.stop()

    def _hear(self, group: Running) -> list[tuple[str, Done | Failure | Progress]]:
        messages, ended, failure = group.read()
        self.chains.told(group, messages)
        if ended:
            group.stop()
            self.chains.ended(group, failure)
        return [(key, message) for key, message in messages if isinstance(message, Progress)]

    def _disconnected(self, message: str) -> tuple[str, Failure]:
        keys = [*self._stages.values(), *self.chains.waiting]
        self._stages = {ref: key for ref, key in self._stages.items() if key != keys[0]}
        self.chains.waiting.pop(keys[0], None)
        return keys[0], Failure(Kind.DISCONNECTED, message)

    def _result(self, ref: Any) -> Done | Failure:
        try:
            return ray.get(ref)
        except exceptions.LocalRayletDiedError as error:
            # Not the worker's node but this process's own, through which it reaches the others.
            return Failure(Kind.DISCONNECTED, f"Ray at {self._session.address}: {_line(error)}")
        except LOST as error:
            return Failure(Kind.LOST, _line(error))
        except exceptions.OutOfMemoryError as error:
            return Failure(Kind.MEMORY, _line(error))
        except exceptions.RayTaskError as error:
            cause: Any = getattr(error, "cause", error)
            ours = cause if isinstance(cause, GraftworkError) else None
            if ours is not None:
                ours.add_note(str(error))  # the worker's traceback, for --debug
            return Failure(Kind.FAILED, str(ours) if ours else _line(cause), ours)
        except exceptions.RayError as error:
            return Failure(Kind.FAILED, _line(error))


def _line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
