"""Opens what the assignment of a training names: backbone, images, queries, settings."""

import copy
from collections.abc import Callable
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
from graftwork.operators.data.index_file import SplitIndex
from graftwork.operators.data.labels import columns_of
from graftwork.operators.data.scenario import rows_of
from graftwork.operators.formats import features
from graftwork.operators.formats.index import load_index
from graftwork.operators.formats.ranks import load
from graftwork.operators.parameters.features import ShardParameters
from graftwork.operators.parameters.hints import ImageHints, NetworkPlace, TrainHints
from graftwork.operators.parameters.learners import LearnerRef, Network, Numerics
from graftwork.operators.parameters.tasks import Columns
from graftwork.operators.parameters.training import TrainingData, TrainParameters
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
    """A copy of the network for this task alone.

    Raises:
        IncompatibleError: its weights changed since the plan.
    """
    loaded = loading.load_on_device(
        place.model, place.weights, place.pooling, network.fingerprint, device, place.image_size
    )
    return networks.check(copy.deepcopy(loaded))


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
    parameters: ShardParameters, place: NetworkPlace, state: State
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
    [dataset] = work.inputs("dataset")
    index = load_index(store, *dataset)
    rows = own = rows_of(index.labels, index.domains, [data.task])
    # Which rows are exemplars is known here alone: the places are those of all tasks so far.
    placed = own
    if memory := data.memory:
        [ranked] = work.inputs("exemplars")
        ranks = load(store, *ranked)
        rows = np.union1d(own, exemplars.chosen(index.labels, index.domains, ranks, memory))
        placed = rows_of(index.labels, index.domains, [*memory.earlier, data.task])
    return open_rows(
        ref,
        reading,
        index,
        rows,
        torch.from_numpy(columns_of(index.labels[rows], ref.learned)),
        query_of(work, store, rows),
        exemplars=torch.from_numpy(np.isin(rows, own, invert=True)),
        chosen=np.searchsorted(placed, rows),
    )


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
        samples=index.sample_ids(np.arange(len(index.labels))),
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
    index: SplitIndex,
    rows: np.ndarray,
    targets: Tensor,
    query: Tensor | None,
    *,
    exemplars: Tensor | None = None,
    chosen: np.ndarray | None = None,
) -> TaskRows | FeatureRows:
    """The images at some places, which are the given rows of the index, for a learner.

    Args:
        exemplars: bool [N], which of them are of earlier tasks; None for none.
        chosen: positions within the places; None where these are those of the rows.
    """
    if not trained(ref.method).card.images:
        assert query is not None, "a method without images has features; checked while planning"
        return FeatureRows(
            targets=targets,
            exemplars=exemplars,
            query=query,
            name=lambda row: f"row {rows[row]} of the data set",
        )
    places = reading.places
    if chosen is not None and len(chosen) != sources.count(places):
        places = sources.pick(places, chosen)
    return TaskRows(
        sources.read(places),
        digests=index.digests[rows],
        samples=index.sample_ids(rows),
        name=partial(sources.place_name, places),
        targets=targets,
        exemplars=exemplars,
        query=query,
        preprocessing=ref.preprocessing,
        seed=ref.seed,
        max_pixels=reading.max_pixels,
    )


def query_of(work: Assignment, store: Store, rows: np.ndarray) -> Tensor | None:
    """Frozen features [N, D] of some rows, where the assignment reads them from the cache."""
    if not (shards := work.inputs("features")):
        return None
    return torch.from_numpy(features.load(store, shards)[rows].astype(np.float32))
