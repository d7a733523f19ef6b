"""One method on one class order with one seed: what it is made of, and what becomes of it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from graftwork.operators.data.scenario import OrderName, StreamTask, seen_classes
from graftwork.operators.stage import Resources, Stage
from graftwork.pipelines.planning.methods import Method
from graftwork.pipelines.planning.shared import Shared

Described = list[dict[str, list[int]]]
"""A stream of tasks as keys hold it: classes and domains of each."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a run predicts with in the end, to be used outside of the pipeline.

    Args:
        predictor: the description of one of `operators.serving.kinds.KINDS`, in which file names
            stand for states.
        states: file name -> the stage that holds the state, and the prefix of its tensors' names
            there.
        beside: of the second network, if a part of the predictor is on it.
    """

    predictor: dict[str, Any]
    states: dict[str, tuple[Stage, str]]
    beside: Shared | None = None

    def within(self, name: str) -> "Served":
        """As a part of another predictor: its files begin with a name."""
        return replace(
            self,
            predictor=_renamed(self.predictor, name),
            states={f"{name}.{file}": held for file, held in self.states.items()},
        )


def _renamed(part: dict[str, Any], name: str) -> dict[str, Any]:
    """A predictor's description with other names of its files."""
    found: dict[str, Any] = {}
    for role, value in part.items():
        if role == "state":
            found[role] = f"{name}.{value}"
        elif role == "members":
            found[role] = [_renamed(member, name) for member in value]
        elif isinstance(value, dict) and role in ("graft", "clip", "vit"):
            found[role] = _renamed(value, name)
        else:
            found[role] = value
    return found


@dataclass(frozen=True, kw_only=True)
class Run:
    """One method on one class order with one seed.

    Args:
        own: its stages before the evaluation: a fit, or trainings (and joins) and predictions.
        model: the stage that holds what it predicts with in the end.
        evaluate: what the run is for.
        served: what it predicts with; None if that takes more than an image, as a vote over the
            test batch does.
        parents: runs whose models or scores it combines.
    """

    method: Method
    order: OrderName
    tasks: tuple[StreamTask, ...]
    seed: int
    own: tuple[Stage, ...]
    model: Stage
    evaluate: Stage
    served: Served | None = None
    parents: tuple["Run", ...] = ()

    @property
    def classes(self) -> list[int]:
        """Ids of the classes seen in the end, ascending."""
        return sorted(seen_classes(self.tasks, len(self.tasks) - 1))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What a run is made of.

    Args:
        shared: what all runs share.
        stream: its tasks.
        described: the same as keys hold them.
    """

    shared: Shared
    method: Method
    order: OrderName
    stream: tuple[StreamTask, ...]
    described: Described
    seed: int
    beside: Shared | None = None

    @property
    def label(self) -> str:
        return f"{self.method.label} order {self.order} seed {self.seed}"

    @property
    def num_classes(self) -> int:
        return len(self.shared.dataset.classes)

    def run(
        self,
        own: Iterable[Stage],
        model: Stage,
        evaluate: Stage,
        served: Served | None,
        parents: Iterable[Run] = (),
    ) -> Run:
        return Run(
            method=self.method,
            order=self.order,
            tasks=self.stream,
            seed=self.seed,
            own=tuple(own),
            model=model,
            evaluate=evaluate,
            served=served,
            parents=tuple(parents),
        )

    def evaluation(self, parameters: dict[str, Any], inputs: dict[str, Any]) -> Stage:
        cpus = self.shared.spec.resources.fit.cpus
        return Stage(
            operator="evaluate",
            parameters={
                **parameters,
                "order": self.order,
                "seed": self.seed,
                "num_classes": self.num_classes,
                "tasks": self.described,
            },
            inputs=inputs,
            hints={"cpus": cpus},
            resources=Resources(cpus=cpus),
            label=f"evaluate {self.label}",
        )


def task_json(task: StreamTask) -> dict[str, list[int]]:
    return {"classes": list(task.classes), "domains": list(task.domains)}
