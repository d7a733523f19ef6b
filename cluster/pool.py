"""Stages as Ray tasks: the one place where a stage becomes remote."""

import socket
import time
from dataclasses import replace
from typing import Any

import ray
from ray import exceptions

from cluster.policy import Failure, Kind
from cluster.session import Session
from cluster.worker import Done, run_stage
from operators.errors import GraftworkError
from operators.stage import OPERATORS, Operator, Order, Stage
from operators.store import Store

SILENCE = 15.0
"""Seconds without an answer of the head node after which the cluster counts as lost."""

LOST = (
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.TaskCancelledError,
)


def run_on_ray(operator: Operator, order: Order, store: Store, threads: int) -> Done:
    """`run_stage`, and on which node."""
    done = run_stage(operator, order, store, threads=threads)
    return replace(done, node=ray.get_runtime_context().get_node_id())


# Ray's own retries are off: the policy decides, and can see that memory was the reason.
REMOTE = ray.remote(max_retries=0, retry_exceptions=False)(run_on_ray)


class RayPool:
    """A `Pool` on the Ray that this process is connected to.

    Args:
        store: travels with every stage.
        session: the connection, to watch over.
        slots: stages handed to Ray at once.
    """

    def __init__(self, store: Store, session: Session, slots: int) -> None:
        self.slots = slots
        self._store = store
        self._session = session
        self._stages: dict[ray.ObjectRef[Any], str] = {}
        self._answered = self._asked = time.monotonic()

    def submit(self, stage: Stage) -> None:
        """Hands a stage to Ray."""
        cpus, gpus = stage.resources.cpus, stage.resources.gpus
        task = REMOTE.options(num_cpus=cpus, num_gpus=gpus, name=stage.label or stage.operator)
        # Ray's stubs do not follow a function through `options`.
        ref: Any = task.remote(  # pyright: ignore[reportCallIssue]
            OPERATORS[stage.operator], stage.order(), self._store, int(cpus)
        )
        self._stages[ref] = stage.key

    def wait(self, timeout: float) -> list[tuple[str, Done | Failure]]:
        """Results of the attempts that ended, within `timeout` seconds."""
        refs = list(self._stages)
        if not refs:
            time.sleep(timeout)
            return []
        try:
            ready, _ = ray.wait(refs, num_returns=1, timeout=timeout)
            if ready and len(refs) > 1:
                ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        except (exceptions.RaySystemError, ConnectionError) as error:
            lost = Failure(Kind.DISCONNECTED, f"Ray at {self._session.address}: {_line(error)}")
            return [(self._stages.pop(refs[0]), lost)]
        ended = [(self._stages.pop(ref), self._result(ref)) for ref in ready]
        # Also when attempts end: with the head gone they all end, with the same error.
        if not self._head_answers():
            message = f"the head node of Ray at {self._session.address} does not answer"
            lost = Failure(Kind.DISCONNECTED, message)
            if not ended:
                ended = [(self._stages.pop(refs[0]), lost)]
            return [(key, r if isinstance(r, Done) else lost) for key, r in ended]
        return ended

    def cancel(self) -> None:
        """Raises KeyboardInterrupt in the workers, which removes what they have half written."""
        for ref in self._stages:
            ray.cancel(ref, force=False)

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

    def _head_answers(self) -> bool:
        """Whether the head node's port has accepted a connection lately.

        Without this, a driver whose head node dies waits for a minute, and is then ended by Ray
        without a word that a user could act on.
        """
        now = time.monotonic()
        if self._session.head is None or now - self._asked < 1.0:
            return True
        self._asked = now
        try:
            socket.create_connection(self._session.head, timeout=1.0).close()
        except OSError:
            return time.monotonic() - self._answered < (2.0 if self._session.local else SILENCE)
        self._answered = time.monotonic()
        return True


def _line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
