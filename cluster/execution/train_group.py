"""One worker group of Ray Train for a chain of stages: the one place that knows Ray Train.

Ray Train makes the group (processes on the nodes, torch.distributed among them) and notices when
one of them dies or hangs. The rest is ours: a stage is stored when it is in the store, `policy.py`
decides about failures, and no checkpoint of Ray Train's exists.

    driver -> Group (an actor, calls `fit`) -> TrainController -> workers, which run `run_chain`

Each owns the next one, so that all of them end with the driver, whatever ends it.
"""

import os
import queue
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import ray
from ray import exceptions

from graftwork.cluster.execution.chain_groups import Message
from graftwork.cluster.execution.chain_worker import Broken, Progress, run_chain
from graftwork.cluster.execution.policy import Failure, Kind
from graftwork.cluster.execution.worker import Done
from graftwork.operators.assignment import Assignment
from graftwork.operators.errors import StageFailed
from graftwork.operators.stage import OPERATORS, Operator, Resources, Stage
from graftwork.operators.store import Store

ENVIRONMENT = {
    # The store, and data, may be given by relative paths.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # A stage is lost with its node in any case, so that a warning would be of no use.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Seconds between two looks at the workers, and until one without an answer counts as dead.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
}
"""Settings for Ray Train, unless the environment has others."""

Work = list[tuple[Operator, Assignment]]


class Group:
    """An actor that runs one worker group and keeps the messages of its workers for the driver."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[tuple[str, Message] | None] = queue.SimpleQueue()
        self._broken: list[Broken] = []

    def tell(self, message: Done | Progress | Broken) -> None:
        """Takes a message from a worker."""
        if isinstance(message, Broken):
            self._broken.append(message)
        else:
            self._messages.put((message.key, message))

    def messages(self) -> list[tuple[str, Message] | None]:
        """Messages since the last call, at least one; None is the last of all."""
        found = [self._messages.get()]
        while not self._messages.empty():
            found.append(self._messages.get())
        return found

    def fit(self, name: str, work: Work, store: Store, resources: Resources) -> Failure | None:
        """Runs the group to its end.

        Args:
            name: of the run, fresh: Ray Train would continue an earlier one of that name.
            work: the stages.
            store: where they go.
            resources: of the group.

        Returns:
            Why the group ended before all stages were stored, if no stage is to blame.
        """
        failure = None
        try:
            fit(ray.get_runtime_context().current_actor, name, work, store, resources)
        except Exception as error:
            key, failure = judge(error, self._broken)
            if key:
                self._messages.put((key, failure))
                failure = None
        self._messages.put(None)
        return failure


def fit(group: Any, name: str, work: Work, store: Store, resources: Resources) -> None:
    """Runs Ray Train; arguments as for `Group.fit`, whose handle is `group`."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    free_places_of_the_dead()
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    per_worker = {"CPU": resources.cpus, "GPU": resources.gpus}
    TorchTrainer(
        train,
        train_loop_config={"group": group, "work": work, "store": store, "cpus": resources.cpus},
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={kind: count for kind, count in per_worker.items() if count},
        ),
        run_config=RunConfig(
            name=name,
            # In memory: besides checkpoints, of which we have none, Ray Train writes a marker.
            storage_path="ray-train",
            storage_filesystem=PyFileSystem(FSSpecHandler(fsspec.filesystem("memory"))),
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
        ),
    ).fit()


def train(config: Mapping[str, Any]) -> None:
    """Entry point of each worker of a group."""
    node = ray.get_runtime_context().get_node_id()

    def report(message: Done | Progress | Broken) -> None:
        if isinstance(message, Done):
            message = replace(message, node=node)
        told = config["group"].tell.remote(message)
        if not isinstance(message, Progress):
            ray.get(told)  # before this process may end

    run_chain(config["work"], config["store"], int(config["cpus"]), report)


def judge(error: BaseException, broken: Sequence[Broken]) -> tuple[str, Failure]:
    """Key of the stage to blame for the end of a group, empty if none is, and the failure.

    When one rank dies, the others fail with whatever error their collective raises. Then only an
    error of ours is believed.

    Args:
        error: what `fit` raised.
        broken: what the ranks told about their stages.
    """
    failed = getattr(error, "worker_failures", {}).values()
    deaths = [e.health_check_failure for e in failed if hasattr(e, "health_check_failure")]
    for one in broken:
        if not (one.peer_lost or (deaths and isinstance(one.error, StageFailed))):
            return one.key, Failure(Kind.FAILED, str(one.error), one.error)
    if any(isinstance(death, exceptions.OutOfMemoryError) for death in deaths):
        return "", Failure(Kind.MEMORY, one_line(deaths[0]))
    return "", Failure(Kind.LOST, one_line(next(iter([*deaths, *failed]), error)))


def one_line(error: BaseException) -> str:
    """An error for a message."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def free_places_of_the_dead() -> None:
    """Removes placement groups of this job whose maker is dead.

    A controller that is killed leaves the CPUs of its workers reserved. Ray Train's own remedy asks
    the dashboard who is dead, and a local Ray has none.
    """
    # No public interface tells who made a placement group.
    from ray._private.state import state
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    accessor, messages = state._connect_and_get_accessor(), cast(Any, gcs_pb2)
    for record in accessor.get_placement_group_table():
        found = messages.PlacementGroupTableData.FromString(record)
        if found.creator_actor_dead and found.creator_job_id.hex() == job:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(found.placement_group_id)))


class Running:
    """A worker group that was started, as the driver sees it."""

    def __init__(self, stages: Sequence[Stage], store: Store) -> None:
        first = stages[0]
        slug = re.sub(r"[^a-z0-9]+", "-", first.chain.lower()).strip("-")
        name = f"{slug}-{first.key[:16]}-{uuid.uuid4().hex[:12]}"
        work = [(OPERATORS[stage.operator], stage.assignment()) for stage in stages]
        actor: Any = ray.remote(Group)
        self._group = actor.options(num_cpus=0, max_restarts=0, max_concurrency=8).remote()
        self._fit = self._group.fit.remote(name, work, store, first.resources)
        self.messages = self._group.messages.remote()
        """Ray's reference of the next messages: ready when there are some."""

    def read(self) -> tuple[list[tuple[str, Message]], bool, Failure | None]:
        """The messages that are ready, whether the group has ended, and why if it died."""
        try:
            found = ray.get(self.messages)
            told = [message for message in found if message is not None]
            if len(told) == len(found):
                self.messages = self._group.messages.remote()
                return told, False, None
            return told, True, ray.get(self._fit)
        except exceptions.RayError as error:
            return [], True, Failure(Kind.LOST, one_line(error))

    def stop(self) -> None:
        """Ends all processes of the group."""
        ray.kill(self._group)
