"""Stages of a run of the contract `fused`: two chains and a blend after each task."""

from dataclasses import replace

from graftwork.operators.stage import Resources, Stage
from graftwork.pipelines.planning import trained
from graftwork.pipelines.planning.runs import Cell, Run, Served


def fused(cell: Cell) -> Run:
    """Two chains side by side, and a blend of their scores after each task."""
    method, described, shared = cell.method, cell.described, cell.shared
    assert cell.beside is not None, "check_networks asks for it"
    chains: dict[str, list[Stage]] = {}
    tests: dict[str, list[Stage]] = {}
    scores: dict[str, list[Stage]] = {}
    for role, network in (("clip", shared), ("vit", cell.beside)):
        branch = replace(cell, shared=network, method=method.branch(role))
        chains[role] = trained.chain(
            branch, branch.method.description, described, trained.learned(cell)
        )
        tests[role] = trained.predicted(branch, branch.method, chains[role])
        scores[role] = [trained.score(branch, stage) for stage in chains[role]]
    cpus = shared.spec.resources.fit.cpus
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
                "dataset": (shared.dataset.test.stage(),),
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
