"""Runs that combine other runs of the spec: merged states, and ensembles of scores.

A merge makes one more state after every task, predicted with and evaluated like the states of the
method it came from. An ensemble reads scores that are there. Neither trains anything.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from operators.data.holdout import sampled
from operators.data.scenario import rows_of, seen_classes
from operators.errors import ConfigError
from operators.keys import program_digest
from operators.stage import Resources, Stage
from operators.store.store import Memo
from pipelines.planning.runs import Cell, Method, Run, Served, task_json
from pipelines.planning.shared import Trunk
from pipelines.planning.trained import predicted, served_learner
from pipelines.spec.combination import Combination, read
from pipelines.spec.loading import Loaded
from pipelines.spec.problems import nearest

LEARNER = ("method", "seed", "task", "learned", "architecture", "backbone", "preprocessing")
"""Parameters of a training that say what its state belongs to."""


@dataclass(frozen=True, kw_only=True)
class Combined:
    """A combination of the spec with everything resolved.

    Args:
        asked: the entry.
        operator: the merge or the rule as keys hold it: name, version, hyper-parameters.
        card: its card as JSON values.
        members: methods, or combinations before it, by label.
        label: what people see.
    """

    asked: Combination
    operator: dict[str, Any]
    card: dict[str, Any]
    members: tuple[str, ...]
    label: str


def resolve(loaded: Loaded, methods: Sequence[Method], memo: Memo) -> tuple[Combined, ...]:
    """The combinations of a spec; asks the memo before importing torch.

    Raises:
        ConfigError: unknown names or fields, or members that cannot be combined; all at once.
    """
    problems: list[tuple[str, str]] = []
    found: list[Combined] = []
    spec = loaded.spec
    entries = [
        read(section, number, entry)
        for section, given in (("merge", spec.merge), ("ensemble", spec.ensemble))
        for number, entry in enumerate(given)
    ]
    program = program_digest()
    for asked in entries:
        facts, wrong = _facts(asked, memo, program)
        members, unfit = _members(asked, methods, found, len(spec.seeds))
        problems += wrong + unfit
        if wrong or unfit:
            continue
        label = asked.name or f"{asked.kind} of {_listed(members)} over {asked.over}"
        if label in {other.label for other in found} | {method.label for method in methods}:
            differing = " ".join(f"{name}={value}" for name, value in asked.given.items())
            label = f"{label} {differing}".strip()
        if label in {other.label for other in found} | {method.label for method in methods}:
            problems.append((asked.path, f'second result called "{label}"; give it another name'))
            continue
        found.append(
            Combined(
                asked=asked,
                operator={
                    "name": asked.kind,
                    "version": facts["card"]["version"],
                    "hyperparameters": facts["hyperparameters"],
                },
                card=facts["card"],
                members=members,
                label=label,
            )
        )
    if problems:
        raise loaded.error(problems)
    return tuple(found)


def _facts(
    asked: Combination, memo: Memo, program: str
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    preimage = {
        "kind": asked.section, "name": asked.kind, "given": asked.given, "source": program,
    }  # fmt: skip
    known = memo.get(preimage)
    if known is not None:
        return json.loads(known), []
    from operators import catalogue  # imports torch

    facts, wrong = catalogue.combination(asked.section, asked.kind, asked.given)
    if not wrong:
        memo.put(preimage, json.dumps(facts).encode())
    return facts, [(asked.path + path, what) for path, what in wrong]


def _members(
    asked: Combination, methods: Sequence[Method], earlier: Sequence[Combined], seeds: int
) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    """Labels of the members, and what is wrong with them."""
    at, labels, problems = f"{asked.path}.of", [], []
    known = {method.label: method for method in methods}
    merged = {other.label for other in earlier if asked.section == "ensemble"}
    merged -= {other.label for other in earlier if other.asked.section == "ensemble"}
    for name in asked.of:
        named = [method.label for method in methods if name in (method.label, method.name)]
        if name in merged:
            labels.append(name)
        elif len(named) > 1 and name not in known:
            problems.append((at, f'"{name}" stands here for {", ".join(named)}; write one of them'))
        elif not named:
            hint = nearest(name, [*known, *merged])
            problems.append((at, f'no method "{name}" among methods{hint}'))
        else:
            labels.append(name if name in known else named[0])
            if asked.section == "merge":
                problems += [(at, what) for what in _unmergeable(known[labels[-1]], asked.over)]
    if asked.over == "seeds" and seeds < 2:
        problems.append((f"{asked.path}.over", "needs at least 2 seeds, got 1; give more seeds"))
    return tuple(labels), problems


def _unmergeable(method: Method, over: str) -> Iterator[str]:
    if method.card["contract"] != "trained":
        yield (
            f"{method.name} has no checkpoint of a network after every task to merge; "
            "name a method that trains on every task, or use ensemble"
        )
    elif method.card["upper_bound"] and over != "seeds":
        yield f"{method.name} trains on all tasks at once and has one checkpoint only"


def combine(trunk: Trunk, combinations: Iterable[Combined], runs: Sequence[Run]) -> Iterator[Run]:
    """The runs of all combinations.

    Args:
        runs: of the spec's methods.

    Raises:
        ConfigError: a stream with one task, where tasks are to be combined.
    """
    known: dict[str, list[Run]] = {}
    for run in runs:
        known.setdefault(run.method.label, []).append(run)
    for entry in combinations:
        made = [_run(trunk, entry, parents) for parents in _cells(entry, known)]
        known[entry.label] = made
        yield from made


def _cells(entry: Combined, known: Mapping[str, list[Run]]) -> Iterator[tuple[Run, ...]]:
    """The runs that are combined with each other."""
    if entry.asked.over != "seeds":
        yield from zip(*(known[label] for label in entry.members), strict=True)
        return
    by_order: dict[str, list[Run]] = {}
    for run in known[entry.members[0]]:
        by_order.setdefault(json.dumps(run.order), []).append(run)
    yield from map(tuple, by_order.values())


def _run(trunk: Trunk, entry: Combined, parents: tuple[Run, ...]) -> Run:
    cell = Cell(
        trunk=trunk,
        method=_as_method(entry, parents),
        order=parents[0].order,
        stream=parents[0].tasks,
        described=[task_json(task) for task in parents[0].tasks],
        seed=parents[0].seed,
    )
    make = _merge if entry.asked.section == "merge" else _ensemble
    return make(cell, entry, parents)


def _as_method(entry: Combined, parents: Sequence[Run]) -> Method:
    """What results show in the place of a method."""
    asked = entry.asked
    shown = {"of": list(entry.members), "over": asked.over}
    if asked.over == "seeds":
        shown["seeds"] = [run.seed for run in parents]
    if asked.section == "merge":
        shown["head"] = asked.head
    return Method(
        name=entry.label,
        label=entry.label,
        hyperparameters={asked.section: asked.kind, **entry.operator["hyperparameters"], **shown},
        card={
            **entry.card,
            "contract": asked.section,
            "batch_information_at_test": any(
                run.method.card["batch_information_at_test"] for run in parents
            ),
        },
    )


def _merge(cell: Cell, entry: Combined, parents: tuple[Run, ...]) -> Run:
    """A merged state after every task, its predictions, and their evaluation."""
    # Of tasks that were trained side by side, what they were joined to.
    kinds = ["join" if run.method.card["independent"] else "train" for run in parents]
    chains = [
        [stage for stage in run.own if stage.operator == kind]
        for run, kind in zip(parents, kinds, strict=True)
    ]
    count = len(chains[0])
    if entry.asked.over == "tasks":
        if count < 2:
            raise ConfigError(
                "the stream has one task; nothing to merge", key=f"{entry.asked.path}.over"
            )
        series = [chains[0][: number + 1] for number in range(count)]
    else:
        series = [[chain[number] for chain in chains] for number in range(count)]
    merged, measured = [], {}
    for number, models in enumerate(series):
        if most := entry.card["most"]:
            models = models[-most:]
        if entry.card["statistics"]:
            for model in models:
                if model.key not in measured:
                    measured[model.key] = _statistics(cell, entry, model, parents[-1].method)
        merged.append(_merge_stage(cell, entry, models, measured, f"{number + 1}/{count}"))
    predictions = predicted(cell, parents[-1].method, merged)
    evaluate = cell.evaluation(
        {"method": entry.operator}, {"predictions": tuple(predictions), "model": tuple(merged)}
    )
    used = [stage for stages in measured.values() for stage in stages]
    votes = cell.method.card["batch_information_at_test"]
    served = None if votes else served_learner(merged[-1])
    return cell.run([*used, *merged, *predictions], merged[-1], evaluate, served, parents)


def _merge_stage(
    cell: Cell,
    entry: Combined,
    models: Sequence[Stage],
    measured: Mapping[str, tuple[Stage, ...]],
    task: str,
) -> Stage:
    trunk = cell.trunk
    cpus = trunk.spec.resources.fit.cpus
    return Stage(
        operator="merge",
        parameters={
            **{name: models[-1].parameters[name] for name in LEARNER},
            "start": models[0].parameters["task"],
            "merge": entry.operator,
            "head": entry.asked.head,
            "over": entry.asked.over,
        },
        inputs={
            "models": tuple(models),
            **(
                {f"statistics {i}": measured[model.key] for i, model in enumerate(models)}
                if measured
                else {}
            ),
        },
        hints={**trunk.where(), "cpus": cpus},
        resources=Resources(cpus=cpus),
        label=f"merge {cell.label} task {task}",
    )


def _statistics(cell: Cell, entry: Combined, model: Stage, method: Method) -> tuple[Stage, ...]:
    """Sums over shards of the images that a model was trained on last."""
    trunk, split = cell.trunk, cell.trunk.dataset.train
    given, part = entry.operator["hyperparameters"], model.parameters["images"]
    resources, size = trunk.spec.resources.extract, trunk.spec.features.shard_size
    total = min(given["images"], int(trunk.counts(split, part).sum()))

    def rows(start: int, stop: int) -> Any:
        whole = rows_of(split.labels, split.domains, [part])
        return sampled(split.digests, whole, given["images"])[start:stop]

    shards = [(start, min(start + size, total)) for start in range(0, total, size)]
    about = f"{method.label} order {cell.order} seed {model.parameters['seed']}"
    return tuple(
        Stage(
            operator="statistics",
            parameters={
                **{name: model.parameters[name] for name in LEARNER},
                "images": part,
                "limit": given["images"],
                "shard": [start, stop],
                "statistics": {
                    "kind": entry.card["statistics"],
                    **({"labels": given["labels"]} if "labels" in given else {}),
                },
                "numerics": {**trunk.numerics(resources.gpus), "compile": False},
            },
            inputs={
                "model": (model,),
                "dataset": (split.stage(),),
                "features": trunk.features(split) if method.card["query"] else (),
            },
            hints=trunk.hints(
                split, partial(rows, start, stop), images=stop - start, cpus=resources.cpus
            ),
            resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
            label=f"{entry.card['statistics']} statistics of {about} task "
            f"{model.parameters['task']['index'] + 1} shard {number + 1}/{len(shards)}",
        )
        for number, (start, stop) in enumerate(shards)
    )


def _ensemble(cell: Cell, entry: Combined, parents: tuple[Run, ...]) -> Run:
    """Predictions after every task by a rule over all members, and their evaluation."""
    trunk = cell.trunk
    cpus = trunk.spec.resources.fit.cpus
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
            "dataset": (trunk.dataset.test.stage(),),
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


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
