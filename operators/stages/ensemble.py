"""Ensembles of methods: combines scores that are stored, or follow from stored features.

No image is forwarded. A trained method's scores were kept by its `predict` stages; a fitted one
scores cached features again.

Shapes: N rows, K classes seen, K_e those of one model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from graftwork.operators import ensembling
from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.ensembling.rules import RuleOf
from graftwork.operators.ensembling.scores import align, wrong
from graftwork.operators.errors import DamagedStage, Diverged
from graftwork.operators.evaluation.fitted_scores import FittedScores
from graftwork.operators.formats import predictions, selection
from graftwork.operators.formats.manifests import facts_of
from graftwork.operators.formats.selection import Chosen
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.combining import EnsembleParameters, Member
from graftwork.operators.parameters.hints import CpuHints, Selection
from graftwork.operators.store import Store

T = TypeVar("T")


def run(work: Assignment, store: Store) -> Result:
    """The operator `ensemble`: predictions after every task, by a rule over several models.

    Raises:
        DamagedStage: an input is damaged.
        Diverged: a model's score is NaN or infinite.
    """
    parameters = from_json(EnsembleParameters, work.parameters)
    hints = from_json(CpuHints, work.hints)
    torch.set_num_threads(max(1, int(hints.cpus)))
    rule: RuleOf = ensembling.build(parameters.rule.name, parameters.rule.hyperparameters)
    tasks = selection.of(work, store, hints.selection, parameters.tasks)
    rows, true_task = selection.joined(tasks), selection.numbers(tasks)
    parts = [_part(work, number) for number in range(len(parameters.members))]
    members = [
        _scores(member, part, store, hints.selection, rows)
        for member, part in zip(parameters.members, parts, strict=True)
    ]
    tables = []
    for number, task in enumerate(parameters.tasks):
        assert task.seen is not None, "test rows say how many classes are known"
        count = predictions.shown(true_task, number)
        scores = [after(number, count, task.seen) for after in members]
        stack, _ = align(scores, [range(task.seen)] * len(scores))
        _check(stack, parameters.members, number, work.label)
        combined = rule.combine(stack)
        if bool(combined.isnan().any()):
            raise Diverged(f"{work.label}: scores after task {number + 1} are NaN")
        tables.append(
            predictions.decide(rows.index, parameters.tasks, true_task, number, combined.numpy())
        )
    facts = [facts_of(store, *stage) for part in parts for stage in _models(part)]
    return Result(
        files={"predictions.parquet": predictions.encode(predictions.join(tables))},
        facts={
            "models": len(parts),
            "trainable_parameters": sum(each.trainable_parameters for each in facts),
            "state_bytes": sum(each.state_bytes for each in facts),
        },
    )


def _check(stack: Tensor, members: Sequence[Member], number: int, label: str) -> None:
    """Raises Diverged, with its name, for a model whose scores [E, N, K] are of no use."""
    found = wrong(stack).nonzero()
    if len(found):
        model, row = found[0].tolist()
        method = members[model].method.name
        raise Diverged(
            f"{label}: scores of {method} (member {model + 1} of {len(members)}) after task "
            f"{number + 1} are NaN or infinite for image {row}"
        )


def _part(work: Assignment, number: int) -> Assignment:
    """One model's inputs, under the roles that they have in its own evaluation."""
    prefix = f"{number} "

    def own(roles: Mapping[str, T]) -> dict[str, T]:
        return {
            name.removeprefix(prefix): value
            for name, value in roles.items()
            if name.startswith(prefix)
        }

    return replace(
        work,
        preimage={**work.preimage, "inputs": own(work.preimage["inputs"])},
        input_operators=own(work.input_operators),
        reads=own(work.reads) | {"dataset": work.reads["dataset"]},
    )


def _models(part: Assignment) -> list[tuple[str, str]]:
    """Finds what the model predicts with after the last task."""
    return part.inputs("model")[-1:]


def _scores(
    member: Member, part: Assignment, store: Store, given: Selection, rows: Chosen
) -> Callable[[int, int, int], Tensor]:
    """Scores of a model, by task, number of rows and number of classes."""
    matrix = selection.matrix(part, store, given, rows)
    if matrix is None:
        return partial(_stored, part, store)
    fitted = FittedScores(member, part, store, rows, matrix)
    return lambda number, count, seen: torch.from_numpy(fitted.after(number, count, seen))


def _stored(part: Assignment, store: Store, number: int, count: int, seen: int) -> Tensor:
    """Scores [count, seen] of a trained method after a task, as its predictions left them."""
    stored = part.inputs("predictions")
    # A method that trains on all tasks at once predicts once.
    operator, key = stored[number if len(stored) > 1 else 0]
    scores = load_tensors(store.read(operator, key, "scores.safetensors"))["scores"]
    if len(scores) < count or scores.shape[1] < seen:
        raise DamagedStage(operator, key, "scores.safetensors lacks rows or columns")
    return scores[:count, :seen]
