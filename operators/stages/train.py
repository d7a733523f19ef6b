"""Trains one task of a trained method: what a stage of a chain does.

Plain functions: a worker group of Ray Train calls `run` on every rank, a test or a GPU machine
without Ray calls it alone.

Shapes: N rows of the task, D width.
"""

import time
from typing import Any

import torch

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.trained import Trained, shared, trains
from graftwork.operators import live
from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.building import trained
from graftwork.operators.errors import Diverged
from graftwork.operators.formats.states import bytes_of, files_of, load_state
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.hints import TrainHints
from graftwork.operators.parameters.training import TrainParameters
from graftwork.operators.store import Store
from graftwork.operators.training import loop, snapshots
from graftwork.operators.training.opening import (
    backbone,
    reference_of,
    settings,
    task_of,
    task_rows,
)


def run(work: Assignment, store: Store) -> Result:
    """The operator `train`: what is left of a task, on all ranks of a group at once.

    Raises:
        BadDataError: images are not those that were indexed, or cannot be decoded.
        DamagedStage: an input is damaged.
        Diverged: NaN or infinity; the snapshot before it stays.
        IncompatibleError: the backbone's weights changed since the plan.
    """
    parameters = from_json(TrainParameters, work.parameters)
    hints = from_json(TrainHints, work.hints)
    learner, reading, numerics = parameters.learner, hints.reading, parameters.numerics
    torch.set_num_threads(max(1, int(reading.cpus)))
    task = task_of(learner.task)
    method = trained(learner.method)
    resume = snapshots.find(store, work.key)
    started = time.perf_counter()
    rows = task_rows(work, store, learner, parameters.data, reading)

    def say(**facts: Any) -> None:
        live.say(task=task.index + 1, tasks=hints.tasks, **facts)

    try:
        state, log = loop.train_task(
            trains(method),
            backbone(learner.network, reading.network, numerics.device),
            task,
            rows,
            _start(work, store, method),
            settings(learner.seed, numerics, reading.cpus, hints.checkpoint_minutes),
            single=parameters.single,
            reference=reference_of(work, store, parameters, hints),
            resume=resume,
            keep=lambda snapshot: snapshots.keep(store, work.key, snapshot),
            say=say,
        )
    except Diverged as error:
        raise Diverged(f"{work.label}: {error}") from error
    seconds = time.perf_counter() - started
    forwarded_now = log.images_forwarded - (resume.counts[1] if resume else 0)
    return Result(
        files=files_of(state),
        facts={
            "epochs": log.epochs,
            "steps": log.steps,
            "images_forwarded": log.images_forwarded,
            "exemplars": int(rows.exemplars.sum()),
            "images_per_second": round(forwarded_now / seconds, 2),
            "trainable_parameters": log.trainable,
            "state_bytes": bytes_of(state),
        },
        obsolete=(snapshots.name(work.key),),
    )


def _start(work: Assignment, store: Store, method: Trained) -> State | None:
    """State that the task begins with: of the task before, or what experts share; None for none."""
    if previous := work.inputs("previous"):
        return load_state(store, *previous[0])
    if first := work.inputs("first"):
        return shared(method, load_state(store, *first[0]))
    return None
