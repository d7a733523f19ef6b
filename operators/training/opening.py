"""What an assignment of a training names, opened: backbone, images, queries, settings."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftwork.methods.contracts.trained import Task
from graftwork.methods.networks import network
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
from graftwork.operators.formats.states import load_state
from graftwork.operators.images.preprocessing import Preprocessing
from graftwork.operators.store import Store
from graftwork.operators.training import loop
from graftwork.operators.training.rows import FeatureRows, ReferenceRows, TaskRows
from graftwork.operators.training.settings import Settings


def task_of(keyed: dict[str, Any]) -> Task:
    """What the method may know of the task of a key."""
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in keyed["task"].items()
    }
    return Task(**given)


def settings(keyed: dict[str, Any], hints: dict[str, Any]) -> Settings:
    """What surrounds the training."""
    numerics = keyed["numerics"]
    return Settings(
        seed=keyed["seed"],
        device=numerics["device"],
        precision=numerics["precision"],
        compile=numerics["compile"],
        decoders=max(1, int(hints["cpus"])),
        every=60.0 * hints.get("checkpoint_minutes", float("inf")),
    )


def backbone(keyed: dict[str, Any], hints: dict[str, Any]) -> Any:
    """A copy of the network for this task alone.

    Raises:
        IncompatibleError: its weights changed since the plan.
    """
    loaded = loading.load_on_device(
        hints["model"],
        hints["weights"],
        hints["pooling"],
        keyed["backbone"],
        keyed["numerics"]["device"],
        hints["image_size"],
    )
    return network.check(copy.deepcopy(loaded))


def adapted(work: Assignment, store: Store, graft: tuple[str, str]) -> Callable[[Tensor], Tensor]:
    """Features [B, D] of the backbone that a first session adapted.

    Args:
        work: whose parameters name the first session (`graft`) and the backbone.
        graft: operator and key of the stored training.
    """
    keyed = work.parameters
    learner, _ = loop.open_learner(
        trained(keyed["graft"]["method"]),
        backbone(keyed, work.hints),
        task_of(keyed["graft"]),
        load_state(store, *graft),
        Settings(seed=keyed["graft"]["seed"], device=keyed["numerics"]["device"]),
    )
    return learner.eval().features


def task_rows(work: Assignment, store: Store) -> TaskRows | FeatureRows:
    """The training images of the task of an assignment, and the exemplars of earlier tasks.

    Raises:
        BadDataError: they are not those that were indexed.
        DamagedStage: an input is damaged.
    """
    keyed, [dataset] = work.parameters, work.inputs("dataset")
    index = load_index(store, *dataset)
    rows = own = rows_of(index.labels, index.domains, [keyed["images"]])
    # Which rows are exemplars is known here alone: the places are those of all tasks so far.
    placed = own
    if memory := keyed.get("memory"):
        [ranked] = work.inputs("exemplars")
        ranks = load(store, *ranked)
        rows = np.union1d(own, exemplars.chosen(index.labels, index.domains, ranks, memory))
        placed = rows_of(index.labels, index.domains, [*memory["earlier"], keyed["images"]])
    return open_rows(
        work,
        index,
        rows,
        torch.from_numpy(columns_of(index.labels[rows], keyed["learned"])),
        query_of(work, store, rows),
        exemplars=torch.from_numpy(np.isin(rows, own, invert=True)),
        chosen=np.searchsorted(placed, rows),
    )


def reference_of(work: Assignment, store: Store) -> ReferenceRows | None:
    """Images and texts of no task, where the order has them.

    Raises:
        BadDataError: the images are not those that were indexed.
    """
    keyed, hints = work.parameters, work.hints
    if not (stages := work.inputs("reference")):
        return None
    index, places = load_index(store, *stages[0]), hints["reference"]
    rows = TaskRows(
        sources.read(places),
        digests=index.digests,
        samples=index.sample_ids(np.arange(len(index.labels))),
        name=partial(sources.place_name, places),
        targets=torch.zeros(len(index.labels), dtype=torch.int64),
        query=None,
        preprocessing=Preprocessing.from_json(keyed["preprocessing"]),
        seed=keyed["seed"],
        max_pixels=hints["max_pixels"],
    )
    return ReferenceRows(rows, tuple(keyed["reference"]), keyed["numerics"]["device"])


def open_rows(
    work: Assignment,
    index: SplitIndex,
    rows: np.ndarray,
    targets: Tensor,
    query: Tensor | None,
    *,
    exemplars: Tensor | None = None,
    chosen: np.ndarray | None = None,
) -> TaskRows | FeatureRows:
    """The images at the `places` of an assignment, which are the given rows of the index.

    Args:
        exemplars: bool [N], which of them are of earlier tasks; None for none.
        chosen: positions within the places; None where these are those of the rows.
    """
    keyed = work.parameters
    if not trained(keyed["method"]).card.images:
        assert query is not None, "a method without images has features; checked while planning"
        return FeatureRows(
            targets=targets,
            exemplars=exemplars,
            query=query,
            name=lambda row: f"row {rows[row]} of the data set",
        )
    places = work.hints["places"]
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
        preprocessing=Preprocessing.from_json(keyed["preprocessing"]),
        seed=keyed["seed"],
        max_pixels=work.hints["max_pixels"],
    )


def query_of(work: Assignment, store: Store, rows: np.ndarray) -> Tensor | None:
    """Frozen features [N, D] of some rows, where the order reads them from the cache."""
    if not (shards := work.inputs("features")):
        return None
    return torch.from_numpy(features.load(store, shards)[rows].astype(np.float32))
