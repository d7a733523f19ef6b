"""Trains one task of a trained method: what a stage of a chain does.

Plain functions: a worker group of Ray Train calls `run` on every rank, a test or a GPU machine
without Ray calls it alone.

Shapes: N rows of the task, D width.
"""

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

import methods
from methods.contracts.card import State
from methods.contracts.trained import Task, Trained, shared, trains
from methods.networks import network
from operators import live
from operators.backbones import loading
from operators.data import exemplars, sources
from operators.data.index_file import SplitIndex
from operators.data.scenario import rows_of
from operators.errors import Diverged
from operators.formats import features
from operators.images.preprocessing import Preprocessing
from operators.stage import Order, Result
from operators.stages import exemplars as rank
from operators.stages import fit
from operators.store.store import Store
from operators.training import loop, snapshots
from operators.training.rows import FeatureRows, ReferenceRows, TaskRows


def run(order: Order, store: Store) -> Result:
    """The operator `train`: what is left of a task, on all ranks of a group at once.

    Raises:
        BadDataError: images are not those that were indexed, or cannot be decoded.
        DamagedStage: an input is damaged.
        Diverged: NaN or infinity; the snapshot before it stays.
        IncompatibleError: the backbone's weights changed since the plan.
    """
    keyed, hints = order.parameters, order.hints
    torch.set_num_threads(max(1, int(hints["cpus"])))
    task = task_of(keyed)
    method = build(keyed["method"])
    resume = snapshots.find(store, order.key)
    started = time.perf_counter()
    rows = task_rows(order, store)

    def say(**facts: Any) -> None:
        live.say(task=task.index + 1, tasks=task.count, **facts)

    try:
        state, log = loop.train_task(
            trains(method),
            backbone(keyed, hints),
            task,
            rows,
            _start(order, store, method),
            settings(keyed, hints),
            reference=reference_of(order, store),
            resume=resume,
            keep=lambda snapshot: snapshots.keep(store, order.key, snapshot),
            say=say,
        )
    except Diverged as error:
        raise Diverged(f"{order.label}: {error}") from error
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
        obsolete=(snapshots.name(order.key),),
    )


def _start(order: Order, store: Store, method: Trained) -> State | None:
    """What the task begins with: the task before, or what experts share; None for nothing."""
    if previous := order.inputs("previous"):
        return load_state(store, *previous[0])
    if first := order.inputs("first"):
        return shared(method, load_state(store, *first[0]))
    return None


def build(method: dict[str, Any]) -> Trained:
    """The method of a key's description `{name, version, hyperparameters}`."""
    return methods.build(method["name"], method["hyperparameters"])  # type: ignore[return-value]


def task_of(keyed: dict[str, Any]) -> Task:
    """What the method may know of the task of a key."""
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in keyed["task"].items()
    }
    return Task(**given)


def settings(keyed: dict[str, Any], hints: dict[str, Any]) -> loop.Settings:
    """What surrounds the training."""
    numerics = keyed["numerics"]
    return loop.Settings(
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


def adapted(order: Order, store: Store, graft: tuple[str, str]) -> Callable[[Tensor], Tensor]:
    """Features [B, D] of the backbone that a first session adapted.

    Args:
        order: whose parameters name the first session (`graft`) and the backbone.
        graft: operator and key of the stored training.
    """
    keyed = order.parameters
    learner, _ = loop.open_learner(
        build(keyed["graft"]["method"]),
        backbone(keyed, order.hints),
        task_of(keyed["graft"]),
        load_state(store, *graft),
        loop.Settings(seed=keyed["graft"]["seed"], device=keyed["numerics"]["device"]),
    )
    return learner.eval().features


def load_state(store: Store, operator: str, key: str) -> State:
    """What is stored of a task.

    Raises:
        DamagedStage: it is damaged.
    """
    return load_tensors(store.read(operator, key, "state.safetensors"))


def columns_of(labels: np.ndarray, learned: list[int]) -> Tensor:
    """Columns int64 [N] of labels, in the order learned."""
    column = np.full(int(max(learned)) + 1, -1, dtype=np.int64)
    column[learned] = np.arange(len(learned))
    return torch.from_numpy(column[labels])


def task_rows(order: Order, store: Store) -> TaskRows | FeatureRows:
    """The training images of the task of an order, and the exemplars of earlier tasks.

    Raises:
        BadDataError: they are not those that were indexed.
        DamagedStage: an input is damaged.
    """
    keyed, [dataset] = order.parameters, order.inputs("dataset")
    index = fit.load_index(store, *dataset)
    rows = own = rows_of(index.labels, index.domains, [keyed["images"]])
    # Which rows are exemplars is known here alone: the places are those of all tasks so far.
    placed = own
    if memory := keyed.get("memory"):
        [ranked] = order.inputs("exemplars")
        ranks = rank.load(store, *ranked)
        rows = np.union1d(own, exemplars.chosen(index.labels, index.domains, ranks, memory))
        placed = rows_of(index.labels, index.domains, [*memory["earlier"], keyed["images"]])
    return open_rows(
        order,
        index,
        rows,
        columns_of(index.labels[rows], keyed["learned"]),
        query_of(order, store, rows),
        exemplars=torch.from_numpy(np.isin(rows, own, invert=True)),
        chosen=np.searchsorted(placed, rows),
    )


def reference_of(order: Order, store: Store) -> ReferenceRows | None:
    """Images and texts of no task, where the order has them.

    Raises:
        BadDataError: the images are not those that were indexed.
    """
    keyed, hints = order.parameters, order.hints
    if not (stages := order.inputs("reference")):
        return None
    index, places = fit.load_index(store, *stages[0]), hints["reference"]
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
    order: Order,
    index: SplitIndex,
    rows: np.ndarray,
    targets: Tensor,
    query: Tensor | None,
    *,
    exemplars: Tensor | None = None,
    chosen: np.ndarray | None = None,
) -> TaskRows | FeatureRows:
    """The images at an order's `places`, which are the given rows of the index.

    Args:
        exemplars: bool [N], which of them are of earlier tasks; None for none.
        chosen: positions within the places; None where these are those of the rows.
    """
    keyed = order.parameters
    if not build(keyed["method"]).card.images:
        assert query is not None, "a method without images has features; checked while planning"
        return FeatureRows(
            targets=targets,
            exemplars=exemplars,
            query=query,
            name=lambda row: f"row {rows[row]} of the data set",
        )
    places = order.hints["places"]
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
        max_pixels=order.hints["max_pixels"],
    )


def query_of(order: Order, store: Store, rows: np.ndarray) -> Tensor | None:
    """Frozen features [N, D] of some rows, where the order reads them from the cache."""
    if not (shards := order.inputs("features")):
        return None
    return torch.from_numpy(features.load(store, shards)[rows].astype(np.float32))


def files_of(state: State) -> dict[str, bytes]:
    """A state as it is stored."""
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    return {"state.safetensors": save_tensors(on_cpu)}


def bytes_of(state: State) -> int:
    """What its tensors hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
