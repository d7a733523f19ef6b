"""Fits a closed-form method along a stream of tasks.

The rows of a task are summed block by block, a block being the rows of one class in one domain:
whatever the class order, the same blocks are added, in the order of the tasks and, within a task,
of class and domain. A sweep over class orders reads the blocks' statistics again and again; where
they are small they stay in the worker process.
"""

import json
import time
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.fitted import Fitted, Rows
from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.building import fitted
from graftwork.operators.data.exemplars import blocks
from graftwork.operators.data.scenario import StreamTask, seen_classes, stream_of
from graftwork.operators.errors import DamagedStage, Diverged
from graftwork.operators.formats import features
from graftwork.operators.formats.index import load_index
from graftwork.operators.formats.texts import load
from graftwork.operators.parameters.as_json import from_json, to_json
from graftwork.operators.parameters.fitting import FitParameters
from graftwork.operators.parameters.hints import CpuHints
from graftwork.operators.parameters.learners import MethodRef
from graftwork.operators.store import Store

BLOCK_CACHE_BYTES = 512 * 2**20
"""Statistics of all blocks together are kept in a worker process up to this size."""


def run(work: Assignment, store: Store) -> Result:
    """The operator `fit`: the state that predicts, after every task.

    Raises:
        DamagedStage: an input is damaged.
        Diverged: the solution holds NaN or infinity.
    """
    parameters = from_json(FitParameters, work.parameters)
    torch.set_num_threads(max(1, int(from_json(CpuHints, work.hints).cpus)))
    method = fitted(parameters.method)
    seed = parameters.seed or 0
    stream = TrainingRows(store, work, parameters.num_classes)
    total: State | None = None
    tensors: dict[str, torch.Tensor] = {}
    reports = []
    tasks = stream_of(parameters.tasks)
    for number, task in enumerate(tasks):
        started = time.perf_counter()
        newest: State | None = None
        for block in stream.blocks(task):
            part = stream.statistics(method, parameters.method, seed, block)
            newest = part if newest is None else method.add(newest, part)
        assert newest is not None, "a task without training rows is refused before the run"
        total = newest if total is None else method.add(total, newest)
        seen = list(seen_classes(tasks, number))
        state = method.solve(total, newest, seen, seed)
        for name, tensor in state.items():
            if not bool(torch.isfinite(tensor).all()):
                raise Diverged(f"{work.label}: {name} after task {number} is NaN or infinite")
            tensors[f"{number}/{name}"] = tensor.contiguous()
        reports.append(method.report(state) | {"seconds": round(time.perf_counter() - started, 6)})
    return Result(
        files={"state.safetensors": save_tensors(tensors)},
        facts={
            "tasks": reports,
            "state_bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
            "trainable_parameters": 0,
        },
    )


class TrainingRows:
    """The training features of a fit, by block."""

    def __init__(self, store: Store, work: Assignment, num_classes: int) -> None:
        [dataset] = work.inputs("dataset")
        self._shards = features.roles(work)
        self._features = features.matrix(store, self._shards)
        self._index = load_index(store, *dataset)
        self._blocks = dict(blocks(self._index.labels, self._index.domains))
        self._num_classes = num_classes
        texts = work.inputs("text")
        self._texts = load(store, *texts[0]) if texts else None
        self._identity = json.dumps([store.url, dataset, self._shards, texts])
        if len(self._features) != len(self._index.labels):
            raise DamagedStage(
                *dataset,
                f"{len(self._index.labels)} samples, but {len(self._features)} features",
            )

    def blocks(self, task: StreamTask) -> Iterator[tuple[int, int]]:
        """(class, domain) of the blocks of a task that hold rows, in ascending order."""
        for label in sorted(task.classes):
            for domain in sorted(task.domains):
                if (label, domain) in self._blocks:
                    yield label, domain

    def rows(self, block: tuple[int, int]) -> Rows:
        """The rows of a block, in the order of the data set."""
        chosen = self._blocks[block]
        return Rows(
            features=torch.from_numpy(self._features[chosen].astype(np.float32)),
            labels=torch.from_numpy(self._index.labels[chosen].astype(np.int64)),
            samples=torch.from_numpy(self._index.sample_ids(chosen)),
            num_classes=self._num_classes,
            texts=self._texts,
        )

    def statistics(
        self, method: Fitted, described: MethodRef, seed: int, block: tuple[int, int]
    ) -> State:
        """Statistics of a block, from the process's memory where it was summed before."""
        kept = _kept_blocks(self._identity, json.dumps(to_json(described), sort_keys=True), seed)
        if block not in kept.states:
            state = method.statistics(self.rows(block), seed)
            size = sum(t.numel() * t.element_size() for t in state.values())
            if kept.bytes + size > BLOCK_CACHE_BYTES:
                return state
            kept.states[block] = state
            kept.bytes += size
        return kept.states[block]


class _Kept:
    """Statistics of blocks, kept between the stages of one worker process."""

    def __init__(self) -> None:
        self.states: dict[tuple[int, int], State] = {}
        self.bytes = 0


@lru_cache(maxsize=2)
def _kept_blocks(identity: str, description: str, seed: int) -> _Kept:
    del identity, description, seed  # they are the cache's key
    return _Kept()
