"""Explains a plan: hit or miss for every stage, and why a stage is not stored."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from graftwork.cluster.execution.graph import inputs_of, needed
from graftwork.operators.errors import DamagedStage
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store
from graftwork.pipelines.explaining import sealed
from graftwork.pipelines.explaining.sealed import Gone
from graftwork.pipelines.planning.plan import Plan

METHOD = "parameters.method.name"
CANDIDATES = 500
"""At most so many stored stages of an operator are compared with a missing one."""
LONGEST = 24
"""Characters of a value that is shown whole."""
ABSENT = object()
"""Stands for a value that is not there; `null` is one that is."""


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """A stage of a plan, and whether it is stored.

    Args:
        stage: its label.
        group: label that shards and tasks of one kind share.
        operator: what computes it.
        key: sha256 of what it is made of.
        status: `hit` if it is stored, `miss` if a run computes it, `not needed` otherwise.
        why: of a miss, how its key differs from the nearest stored one.
    """

    stage: str
    group: str
    operator: str
    key: str
    status: Literal["hit", "miss", "not needed"]
    why: str


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Summary of what a run would do.

    Args:
        pipeline: its name.
        stages: all of them, inputs before what reads them.
        counts: stages of each status.
        images_to_forward: images that go through the frozen backbone.
        gone: sealed tasks whose images are gone although a run needs them; it refuses to start.
    """

    pipeline: str
    stages: tuple[StageStatus, ...]
    counts: Mapping[str, int]
    images_to_forward: int
    gone: tuple[Gone, ...]


def explain(plan: Plan, store: Store) -> Explanation:
    """Compares a plan with what is stored."""
    stages = plan.stages
    stored = {operator: store.keys(operator) for operator in {s.operator for s in stages}}
    missing = needed(plan.targets, lambda s: s.key in stored[s.operator]).compute
    compute = {stage.key for stage in missing}
    nearest = _Nearest(store, stored)
    rows: list[StageStatus] = []
    for stage in stages:
        hit = stage.key in stored[stage.operator]
        status = "hit" if hit else "miss" if stage.key in compute else "not needed"
        rows.append(
            StageStatus(
                stage=stage.label,
                group=group(stage),
                operator=stage.operator,
                key=stage.key,
                status=status,
                why=nearest.why(stage) if status == "miss" else "",
            )
        )
    images = sum(map(plan.images, missing))
    return Explanation(
        pipeline=plan.spec.pipeline,
        stages=tuple(rows),
        counts=dict(Counter(row.status for row in rows)),
        images_to_forward=images,
        gone=sealed.gone(plan, missing),
    )


class _Nearest:
    """Finds the stored stage that a missing one differs from least."""

    def __init__(self, store: Store, stored: Mapping[str, set[str]]) -> None:
        self._store, self._stored = store, stored
        self._flat: dict[str, list[dict[str, str]]] = {}

    def why(self, stage: Stage) -> str:
        """Names the inputs of the key that differ from the nearest stored stage of the operator."""
        candidates = self._candidates(stage.operator)
        if not candidates:
            return f"no {stage.operator} stage is stored yet"
        wanted = _flatten(stage.preimage)
        method = wanted.get(METHOD)
        candidates = [other for other in candidates if other.get(METHOD) == method]
        if not candidates:
            return f"no {stage.operator} of {_brief(_value(method))} is stored yet"
        differing = [
            (other, [n for n in wanted.keys() | other.keys() if wanted.get(n) != other.get(n)])
            for other in candidates
        ]
        nearest, differences = min(differing, key=lambda pair: len(pair[1]))
        shown = sorted(differences)[:4]
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        return (
            "; ".join(
                f"{_plain(n)} changed"
                if n.startswith("inputs.")
                else f"{_plain(n)}: {_described(n, nearest.get(n), wanted.get(n))}"
                for n in shown
            )
            + more
        )

    def _candidates(self, operator: str) -> list[dict[str, str]]:
        if operator not in self._flat:
            rows: list[dict[str, str]] = []
            for key in sorted(self._stored[operator])[:CANDIDATES]:
                try:
                    rows.append(_flatten(self._store.manifest(operator, key)["preimage"]))
                except DamagedStage:
                    continue  # it is no help in explaining; reading it will tell
            self._flat[operator] = rows
        return self._flat[operator]


def _flatten(preimage: Mapping[str, Any]) -> dict[str, str]:
    """Dotted path -> JSON of the leaf; a list counts as one leaf, and so does an empty mapping."""

    def leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            for name, item in value.items():
                yield from leaves(f"{path}.{name}" if path else name, item)
        else:
            yield path, json.dumps(value)

    return dict(leaves("", preimage))


def _plain(path: str) -> str:
    names = {
        "parameters.images": "image bytes",
        "parameters.backbone": "backbone weights",
        "parameters.tasks": "class order or task sizes",
        "inputs.reference": "reference images",
        "parameters.reference": "reference texts",
        "parameters.names": "class names",
        "parameters.task.names": "class names",
        "parameters.task.templates": "templates",
        "inputs.model": "model",
        "inputs.previous": "the task before",
        "inputs.predictions": "predictions",
        "parameters.memory.exemplars": "number of exemplars",
        "parameters.memory.earlier": "the tasks before",
        "inputs.clip": "scores of the CLIP branch",
        "inputs.vit": "scores of the ViT branch",
        "inputs.graft": "first session",
        "inputs.first_session": "first session",
        "parameters.images.classes": "classes of the task",
        "inputs.models": "models",
    }
    plain = (
        path.removeprefix("inputs.")
        .removeprefix("parameters.")
        .removeprefix("method.hyperparameters.")
    )
    return names.get(path, plain)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One of the differences between two values; the two texts are never equal.

    Args:
        where: in which part of them, such as `task 3 classes`; empty for the values as a whole.
        before: what is stored.
        after: what is wanted.
    """

    where: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.where} {self.before} -> {self.after}".lstrip()


def differences(before: Any, after: Any, name: str = "", where: str = "") -> Iterator[Difference]:
    """Differences between two JSON values, part by part; none for equal ones.

    Values that are short are shown whole. Of long lists the lengths are compared, and the items
    that both have.

    Args:
        before: a JSON value, or `ABSENT`.
        after: another one.
        name: key of the values, which says what the items of lists are.
        where: of the values, in words.
    """
    if _json(before) == _json(after):
        return
    short = max(len(_json(before)), len(_json(after))) <= LONGEST
    if isinstance(before, Mapping) and isinstance(after, Mapping) and not short:
        for key in sorted(before.keys() | after.keys()):
            values = before.get(key, ABSENT), after.get(key, ABSENT)
            yield from differences(*values, name=key, where=f"{where} {key}".lstrip())
    elif isinstance(before, list) and isinstance(after, list) and not short:
        one, several = _ITEMS.get(name, ("entry", "entries"))
        if len(before) != len(after):
            # Their name says it already, unless the list is a part of something else.
            counted = where if where.endswith(several) else f"{where} {several}".lstrip()
            yield Difference(where=counted, before=str(len(before)), after=str(len(after)))
        for number, (old, new) in enumerate(zip(before, after, strict=False), 1):
            yield from differences(old, new, where=f"{where} {one} {number}".lstrip())
    else:
        old, new = _apart(before, after)
        yield Difference(where=where, before=old, after=new)


_ITEMS = {
    "tasks": ("task", "tasks"),
    "names": ("name", "names"),
    "templates": ("template", "templates"),
    "members": ("member", "members"),
}
"""Key of a list -> what its items are called."""


def _described(path: str, before: str | None, after: str | None) -> str:
    """Describes the change of a leaf of the preimage: two differences, and how many more."""
    name = path.rpartition(".")[2]
    found = [str(each) for each in differences(_value(before), _value(after), name)]
    more = [f"and {len(found) - 2} more"] if len(found) > 2 else []
    return ", ".join(found[:2] + more)


def _value(text: str | None) -> Any:
    """The value of a leaf."""
    return ABSENT if text is None else json.loads(text)


def _json(value: Any) -> str:
    """A value's JSON with everything unprintable as an escape: equal for equal values alone."""
    if value is ABSENT:
        return "absent"
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _brief(value: Any) -> str:
    """The beginning of a value, text without quotes."""
    text = _json(value)[1:-1] if isinstance(value, str) else _json(value)
    if len(text) == 64 and all(c in "0123456789abcdef" for c in text):
        return text[:8]
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]}…"


def _apart(before: Any, after: Any) -> tuple[str, str]:
    """Short texts of two differing values, which differ, too."""
    if (old := _brief(before)) != (new := _brief(after)):
        return old, new
    old, new = _json(before), _json(after)
    pairs = zip(old, new, strict=False)
    common = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))
    start = max(0, common - LONGEST // 3)
    return _window(old, start), _window(new, start)


def _window(text: str, start: int) -> str:
    """A part of a text that shows where it is cut."""
    cut = text[start : start + LONGEST]
    return ("…" if start else "") + cut + ("…" if start + LONGEST < len(text) else "")


def mermaid(plan: Plan, store: Store) -> str:
    """The graph in Mermaid's language: shards and tasks are one node, stored ones are green."""
    stages = plan.stages
    stored = {operator: store.keys(operator) for operator in {s.operator for s in stages}}
    nodes: dict[str, list[Stage]] = {}
    names = {stage.key: group(stage) for stage in stages}
    for stage in stages:
        nodes.setdefault(names[stage.key], []).append(stage)
    ids = {name: f"n{number}" for number, name in enumerate(nodes)}
    lines = ["flowchart LR"]
    edges = set()
    for name, members in nodes.items():
        hits = sum(s.key in stored[s.operator] for s in members)
        count = f"<br/>{hits}/{len(members)} stored" if len(members) > 1 else ""
        style = "hit" if hits == len(members) else "miss"
        lines.append(f'  {ids[name]}["{name.replace(chr(34), chr(39))}{count}"]:::{style}')
        for member in members:
            edges |= {(ids[names[s.key]], ids[name]) for s in inputs_of(member)}
    lines += [f"  {a} --> {b}" for a, b in sorted(edges) if a != b]
    lines += ["  classDef hit fill:#d9f2e0,stroke:#2e7d4f", "  classDef miss fill:#fff,stroke:#888"]
    return "\n".join(lines)


def group(stage: Stage) -> str:
    """Name of a node or a line: that of the shards or tasks of one kind, or the stage's own."""
    return stage.group or stage.label or stage.key[:8]
