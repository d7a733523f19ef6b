"""Decisions about each tensor of merged models, made before anything is computed.

| tensor | what happens |
|---|---|
| float, same shape in all models | merged |
| first axes differ (a classifier that grows) | rows that all have are merged, others taken |
| integers, booleans | of the newest model that has them |
| in some models only | as it is, of the newest model that has it |
| float buffer | the mean, if the merge is one; otherwise of the newest model |
| not in the base, where one is needed | the mean: there is no common start |
| classifier, with `head` "newest" | of the newest model |
| anything else that differs | refused |
"""

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
        head: what happens to classifiers.
        heads: names of tensors of the classifier; those whose first axes differ count as well.
        buffers: names of tensors that are no parameters.
        same_names: refuse tensors that some models lack.
    """

    head: Head = "merge"
    heads: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()
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
    """

    name: str
    spec: Spec
    action: Literal["merge", "mean", "copy"]
    owner: int
    rows: int | None = None


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
    for name in sorted({name for model in models for name in model.specs}):
        found = _entry(name, models, base, averages, policy)
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
    name: str, models: Sequence[Reader], base: Reader | None, averages: bool, policy: Policy
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
    if not specs[newest].dtype.is_floating_point or len(specs) < len(models):
        return copied
    grows = len({spec.shape for spec in all_specs}) > 1
    if policy.head == "newest" and (grows or name in policy.heads):
        return copied
    buffer = name in policy.buffers
    if buffer and not averages:
        return copied
    owner = max(specs, key=lambda i: (specs[i].shape[:1], i))
    mean = buffer or (base is not None and started is None)
    counted = specs.values() if mean else all_specs
    shared = min((spec.shape[0] for spec in counted if spec.shape), default=None)
    whole = not specs[owner].shape or shared == specs[owner].shape[0]
    return Entry(
        name=name,
        spec=specs[owner],
        action="mean" if mean else "merge",
        owner=owner,
        rows=None if whole else shared,
    )
