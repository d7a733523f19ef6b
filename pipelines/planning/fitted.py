"""Stages of a run of the contract `fitted`: a fit on cached features and an evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from graftwork.operators.data.dataset import Split
from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.parameters.features import Graft, TextParameters
from graftwork.operators.parameters.fitting import EvaluateParameters, FitParameters
from graftwork.operators.parameters.hints import FitHints
from graftwork.operators.parameters.predictors import FittedPart, GraftPart
from graftwork.operators.stage import Resources, Stage
from graftwork.operators.streams.stream import described
from graftwork.pipelines.planning import trained
from graftwork.pipelines.planning.reads import Hints, Reads
from graftwork.pipelines.planning.runs import Cell, Run, Served
from graftwork.pipelines.planning.shared import Shared

STATE, FIRST_SESSION = "state.safetensors", "first_session.safetensors"
"""Files of a served model: of the classifier, and of what adapted its backbone."""


def fitted(cell: Cell) -> Run:
    """A fit on the features of the frozen backbone, of one adapted on the first task, or both."""
    shared, method, tasks = cell.shared, cell.method, cell.stream.tasks
    cpus = shared.spec.resources.fit.cpus
    classifier, parts = method.classifier, method.adapted
    own: list[Stage] = []
    graft: Graft | None = None
    kinds = {"features": shared.kind()}
    shards: dict[str, Callable[[Split], tuple[Stage, ...]]] = {"features": shared.features}
    if (first := method.first_session) is not None:
        assert parts is not None, "an adapted method has a first session"
        [session] = trained.chain(cell, first, [tasks[0].train])
        learner, model = session.model.learner, session.model.stage
        graft = Graft(method=learner.method, task=learner.task, seed=learner.seed)
        own.append(model)
        kinds["adapted"] = shared.kind(graft)
        shards["adapted"] = cache(lambda split: shared.shards(split, graft, model))
        if not parts.keeps_frozen:
            del kinds["features"], shards["features"]
    scenario = shared.spec.scenario
    separable = classifier.separable and scenario is not None and scenario.whole_classes
    train, ids = [task.train for task in tasks], cell.stream.ids
    if separable:
        # One fit on all classes serves every order.
        everything, ids = shared.everything
        train = [everything]
    place = {each: label for label, each in enumerate(ids)}
    columns = tuple(place[each] for each in cell.stream.ids)
    size = shared.spec.features.shard_size
    learnt = Reads(tasks=train, shards=shards, shard_size=size)
    on_clip = method.facts.network == "clip"
    reads = learnt.stages() | ({"text": (shared.texts(),)} if on_clip else {})

    def parameters(count: int) -> FitParameters:
        """Of the fit of the first tasks."""
        parts = tuple(map(described, train[:count]))
        seen = 1 + max(part.classes[-1] for part in parts)
        return FitParameters(
            method=classifier.method,
            seed=cell.seed if classifier.uses_seed else None,
            features=tuple(kinds.values()),
            texts=_texts(shared, ids[:seen]) if on_clip else None,
            tasks=parts,
        )

    @cache
    def fit(count: int) -> Stage:
        """The fit of the first tasks."""
        return Stage(
            operator="fit",
            parameters=to_json(parameters(count)),
            inputs={"graft": tuple(own)} if own else {},
            reads=reads,
            hints=Hints(
                FitHints(
                    cpus=cpus,
                    num_classes=len(shared.data.classes),
                    ids=ids,
                    grows=cell.grows and not separable,
                ),
                beginnings=lambda: [fit(n).key for n in range(count - 1, 0, -1)],
                selection=learnt.selection,
            ),
            resources=Resources(cpus=cpus),
            label=f"fit {method.label if separable and not own else cell.label}",
        )

    whole_fit = fit(len(train))
    inputs = {"model": (whole_fit,), "first_session": tuple(own)}
    evaluated = cell.evaluated(classifier.method, columns if separable else None)
    return cell.run(
        own=[*own, whole_fit],
        model=whole_fit,
        evaluated=evaluated,
        inputs=inputs,
        reads=Reads(tasks=[task.test for task in tasks], shards=shards, shard_size=size),
        beginnings=lambda: [
            cell.evaluation(
                cut_off(evaluated, n),
                inputs | {"model": (whole_fit if separable else fit(n),)},
            ).key
            for n in range(len(tasks) - 1, 0, -1)
        ],
        served=_served(
            cell, parameters(len(train)), whole_fit, own, graft, _labels(columns, len(ids))
        ),
    )


def cut_off(evaluated: EvaluateParameters, count: int) -> EvaluateParameters:
    """The evaluation after the first tasks alone."""
    tasks, columns, measures = evaluated.tasks[:count], evaluated.columns, evaluated.measures
    seen = tasks[-1].seen
    assert seen is not None, "test rows say how many classes are known"
    return replace(
        evaluated,
        tasks=tasks,
        columns=columns and columns[:seen],
        measures=measures and measures.first(seen),
    )


def _labels(columns: Sequence[int], count: int) -> tuple[int, ...]:
    """Labels of the columns of a state; what no task has learned is numbered on."""
    label = {column: number for number, column in enumerate(columns)}
    others = iter(range(len(columns), count))
    return tuple(label[c] if c in label else next(others) for c in range(count))


def _texts(shared: Shared, ids: Sequence[int]) -> TextParameters:
    """Texts of the classes in the order of their numbers."""
    names = tuple(shared.data.classes[i] for i in ids)
    return TextParameters(kind=shared.text_kind(), names=names)


def _served(
    cell: Cell,
    parameters: FitParameters,
    fit: Stage,
    own: Sequence[Stage],
    graft: Graft | None,
    learned: tuple[int, ...],
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
            learned=learned,
            graft=part,
            keeps_frozen=bool(cell.method.adapted and cell.method.adapted.keeps_frozen),
        ),
        states=states,
    )
