"""Stages of an ensemble."""

from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.parameters.combining import EnsembleParameters, Member
from graftwork.operators.parameters.hints import CpuHints
from graftwork.operators.parameters.predictors import EnsemblePart
from graftwork.operators.stage import Resources, Stage
from graftwork.pipelines.planning.combinations import Combined
from graftwork.pipelines.planning.reads import Hints
from graftwork.pipelines.planning.runs import Cell, Run, Served

ROLES = ("model", "predictions")
"""Inputs of a member's evaluation that the ensemble reads."""
FEATURES = ("features", "adapted")
"""Features that a member's evaluation reads, and the ensemble."""


def ensemble(cell: Cell, entry: Combined, parents: tuple[Run, ...]) -> Run:
    """Predictions after every task by a rule over all members, and their evaluation."""
    shared = cell.shared
    cpus, tests = shared.spec.resources.fit.cpus, [task.test for task in cell.stream.tasks]
    frozen = {
        f"{number} {role}": run.evaluate.reads[role]
        for number, run in enumerate(parents)
        for role in FEATURES
        if role in run.evaluate.reads
    }
    # Of all members the same shards: those that hold test rows.
    reads = shared.reads(tests, frozen=bool(frozen))
    stage = Stage(
        operator="ensemble",
        parameters=to_json(
            EnsembleParameters(
                rule=entry.operator,
                members=tuple(map(_member, parents)),
                tasks=cell.tested,
            )
        ),
        inputs={
            f"{number} {role}": run.evaluate.inputs[role]
            for number, run in enumerate(parents)
            for role in ROLES
            if run.evaluate.inputs.get(role)
        },
        reads={"dataset": reads.stages()["dataset"], **frozen},
        hints=Hints(CpuHints(cpus=cpus), selection=reads.selection),
        resources=Resources(cpus=cpus),
        label=f"ensemble {cell.label}",
    )
    return cell.run(
        own=[stage],
        model=stage,
        evaluated=cell.evaluated(entry.operator),
        inputs={"predictions": (stage,)},
        served=_served(cell, entry, parents),
        parents=parents,
    )


def _member(run: Run) -> Member:
    """A run as the key of an ensemble holds it."""
    given = run.evaluated
    return Member(method=given.method, columns=given.columns, seed=given.seed)


def _served(cell: Cell, entry: Combined, parents: tuple[Run, ...]) -> Served | None:
    """All models and the rule; None if one of them decides by the test batch, and has no model."""
    members = []
    for number, run in enumerate(parents):
        if run.served is None:
            return None
        members.append(run.served.within(str(number)))
    return Served(
        predictor=EnsemblePart(
            rule=entry.operator,
            learned=tuple(range(len(cell.stream.classes))),
            members=tuple(to_json(member.predictor) for member in members),
        ),
        states={file: held for member in members for file, held in member.states.items()},
        beside=next((member.beside for member in members if member.beside), None),
    )
