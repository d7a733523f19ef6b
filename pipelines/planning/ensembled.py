"""Stages of an ensemble."""

from graftwork.operators.data.scenario import seen_classes
from graftwork.operators.stage import Resources, Stage
from graftwork.pipelines.planning.combinations import Combined
from graftwork.pipelines.planning.runs import Cell, Run, Served


def ensemble(cell: Cell, entry: Combined, parents: tuple[Run, ...]) -> Run:
    """Predictions after every task by a rule over all members, and their evaluation."""
    shared = cell.shared
    cpus = shared.spec.resources.fit.cpus
    roles = ("model", "features", "adapted", "predictions")
    stage = Stage(
        operator="ensemble",
        parameters={
            "rule": entry.operator,
            "members": [
                {
                    name: run.evaluate.parameters[name]
                    for name in ("method", "separable", "seed")
                    if name in run.evaluate.parameters
                }
                for run in parents
            ],
            "tasks": cell.described,
        },
        inputs={
            "dataset": (shared.dataset.test.stage(),),
            **{
                f"{number} {role}": run.evaluate.inputs[role]
                for number, run in enumerate(parents)
                for role in roles
                if run.evaluate.inputs.get(role)
            },
        },
        hints={"cpus": cpus},
        resources=Resources(cpus=cpus),
        label=f"ensemble {cell.label}",
    )
    evaluate = cell.evaluation({"method": entry.operator}, {"predictions": (stage,)})
    return cell.run([stage], stage, evaluate, _served_ensemble(cell, entry, parents), parents)


def _served_ensemble(cell: Cell, entry: Combined, parents: tuple[Run, ...]) -> Served | None:
    """All models and the rule; None if one of them decides by the test batch, and has no model."""
    members = []
    for number, run in enumerate(parents):
        if run.served is None:
            return None
        members.append(run.served.within(str(number)))
    last = len(cell.stream) - 1
    return Served(
        predictor={
            "kind": "ensemble",
            "rule": entry.operator,
            "learned": sorted(seen_classes(cell.stream, last)),
            "members": [member.predictor for member in members],
        },
        states={file: held for member in members for file, held in member.states.items()},
        beside=next((member.beside for member in members if member.beside), None),
    )
