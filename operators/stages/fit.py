"""Fits a closed-form method along a stream of tasks.

The rows of a task are summed block by block, a block being the rows of one class in one domain:
whatever the class order, the same blocks are added, in the order of the tasks and, within a task,
of the arrival of class and domain. A sweep over class orders reads the blocks' statistics again and
again; where they are small they stay in the worker process.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial, reduce
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.fitted import Fitted, Rows
from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.building import fitted
from graftwork.operators.data.digests import digest_of
from graftwork.operators.data.exemplars import Block, blocks
from graftwork.operators.errors import DamagedStage, Diverged
from graftwork.operators.formats import selection, sums
from graftwork.operators.formats.texts import load
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.features import TextParameters
from graftwork.operators.parameters.fitting import FitParameters
from graftwork.operators.parameters.hints import FitHints
from graftwork.operators.store import Store

BLOCK_CACHE_BYTES = 512 * 2**20
"""Statistics of all blocks together are kept in a worker process up to this size."""


def run(work: Assignment, store: Store) -> Result:
    """The operator `fit`: the state that predicts, after every task.

    Raises:
        DamagedStage: an input is damaged.
        Diverged: the solution holds NaN or infinity.
    """
    parameters, hints = from_json(FitParameters, work.parameters), from_json(FitHints, work.hints)
    torch.set_num_threads(max(1, int(hints.cpus)))
    method = fitted(parameters.method)
    seed = parameters.seed or 0
    rows = TrainingRows(store, work, parameters, hints)
    begun = _beginning(store, hints)
    tensors, reports, total = dict(begun.tensors), list(begun.reports), begun.sums
    first, seen = len(reports), 0
    if first and total is None:
        total = reduce(method.add, (_sum(method, rows, seed, n) for n in range(first)))
    for number, task in enumerate(parameters.tasks):
        seen = max(seen, task.classes[-1] + 1)
        if number < first:
            continue
        started = time.perf_counter()
        newest = _sum(method, rows, seed, number)
        total = newest if total is None else method.add(total, newest)
        state = method.solve(total, newest, hints.ids[:seen], seed)
        for name, tensor in state.items():
            if not bool(torch.isfinite(tensor).all()):
                raise Diverged(f"{work.label}: {name} after task {number} is NaN or infinite")
            tensors[f"{number}/{name}"] = tensor.contiguous()
        reports.append(method.report(state) | {"seconds": round(time.perf_counter() - started, 6)})
    assert total is not None, "a stream has a task"
    if hints.grows:
        sums.keep(store, work.key, total, hints.ids[:seen], hints.num_classes)
    return Result(
        files={"state.safetensors": save_tensors(tensors)},
        facts={
            "tasks": reports,
            "state_bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
            "trainable_parameters": 0,
        },
        obsolete=begun.obsolete,
    )


def _sum(method: Fitted, rows: "TrainingRows", seed: int, number: int) -> State:
    """Statistics of a task, block by block."""
    newest: State | None = None
    for block in rows.blocks(number):
        part = rows.statistics(method, seed, number, block)
        newest = part if newest is None else method.add(newest, part)
    assert newest is not None, "a task without training rows is refused before the run"
    return newest


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """Results that a fit of fewer tasks left.

    Args:
        tensors: states by task and name.
        reports: of its solves.
        sums: its running sums, with room for all classes; None if they are to be made again.
        obsolete: names of what this fit replaces.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    reports: Sequence[Mapping[str, Any]] = ()
    sums: State | None = None
    obsolete: tuple[str, ...] = ()


def _beginning(store: Store, hints: FitHints) -> Beginning:
    """The longest stored fit that this one begins with."""
    for key in hints.beginnings:
        if not store.has("fit", key):
            continue
        try:
            tensors = load_tensors(store.read("fit", key, "state.safetensors"))
            reports = store.manifest("fit", key)["facts"]["tasks"]
        except DamagedStage:
            continue  # this fit does not need it; who reads it has it computed again
        return Beginning(
            tensors=tensors,
            reports=reports,
            sums=sums.find(store, key, hints.ids, hints.num_classes),
            obsolete=sums.names(key) if hints.grows else (),
        )
    return Beginning()


class TrainingRows:
    """The training features of a fit, by task and block.

    Sums are kept under the data set's own class numbers, which are the same in every class order.
    """

    def __init__(
        self, store: Store, work: Assignment, parameters: FitParameters, hints: FitHints
    ) -> None:
        self._tasks = selection.of(work, store, hints.selection, parameters.tasks)
        self._blocks = [dict(blocks(task.index.labels, task.index.domains)) for task in self._tasks]
        self._hints, self._texts = hints, _texts(work, store, parameters.texts, hints)
        method = {name: work.parameters[name] for name in ("method", "features")}
        self._about = json.dumps(
            [store.url, method, work.inputs("text"), work.inputs("graft"), hints.num_classes],
            sort_keys=True,
        )
        self._matrix = lru_cache(maxsize=1)(partial(self._of_task, work, store))

    def blocks(self, number: int) -> Sequence[Block]:
        """(class, domain) of the blocks of a task, in ascending order."""
        return list(self._blocks[number])

    def rows(self, number: int, block: Block) -> Rows:
        """The rows of a block, in the order of the data set."""
        chosen = self._blocks[number][block]
        index = self._tasks[number].index.at(chosen)
        return Rows(
            features=torch.from_numpy(self._matrix(number)[chosen].astype(np.float32)),
            labels=torch.from_numpy(np.array(self._hints.ids, dtype=np.int64)[index.labels]),
            samples=torch.from_numpy(index.sample_ids()),
            num_classes=self._hints.num_classes,
            texts=self._texts,
        )

    def statistics(self, method: Fitted, seed: int, number: int, block: Block) -> State:
        """Statistics of a block, from the process's memory where it was summed before."""
        images = self._tasks[number].index.digests[self._blocks[number][block]]
        name = (self._hints.ids[block[0]], digest_of(images))
        kept = _kept_blocks(self._about, seed)
        if name not in kept.states:
            state = method.statistics(self.rows(number, block), seed)
            size = sum(t.numel() * t.element_size() for t in state.values())
            if kept.bytes + size > BLOCK_CACHE_BYTES:
                return state
            kept.states[name] = state
            kept.bytes += size
        return kept.states[name]

    def _of_task(self, work: Assignment, store: Store, number: int) -> np.ndarray:
        """Features [N, D] of a task's rows."""
        found = selection.matrix(work, store, self._hints.selection, self._tasks[number])
        assert found is not None, "a fit comes with shards of features"
        return found


def _texts(
    work: Assignment, store: Store, wanted: TextParameters | None, hints: FitHints
) -> Tensor | None:
    """Features [T, K, E] of the names of all classes, for a method that reads them.

    Raises:
        DamagedStage: they are not those of the names in the key.
    """
    if wanted is None:
        return None
    [stage] = work.inputs("text")
    found, names = load(store, *stage)
    if tuple(names[i] for i in hints.ids) != wanted.names:
        raise DamagedStage(*stage, f"not the class names that {work.label} was planned for")
    return found


class _Kept:
    """Statistics of blocks, kept between the stages of one worker process."""

    def __init__(self) -> None:
        self.states: dict[tuple[int, str], State] = {}
        self.bytes = 0


@lru_cache(maxsize=2)
def _kept_blocks(about: str, seed: int) -> _Kept:
    del about, seed  # they are the cache's key
    return _Kept()
