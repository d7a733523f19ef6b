"""The runs of a spec: every method on every class order with every seed, as stages.

A fitted method is one fit on cached features and one evaluation; a trained one a chain of tasks, or
tasks side by side that are joined one after the other, with predictions after each; an adapted one
trains on the first task and is fitted on what the adapted backbone sees.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from operators.augmentation import AUGMENTATIONS
from operators.dataset import Dataset
from operators.errors import BadDataError, ConfigError
from operators.exemplars import shares
from operators.scenario import OrderName, Task, rows_of, seen_classes, stream_of, tasks
from operators.stage import Resources, Stage
from pipelines.trunk import Hints, Trunk

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
            and whether the frozen features stay in front; of a fused one its two branches.
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
        return self.parts and self.parts.get("first_session")

    def branch(self, role: str) -> "Method":
        """One of the two branches of a fused method, as a method of its own."""
        assert self.parts is not None
        return Method(label=f"{self.label} {role}", **self.parts[role])

    @property
    def trains(self) -> bool:
        """Whether images are needed, not only features."""
        return self.card["contract"] in ("trained", "fused") or self.first_session is not None

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
        beside: of the second network, if a part of the predictor is on it.
    """

    predictor: dict[str, Any]
    states: dict[str, tuple[Stage, str]]
    beside: Trunk | None = None

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
    tasks: tuple[Task, ...]
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
        trunk: what all runs share.
        stream: its tasks.
        described: the same as keys hold them.
    """

    trunk: Trunk
    method: Method
    order: OrderName
    stream: tuple[Task, ...]
    described: Described
    seed: int
    beside: Trunk | None = None

    @property
    def label(self) -> str:
        return f"{self.method.label} order {self.order} seed {self.seed}"

    @property
    def num_classes(self) -> int:
        return len(self.trunk.dataset.classes)

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


def make_runs(
    trunk: Trunk, methods: Iterable[Method], beside: Trunk | None = None
) -> Iterator[Run]:
    """All runs of a spec, method by method.

    Args:
        beside: of the second network, for methods with a branch on it.

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
        described = [task_json(task) for task in stream]
        _check_rows(dataset, described, order)
        streams.append((order, stream, described))
    for method in methods:
        for order, stream, described in streams:
            for seed in spec.seeds:
                cell = Cell(
                    trunk=trunk,
                    method=method,
                    order=order,
                    stream=stream,
                    described=described,
                    seed=seed,
                    beside=beside,
                )
                yield {"trained": _trained, "fused": _fused}.get(method.card["contract"], _fitted)(
                    cell
                )


def _fitted(cell: Cell) -> Run:
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
            "tasks": [task_json(everything)] if separable else cell.described,
        },
        inputs={
            **train,
            "dataset": (dataset.train.stage(),),
            **({"text": (trunk.texts(),)} if method.card["network"] == "clip" else {}),
        },
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


def _trained(cell: Cell) -> Run:
    """Tasks in a chain, or side by side and then joined, and predictions after each."""
    joint = cell.method.card["upper_bound"]
    parts = [_union(cell.described)] if joint else cell.described
    experts: list[Stage] = []
    if cell.method.card["independent"]:
        experts, models = _side_by_side(cell, parts, _learned(cell))
    else:
        models = _chain(cell, cell.method.description, parts, _learned(cell))
    predictions = predicted(cell, cell.method, models)
    evaluate = cell.evaluation(
        {"method": cell.method.description},
        {
            "predictions": tuple(predictions),
            "model": tuple(models),
            **({"experts": tuple(experts)} if experts else {}),
        },
    )
    # A vote over the neighbours in a batch is no prediction of an image.
    votes = cell.method.card["batch_information_at_test"]
    served = None if votes else served_learner(models[-1])
    return cell.run([*experts, *models, *predictions], models[-1], evaluate, served)


def _fused(cell: Cell) -> Run:
    """Two chains side by side, and a blend of their scores after each task."""
    method, described, trunk = cell.method, cell.described, cell.trunk
    assert cell.beside is not None, "check_networks asks for it"
    chains: dict[str, list[Stage]] = {}
    tests: dict[str, list[Stage]] = {}
    scores: dict[str, list[Stage]] = {}
    for role, network in (("clip", trunk), ("vit", cell.beside)):
        branch = replace(cell, trunk=network, method=method.branch(role))
        chains[role] = _chain(branch, branch.method.description, described, _learned(cell))
        tests[role] = predicted(branch, branch.method, chains[role])
        scores[role] = [_score(branch, stage) for stage in chains[role]]
    cpus = trunk.spec.resources.fit.cpus
    blends = [
        Stage(
            operator="blend",
            parameters={
                "method": method.description,
                "learned": chains["clip"][number].parameters["learned"],
                "tasks": described[: number + 1],
                "after": [number],
            },
            inputs={
                **{role: (stages[number],) for role, stages in scores.items()},
                **{f"{role}_test": (stages[number],) for role, stages in tests.items()},
                "dataset": (trunk.dataset.test.stage(),),
            },
            hints={"cpus": cpus},
            resources=Resources(cpus=cpus),
            label=f"blend {cell.label} task {number + 1}/{len(described)}",
        )
        for number in range(len(described))
    ]
    evaluate = cell.evaluation(
        {"method": method.description},
        {
            "model": tuple(chains["clip"]),
            "beside": tuple(chains["vit"]),
            "branches": (*tests["clip"], *tests["vit"]),
            "scores": (*scores["clip"], *scores["vit"]),
            "predictions": tuple(blends),
        },
    )
    own = [*evaluate.inputs["model"], *evaluate.inputs["beside"], *evaluate.inputs["branches"]]
    branches = {role: served_learner(stages[-1]).within(role) for role, stages in chains.items()}
    served = Served(
        predictor={
            "kind": "fused",
            "method": method.description,
            "learned": blends[-1].parameters["learned"],
            "state": "state.safetensors",
            **{role: branch.predictor for role, branch in branches.items()},
        },
        states={
            "state.safetensors": (blends[-1], ""),
            **branches["clip"].states,
            **branches["vit"].states,
        },
        beside=cell.beside,
    )
    return cell.run([*own, *evaluate.inputs["scores"], *blends], blends[-1], evaluate, served)


def _learned(cell: Cell) -> list[int]:
    """Classes in the order learned."""
    return list(seen_classes(cell.stream, len(cell.stream) - 1))


def _score(cell: Cell, model: Stage) -> Stage:
    """Scores of a trained task on the rows that it was trained on."""
    resources, hints = cell.trunk.spec.resources.extract, model.hints
    assert isinstance(hints, Hints), "they were made by _chain"
    return Stage(
        operator="score",
        parameters={
            **{name: v for name, v in model.parameters.items() if name != "augmentation"},
            "numerics": {**cell.trunk.numerics(resources.gpus), "compile": False},
        },
        inputs={"model": (model,), **{r: s for r, s in model.inputs.items() if r != "previous"}},
        hints=hints.but(
            images=hints["images"] // cell.method.hyperparameters["epochs"],
            cpus=resources.cpus,
        ),
        resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
        label=model.label.replace("train", "score", 1),
    )


def predicted(cell: Cell, method: Method, models: Sequence[Stage]) -> list[Stage]:
    """Predictions of each model: after its task, or after all for a method that sees all at once.

    Args:
        method: whose learner the models are states of.
        models: stages with the parameters of a training.
    """
    trunk, stream, joint = cell.trunk, cell.stream, method.card["upper_bound"]
    test, resources = trunk.dataset.test, trunk.spec.resources.extract
    vote = method.hyperparameters.get("eval_selection", "instance") != "instance"
    predictions = []
    for number, model in enumerate(models):
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
                    partial(
                        rows_of,
                        test.labels,
                        test.domains,
                        shown if method.card["images"] else [],
                    ),
                    images=sum(int(trunk.counts(test, task).sum()) for task in shown),
                    cpus=resources.cpus,
                ),
                resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
                label=f"predict {cell.label} task {after[-1] + 1}/{len(stream)}",
            )
        )
    return predictions


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
    cell: Cell, method: dict[str, Any], parts: Described, learned: Sequence[int]
) -> list[Stage]:
    """One training stage per task, each with the one before as its input."""
    stages: list[Stage] = []
    for number in range(len(parts)):
        inputs = {"previous": tuple(stages[-1:])}
        stages.append(_training(cell, method, parts, learned, number, inputs, cell.label))
    return stages


def _side_by_side(
    cell: Cell, parts: Described, learned: Sequence[int]
) -> tuple[list[Stage], list[Stage]]:
    """One training stage per task, each on its own, and what joins them one after the other."""
    trunk, method, train = cell.trunk, cell.method, cell.trunk.dataset.train
    resources, query = trunk.spec.resources.extract, method.card["query"]
    experts: list[Stage] = []
    joins: list[Stage] = []
    for number, part in enumerate(parts):
        inputs = {"first": tuple(joins[:1])} if method.card["shared"] else {}
        # A chain of one stage: a worker group for each, as many at once as the cluster has room.
        chain = f"{cell.label} expert {number + 1}"
        expert = _training(cell, method.description, parts, learned, number, inputs, chain)
        joins.append(
            Stage(
                operator="join",
                parameters={
                    **{n: v for n, v in expert.parameters.items() if n != "augmentation"},
                    "numerics": {**trunk.numerics(resources.gpus), "compile": False},
                },
                inputs={
                    "dataset": (train.stage(),),
                    "previous": tuple(joins[-1:]),
                    "expert": (expert,),
                    "features": trunk.features(train) if query else (),
                },
                # Whether a method looks at images once more is its own affair: none are announced.
                hints=trunk.hints(
                    train,
                    partial(rows_of, train.labels, train.domains, [part]),
                    images=0,
                    cpus=resources.cpus,
                ),
                resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
                label=f"join {cell.label} task {number + 1}/{len(parts)}",
            )
        )
        experts.append(expert)
    return experts, joins


def _training(
    cell: Cell,
    method: dict[str, Any],
    parts: Described,
    learned: Sequence[int],
    number: int,
    inputs: dict[str, tuple[Stage, ...]],
    chain: str,
) -> Stage:
    """The training of a task."""
    trunk, train, part, card = cell.trunk, cell.trunk.dataset.train, parts[number], cell.method.card
    hyper, resources = method["hyperparameters"], trunk.spec.resources.train
    augmentation = hyper.get("augmentation", "none")
    plain = augmentation == "none"
    place = {c: column for column, c in enumerate(learned)}
    seen = {c for earlier in parts[: number + 1] for c in earlier["classes"]}
    before = {c for earlier in parts[:number] for c in earlier["classes"]}
    counts = trunk.counts(train, part)
    # A domain need not have images of every class.
    present = [c for c, count in zip(part["classes"], counts, strict=True) if count]
    images = int(counts.sum())
    keyed: dict[str, Any] = {}
    inputs = {
        "dataset": (train.stage(),),
        **inputs,
        "features": trunk.features(train) if card["query"] and plain else (),
    }
    hints: dict[str, Any] = {}
    # Of all that may be kept: a worker reads the exemplars alone.
    readable = [part] if card["images"] else []
    if hyper.get("exemplars", 0) > 0 and len(parts) > 1:
        memory = _memory(cell, hyper, parts[:number])
        keyed["memory"] = memory.described
        # Of the first task too, which needs none: its group then trains the whole chain.
        inputs["exemplars"] = (trunk.exemplars(hyper["exemplar_selection"], cell.seed),)
        images += memory.images
        readable = parts[: number + 1] if card["images"] else []
    if card["reference"] and trunk.reference is not None:
        keyed["reference"] = list(trunk.reference.texts)
        inputs["reference"] = (trunk.reference.stage(),)
        hints["reference"] = trunk.reference.images.places(0, len(trunk.reference.images))
    return Stage(
        operator="train",
        parameters={
            "method": method,
            "seed": cell.seed,
            **trunk.network(),
            "preprocessing": trunk.preprocessing.to_json(),
            "augmentation": AUGMENTATIONS[augmentation].to_json(),
            "numerics": {**trunk.numerics(resources.gpus), "compile": resources.compile},
            "task": {
                "index": number,
                "count": len(parts),
                "current": sorted(place[c] for c in present),
                "before": len(before),
                "seen": len(seen),
                **_names(cell, learned[: len(seen)]),
            },
            "images": part,
            "learned": list(learned[: len(seen)]),
            **keyed,
        },
        inputs=inputs,
        hints=trunk.hints(
            train,
            partial(rows_of, train.labels, train.domains, readable),
            images=images * hyper["epochs"] * (2 if card["query"] and not plain else 1),
            cpus=resources.cpus,
            checkpoint_minutes=resources.checkpoint_minutes,
            **hints,
        ),
        resources=Resources(cpus=resources.cpus, gpus=resources.gpus, workers=resources.workers),
        chain=chain,
        label=f"train {cell.label} task {number + 1}/{len(parts)}",
    )


@dataclass(frozen=True, kw_only=True)
class _Memory:
    """The exemplars of a task: as keys hold them, and how many there are."""

    described: dict[str, Any]
    images: int


def _memory(cell: Cell, hyper: dict[str, Any], earlier: Described) -> _Memory:
    """What a task may train on again.

    Raises:
        ConfigError: the budget leaves a class without a single image.
    """
    budget, kind = hyper["exemplars"], hyper["exemplar_budget"]
    classes = len({c for task in earlier for c in task["classes"]})
    if kind == "total" and budget < classes:
        raise ConfigError(
            f"methods: {cell.method.name} shares exemplars {budget} among {classes} classes, which "
            f"leaves none for some; give at least {classes}, or 0"
        )
    table = cell.trunk.table(cell.trunk.dataset.train)
    kept = shares(table, earlier, budget, kind)
    return _Memory(
        described={"earlier": earlier, "exemplars": budget, "budget": kind},
        images=sum(kept.values()),
    )


def _names(cell: Cell, learned: Sequence[int]) -> dict[str, list[str]]:
    """Names of classes in the order learned, and templates, for a method that reads them."""
    if cell.method.card["network"] != "clip":
        return {}
    return cell.trunk.named(cell.trunk.dataset.classes[c] for c in learned)


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


def task_json(task: Task) -> dict[str, list[int]]:
    return {"classes": list(task.classes), "domains": list(task.domains)}
