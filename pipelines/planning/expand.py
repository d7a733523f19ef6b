"""The runs of a spec: every method on every class order with every seed, as stages.

A fitted method is one fit on cached features and one evaluation; a trained one a chain of tasks, or
tasks side by side that are joined one after the other, with predictions after each; an adapted one
trains on the first task and is fitted on what the adapted backbone sees.
"""

from collections.abc import Iterable, Iterator

from graftwork.operators.data import scenario as scenarios
from graftwork.operators.data.scenario import OrderName
from graftwork.operators.data.stream import Stream, cut
from graftwork.operators.errors import BadDataError
from graftwork.pipelines.planning.fitted import fitted
from graftwork.pipelines.planning.fused import fused
from graftwork.pipelines.planning.methods import Method
from graftwork.pipelines.planning.runs import Cell, Run
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
    streams: list[tuple[OrderName, Stream]] = []
    for order in scenario.orders:
        tasks = scenarios.tasks(
            scenario.kind,
            len(dataset.classes),
            dataset.domains,
            scenario.initial,
            scenario.increment,
            order,
        )[: scenario.tasks]
        stream = cut(dataset, tasks)
        _check_rows(stream, order)
        streams.append((order, stream))
    for method in methods:
        for order, stream in streams:
            for seed in spec.seeds:
                cell = Cell(
                    shared=shared,
                    method=method,
                    order=order,
                    stream=stream,
                    seed=seed,
                    beside=beside,
                )
                yield {"trained": run_of, "fused": fused}.get(method.facts.contract, fitted)(cell)


def _check_rows(stream: Stream, order: OrderName) -> None:
    """Every task needs rows to learn from and rows to be tested on."""
    for number, task in enumerate(stream.tasks):
        for name, rows in (("training", task.train), ("test", task.test)):
            if not len(rows):
                raise BadDataError(
                    f"task {number} of order {order} ({task.name}) has no {name} images",
                    key="scenario",
                )
