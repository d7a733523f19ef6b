"""The runs of a spec: every method on every class order with every seed, as stages.

A fitted method is one fit on cached features and one evaluation; a trained one a chain of tasks,
with predictions after each; an adapted one trains on the first task and is fitted on what the
adapted backbone sees.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from operators.augmentation import AUGMENTATIONS
from operators.dataset import Dataset
from operators.errors import BadDataError
from operators.scenario import OrderName, Task, rows_of, seen_classes, stream_of, tasks
from operators.stage import Resources, Stage
from pipelines.trunk import Trunk

Described = list[dict[str, list[int]]]
"""A stream of tasks as keys hold it: classes and domains of each."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of the spec with every hyper-parameter resolved.

    Args:
        name: name in `METHODS`.
        hyperparameters: all of them, defaults included.
        card: the method's card as JSON values.
        label: the name, with what the spec sets where a method stands in it twice.
        parts: of an adapted method: its first session, the classifier that is fitted afterwards,
            and whether the frozen features stay in front.
    """

    name: str
    hyperparameters: dict[str, Any]
    card: dict[str, Any]
    label: str
    parts: dict[str, Any] | None = None

    @property
    def description(self) -> dict[str, Any]:
        """The method as keys hold it."""
        return {
            "name": self.name,
            "version": self.card["version"],
            "hyperparameters": self.hyperparameters,
        }

    @property
    def first_session(self) -> dict[str, Any] | None:
        """Description of what is trained on the first task before anything is fitted."""
        return self.parts and self.parts["first_session"]

    @property
    def trains(self) -> bool:
        """Whether images are needed, not only features."""
        return self.card["contract"] == "trained" or self.first_session is not None

    @property
    def recipe(self) -> dict[str, Any]:
        """Hyper-parameters of what is trained."""
        first = self.first_session
        return first["hyperparameters"] if first else self.hyperparameters


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a run predicts with in the end, to be used outside of the pipeline.

    Args:
        predictor: the description of one of `operators.predictors.KINDS`, in which file names
            stand for states.
        states: file name -> the stage that holds the state, and the prefix of its tensors' names
            there.
    """

    predictor: dict[str, Any]
    states: dict[str, tuple[Stage, str]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One method on one class order with one seed.

    Args:
        own: its stages before the evaluation: a fit, or trainings and predictions.
        model: the stage that holds what it predicts with in the end.
        evaluate: what the run is for.
        served: what it predicts with; None if that takes more than an image.
    """

    method: Method
    order: OrderName
    tasks: tuple[Task, ...]
    seed: int
    own: tuple[Stage, ...]
    model: Stage
    evaluate: Stage
    served: Served | None = None

    @property
    def classes(self) -> list[int]:
        """Ids of the classes seen in the end, ascending."""
        return sorted(seen_classes(self.tasks, len(self.tasks) - 1))


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """What a run is made of."""

    trunk: Trunk
    method: Method
    order: OrderName
    stream: tuple[Task, ...]
    described: Described
    seed: int

    @property
    def label(self) -> str:
        return f"{self.method.label} order {self.order} seed {self.seed}"

    @property
    def num_classes(self) -> int:
        return len(self.trunk.dataset.classes)

    def run(
        self, own: Iterable[Stage], model: Stage, evaluate: Stage, served: Served | None
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
        )

    def evaluation(self, parameters: dict[str, Any], inputs: dict[str, Any]) -> Stage:
        cpus = self.trunk.spec.resources.fit.cpus
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


def make_runs(trunk: Trunk, methods: Iterable[Method]) -> Iterator[Run]:
    """All runs of a spec, method by method.

    Raises:
        BadDataError: a task without training or test images.
    """
    spec, dataset = trunk.spec, trunk.dataset
    scenario = spec.scenario
    streams: list[tuple[OrderName, tuple[Task, ...], Described]] = []
    for order in scenario.orders:
        stream = tuple(
            tasks(
                scenario.kind,
                len(dataset.classes),
                dataset.domains,
                scenario.initial,
                scenario.increment,
                order,
            )[: scenario.tasks]
        )
        described = [_task_json(task) for task in stream]
        _check_rows(dataset, described, order)
        streams.append((order, stream, described))
    for method in methods:
        for order, stream, described in streams:
            for seed in spec.seeds:
                cell = _Cell(
                    trunk=trunk,
                    method=method,
                    order=order,
                    stream=stream,
                    described=described,
                    seed=seed,
                )
                yield _trained(cell) if method.card["contract"] == "trained" else _fitted(cell)


def _fitted(cell: _Cell) -> Run:
    """A fit on the features of the frozen backbone, of one adapted on the first task, or both."""
    trunk, method = cell.trunk, cell.method
    dataset, cpus = trunk.dataset, trunk.spec.resources.fit.cpus
    parts = method.parts or {}
    classifier = parts.get("classifier") or {
        **method.description,
        "separable": method.card["separable"],
        "uses_seed": method.card["uses_seed"],
    }
    description = {name: classifier[name] for name in ("name", "version", "hyperparameters")}
    own: list[Stage] = []
    graft: dict[str, Any] | None = None
    train: dict[str, tuple[Stage, ...]] = {"features": trunk.features(dataset.train)}
    test: dict[str, tuple[Stage, ...]] = {"features": trunk.features(dataset.test)}
    if (first := method.first_session) is not None:
        [session] = _chain(cell, first, [cell.described[0]], list(cell.stream[0].classes))
        graft = {name: session.parameters[name] for name in ("method", "task", "seed")}
        own.append(session)
        for split, inputs in ((dataset.train, train), (dataset.test, test)):
            inputs["adapted"] = trunk.shards(split, graft, session)
            if not parts["keeps_frozen"]:
                del inputs["features"]
    separable = classifier["separable"] and trunk.spec.scenario.kind == "class_incremental"
    # One fit on all classes serves every order of a separable method.
    everything = Task(
        index=0,
        classes=tuple(range(cell.num_classes)),
        domains=tuple(range(len(dataset.domains))),
    )
    fit = Stage(
        operator="fit",
        parameters={
            "method": description,
            "seed": cell.seed if classifier["uses_seed"] else None,
            "num_classes": cell.num_classes,
            "tasks": [_task_json(everything)] if separable else cell.described,
        },
        inputs={**train, "dataset": (dataset.train.stage(),)},
        hints={"cpus": cpus},
        resources=Resources(cpus=cpus),
        label=f"fit {method.label if separable and not own else cell.label}",
    )
    evaluate = cell.evaluation(
        {"method": description, "separable": separable},
        {
            "model": (fit,),
            "first_session": tuple(own),
            **test,
            "dataset": (dataset.test.stage(),),
        },
    )
    return cell.run([*own, fit], fit, evaluate, _served_fit(fit, own, graft, parts))


def _served_fit(
    fit: Stage, own: Sequence[Stage], graft: dict[str, Any] | None, parts: dict[str, Any]
) -> Served:
    """The classifier after the last task, and the first session that adapted its backbone."""
    tasks = fit.parameters["tasks"]
    predictor = {
        "kind": "fitted",
        "method": fit.parameters["method"],
        "seed": fit.parameters["seed"] or 0,
        "state": "state.safetensors",
        "learned": list(seen_classes(stream_of(tasks), len(tasks) - 1)),
        "graft": graft and {**graft, "state": "first_session.safetensors"},
        "keeps_frozen": bool(parts.get("keeps_frozen")),
    }
    states = {"state.safetensors": (fit, f"{len(tasks) - 1}/")}
    if own:
        states["first_session.safetensors"] = (own[0], "")
    return Served(predictor=predictor, states=states)


def _trained(cell: _Cell) -> Run:
    """A chain of tasks, and predictions after each."""
    trunk, method, stream = cell.trunk, cell.method, cell.stream
    joint = method.card["upper_bound"]
    learned = list(seen_classes(stream, len(stream) - 1))
    parts = [_union(cell.described)] if joint else cell.described
    chain = _chain(cell, method.description, parts, learned)
    test, resources = trunk.dataset.test, trunk.spec.resources.extract
    vote = method.hyperparameters.get("eval_selection") == "batch_vote"
    predictions = []
    for number, model in enumerate(chain):
        after = list(range(len(stream))) if joint else [number]
        shown = cell.described[: after[-1] + 1]
        predictions.append(
            Stage(
                operator="predict",
                parameters={
                    **{
                        name: model.parameters[name]
                        for name in (
                            "method",
                            "seed",
                            "task",
                            "learned",
                            "architecture",
                            "backbone",
                            "preprocessing",
                        )
                    },
                    "numerics": {**trunk.numerics(resources.gpus), "compile": False},
                    "tasks": shown,
                    "after": after,
                    "vote_batch": method.hyperparameters["batch_size"] if vote else None,
                },
                inputs={
                    "model": (model,),
                    "dataset": (test.stage(),),
                    "features": trunk.features(test) if method.card["query"] else (),
                },
                hints=trunk.hints(
                    test,
                    partial(rows_of, test.labels, test.domains, shown),
                    images=sum(int(trunk.counts(test, task).sum()) for task in shown),
                    cpus=resources.cpus,
                ),
                resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
                label=f"predict {cell.label} task {after[-1] + 1}/{len(stream)}",
            )
        )
    evaluate = cell.evaluation(
        {"method": method.description}, {"predictions": tuple(predictions), "model": tuple(chain)}
    )
    return cell.run(
        [*chain, *predictions],
        chain[-1],
        evaluate,
        # A vote over the neighbours in a batch is no prediction of an image.
        None if vote else served_learner(chain[-1]),
    )


def served_learner(last: Stage) -> Served:
    """A method's learner with what is stored after its last task.

    Args:
        last: has `method`, `seed`, `task` and `learned` among its parameters, and the learner's
            state as its file.
    """
    shared = {name: last.parameters[name] for name in ("method", "seed", "task", "learned")}
    return Served(
        predictor={"kind": "trained", **shared, "state": "state.safetensors"},
        states={"state.safetensors": (last, "")},
    )


def _chain(
    cell: _Cell, method: dict[str, Any], parts: Described, learned: Sequence[int]
) -> list[Stage]:
    """One training stage per task, each with the one before as its input."""
    trunk, train = cell.trunk, cell.trunk.dataset.train
    hyper, resources = method["hyperparameters"], trunk.spec.resources.train
    plain = hyper["augmentation"] == "none"
    query = cell.method.card["query"]
    shared = {
        "method": method,
        "seed": cell.seed,
        **trunk.network(),
        "preprocessing": trunk.preprocessing.to_json(),
        "augmentation": AUGMENTATIONS[hyper["augmentation"]].to_json(),
        "numerics": {**trunk.numerics(resources.gpus), "compile": resources.compile},
    }
    place = {c: column for column, c in enumerate(learned)}
    passes = hyper["epochs"] * (2 if query and not plain else 1)
    stages: list[Stage] = []
    before = 0
    for number, part in enumerate(parts):
        seen = len({c for earlier in parts[: number + 1] for c in earlier["classes"]})
        counts = trunk.counts(train, part)
        # A domain need not have images of every class.
        present = [c for c, count in zip(part["classes"], counts, strict=True) if count]
        stages.append(
            Stage(
                operator="train",
                parameters={
                    **shared,
                    "task": {
                        "index": number,
                        "count": len(parts),
                        "current": sorted(place[c] for c in present),
                        "before": before,
                        "seen": seen,
                    },
                    "images": part,
                    "learned": list(learned[:seen]),
                },
                inputs={
                    "dataset": (train.stage(),),
                    "previous": tuple(stages[-1:]),
                    "features": trunk.features(train) if query and plain else (),
                },
                hints=trunk.hints(
                    train,
                    partial(rows_of, train.labels, train.domains, [part]),
                    images=int(counts.sum()) * passes,
                    cpus=resources.cpus,
                    checkpoint_minutes=resources.checkpoint_minutes,
                ),
                resources=Resources(
                    cpus=resources.cpus, gpus=resources.gpus, workers=resources.workers
                ),
                chain=cell.label,
                label=f"train {cell.label} task {number + 1}/{len(parts)}",
            )
        )
        before = seen
    return stages


def _union(described: Described) -> dict[str, list[int]]:
    """All tasks as one."""
    return {
        name: list(dict.fromkeys(value for task in described for value in task[name]))
        for name in ("classes", "domains")
    }


def _check_rows(dataset: Dataset, stream: Described, order: OrderName) -> None:
    """Every task needs rows to learn from and rows to be tested on."""
    for split in (dataset.train, dataset.test):
        present = set(zip(split.labels.tolist(), split.domains.tolist(), strict=True))
        for number, task in enumerate(stream):
            if not any((c, d) in present for c in task["classes"] for d in task["domains"]):
                where = ", ".join(dataset.domains[d] for d in task["domains"])
                raise BadDataError(
                    f"scenario: task {number} of order {order} has no {split.name} images"
                    + (f" (domain {where})" if where else "")
                )


def _task_json(task: Task) -> dict[str, list[int]]:
    return {"classes": list(task.classes), "domains": list(task.domains)}
