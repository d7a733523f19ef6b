"""Stages of a run of the contract `fitted`: a fit on cached features and an evaluation."""

from collections.abc import Sequence

from graftwork.operators.data.scenario import StreamTask, seen_classes, stream_of
from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.parameters.features import Graft
from graftwork.operators.parameters.fitting import FitParameters
from graftwork.operators.parameters.hints import CpuHints
from graftwork.operators.parameters.predictors import FittedPart, GraftPart
from graftwork.operators.stage import Resources, Stage
from graftwork.pipelines.planning import trained
from graftwork.pipelines.planning.runs import Cell, Run, Served, task_data

STATE, FIRST_SESSION = "state.safetensors", "first_session.safetensors"
"""Files of a served model: of the classifier, and of what adapted its backbone."""


def fitted(cell: Cell) -> Run:
    """A fit on the features of the frozen backbone, of one adapted on the first task, or both."""
    shared, method = cell.shared, cell.method
    dataset, cpus = shared.dataset, shared.spec.resources.fit.cpus
    classifier, keeps_frozen = (
        method.classifier,
        bool(method.adapted and method.adapted.keeps_frozen),
    )
    own: list[Stage] = []
    graft: Graft | None = None
    train: dict[str, tuple[Stage, ...]] = {"features": shared.features(dataset.train)}
    test: dict[str, tuple[Stage, ...]] = {"features": shared.features(dataset.test)}
    if (first := method.first_session) is not None:
        [session] = trained.chain(cell, first, cell.described[:1], cell.stream[0].classes)
        learner = session.model.learner
        graft = Graft(method=learner.method, task=learner.task, seed=learner.seed)
        own.append(session.model.stage)
        for split, inputs in ((dataset.train, train), (dataset.test, test)):
            inputs["adapted"] = shared.shards(split, graft, session.model.stage)
            if not keeps_frozen:
                del inputs["features"]
    separable = classifier.separable and shared.spec.scenario.kind == "class_incremental"
    # One fit on all classes serves every order of a separable method.
    everything = StreamTask(
        index=0,
        classes=tuple(range(cell.num_classes)),
        domains=tuple(range(len(dataset.domains))),
    )
    parameters = FitParameters(
        method=classifier.method,
        seed=cell.seed if classifier.uses_seed else None,
        num_classes=cell.num_classes,
        tasks=(task_data(everything),) if separable else cell.described,
    )
    fit = Stage(
        operator="fit",
        parameters=to_json(parameters),
        inputs={
            **train,
            "dataset": (dataset.train.stage(),),
            **({"text": (shared.texts(),)} if method.facts.network == "clip" else {}),
        },
        hints=to_json(CpuHints(cpus=cpus)),
        resources=Resources(cpus=cpus),
        label=f"fit {method.label if separable and not own else cell.label}",
    )
    return cell.run(
        own=[*own, fit],
        model=fit,
        evaluated=cell.evaluated(classifier.method, separable),
        inputs={
            "model": (fit,),
            "first_session": tuple(own),
            **test,
            "dataset": (dataset.test.stage(),),
        },
        served=_served(parameters, fit, own, graft, keeps_frozen),
    )


def _served(
    parameters: FitParameters,
    fit: Stage,
    own: Sequence[Stage],
    graft: Graft | None,
    keeps_frozen: bool,
) -> Served:
    """The classifier after the last task, and the first session that adapted its backbone."""
    last = len(parameters.tasks) - 1
    states = {STATE: (fit, f"{last}/")}
    part = None
    if graft is not None:
        states[FIRST_SESSION] = (own[0], "")
        part = GraftPart(method=graft.method, task=graft.task, seed=graft.seed, state=FIRST_SESSION)
    return Served(
        predictor=FittedPart(
            method=parameters.method,
            seed=parameters.seed or 0,
            state=STATE,
            learned=tuple(seen_classes(stream_of(parameters.tasks), last)),
            graft=part,
            keeps_frozen=keeps_frozen,
        ),
        states=states,
    )
