"""The runs of a spec: every method on every class order with every seed, as stages.

A fitted method is one fit on cached features and one evaluation; a trained one a chain of tasks, or
tasks side by side that are joined one after the other, with predictions after each; an adapted one
trains on the first task and is fitted on what the adapted backbone sees.
"""

from collections.abc import Iterable, Iterator

from graftwork.operators.errors import BadDataError
from graftwork.operators.streams import scenario as scenarios
from graftwork.operators.streams.scenario import OrderName
from graftwork.operators.streams.stream import Data, Stream, cut
from graftwork.pipelines.planning.checks import check_room
from graftwork.pipelines.planning.fitted import fitted
from graftwork.pipelines.planning.fused import fused
from graftwork.pipelines.planning.methods import Method
from graftwork.pipelines.planning.runs import Cell, Run
from graftwork.pipelines.planning.shared import Shared
from graftwork.pipelines.planning.trained import run_of
from graftwork.pipelines.spec.model import PipelineSpec

LISTED: OrderName = "listed"
"""Name of the order of tasks that a spec lists."""


def make_runs(
    shared: Shared, methods: Iterable[Method], beside: Shared | None = None
) -> Iterator[Run]:
    """All runs of a spec, method by method.

    Args:
        beside: of the second network, for methods with a branch on it.

    Raises:
        BadDataError: a task without training or test images.
    """
    spec, streams = shared.spec, list(_streams(shared.spec, shared.data))
    methods = tuple(methods)
    check_room(
        [method for method in methods if method.trains],
        max(len(stream.tasks) for _, stream in streams),
    )
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
                    # A sweep over class orders is no stream that grows.
                    grows=len(streams) == 1,
                )
                yield {"trained": run_of, "fused": fused}.get(method.facts.contract, fitted)(cell)


def _streams(spec: PipelineSpec, data: Data) -> Iterator[tuple[OrderName, Stream]]:
    """The streams of a spec, and what they are called.

    Raises:
        BadDataError: a task without training or test images.
        ConfigError: an order or sizes that do not fit the data.
    """
    if data.stream is not None:
        _check_rows(data.stream, "stream", "")
        yield LISTED, data.stream
        return
    scenario, [dataset] = spec.scenario, data.sources
    assert scenario is not None, "what is not listed is cut; checked while the spec is read"
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
        _check_rows(stream, "scenario", f" of order {order}")
        yield order, stream


def _check_rows(stream: Stream, key: str, order: str) -> None:
    """Every task needs rows to learn from and rows to be tested on."""
    for number, task in enumerate(stream.tasks):
        for name, rows in (("training", task.train), ("test", task.test)):
            if not len(rows):
                place = f"{key}.{number}" if key == "stream" else key
                raise BadDataError(f'task "{task.name}"{order} has no {name} images', key=place)
