"""Says why a stage is not stored: in what it differs from the nearest one that is."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from graftwork.operators.stage import Stage
from graftwork.pipelines.explaining.differences import ABSENT, brief, differences
from graftwork.pipelines.explaining.former import Formers

METHOD, TASKS = "parameters.method.name", "parameters.tasks"
ROWS, TASK = "parameters.images.rows", "parameters.task.index"
"""Paths of leaves of a preimage: of what is learned, its rows and the number of the task."""


class Nearest:
    """Finds the stored stage that a missing one differs from least."""

    def __init__(self, formers: Formers) -> None:
        self._formers = formers
        self._flat: dict[str, list[dict[str, str]]] = {}

    def why(self, stage: Stage) -> str:
        """Names the inputs of the key that differ from the nearest stored stage of the operator."""
        operator = stage.operator
        if operator not in self._flat:
            self._flat[operator] = [_flatten(f.preimage) for f in self._formers.of(operator)]
        candidates = self._flat[operator]
        if not candidates:
            return f"no {operator} stage is stored yet"
        wanted = _flatten(stage.preimage)
        method = wanted.get(METHOD)
        candidates = [other for other in candidates if other.get(METHOD) == method]
        if not candidates:
            return f"no {operator} of {brief(_value(method))} is stored yet"
        # Another task's rows would be others, whatever became of this one's.
        candidates = [other for other in candidates if other.get(TASK) == wanted.get(TASK)]
        if not candidates:
            task = int(wanted[TASK]) + 1
            return f"no {operator} of {brief(_value(method))} for task {task} is stored yet"
        differing = [
            (other, [n for n in wanted.keys() | other.keys() if wanted.get(n) != other.get(n)])
            for other in candidates
        ]
        nearest, names = min(differing, key=lambda pair: len(pair[1]))
        shown = sorted(names)[:4]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return "; ".join(_changed(name, nearest, wanted) for name in shown) + more


def _changed(name: str, nearest: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """Says what differs in a leaf of the preimage."""
    if name.startswith("inputs."):
        return f"{_plain(name)} changed"
    before, after = _value(nearest.get(name)), _value(wanted.get(name))
    if name == ROWS and TASK in wanted:
        return f"task {int(wanted[TASK]) + 1}: rows {_listed(before, after, 'rows')}"
    lists = isinstance(before, list) and isinstance(after, list)
    if name == TASKS and lists and len(before) == len(after):
        # The order and number of the tasks are the same: their rows or classes are not.
        pairs = enumerate(zip(before, after, strict=True), 1)
        found = [f"task {number}: {each}" for number, (a, b) in pairs for each in differences(a, b)]
        return _first(found)
    return f"{_plain(name)}: {_listed(before, after, name.rpartition('.')[2])}"


def _listed(before: Any, after: Any, name: str) -> str:
    return _first([str(each) for each in differences(before, after, name)])


def _first(found: list[str]) -> str:
    """Two differences, and how many more."""
    return ", ".join(found[:2] + ([f"and {len(found) - 2} more"] if len(found) > 2 else []))


def _flatten(preimage: Mapping[str, Any]) -> dict[str, str]:
    """Dotted path -> JSON of the leaf; a list counts as one leaf, and so does an empty mapping."""

    def leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            for name, item in value.items():
                yield from leaves(f"{path}.{name}" if path else name, item)
        else:
            yield path, json.dumps(value)

    return dict(leaves("", preimage))


def _value(text: str | None) -> Any:
    """The value of a leaf."""
    return ABSENT if text is None else json.loads(text)


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
