"""The runs of a spec: every method on every class order with every seed, as stages.

A fitted method is one fit on cached features and one evaluation; a trained one a chain of tasks, or
tasks side by side that are joined one after the other, with predictions after each; an adapted one
trains on the first task and is fitted on what the adapted backbone sees.
"""

from collections.abc import Iterable, Iterator, Sequence

from graftwork.operators.data.dataset import Dataset
from graftwork.operators.data.scenario import OrderName, StreamTask, tasks
from graftwork.operators.errors import BadDataError
from graftwork.operators.parameters.tasks import TaskData
from graftwork.pipelines.planning.fitted import fitted
from graftwork.pipelines.planning.fused import fused
from graftwork.pipelines.planning.methods import Method
from graftwork.pipelines.planning.runs import Cell, Run, task_data
from graftwork.pipelines.planning.shared import Shared
from graftwork.pipelines.planning.trained import run_of


def make_runs(
    shared: Shared, methods: Iterable[Method], beside: Shared | None = None
) -> Iterator[Run]:
    """All runs of a spec, method by method.

    Args:
        beside: of the second network, for methods with a branch on it.

    Raises:
        BadDataError: a task without training or test images.
    """
    spec, dataset = shared.spec, shared.dataset
    scenario = spec.scenario
    streams: list[tuple[OrderName, tuple[StreamTask, ...], tuple[TaskData, ...]]] = []
    for order in scenario.orders:
        stream = tuple(
            tasks(
                scenario.kind,
                len(dataset.classes),
                dataset.domains,
                scenario.initial,
                scenario.increment,
                order,
            )[: scenario.tasks]
        )
        _check_rows(dataset, stream, order)
        streams.append((order, stream, tuple(map(task_data, stream))))
    for method in methods:
        for order, stream, described in streams:
            for seed in spec.seeds:
                cell = Cell(
                    shared=shared,
                    method=method,
                    order=order,
                    stream=stream,
                    described=described,
                    seed=seed,
                    beside=beside,
                )
                yield {"trained": run_of, "fused": fused}.get(method.facts.contract, fitted)(cell)


def _check_rows(dataset: Dataset, stream: Sequence[StreamTask], order: OrderName) -> None:
    """Every task needs rows to learn from and rows to be tested on."""
    for split in (dataset.train, dataset.test):
        present = set(zip(split.labels.tolist(), split.domains.tolist(), strict=True))
        for number, task in enumerate(stream):
            if not any((c, d) in present for c in task.classes for d in task.domains):
                where = ", ".join(dataset.domains[d] for d in task.domains)
                raise BadDataError(
                    f"task {number} of order {order} has no {split.name} images"
                    + (f" (domain {where})" if where else ""),
                    key="scenario",
                )
