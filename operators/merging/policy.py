"""Decisions about each tensor of merged models, made before anything is computed.

What a tensor is, a weight, a statistic or a counter, is said by the learner; see
`methods/contracts/roles.py`.

| tensor | what happens |
|---|---|
| weights, same shape in all models | merged |
| first axes differ (a classifier that grows) | rows that all have are merged, others taken |
| the same, where the base lacks rows, or parts of later tasks | newest, unless `head` is "merge" |
| statistics | as weights, if the merge is a mean of models; otherwise of the newest |
| counters, integers, booleans, empty tensors | of the newest model that has them |
| in some models only | as it is, of the newest model that has it |
| weights that are not in the base, where one is needed | the mean: there is no common start |
| classifier, with `head` "newest" | of the newest model |
| anything else that differs | refused |

A merge of task vectors scales what the base has. Rows of the first task alone would be scaled, and
those of later tasks not, which compares classes by two measures: rows that no later task changes
go 3 times as far from their start over ten tasks under task arithmetic at 0.3, half as far under
MagMax, and those of all other tasks exactly as far.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graftwork.operators.errors import IncompatibleError
from graftwork.operators.merging.readers import Reader, Spec

Head = Literal["merge", "newest"]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Facts about tensors besides their shapes.

    Args:
        head: what happens to classifiers; None takes the newest where the base lacks rows, and
            merges them otherwise.
        heads: names of tensors of the classifier; those whose first axes differ count as well.
        statistics: names of tensors that were measured on images.
        counters: names of tensors that count or choose.
        same_names: refuse tensors that some models lack.
    """

    head: Head | None = None
    heads: frozenset[str] = frozenset()
    statistics: frozenset[str] = frozenset()
    counters: frozenset[str] = frozenset()
    same_names: bool = False


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Decision about one tensor.

    Args:
        name: its name.
        spec: of the result.
        action: apply the merge, take the mean, or copy from `owner`.
        owner: number of the model that gives the type, and the rows that are not merged.
        rows: so many rows are merged; None for the whole tensor.
        learned: whether it holds weights, not statistics.
    """

    name: str
    spec: Spec
    action: Literal["merge", "mean", "copy"]
    owner: int
    rows: int | None = None
    learned: bool = True


def decide(
    models: Sequence[Reader], base: Reader | None, averages: bool, policy: Policy
) -> list[Entry]:
    """Decides what happens to each tensor.

    Args:
        models: oldest first.
        base: the state before training, for merges that need it.
        averages: whether the merge is a mean.

    Raises:
        IncompatibleError: the models do not fit together; the tensors are named.
    """
    entries, problems = [], []
    later = _later_parts(models, base)
    for name in sorted({name for model in models for name in model.specs}):
        found = _entry(name, models, base, averages, policy, later)
        if isinstance(found, Entry):
            entries.append(found)
        else:
            problems.append(found)
    if problems:
        shown = "; ".join(problems[:5]) + (
            f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        )
        raise IncompatibleError(
            f"models do not fit together ({len(problems)} tensors differ): {shown}; "
            "merge models of one method and one backbone"
        )
    return entries


def _entry(
    name: str,
    models: Sequence[Reader],
    base: Reader | None,
    averages: bool,
    policy: Policy,
    later: frozenset[str],
) -> Entry | str:
    """The decision, or what is wrong."""
    specs = {i: model.specs[name] for i, model in enumerate(models) if name in model.specs}
    if policy.same_names and len(specs) < len(models):
        missing = [str(i) for i in range(len(models)) if i not in specs]
        return f"{name} is missing in model {', '.join(missing)}"
    started = base.specs.get(name) if base is not None else None
    all_specs = [*specs.values(), *([started] if started else [])]
    if (
        len({spec.dtype.is_floating_point for spec in all_specs}) > 1
        or len({(len(spec.shape), spec.shape[1:]) for spec in all_specs}) > 1
    ):
        return f"{name} {', '.join(str(list(spec.shape)) for spec in all_specs)}"
    newest = max(specs)
    copied = Entry(name=name, spec=specs[newest], action="copy", owner=newest)
    counted = name in policy.counters or not specs[newest].dtype.is_floating_point
    if counted or len(specs) < len(models) or 0 in specs[newest].shape:
        return copied
    statistic = name in policy.statistics
    # A model that has seen nothing has no statistics.
    if statistic and (base is not None or not averages):
        return copied
    part = _family(name) in later
    grows = part or len({spec.shape for spec in all_specs}) > 1
    if policy.head == "newest" and (grows or name in policy.heads):
        return copied
    owner = max(specs, key=lambda i: (specs[i].shape[:1], i))
    lacks = started is not None and (part or started.shape[:1] < specs[owner].shape[:1])
    if policy.head is None and lacks:
        return copied
    mean = base is not None and started is None
    rowed = specs.values() if mean else all_specs
    shared = min((spec.shape[0] for spec in rowed if spec.shape), default=None)
    whole = not specs[owner].shape or shared == specs[owner].shape[0]
    return Entry(
        name=name,
        spec=specs[owner],
        action="mean" if mean else "merge",
        owner=owner,
        rows=None if whole else shared,
        learned=not statistic,
    )


def _later_parts(models: Sequence[Reader], base: Reader | None) -> frozenset[str]:
    """Families of parts that the base has some of: those of later tasks came with their tasks."""
    if base is None:
        return frozenset()
    there = {_family(name) for name in base.specs}
    names = {name for model in models for name in model.specs}
    return frozenset(f for name in names - set(base.specs) if (f := _family(name)) in there)


def _family(name: str) -> str:
    """The name without numbers: `stages.1.q.weight` is of one family with `stages.0.q.weight`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)
