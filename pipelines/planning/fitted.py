"""Stages of a run of the contract `fitted`: a fit on cached features and an evaluation."""

from collections.abc import Sequence
from typing import Any

from graftwork.operators.data.scenario import StreamTask, seen_classes, stream_of
from graftwork.operators.stage import Resources, Stage
from graftwork.pipelines.planning import trained
from graftwork.pipelines.planning.runs import Cell, Run, Served, task_json


def fitted(cell: Cell) -> Run:
    """A fit on the features of the frozen backbone, of one adapted on the first task, or both."""
    shared, method = cell.shared, cell.method
    dataset, cpus = shared.dataset, shared.spec.resources.fit.cpus
    parts = method.parts or {}
    classifier = parts.get("classifier") or {
        **method.description,
        "separable": method.card["separable"],
        "uses_seed": method.card["uses_seed"],
    }
    description = {name: classifier[name] for name in ("name", "version", "hyperparameters")}
    own: list[Stage] = []
    graft: dict[str, Any] | None = None
    train: dict[str, tuple[Stage, ...]] = {"features": shared.features(dataset.train)}
    test: dict[str, tuple[Stage, ...]] = {"features": shared.features(dataset.test)}
    if (first := method.first_session) is not None:
        [session] = trained.chain(cell, first, [cell.described[0]], list(cell.stream[0].classes))
        graft = {name: session.parameters[name] for name in ("method", "task", "seed")}
        own.append(session)
        for split, inputs in ((dataset.train, train), (dataset.test, test)):
            inputs["adapted"] = shared.shards(split, graft, session)
            if not parts["keeps_frozen"]:
                del inputs["features"]
    separable = classifier["separable"] and shared.spec.scenario.kind == "class_incremental"
    # One fit on all classes serves every order of a separable method.
    everything = StreamTask(
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
            **({"text": (shared.texts(),)} if method.card["network"] == "clip" else {}),
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
