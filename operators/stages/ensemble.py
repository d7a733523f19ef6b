"""Ensembles of methods: combines scores that are stored, or follow from stored features.

No image is forwarded. A trained method's scores were kept by its `predict` stages; a fitted one
scores cached features again.

Shapes: N rows, K classes seen, K_e those of one model.
"""

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
from graftwork.operators.store import Store


def run(work: Assignment, store: Store) -> Result:
    """The operator `ensemble`: predictions after every task, by a rule over several models.

    Raises:
        DamagedStage: an input is damaged.
        Diverged: a model's score is NaN.
    """
    keyed, [dataset] = work.parameters, work.inputs("dataset")
    torch.set_num_threads(max(1, int(work.hints["cpus"])))
    rule: RuleOf = ensembling.build(keyed["rule"]["name"], keyed["rule"]["hyperparameters"])
    index, stream = load_index(store, *dataset), stream_of(keyed["tasks"])
    true_task = task_of(index.labels, index.domains, stream)
    members = [_member(work, number) for number in range(len(keyed["members"]))]
    tables = []
    for number in range(len(stream)):
        rows = predictions.seen_rows(true_task, number)
        classes = np.array(sorted(seen_classes(stream, number)))
        scores = [_scores(member, store, number, rows, classes) for member in members]
        stack, known = align(scores, [classes.tolist()] * len(scores))
        combined = rule.combine(stack)
        if bool(combined.isnan().any()):
            raise Diverged(f"{work.label}: scores after task {number} are NaN")
        tables.append(
            predictions.decide(
                index, stream, true_task, number, rows, np.array(known), combined.numpy()
            )
        )
    facts = [store.manifest(*stage)["facts"] for m in members for stage in _models(m)]
    return Result(
        files={"predictions.parquet": predictions.encode(predictions.join(tables))},
        facts={
            "models": len(members),
            "trainable_parameters": sum(f.get("trainable_parameters", 0) for f in facts),
            "state_bytes": sum(f.get("state_bytes", 0) for f in facts),
        },
    )


def _member(work: Assignment, number: int) -> Assignment:
    """One model's part of the order: its evaluation, as if it stood alone."""
    prefix = f"{number} "
    roles = work.preimage["inputs"]
    own = {name.removeprefix(prefix): name for name in roles if name.startswith(prefix)}
    return replace(
        work,
        preimage={
            **work.preimage,
            "parameters": {
                **work.parameters["members"][number],
                "tasks": work.parameters["tasks"],
            },
            "inputs": {short: roles[name] for short, name in own.items()},
        },
        input_operators={
            short: work.input_operators[name]
            for short, name in own.items()
            if name in work.input_operators
        },
    )


def _models(member: Assignment) -> list[tuple[str, str]]:
    """What the model predicts with after the last task."""
    return member.inputs("model")[-1:]


def _scores(
    member: Assignment, store: Store, number: int, rows: np.ndarray, classes: np.ndarray
) -> Tensor:
    """Scores [N, K] of the given rows after a task; columns as in `classes`."""
    stored = member.inputs("predictions")
    if not stored:
        return torch.from_numpy(fitted_scores.fitted_scores(member, store, number, rows, classes))
    # A method that trains on all tasks at once predicts once.
    operator, key = stored[number if len(stored) > 1 else 0]
    preimage: dict[str, Any] = store.manifest(operator, key)["preimage"]
    learned = preimage["parameters"]["learned"]
    kept = load_tensors(store.read(operator, key, "scores.safetensors"))
    place = {int(row): at for at, row in enumerate(kept["rows"])}
    if any(int(row) not in place for row in rows):
        raise DamagedStage(operator, key, "scores.safetensors lacks rows")
    columns = [learned.index(label) for label in classes.tolist()]
    return kept["scores"][[place[int(row)] for row in rows]][:, columns]
