"""Opens what the assignment of a training names: backbone, images, queries, settings."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.trained import Learner, Task
from graftwork.methods.networks import network as networks
from graftwork.operators.assignment import Assignment
from graftwork.operators.backbones import loading
from graftwork.operators.building import trained
from graftwork.operators.data import exemplars, sources
from graftwork.operators.formats import selection
from graftwork.operators.formats.index import load_index
from graftwork.operators.formats.ranks import load
from graftwork.operators.formats.selection import Chosen
from graftwork.operators.parameters.features import FeatureKind
from graftwork.operators.parameters.hints import (
    ImageHints,
    NetworkPlace,
    Selection,
    TrainHints,
)
from graftwork.operators.parameters.learners import LearnerRef, Network, Numerics
from graftwork.operators.parameters.tasks import Columns
from graftwork.operators.parameters.training import Memory, TrainingData, TrainParameters
from graftwork.operators.store import Store
from graftwork.operators.training import loop
from graftwork.operators.training.rows import FeatureRows, ReferenceRows, TaskRows
from graftwork.operators.training.settings import Settings


def task_of(columns: Columns) -> Task:
    """The task of a key, as the method may know it."""
    given = {name: value for name, value in vars(columns).items() if value is not None}
    return Task(**given)


def settings(
    seed: int, numerics: Numerics, cpus: float, checkpoint_minutes: float = float("inf")
) -> Settings:
    """Settings of the training.

    Args:
        seed: of the run.
        cpus: threads that prepare images.
        checkpoint_minutes: between two snapshots.
    """
    return Settings(
        seed=seed,
        device=numerics.device,
        precision=numerics.precision,
        compile=bool(numerics.compile),
        decoders=max(1, int(cpus)),
        every=60.0 * checkpoint_minutes,
    )


def backbone(network: Network, place: NetworkPlace, device: str) -> Any:
    """A copy of the network for this task alone, and of the one beside it.

    Raises:
        IncompatibleError: its weights changed since the plan.
    """
    loaded = loading.load_on_device(
        place.model, place.weights, place.pooling, network.fingerprint, device, place.image_size
    )
    own = networks.check(copy.deepcopy(loaded))
    if network.beside is None or place.beside is None:
        return own
    return networks.paired(own, backbone(network.beside, place.beside, device))


def learner(
    ref: LearnerRef, place: NetworkPlace, state: State | None, settings: Settings
) -> Learner:
    """A learner with what was stored of it, on the device.

    Args:
        state: stored after the task; None for one that has seen nothing.

    Raises:
        IncompatibleError: the backbone's weights changed since the plan.
    """
    opened, _ = loop.open_learner(
        trained(ref.method),
        backbone(ref.network, place, settings.device),
        task_of(ref.task),
        state,
        settings,
    )
    return opened


def adapted(
    parameters: FeatureKind, place: NetworkPlace, state: State
) -> Callable[[Tensor], Tensor]:
    """Features [B, D] of the backbone that a first session adapted.

    Args:
        parameters: with the first session.
        state: what it left.
    """
    graft, device = parameters.graft, parameters.numerics.device
    assert graft is not None, "an adapted shard names what adapted its backbone"
    opened, _ = loop.open_learner(
        trained(graft.method),
        backbone(parameters.network, place, device),
        task_of(graft.task),
        state,
        Settings(seed=graft.seed, device=device),
    )
    return opened.eval().features


def task_rows(
    work: Assignment, store: Store, ref: LearnerRef, data: TrainingData, reading: ImageHints
) -> TaskRows | FeatureRows:
    """The training images of the task of an assignment, and the exemplars of earlier tasks.

    Raises:
        BadDataError: they are not those that were indexed.
        DamagedStage: an input is damaged.
    """
    memory = data.memory
    wanted = [*(memory.earlier if memory else ()), data.task]
    tasks = selection.of(work, store, reading.selection, wanted)
    every = selection.joined(tasks)
    order = selection.in_order(every)
    every, own = every.at(order), selection.numbers(tasks)[order] == len(tasks) - 1
    kept = np.ones(len(every), dtype=bool)
    # Which rows are exemplars is known here alone: the places are those of all tasks so far.
    if memory:
        selection.require(work, every, memory.order, "rows of the tasks so far")
        kept = np.concatenate(
            [*_exemplars(work, store, memory, tasks[:-1]), np.ones(len(tasks[-1]), dtype=bool)]
        )[order]
    rows = every.at(kept)
    return open_rows(
        ref,
        reading,
        rows,
        query_of(work, store, reading.selection, rows, data.query),
        exemplars=torch.from_numpy(~own[kept]),
        chosen=np.flatnonzero(kept),
    )


def _exemplars(
    work: Assignment, store: Store, memory: Memory, earlier: Sequence[Chosen]
) -> list[np.ndarray]:
    """Masks of the exemplars among the rows of earlier tasks."""
    indexes = [task.index for task in earlier]
    counts = [exemplars.counts(index) for index in indexes]
    most = exemplars.shares(counts, memory.exemplars, memory.budget)
    # One stage for each block of each task, in their order.
    stages = iter(work.inputs("exemplars"))
    return [
        exemplars.chosen(
            index,
            [load(store, *next(stages)) for _ in own],
            {block: most[number, block] for block in own},
        )
        for number, (index, own) in enumerate(zip(indexes, counts, strict=True))
    ]


def reference_of(
    work: Assignment, store: Store, parameters: TrainParameters, hints: TrainHints
) -> ReferenceRows | None:
    """Images and texts of no task, where the assignment has them.

    Raises:
        BadDataError: the images are not those that were indexed.
    """
    texts, places = parameters.data.reference, hints.reference
    if texts is None or places is None:
        return None
    [images] = work.inputs("reference")
    index = load_index(store, *images)
    rows = TaskRows(
        sources.read(places),
        digests=index.digests,
        samples=index.sample_ids(),
        name=partial(sources.place_name, places),
        targets=torch.zeros(len(index.labels), dtype=torch.int64),
        query=None,
        preprocessing=parameters.learner.preprocessing,
        seed=parameters.learner.seed,
        max_pixels=hints.reading.max_pixels,
    )
    return ReferenceRows(rows, texts, parameters.numerics.device)


def open_rows(
    ref: LearnerRef,
    reading: ImageHints,
    rows: Chosen,
    query: Tensor | None,
    *,
    exemplars: Tensor | None = None,
    chosen: np.ndarray | None = None,
) -> TaskRows | FeatureRows:
    """The images of some rows for a learner.

    Args:
        exemplars: bool [N], which of them are of earlier tasks; None for none.
        chosen: positions within the places; None where these are those of the rows.
    """
    targets = torch.from_numpy(rows.index.labels.astype(np.int64))
    if not trained(ref.method).card.images:
        assert query is not None, "a method without images has features; checked while planning"
        return FeatureRows(
            targets=targets,
            exemplars=exemplars,
            query=query,
            name=lambda row: f"row {rows.position[row]} of the data set",
        )
    places = reading.places
    if chosen is not None and len(chosen) != sources.count(places):
        places = sources.pick(places, chosen)
    return TaskRows(
        sources.read(places),
        digests=rows.index.digests,
        samples=rows.index.sample_ids(),
        name=partial(sources.place_name, places),
        targets=targets,
        exemplars=exemplars,
        query=query,
        preprocessing=ref.preprocessing,
        seed=ref.seed,
        task=ref.task.index,
        max_pixels=reading.max_pixels,
    )


def query_of(
    work: Assignment,
    store: Store,
    given: Selection,
    rows: Chosen,
    kind: FeatureKind | None,
) -> Tensor | None:
    """Frozen features [N, D] of some rows, where the key says that they come from the cache."""
    if kind is None:
        return None
    found = selection.matrix(work, store, given, rows)
    assert found is not None, "a key that names features comes with shards"
    return torch.from_numpy(found.astype(np.float32))
