"""The runs of a spec: every method on every class order with every seed, as stages.

A fitted method is one fit on cached features and one evaluation; a trained one a chain of tasks, or
tasks side by side that are joined one after the other, with predictions after each; an adapted one
trains on the first task and is fitted on what the adapted backbone sees.
"""

from collections.abc import Iterable, Iterator

from graftwork.operators.data.dataset import Dataset
from graftwork.operators.errors import BadDataError
from graftwork.operators.parameters.fitting import Group, Measures
from graftwork.operators.parameters.training import SinglePass
from graftwork.operators.streams import blurry, manifest, online, thinning
from graftwork.operators.streams import scenario as scenarios
from graftwork.operators.streams.blurry import Blurry
from graftwork.operators.streams.scenario import LISTED, OrderName
from graftwork.operators.streams.stream import Data, Piece, Stream, arrange, cut
from graftwork.operators.streams.thinning import FewShot, LongTailed
from graftwork.pipelines.planning.checks import check_online, check_room, check_transfer
from graftwork.pipelines.planning.fitted import fitted
from graftwork.pipelines.planning.fused import fused
from graftwork.pipelines.planning.methods import Method
from graftwork.pipelines.planning.runs import Cell, Run
from graftwork.pipelines.planning.shared import Shared
from graftwork.pipelines.planning.trained import run_of
from graftwork.pipelines.spec.model import PipelineSpec
from graftwork.pipelines.spec.scenario import Scenario


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
    if spec.transfer:
        check_transfer(methods)
    section = spec.scenario and spec.scenario.online
    if section:
        check_online(spec, section, methods)
    single = section and SinglePass(batch_size=section.batch_size, times=section.times)
    measures = [_measures(spec.scenario, stream) for _, stream in streams]
    for method in methods:
        for (order, stream), measured in zip(streams, measures, strict=True):
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
                    measures=measured,
                    single=single,
                    mask="batch" if section and section.mask == "batch" else None,
                )
                yield {"trained": run_of, "fused": fused}.get(method.facts.contract, fitted)(cell)


def _streams(spec: PipelineSpec, data: Data) -> Iterator[tuple[OrderName, Stream]]:
    """The streams of a spec, and what they are called.

    Raises:
        BadDataError: a task without training images, a manifest that does not fit.
        ConfigError: an order or sizes that do not fit the data.
    """
    if data.stream is not None:
        _check_rows(data.stream, "stream", "")
        yield LISTED, data.stream
        return
    scenario, [dataset] = spec.scenario, data.sources
    assert scenario is not None, "what is not listed is cut; checked while the spec is read"
    for order in scenario.orders:
        pieces = tasks_of(scenario, dataset, order)
        if scenario.online is not None:
            pieces = online.sections(pieces, scenario.online.every)
        stream = arrange(pieces, dataset.classes)
        _check_rows(stream, "scenario", f" of order {order}")
        yield order, stream


def tasks_of(scenario: Scenario, dataset: Dataset, order: OrderName) -> list[Piece]:
    """The tasks of a data set; of an online stream with the order of their images.

    Raises:
        BadDataError: a manifest that does not fit.
        ConfigError: an order or sizes that do not fit the data.
    """
    pieces = _cut(scenario, dataset, order)
    if isinstance(scenario.tasks, int):
        pieces = pieces[: scenario.tasks]
    if scenario.few_shot is not None:
        pieces = thinning.few_shot(pieces, FewShot(**scenario.few_shot.model_dump()))
    if (tail := tail_of(scenario)) is not None:
        pieces = thinning.long_tailed(pieces, tail)
    if scenario.online is not None:
        pieces = online.arriving(pieces, order if isinstance(order, int) else 0)
    return pieces


def tail_of(scenario: Scenario) -> LongTailed | None:
    """The fall of the numbers of images, if they fall."""
    return scenario.long_tailed and LongTailed(**scenario.long_tailed.model_dump())


def _cut(scenario: Scenario, dataset: Dataset, order: OrderName) -> list[Piece]:
    if scenario.manifest is not None:
        return manifest.pieces(scenario.manifest, dataset)
    if scenario.blurry is not None:
        assert isinstance(order, int), "checked while the spec is read"
        return blurry.pieces(dataset, Blurry(**scenario.blurry.model_dump()), order)
    kind, classes, domains = scenario.kind, dataset.classes, dataset.domains
    assert kind is not None, "there is no manifest"
    if scenario.groups is not None:
        return cut(dataset, scenarios.grouped(kind, classes, domains, scenario.groups))
    sizes = scenario.sizes
    if sizes is None and scenario.increment is not None:
        sizes = scenarios.task_sizes(len(classes), scenario.initial, scenario.increment)
    return cut(dataset, scenarios.tasks(kind, classes, domains, sizes, order))


def _measures(scenario: Scenario | None, stream: Stream) -> Measures | None:
    """Measures of a stream of its kind beside accuracies after each task."""
    if scenario is None:
        return None
    groups: dict[str, tuple[int, ...]] = {}
    if scenario.few_shot is not None:
        base, seen = stream.tasks[0].seen, stream.tasks[-1].seen
        groups = {"base": tuple(range(base)), "novel": tuple(range(base, seen))}
    if (tail := tail_of(scenario)) is not None:
        counts = dict.fromkeys(range(len(stream.classes)), 0)
        for task in stream.tasks:
            for (label, _), count in task.train.blocks.items():
                counts[label] += count
        groups |= thinning.groups(counts, tail)
    named = tuple(Group(name=name, classes=classes) for name, classes in groups.items())
    measures = Measures(groups=named, online=scenario.online is not None)
    return None if measures == Measures() else measures


def _check_rows(stream: Stream, key: str, order: str) -> None:
    """Every task needs rows to learn from, and the first one rows to be tested on."""
    for number, task in enumerate(stream.tasks):
        wanted = {"training": task.train} | ({} if number else {"test": task.test})
        for name, rows in wanted.items():
            if not len(rows):
                place = f"{key}.{number}" if key == "stream" else key
                raise BadDataError(f'task "{task.name}"{order} has no {name} images', key=place)
