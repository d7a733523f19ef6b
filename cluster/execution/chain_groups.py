"""Worker groups: which chains have one, which wait, what their stages wait for. Without Ray.

The schedule hands out a stage of a chain when those before it are done. The group does not wait
for that: it gets all that is left of its chain when the first stage is handed out, and what it
tells about later stages is kept until they are handed out, too.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from graftwork.cluster.execution.chain_worker import Progress
from graftwork.cluster.execution.graph import Plan, inputs_of
from graftwork.cluster.execution.policy import Failure
from graftwork.cluster.execution.worker import Done
from graftwork.operators.stage import Resources, Stage

Handle = TypeVar("Handle")
Message = Done | Failure | Progress


@dataclass(frozen=True)
class _Group:
    """A running worker group.

    Args:
        chain: the chain whose stages it computes.
        left: keys of those that are not stored yet, in order; the first one is being computed.
        resources: of the group.
    """

    chain: str
    left: list[str]
    resources: Resources


class Chains(Generic[Handle]):
    """Worker groups of a run.

    Args:
        plan: the graph, and what of it is computed.
        cpus: CPUs of the cluster.
        gpus: its GPUs.
        start: starts a worker group for some stages.
    """

    def __init__(
        self, plan: Plan, cpus: float, gpus: float, start: Callable[[list[Stage]], Handle]
    ) -> None:
        self.starts = 0
        """Worker groups started so far."""
        self.groups: dict[Handle, _Group] = {}
        self.waiting: dict[str, Stage] = {}
        """Stages that the schedule has handed out."""
        self._stages = plan.stages
        self._open = {stage.key for stage in plan.compute}
        self._cpus, self._gpus = cpus, gpus
        self._start = start
        self._queue: list[Stage] = []
        self._told: dict[str, Done | Failure] = {}

    def submit(self, stage: Stage) -> None:
        """Waits for a stage: one of a running group, or the first of a new one."""
        self.waiting[stage.key] = stage
        self._open.add(stage.key)
        running = any(stage.key in group.left for group in self.groups.values())
        if not running and stage.key not in self._told:
            self._queue.append(stage)
            self._start_queued()

    def finished(self, key: str) -> None:
        """A stage of the graph, also one of no chain, is done."""
        self._open.discard(key)

    def told(self, handle: Handle, messages: Iterable[tuple[str, Message]]) -> None:
        """A group reports on its stages."""
        for key, message in messages:
            if isinstance(message, Done):
                self.groups[handle].left.remove(key)
                self.finished(key)
            if not isinstance(message, Progress):
                self._told[key] = message

    def ended(self, handle: Handle, failure: Failure | None = None) -> None:
        """A group is gone.

        Args:
            failure: why, if it has not told what happened to its stage.
        """
        group = self.groups.pop(handle)
        if failure is not None and group.left:
            self._told[group.left[0]] = failure
        # Stages that were handed out, and not reached: ahead, as they have waited for long.
        missed = [self.waiting[key] for key in group.left if key in self.waiting]
        self._queue[:0] = [stage for stage in missed if stage.key not in self._told]
        self._start_queued()

    def results(self) -> list[tuple[str, Done | Failure]]:
        """Results or failures of the attempts at stages that were handed out, each once."""
        keys = [key for key in self._told if key in self.waiting]
        for key in keys:
            del self.waiting[key]
        return [(key, self._told.pop(key)) for key in keys]

    def _start_queued(self) -> None:
        """Starts groups as long as the cluster has room for them.

        A group that waits for CPUs would do so with three processes of Ray Train's.
        """
        running = {group.chain for group in self.groups.values()}
        for stage in list(self._queue):
            if stage.chain in running:
                continue  # again, for a stage that was damaged: after the others
            if not self._fits(stage.resources):
                break
            self._queue.remove(stage)
            running.add(stage.chain)
            work = self._rest(stage)
            self.starts += 1
            keys = [member.key for member in work]
            self.groups[self._start(work)] = _Group(stage.chain, keys, stage.resources)
        # What a new group computes anyway needs no group of its own.
        left = {key for group in self.groups.values() for key in group.left}
        self._queue = [stage for stage in self._queue if stage.key not in left]

    def _fits(self, wanted: Resources) -> bool:
        every = [wanted, *(group.resources for group in self.groups.values())]
        cpus = sum(one.workers * one.cpus for one in every)
        gpus = sum(one.workers * one.gpus for one in every)
        return len(every) == 1 or (cpus <= self._cpus and gpus <= self._gpus)

    def _rest(self, first: Stage) -> list[Stage]:
        """A stage and the open ones after it in its chain, as far as nothing else is missing."""
        chain = [stage for stage in self._stages if stage.chain == first.chain]
        after = chain[chain.index(first) + 1 :]
        work = [first]
        missing = self._open - {first.key}
        for stage in after:
            if stage.key not in self._open:
                continue
            if any(child.key in missing for child in inputs_of(stage)):
                break
            work.append(stage)
            missing.discard(stage.key)
        return work
