"""The runs of a spec: every method on every class order with every seed, as stages.

A fitted method is one fit on cached features and one evaluation; a trained one a chain of tasks, or
tasks side by side that are joined one after the other, with predictions after each; an adapted one
trains on the first task and is fitted on what the adapted backbone sees.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from operators.data.dataset import Dataset
from operators.data.scenario import OrderName, Task, seen_classes, stream_of, tasks
from operators.errors import BadDataError
from operators.stage import Resources, Stage
from pipelines.planning import trained
from pipelines.planning.runs import Cell, Described, Method, Run, Served, task_json
from pipelines.planning.shared import Trunk


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
        [session] = trained.chain(cell, first, [cell.described[0]], list(cell.stream[0].classes))
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
        experts, models = trained.side_by_side(cell, parts, trained.learned(cell))
    else:
        models = trained.chain(cell, cell.method.description, parts, trained.learned(cell))
    predictions = trained.predicted(cell, cell.method, models)
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
    served = None if votes else trained.served_learner(models[-1])
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
        chains[role] = trained.chain(
            branch, branch.method.description, described, trained.learned(cell)
        )
        tests[role] = trained.predicted(branch, branch.method, chains[role])
        scores[role] = [trained.score(branch, stage) for stage in chains[role]]
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
    branches = {
        role: trained.served_learner(stages[-1]).within(role) for role, stages in chains.items()
    }
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
                    f"task {number} of order {order} has no {split.name} images"
                    + (f" (domain {where})" if where else ""),
                    key="scenario",
                )
