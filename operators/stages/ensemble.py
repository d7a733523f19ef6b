"""Ensembles of methods: combines scores that are stored, or follow from stored features.

No image is forwarded. A trained method's scores were kept by its `predict` stages; a fitted one
scores cached features again.

Shapes: N rows, K classes seen, K_e those of one model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from graftwork.operators import ensembling
from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.data.scenario import seen_classes, stream_of, task_of
from graftwork.operators.ensembling.rules import RuleOf
from graftwork.operators.ensembling.scores import align
from graftwork.operators.errors import DamagedStage, Diverged
from graftwork.operators.evaluation import fitted_scores
from graftwork.operators.formats import predictions
from graftwork.operators.formats.index import load_index
from graftwork.operators.formats.manifests import facts_of
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.combining import EnsembleParameters, Member
from graftwork.operators.parameters.hints import CpuHints
from graftwork.operators.parameters.tasks import TaskData
from graftwork.operators.parameters.training import BlendParameters, PredictParameters
from graftwork.operators.store import Store


def run(work: Assignment, store: Store) -> Result:
    """The operator `ensemble`: predictions after every task, by a rule over several models.

    Raises:
        DamagedStage: an input is damaged.
        Diverged: a model's score is NaN.
    """
    parameters, [dataset] = from_json(EnsembleParameters, work.parameters), work.inputs("dataset")
    torch.set_num_threads(max(1, int(from_json(CpuHints, work.hints).cpus)))
    rule: RuleOf = ensembling.build(parameters.rule.name, parameters.rule.hyperparameters)
    index, stream = load_index(store, *dataset), stream_of(parameters.tasks)
    true_task = task_of(index.labels, index.domains, stream)
    parts = [_part(work, number) for number in range(len(parameters.members))]
    tables = []
    for number in range(len(stream)):
        rows = predictions.seen_rows(true_task, number)
        classes = np.array(sorted(seen_classes(stream, number)))
        scores = [
            _scores(member, parameters.tasks, part, store, number, rows, classes)
            for member, part in zip(parameters.members, parts, strict=True)
        ]
        stack, known = align(scores, [classes.tolist()] * len(scores))
        combined = rule.combine(stack)
        if bool(combined.isnan().any()):
            raise Diverged(f"{work.label}: scores after task {number} are NaN")
        tables.append(
            predictions.decide(
                index, stream, true_task, number, rows, np.array(known), combined.numpy()
            )
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


def _part(work: Assignment, number: int) -> Assignment:
    """One model's inputs, under the roles that they have in its own evaluation."""
    prefix = f"{number} "
    roles = work.preimage["inputs"]
    own = {name.removeprefix(prefix): name for name in roles if name.startswith(prefix)}
    return replace(
        work,
        preimage={
            **work.preimage,
            "inputs": {short: roles[name] for short, name in own.items()},
        },
        input_operators={
            short: work.input_operators[name]
            for short, name in own.items()
            if name in work.input_operators
        },
    )


def _models(part: Assignment) -> list[tuple[str, str]]:
    """Finds what the model predicts with after the last task."""
    return part.inputs("model")[-1:]


def _scores(
    member: Member,
    tasks: Sequence[TaskData],
    part: Assignment,
    store: Store,
    number: int,
    rows: np.ndarray,
    classes: np.ndarray,
) -> Tensor:
    """Scores [N, K] of the given rows after a task; columns as in `classes`."""
    stored = part.inputs("predictions")
    if not stored:
        return torch.from_numpy(
            fitted_scores.fitted_scores(member, tasks, part, store, number, rows, classes)
        )
    # A method that trains on all tasks at once predicts once.
    operator, key = stored[number if len(stored) > 1 else 0]
    learned = _columns(operator, store.manifest(operator, key)["preimage"]["parameters"])
    kept = load_tensors(store.read(operator, key, "scores.safetensors"))
    place = {int(row): at for at, row in enumerate(kept["rows"])}
    if any(int(row) not in place for row in rows):
        raise DamagedStage(operator, key, "scores.safetensors lacks rows")
    columns = [learned.index(label) for label in classes.tolist()]
    return kept["scores"][[place[int(row)] for row in rows]][:, columns]


def _columns(operator: str, parameters: Mapping[str, Any]) -> tuple[int, ...]:
    """Class ids of the columns of stored scores."""
    if operator == "blend":
        return from_json(BlendParameters, parameters).learned
    return from_json(PredictParameters, parameters).learner.learned
