"""The stages of trained methods: tasks in a chain or side by side, and predictions after each."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from graftwork.operators.data.exemplars import shares
from graftwork.operators.data.scenario import rows_of, seen_classes
from graftwork.operators.errors import ConfigError
from graftwork.operators.images.augmentation import AUGMENTATIONS
from graftwork.operators.stage import Resources, Stage
from graftwork.pipelines.planning import trained
from graftwork.pipelines.planning.hints import Hints
from graftwork.pipelines.planning.methods import Method
from graftwork.pipelines.planning.runs import Cell, Described, Run, Served


def learned(cell: Cell) -> list[int]:
    """Classes in the order learned."""
    return list(seen_classes(cell.stream, len(cell.stream) - 1))


def score(cell: Cell, model: Stage) -> Stage:
    """Scores of a trained task on the rows that it was trained on."""
    resources, hints = cell.shared.spec.resources.extract, model.hints
    assert isinstance(hints, Hints), "they were made by `chain`"
    return Stage(
        operator="score",
        parameters={
            **{name: v for name, v in model.parameters.items() if name != "augmentation"},
            "numerics": {**cell.shared.numerics(resources.gpus), "compile": False},
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
    shared, stream, joint = cell.shared, cell.stream, method.card["upper_bound"]
    test, resources = shared.dataset.test, shared.spec.resources.extract
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
                    "numerics": {**shared.numerics(resources.gpus), "compile": False},
                    "tasks": shown,
                    "after": after,
                    "vote_batch": method.hyperparameters["batch_size"] if vote else None,
                },
                inputs={
                    "model": (model,),
                    "dataset": (test.stage(),),
                    "features": shared.features(test) if method.card["query"] else (),
                },
                hints=shared.hints(
                    test,
                    partial(
                        rows_of,
                        test.labels,
                        test.domains,
                        shown if method.card["images"] else [],
                    ),
                    images=sum(int(shared.counts(test, task).sum()) for task in shown),
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


def chain(
    cell: Cell, method: dict[str, Any], parts: Described, learned: Sequence[int]
) -> list[Stage]:
    """One training stage per task, each with the one before as its input."""
    stages: list[Stage] = []
    for number in range(len(parts)):
        inputs = {"previous": tuple(stages[-1:])}
        stages.append(_training(cell, method, parts, learned, number, inputs, cell.label))
    return stages


def side_by_side(
    cell: Cell, parts: Described, learned: Sequence[int]
) -> tuple[list[Stage], list[Stage]]:
    """One training stage per task, each on its own, and what joins them one after the other."""
    shared, method, train = cell.shared, cell.method, cell.shared.dataset.train
    resources, query = shared.spec.resources.extract, method.card["query"]
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
                    "numerics": {**shared.numerics(resources.gpus), "compile": False},
                },
                inputs={
                    "dataset": (train.stage(),),
                    "previous": tuple(joins[-1:]),
                    "expert": (expert,),
                    "features": shared.features(train) if query else (),
                },
                # Whether a method looks at images once more is its own affair: none are announced.
                hints=shared.hints(
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
    shared, train, part, card = (
        cell.shared,
        cell.shared.dataset.train,
        parts[number],
        cell.method.card,
    )
    hyper, resources = method["hyperparameters"], shared.spec.resources.train
    augmentation = hyper.get("augmentation", "none")
    plain = augmentation == "none"
    place = {c: column for column, c in enumerate(learned)}
    seen = {c for earlier in parts[: number + 1] for c in earlier["classes"]}
    before = {c for earlier in parts[:number] for c in earlier["classes"]}
    counts = shared.counts(train, part)
    # A domain need not have images of every class.
    present = [c for c, count in zip(part["classes"], counts, strict=True) if count]
    images = int(counts.sum())
    keyed: dict[str, Any] = {}
    inputs = {
        "dataset": (train.stage(),),
        **inputs,
        "features": shared.features(train) if card["query"] and plain else (),
    }
    hints: dict[str, Any] = {}
    # Of all that may be kept: a worker reads the exemplars alone.
    readable = [part] if card["images"] else []
    if hyper.get("exemplars", 0) > 0 and len(parts) > 1:
        memory = _memory(cell, hyper, parts[:number])
        keyed["memory"] = memory.described
        # Of the first task too, which needs none: its group then trains the whole chain.
        inputs["exemplars"] = (shared.exemplars(hyper["exemplar_selection"], cell.seed),)
        images += memory.images
        readable = parts[: number + 1] if card["images"] else []
    if card["reference"] and shared.reference is not None:
        keyed["reference"] = list(shared.reference.texts)
        inputs["reference"] = (shared.reference.stage(),)
        hints["reference"] = shared.reference.images.places(0, len(shared.reference.images))
    return Stage(
        operator="train",
        parameters={
            "method": method,
            "seed": cell.seed,
            **shared.network(),
            "preprocessing": shared.preprocessing.to_json(),
            "augmentation": AUGMENTATIONS[augmentation].to_json(),
            "numerics": {**shared.numerics(resources.gpus), "compile": resources.compile},
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
        hints=shared.hints(
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
            f"{cell.method.name} shares exemplars {budget} among {classes} classes, which "
            f"leaves none for some; give at least {classes}, or 0",
            key="methods",
        )
    table = cell.shared.table(cell.shared.dataset.train)
    kept = shares(table, earlier, budget, kind)
    return _Memory(
        described={"earlier": earlier, "exemplars": budget, "budget": kind},
        images=sum(kept.values()),
    )


def _names(cell: Cell, learned: Sequence[int]) -> dict[str, list[str]]:
    """Names of classes in the order learned, and templates, for a method that reads them."""
    if cell.method.card["network"] != "clip":
        return {}
    return cell.shared.named(cell.shared.dataset.classes[c] for c in learned)


def run_of(cell: Cell) -> Run:
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


def _union(described: Described) -> dict[str, list[int]]:
    """All tasks as one."""
    return {
        name: list(dict.fromkeys(value for task in described for value in task[name]))
        for name in ("classes", "domains")
    }
