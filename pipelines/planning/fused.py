"""Stages of a run of the contract `fused`: two chains and a blend after each task, or one chain."""

from dataclasses import replace

from graftwork.operators.errors import ConfigError
from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.parameters.hints import CpuHints
from graftwork.operators.parameters.predictors import FusedPart
from graftwork.operators.parameters.training import BlendParameters
from graftwork.operators.stage import Resources, Stage
from graftwork.pipelines.planning import trained
from graftwork.pipelines.planning.reads import Hints
from graftwork.pipelines.planning.runs import Cell, Model, Run, Served


def fused(cell: Cell) -> Run:
    """Two chains side by side, and a blend of their scores after each task; or one for both."""
    method, shared, stream = cell.method, cell.shared, cell.stream.tasks
    if "joint" in method.branches:
        return _joint(cell)
    assert cell.beside is not None, "check_networks asks for it"
    chains: dict[str, list[Model]] = {}
    tests: dict[str, list[Stage]] = {}
    scores: dict[str, list[Stage]] = {}
    for role, network in (("clip", shared), ("vit", cell.beside)):
        branch = replace(cell, shared=network, method=method.branches[role])
        trainings = trained.chain(
            branch, branch.method.description, [task.train for task in stream]
        )
        chains[role] = [training.model for training in trainings]
        tests[role] = trained.predicted(branch, branch.method, chains[role])
        scores[role] = [trained.score(branch, training) for training in trainings]
    cpus, group = shared.spec.resources.fit.cpus, f"blend {cell.label}"
    reads = [
        shared.reads([task.test for task in stream[: number + 1]]) for number in range(len(stream))
    ]
    blends = [
        Stage(
            operator="blend",
            parameters=to_json(
                BlendParameters(
                    method=method.description,
                    tasks=cell.tested[: number + 1],
                    after=(number,),
                )
            ),
            inputs={
                **{role: (stages[number],) for role, stages in scores.items()},
                **{f"{role}_test": (stages[number],) for role, stages in tests.items()},
            },
            reads=reads[number].stages(),
            hints=Hints(CpuHints(cpus=cpus), selection=reads[number].selection),
            resources=Resources(cpus=cpus),
            label=f"{group} task {number + 1}/{len(stream)}",
            group=group,
        )
        for number in range(len(stream))
    ]
    clip, vit = (tuple(model.stage for model in chains[role]) for role in ("clip", "vit"))
    branches, both = (*tests["clip"], *tests["vit"]), (*scores["clip"], *scores["vit"])
    return cell.run(
        own=[*clip, *vit, *branches, *both, *blends],
        model=blends[-1],
        evaluated=cell.evaluated(method.description),
        inputs={
            "model": clip,
            "beside": vit,
            "branches": branches,
            "scores": both,
            "predictions": tuple(blends),
        },
        served=_served(cell, chains["clip"][-1], chains["vit"][-1], blends[-1]),
    )


def _joint(cell: Cell) -> Run:
    """One chain of a learner on both networks.

    Raises:
        ConfigError: the second network takes images of another size.
    """
    beside, shared, method = cell.beside, cell.shared, cell.method.branches["joint"]
    assert beside is not None, "check_networks asks for it"
    size, own = beside.backbone.data_config["input_size"][1], shared.preprocessing.crop
    if beside.backbone.data_config.get("fixed_input_size", False) and own not in (None, size):
        raise ConfigError(
            f"takes images of {size} pixels, with training: joint it is given those of "
            f"backbone.preprocessing, {own}; set vit.image_size: {own}",
            key="vit.model",
        )
    both = replace(cell, shared=replace(shared, main=shared, paired=beside), method=method)
    trainings = trained.chain(both, method.description, [task.train for task in cell.stream.tasks])
    models = [training.model for training in trainings]
    predictions = trained.predicted(both, method, models)
    states = tuple(model.stage for model in models)
    return cell.run(
        own=[*states, *predictions],
        model=states[-1],
        evaluated=cell.evaluated(cell.method.description),
        inputs={"predictions": tuple(predictions), "model": states},
        served=Served(
            predictor=replace(trained.trained_part(models[-1].learner), paired=True),
            states={trained.STATE: (states[-1], "")},
            beside=beside,
        ),
    )


def _served(cell: Cell, clip: Model, vit: Model, blend: Stage) -> Served:
    """Both branches after the last task, and their blend."""
    parts = {
        role: trained.trained_part(model.learner, role)
        for role, model in (("clip", clip), ("vit", vit))
    }
    return Served(
        predictor=FusedPart(
            method=cell.method.description,
            learned=parts["clip"].learned,
            state=trained.STATE,
            clip=parts["clip"],
            vit=parts["vit"],
        ),
        states={
            trained.STATE: (blend, ""),
            parts["clip"].state: (clip.stage, ""),
            parts["vit"].state: (vit.stage, ""),
        },
        beside=cell.beside,
    )
