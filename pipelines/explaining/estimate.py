"""Estimates what a run takes, by what stages of the same kind took before."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.cluster.execution.graph import inputs_of
from graftwork.operators.stage import Stage
from graftwork.pipelines.explaining.former import Former, Formers

NAMED = 5
"""At most so many kinds of stage stand in a line."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Time that the missing stages of a plan take.

    Args:
        seconds: of all of them together, without those of `unknown`.
        in_a_row: the same along the longest path of stages that wait for each other: a run takes
            that at least, however many workers there are.
        former: how many stored stages say so.
        unknown: kinds of stage of which none was computed before, such as `train l2p`.
    """

    seconds: float
    in_a_row: float
    former: int
    unknown: tuple[str, ...]

    def __str__(self) -> str:
        """A line for people; empty if nothing is missing."""
        kinds = ", ".join(self.unknown[:NAMED])
        if len(self.unknown) > NAMED:
            kinds += f" and {len(self.unknown) - NAMED} more"
        if not self.former:
            return f"no former stage says how long it takes: {kinds}" if kinds else ""
        stages = "one stage" if self.former == 1 else f"{self.former} stages"
        line = f"about {duration(self.seconds)} of work "
        line += f"({duration(self.in_a_row)} in a row at least), from {stages} done before"
        if not kinds:
            return line
        count = len(self.unknown)
        several = f"{count} kinds" if count > 1 else "one kind"
        return f"{line}; {several} of stage without a former one: {kinds}"


def estimate(missing: Sequence[Stage], formers: Formers) -> Estimate:
    """Estimates what stages take.

    Args:
        missing: what a run has to compute, inputs before what reads them.
    """
    unknown: dict[str, None] = {}
    used: set[str] = set()
    ends: dict[str, float] = {}
    total, guesses = 0.0, _Guesses(formers)
    for stage in missing:
        former, seconds = guesses.of(stage)
        if former is None:
            unknown[_Kind.of(stage.preimage).name] = None
        else:
            used.add(former.key)
        total += seconds
        before = (ends.get(each.key, 0.0) for each in inputs_of(stage))
        ends[stage.key] = seconds + max(before, default=0.0)
    return Estimate(
        seconds=total,
        in_a_row=max(ends.values(), default=0.0),
        former=len(used),
        unknown=tuple(unknown),
    )


def duration(seconds: float) -> str:
    """Seconds for people, in two digits."""
    if seconds < 1:
        return "less than a second"
    for size, name in ((1, "s"), (60, "min"), (3600, "h")):
        if seconds < 99.5 * size or name == "h":
            value = seconds / size
            digits = 1 if size > 1 and value < 9.95 else 0
            return f"{f'{value:.{digits}f}'.removesuffix('.0')} {name}"
    raise AssertionError("the last unit takes all")


class _Guesses:
    """Seconds of stages, each worked out once for stages that look the same."""

    def __init__(self, formers: Formers) -> None:
        self._formers = formers
        self._alike: dict[str, dict[str, list[Former]]] = {}
        self._known: dict[tuple[str, str, str, int], tuple[Former | None, float]] = {}

    def of(self, stage: Stage) -> tuple[Former | None, float]:
        """The stored stage that is most like another one, and seconds by it."""
        kind, values = _Kind.of(stage.preimage), _values(stage.preimage)
        images = stage.hints.get("images", 0)
        what = (stage.operator, kind.same, json.dumps(values, sort_keys=True), images)
        if what not in self._known:
            self._known[what] = self._nearest(stage.operator, kind, values, images)
        return self._known[what]

    def _nearest(
        self, operator: str, kind: "_Kind", values: Mapping[str, Any], images: int
    ) -> tuple[Former | None, float]:
        if operator not in self._alike:
            alike: dict[str, list[Former]] = {}
            for former in self._formers.of(operator):
                alike.setdefault(_Kind.of(former.preimage).same, []).append(former)
            self._alike[operator] = alike
        candidates = self._alike[operator].get(kind.same)
        if not candidates:
            return None, 0.0

        def distance(former: Former) -> tuple[int, float, float]:
            other = _values(former.preimage)
            names = values.keys() | other.keys()
            differing = sum(values.get(name) != other.get(name) for name in names)
            scale = abs(math.log(images / former.images)) if images and former.images else 0.0
            return differing, scale, -former.created

        found = min(candidates, key=distance)
        scale = images / found.images if images and found.images else 1.0
        return found, found.seconds * scale


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A kind of stage.

    Args:
        name: for people.
        same: JSON of what two stages of a kind have in common: method, networks, device.
    """

    name: str
    same: str

    @classmethod
    def of(cls, preimage: Mapping[str, Any]) -> "_Kind":
        """The kind of a stage, by the preimage of its key."""
        parameters = preimage["parameters"]
        # A fit reads one kind of features or two, herding looks at one.
        features = parameters.get("features", ())
        kinds = [features] if isinstance(features, Mapping) else features
        networks = [_network(p) for p in (parameters, *kinds) if "architecture" in p]
        methods = [each["name"] for each in _methods(parameters)]
        if "selection" in parameters:
            methods.append(parameters["selection"])
        own = methods or [network["architecture"] for network in networks]
        return cls(
            name=" ".join([preimage["operator"], *own[:1]]),
            same=json.dumps([preimage["operator"], methods, networks], sort_keys=True),
        )


def _methods(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Names what a stage computes with: a merge before the method that it merges."""
    return [parameters[role] for role in ("merge", "rule", "method") if role in parameters]


def _values(preimage: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters by name."""
    methods = _methods(preimage["parameters"])
    return {name: value for each in methods for name, value in each["hyperparameters"].items()}


def _network(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Collects what the time of a pass depends on, besides images and method; not the weights."""
    numerics = parameters.get("numerics", {})
    graft = parameters.get("graft")
    return {
        "architecture": parameters["architecture"],
        "crop": parameters.get("preprocessing", {}).get("crop"),
        "device": numerics.get("device"),
        "precision": numerics.get("precision"),
        "graft": graft and graft["method"]["name"],
    }
