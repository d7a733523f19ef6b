"""Merges and ensembles of a spec, resolved: which rule, of which runs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.operators.keys import program_digest
from graftwork.operators.parameters.combining import StatisticsKind
from graftwork.operators.parameters.learners import MethodRef
from graftwork.operators.store.memo import Memo
from graftwork.pipelines.planning.methods import Method
from graftwork.pipelines.spec.combination import Combination, read
from graftwork.pipelines.spec.loading import Loaded
from graftwork.pipelines.spec.problems import nearest


@dataclass(frozen=True, kw_only=True)
class Weighing:
    """Sums that a merge measures of every model.

    Args:
        statistics: which sums.
        images: over so many training images of the model's newest task, at most.
    """

    statistics: StatisticsKind
    images: int


@dataclass(frozen=True, kw_only=True)
class Combined:
    """A combination of the spec with everything resolved.

    Args:
        asked: the entry.
        operator: the merge or the rule as keys hold it.
        most: as many models at most are merged, the newest ones; 0 for any number.
        weighing: what a merge measures of its models; None for nothing.
        members: methods, or combinations before it, by label.
        label: what people see.
    """

    asked: Combination
    operator: MethodRef
    most: int
    weighing: Weighing | None
    members: tuple[str, ...]
    label: str


def resolve(loaded: Loaded, methods: Sequence[Method], memo: Memo) -> tuple[Combined, ...]:
    """The combinations of a spec; asks the memo before importing torch.

    Raises:
        ConfigError: unknown names or fields, or members that cannot be combined; all at once.
    """
    problems: list[tuple[str, str]] = []
    found: list[Combined] = []
    spec = loaded.spec
    entries = [
        read(section, number, entry)
        for section, given in (("merge", spec.merge), ("ensemble", spec.ensemble))
        for number, entry in enumerate(given)
    ]
    program = program_digest()
    for asked in entries:
        facts, wrong = _facts(asked, memo, program)
        statistics = facts.get("card", {}).get("statistics", "")
        members, unfit = members_of(asked, methods, found, len(spec.seeds), statistics)
        problems += wrong + unfit
        if wrong or unfit:
            continue
        label = asked.name or f"{asked.kind} of {listed(members)} over {asked.over}"
        if label in {other.label for other in found} | {method.label for method in methods}:
            differing = " ".join(f"{name}={value}" for name, value in asked.given.items())
            label = f"{label} {differing}".strip()
        if label in {other.label for other in found} | {method.label for method in methods}:
            problems.append((asked.path, f'second result called "{label}"; give it another name'))
            continue
        found.append(
            Combined(
                asked=asked,
                operator=MethodRef(
                    name=asked.kind,
                    version=facts["card"]["version"],
                    hyperparameters=facts["hyperparameters"],
                ),
                most=facts["card"].get("most", 0),  # the card of a rule has no such number
                weighing=_weighing(facts),
                members=members,
                label=label,
            )
        )
    if problems:
        raise loaded.error(problems)
    return tuple(found)


def _weighing(facts: Mapping[str, Any]) -> Weighing | None:
    """Sums that a merge with this card measures."""
    if not (kind := facts["card"].get("statistics")):
        return None
    given = facts["hyperparameters"]
    return Weighing(
        statistics=StatisticsKind(kind=kind, labels=given.get("labels")), images=given["images"]
    )


def _facts(
    asked: Combination, memo: Memo, program: str
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    preimage = {
        "kind": asked.section, "name": asked.kind, "given": asked.given, "source": program,
    }  # fmt: skip
    known = memo.get(preimage)
    if known is not None:
        return json.loads(known), []
    from graftwork.operators import catalogue  # imports torch

    facts, wrong = catalogue.combination(asked.section, asked.kind, asked.given)
    if not wrong:
        memo.put(preimage, json.dumps(facts).encode())
    return facts, [(asked.path + path, what) for path, what in wrong]


def members_of(
    asked: Combination,
    methods: Sequence[Method],
    earlier: Sequence[Combined],
    seeds: int,
    statistics: str = "",
) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    """Labels of the members, and what is wrong with them.

    Args:
        seeds: of the spec.
        statistics: what a merge measures of its models; empty for nothing.
    """
    at, labels, problems = f"{asked.path}.of", [], []
    known = {method.label: method for method in methods}
    merged = {other.label for other in earlier if asked.section == "ensemble"}
    merged -= {other.label for other in earlier if other.asked.section == "ensemble"}
    for name in asked.of:
        named = [method.label for method in methods if name in (method.label, method.name)]
        if name in merged:
            labels.append(name)
        elif len(named) > 1 and name not in known:
            problems.append((at, f'"{name}" stands here for {", ".join(named)}; write one of them'))
        elif not named:
            hint = nearest(name, [*known, *merged])
            problems.append((at, f'no method "{name}" among methods{hint}'))
        else:
            labels.append(name if name in known else named[0])
            if asked.section == "merge":
                reasons = _unmergeable(known[labels[-1]], asked.kind, asked.over, statistics)
                problems += [(at, what) for what in reasons]
    if asked.over == "seeds" and seeds < 2:
        problems.append((f"{asked.path}.over", "needs at least 2 seeds, got 1; give more seeds"))
    return tuple(labels), problems


def _unmergeable(method: Method, kind: str, over: str, statistics: str) -> Iterator[str]:
    """Reasons against a merge of a method's models.

    Args:
        kind: name of the merge.
        statistics: what it measures of its models; empty for nothing.
    """
    if method.facts.contract != "trained":
        yield (
            f"{method.name} has no checkpoint of a network after every task to merge; "
            "name a method that trains on every task, or use ensemble"
        )
    elif method.facts.upper_bound and over != "seeds":
        yield f"{method.name} trains on all tasks at once and has one checkpoint only"
    elif method.facts.apart and over == "tasks":
        yield (
            f"{method.name} trains weights of its own for every task and leaves those of earlier "
            "tasks as they are, so that its models over tasks differ in nothing that a merge could "
            "change; merge over seeds"
        )
    elif statistics == "gram" and not method.facts.linear_layers:
        yield (
            f"{method.name} predicts with weights that are no linear layers of their own, which "
            f"{kind} needs to measure; take another merge"
        )


def listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
