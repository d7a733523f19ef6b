"""What a plan would do: hit or miss for every stage, and why a stage is not stored."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.graph import needed
from operators.errors import DamagedStage
from operators.stage import Stage
from operators.store import Store
from pipelines.plan import Plan

METHOD = "parameters.method.name"
CANDIDATES = 500
"""At most so many stored stages of an operator are compared with a missing one."""


def explain(plan: Plan, store: Store) -> dict[str, Any]:
    """Per stage: `hit`, `miss` with the reason, or `not needed`; and counts of each."""
    stages = plan.stages
    stored = {operator: store.keys(operator) for operator in {s.operator for s in stages}}
    compute = {s.key for s in needed(plan.targets, lambda s: s.key in stored[s.operator]).compute}
    nearest = _Nearest(store, stored)
    rows = []
    for stage in stages:
        hit = stage.key in stored[stage.operator]
        status = "hit" if hit else "miss" if stage.key in compute else "not needed"
        rows.append(
            {
                "stage": stage.label,
                "group": group(stage),
                "operator": stage.operator,
                "key": stage.key,
                "status": status,
                "why": nearest.why(stage) if status == "miss" else "",
            }
        )
    images = sum(plan.images(s) for s in stages if s.key in compute)
    return {
        "pipeline": plan.spec.pipeline,
        "stages": rows,
        "counts": dict(Counter(row["status"] for row in rows)),
        "images_to_forward": images,
    }


class _Nearest:
    """Finds the stored stage that a missing one differs from least."""

    def __init__(self, store: Store, stored: Mapping[str, set[str]]) -> None:
        self._store, self._stored = store, stored
        self._flat: dict[str, list[dict[str, str]]] = {}

    def why(self, stage: Stage) -> str:
        """Which inputs of the key differ from the nearest stored stage of the same operator."""
        candidates = self._candidates(stage.operator)
        if not candidates:
            return f"no {stage.operator} stage is stored yet"
        wanted = _flatten(stage.preimage)
        method = wanted.get(METHOD)
        candidates = [other for other in candidates if other.get(METHOD) == method]
        if not candidates:
            return f"no {stage.operator} of {_short(method)} is stored yet"
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
                else f"{_plain(n)}: {_short(nearest.get(n))} -> {_short(wanted.get(n))}"
                for n in shown
            )
            + more
        )

    def _candidates(self, operator: str) -> list[dict[str, str]]:
        if operator not in self._flat:
            rows = []
            for key in sorted(self._stored[operator])[:CANDIDATES]:
                try:
                    rows.append(_flatten(self._store.manifest(operator, key)["preimage"]))
                except DamagedStage:
                    continue  # it is no help in explaining; reading it will tell
            self._flat[operator] = rows
        return self._flat[operator]


def _flatten(preimage: Mapping[str, Any]) -> dict[str, str]:
    """Dotted path -> JSON of the leaf; a list counts as one leaf."""

    def leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, Mapping):
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
        "inputs.features": "features",
        "inputs.dataset": "labels",
        "inputs.text": "text features",
        "inputs.reference": "reference images",
        "parameters.reference": "reference texts",
        "parameters.names": "class names",
        "parameters.task.names": "class names",
        "parameters.task.templates": "templates",
        "inputs.model": "model",
        "inputs.previous": "the task before",
        "inputs.predictions": "predictions",
        "inputs.exemplars": "exemplars",
        "parameters.memory.exemplars": "number of exemplars",
        "parameters.memory.earlier": "the tasks before",
        "inputs.clip": "scores of the CLIP branch",
        "inputs.vit": "scores of the ViT branch",
        "inputs.graft": "first session",
        "inputs.first_session": "first session",
        "inputs.adapted": "adapted features",
        "parameters.images.classes": "classes of the task",
        "parameters.images.domains": "domains of the task",
        "parameters.learned": "class order",
        "inputs.models": "models",
    }
    plain = (
        path.removeprefix("inputs.")
        .removeprefix("parameters.")
        .removeprefix("method.hyperparameters.")
    )
    return names.get(path, plain)


def _short(value: str | None) -> str:
    if value is None:
        return "absent"
    text = value.strip('"')
    if len(text) == 64 and all(c in "0123456789abcdef" for c in text):
        return text[:8]
    return text if len(text) <= 24 else f"{text[:20]}…"


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
            for inputs in member.inputs.values():
                edges |= {(ids[names[s.key]], ids[name]) for s in inputs}
    lines += [f"  {a} --> {b}" for a, b in sorted(edges) if a != b]
    lines += ["  classDef hit fill:#d9f2e0,stroke:#2e7d4f", "  classDef miss fill:#fff,stroke:#888"]
    return "\n".join(lines)


def group(stage: Stage) -> str:
    """Shards of a split, and tasks of a run, share a node or a line."""
    if stage.operator == "features":
        return stage.label.rpartition(" ")[0]
    if stage.operator == "statistics":
        return stage.label.rpartition(" shard ")[0].rpartition(" task ")[0]
    if stage.operator in ("train", "join", "predict", "score", "blend", "merge"):
        return stage.label.rpartition(" task ")[0]
    return stage.label or stage.key[:8]
