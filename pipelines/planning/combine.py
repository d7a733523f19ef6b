"""Runs that combine other runs of the spec: merged states, and ensembles of scores.

A merge makes one more state after every task, predicted with and evaluated like the states of the
method it came from. An ensemble reads scores that are there. Neither trains anything.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

from graftwork.operators.store.memo import Memo
from graftwork.pipelines.planning.combinations import Combined
from graftwork.pipelines.planning.ensembled import ensemble
from graftwork.pipelines.planning.merged import check, merge
from graftwork.pipelines.planning.methods import CardFacts, Method
from graftwork.pipelines.planning.runs import Cell, Run
from graftwork.pipelines.planning.shared import Shared


def combine(
    shared: Shared, combinations: Iterable[Combined], runs: Sequence[Run], memo: Memo
) -> Iterator[Run]:
    """The runs of all combinations.

    Args:
        runs: of the spec's methods.
        memo: knows which methods' models fit together.

    Raises:
        ConfigError: a stream with one task, where tasks are to be combined.
        IncompatibleError: methods to merge whose models hold other tensors.
    """
    known: dict[str, list[Run]] = {}
    for run in runs:
        known.setdefault(run.method.label, []).append(run)
    for entry in combinations:
        cells = list(_cells(entry, known))
        check(shared, entry, cells[0], memo)
        made = [_run(shared, entry, parents) for parents in cells]
        known[entry.label] = made
        yield from made


def _cells(entry: Combined, known: Mapping[str, list[Run]]) -> Iterator[tuple[Run, ...]]:
    """The runs that are combined with each other."""
    if entry.asked.over != "seeds":
        yield from zip(*(known[label] for label in entry.members), strict=True)
        return
    by_order: dict[str, list[Run]] = {}
    for run in known[entry.members[0]]:
        by_order.setdefault(json.dumps(run.order), []).append(run)
    yield from map(tuple, by_order.values())


def _run(shared: Shared, entry: Combined, parents: tuple[Run, ...]) -> Run:
    cell = Cell(
        shared=shared,
        method=_as_method(entry, parents),
        order=parents[0].order,
        stream=parents[0].stream,
        seed=parents[0].seed,
    )
    make = merge if entry.asked.section == "merge" else ensemble
    return make(cell, entry, parents)


def _as_method(entry: Combined, parents: Sequence[Run]) -> Method:
    """Method that results show for a combination."""
    asked = entry.asked
    shown = {"of": list(entry.members), "over": asked.over}
    if asked.over == "seeds":
        shown["seeds"] = [run.seed for run in parents]
    if asked.head is not None:
        shown["head"] = asked.head
    return Method(
        name=entry.label,
        label=entry.label,
        hyperparameters={asked.section: asked.kind, **entry.operator.hyperparameters, **shown},
        facts=CardFacts(
            contract=asked.section,
            version=entry.operator.version,
            batch_information_at_test=any(
                run.method.facts.batch_information_at_test for run in parents
            ),
        ),
    )
