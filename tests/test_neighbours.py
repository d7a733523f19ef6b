"""No image's prediction depends on those beside it, unless the card says so; then not on ours.

Every value of every switch of every trained method is tried: a new one takes part by its line in
`METHODS` or in the type of its field.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graftwork import methods
from graftwork.methods.contracts.batches import Neighbours, neighbours
from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.methods.contracts.trained import Learner
from graftwork.operators.errors import IncompatibleError
from graftwork.operators.formats import predictions, states
from graftwork.operators.parameters.learners import MethodRef
from graftwork.operators.parameters.predictors import TrainedPart
from graftwork.operators.parameters.tasks import Columns
from graftwork.operators.serving import kinds
from graftwork.operators.stages.predict import batches_of
from graftwork.operators.store import Store
from graftwork.operators.training import forward
from tests import pngs, tiny
from tests import test_conformance as conformance

CLOSE = 2e-4
"""Of scores that differ by rounding alone, as a part of the largest."""
VOTING = {
    "l2p": {"eval_selection": ("batch_vote", "batch_vote_pilot")},
    "dualprompt": {
        "eval_selection": ("batch_vote", "batch_vote_pilot"),
        "kv_layout": ("scrambled",),
    },
    "dap": {"eval_selection": ("batch_vote",)},
    "hide_prompt": {"kv_layout": ("scrambled",)},
    "proof": {"eval_selection": ("batch_mean",)},
}
"""Method -> field -> values that decide by the batch."""


def switches(case: conformance.Case) -> Iterator[conformance.Case]:
    """The case, and one more for every other value of each of its switches."""
    yield case
    for field in methods.fields(case.name):
        if field.name in ("augmentation", "optimizer", "schedule"):
            continue  # no part of what predicts
        choices = [True, False] if field.type == "bool" else field.type.split(" | ")
        for value in choices if len(choices) > 1 and "null" not in choices else ():
            changed = case.but(**{field.name: value})
            try:
                method: Any = changed.method
            except HyperparameterError:
                continue
            if getattr(method, field.name) != getattr(case.method, field.name):
                yield changed


EVERY = [
    pytest.param(case, id=" ".join([case.label, *(f"{k}={v}" for k, v in changed.items())]))
    for base in conformance.CASES
    for case in switches(base)
    for changed in [{k: v for k, v in case.values if (k, v) not in base.values}]
]


def opened(case: conformance.Case) -> tuple[Learner, tiny.TensorImages]:
    """The learner after two tasks on a network whose features depend on the image, and images."""
    task = conformance.stream(case)[-1]
    learner = conformance.opened(
        case, task, conformance.train(case.but(epochs=1), gain=6.0)[-1], gain=6.0
    )
    return learner, tiny.images(task, per_class=4, seed=3)


@torch.no_grad()
def disturb(learner: Learner, seed: int) -> None:
    """Moves what a method has added: a few steps leave keys and prefixes of tasks almost alike."""
    own = {id(parameter) for parameter in learner.network.parameters()}
    generator = torch.Generator().manual_seed(seed)
    for parameter in learner.parameters():
        if id(parameter) not in own:
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)


def apart(case: conformance.Case, learner: Learner, images: tiny.TensorImages) -> float:
    """Largest difference of an image's scores in three batches, as a part of the largest score."""
    pixels, count = images.pixels, len(images.pixels)
    query = forward.frozen_features(learner.network, pixels)
    if not case.method.card.images:
        pixels = pixels.new_empty(count, 0)

    @torch.no_grad()
    def scores(rows: list[int]) -> Tensor:
        return learner.logits(pixels[rows], query[rows] if learner.needs_query else None).float()

    together = scores(list(range(count)))
    mixed = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    alone = torch.cat([scores([row]) for row in range(count)])
    far = max((alone - together).abs().max(), (scores(mixed) - together[mixed]).abs().max())
    return float(far / together.abs().max())


@pytest.mark.parametrize("case", EVERY)
def test_an_image_alone_and_in_a_batch_is_decided_alike_or_the_card_says_so(
    case: conformance.Case,
) -> None:
    learner, images = opened(case)
    found = []
    # Whether images choose differently is a matter of luck; one that does is enough.
    for seed in range(8):
        disturb(learner, seed)
        found.append(apart(case, learner, images))
        if neighbours(case.method) is None or found[-1] > 10 * CLOSE:
            break
    assert (max(found) > 10 * CLOSE) is (neighbours(case.method) is not None)
    assert neighbours(case.method) is not None or max(found) <= CLOSE


def test_those_that_decide_by_the_batch_are_these() -> None:
    found: dict[str, dict[str, tuple[Any, ...]]] = {}
    for base in conformance.CASES:
        for case in switches(base):
            changed = {k: v for k, v in case.values if (k, v) not in base.values}
            if neighbours(case.method) is not None:
                [(field, value)] = changed.items()
                known = found.setdefault(case.name, {}).get(field, ())
                found[case.name][field] = (*known, value)
    assert found == VOTING


# --- how the batches are cut -----------------------------------------------------------------


def test_batches_of_tasks_hold_one_task_in_the_data_sets_order() -> None:
    tasks, columns = np.array([1, 0, 1, 0, 0, 1]), np.array([3, 0, 2, 1, 0, 2])
    found = batches_of(Neighbours(size=2), columns, tasks)
    assert found == [[1, 3], [4], [0, 2], [5]]


def test_batches_of_the_stream_go_class_by_class_over_the_tasks() -> None:
    tasks, columns = np.array([1, 0, 1, 0, 0, 1]), np.array([3, 0, 2, 1, 0, 2])
    found = batches_of(Neighbours(size=2, walk="stream"), columns, tasks)
    assert found == [[1, 4], [3, 2], [5, 0]]
    # The last image of the first task votes with one of the second.
    assert [{int(tasks[row]) for row in batch} for batch in found][1] == {0, 1}


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        (name, field, value)
        for name, fields in VOTING.items()
        for field, values in fields.items()
        for value in values
        if name != "proof"
    ],
)
def test_scores_are_those_of_the_batches_whatever_is_forwarded_at_once(
    name: str, field: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"epochs": 1, "batch_size": 3, field: value, "augmentation": "none"}
    values |= {"hide_prompt": {"test_batch": 3, "last_block": 1, "alignment_epochs": 1}}.get(
        name, {}
    )
    values |= {"dualprompt": {"g_last": 0, "e_first": 1, "e_last": 1}}.get(name, {})
    folder = pngs.data(tmp_path / "data", pngs.rows(4, 0), pngs.rows(2, 50))
    found, stored = [], []
    for size in (8, 3):
        monkeypatch.setitem(forward.PLAIN_BATCH, "cpu", size)
        store = Store(str(tmp_path / f"store{size}"))
        made = pngs.plan(store, folder, methods=[{name: values}], features={"shard_size": 4})
        # Every image has features of its own; what is stored of them is rounded alike.
        pngs.compute(made.stages, store)
        [run] = made.runs
        assert run.served is None
        table = predictions.read(store, "predict", pngs.of(made, "predict")[-1].key)
        found.append(table)
        stored.append(states.load_state(store, "train", pngs.of(made, "train")[-1].key))
    for column in found[0]:
        assert np.array_equal(found[0][column], found[1][column]), column
    for tensor in stored[0]:
        assert torch.equal(stored[0][tensor], stored[1][tensor]), tensor


# --- serving ---------------------------------------------------------------------------------


def test_what_decides_by_the_batch_is_not_served_though_a_model_of_it_was_kept(
    tmp_path: Path,
) -> None:
    part = TrainedPart(
        method=MethodRef(name="dualprompt", version=1, hyperparameters={"kv_layout": "scrambled"}),
        seed=0,
        task=Columns(index=0, count=None, current=(0,), before=0, seen=1),
        learned=(0,),
        state="state.safetensors",
    )
    model = kinds.Model(folder=tmp_path, about={})
    with pytest.raises(IncompatibleError, match="decides an image by those beside it") as caught:
        kinds._learned(part, model)
    assert "\n" not in str(caught.value)
