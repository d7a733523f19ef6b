"""APER: both branches side by side under one cosine, and what planning sees of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graftwork import methods
from graftwork.methods.contracts.card import Card, State
from graftwork.methods.contracts.fitted import Rows
from graftwork.methods.contracts.trained import Task
from graftwork.methods.parts.first_session import FirstSession
from graftwork.methods.representations.simplecil import SimpleCIL
from graftwork.operators import catalogue
from graftwork.operators.assignment import Result
from graftwork.operators.data.digests import digest_of
from graftwork.operators.data.index_file import SplitIndex, encode_index
from graftwork.operators.formats import features, selection
from graftwork.operators.parameters.hints import Selection
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store
from graftwork.operators.training import forward, loop, settings
from tests import tiny

# Table of the authors' configurations for CIFAR-100 in steps of five: epochs, lr, batch, decay.
TABLE = {
    "aper_finetune": (5, 0.01, 128, 5e-4),
    "aper_vpt_shallow": (20, 0.01, 48, 5e-4),
    "aper_vpt_deep": (5, 0.05, 16, 5e-4),
    "aper_ssf": (20, 0.01, 48, 5e-4),
    "aper_adapter": (20, 0.01, 48, 5e-4),
}
each = pytest.mark.parametrize("name", TABLE)
TASKS = [tiny.task(index, count=3) for index in range(3)]
DATA = [tiny.images(task) for task in TASKS]
CLASSES = [*range(9)]


def joined(frozen: Tensor, tuned: Tensor) -> Tensor:
    return torch.cat([frozen, tuned], dim=1)


def rows(values: Tensor, targets: Tensor) -> Rows:
    return Rows(features=values, labels=targets, samples=torch.arange(len(targets)), num_classes=9)


def fit(parts: list[Rows]) -> State:
    method = SimpleCIL()
    states = [method.statistics(part, 0) for part in parts]
    total = states[0]
    for state in states[1:]:
        total = method.add(total, state)
    return method.solve(total, states[-1], CLASSES, 0)


def branches(session: FirstSession, state: State | None) -> list[tuple[Tensor, Tensor]]:
    """Features of the frozen and the adapted backbone on every task."""
    learner = tiny.opened(session, TASKS[0], state)
    with torch.no_grad():
        return [
            (forward.frozen_features(tiny.vit(), data.pixels), learner.features(data.pixels))
            for data in DATA
        ]


def adapted(name: str, **values: Any) -> FirstSession:
    session = methods.build(name, values).parts().first_session
    assert isinstance(session, FirstSession)
    return session


@pytest.fixture(scope="module")
def trained() -> list[tuple[Tensor, Tensor]]:
    session = adapted("aper_ssf", epochs=2, batch_size=6, lr=0.1)
    return branches(session, tiny.train(session, 1)[0])


@each
def test_defaults_are_those_of_the_authors(name: str):
    parts = methods.build(name, {}).parts()
    session = parts.first_session
    assert (session.epochs, session.lr, session.batch_size, session.weight_decay) == TABLE[name]
    assert name == f"aper_{session.peft}"
    assert (session.prompt_length, session.bottleneck, session.dropout) == (5, 64, 0.1)
    assert (session.optimizer, session.schedule) == ("sgd", "cosine")
    assert parts.classifier == ("simplecil", {})
    assert parts.keeps_frozen


@each
def test_every_field_reaches_the_first_session(name: str):
    values = {"epochs": 3, "batch_size": 7, "lr": 0.5, "weight_decay": 0.25, "optimizer": "adamw"}
    values |= {"schedule": "constant", "augmentation": "none"}
    own = {"prompt_length": 9, "vpt_init": "zeros", "bottleneck": 3, "dropout": 0.5}
    known = {field.name for field in methods.fields(name)}
    values |= {key: value for key, value in own.items() if key in known}
    assert known == values.keys()
    session = adapted(name, **values)
    assert {key: getattr(session, key) for key in values} == values


def test_a_adapter_at_the_start_predicts_like_simplecil():
    pairs = branches(adapted("aper_adapter"), None)
    assert all(torch.equal(frozen, tuned) for frozen, tuned in pairs)
    both = [rows(joined(*pair), data.targets) for pair, data in zip(pairs, DATA, strict=True)]
    one = [rows(frozen, data.targets) for (frozen, _), data in zip(pairs, DATA, strict=True)]
    test = torch.cat([part.features for part in one])
    test = test + 2 * torch.randn(test.shape, generator=torch.Generator().manual_seed(0))
    expected = SimpleCIL().logits(fit(one), test, 0)
    scores = SimpleCIL().logits(fit(both), joined(test, test), 0)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(scores.argmax(1), expected.argmax(1))
    # A test that errs nowhere would prove little.
    truth = torch.cat([data.targets for data in DATA])
    assert 0.2 < (expected.argmax(1) == truth).float().mean() < 1


@each
@pytest.mark.parametrize("first", [(0,), (0, 1, 2)])
def test_ragged_tasks_of_few_images(name: str, first: tuple[int, ...]):
    session = adapted(name, epochs=2, batch_size=6, lr=0.1)
    seen = len(first)
    start = Task(index=0, current=first, before=0, seen=seen)
    # A single image where the first task is a single class; class 0 returns with more.
    tasks = [(first, 1 if seen == 1 else 4), ((seen,), 1), ((0, 4, 5, 6), 4)]
    data = [
        tiny.images(Task(index=i, current=current, before=0, seen=9), per_class)
        for i, (current, per_class) in enumerate(tasks)
    ]
    state, _ = loop.train_task(session, tiny.vit(), start, data[0], None, settings.Settings(seed=0))
    assert all(tensor.isfinite().all() for tensor in state.values())
    learner = tiny.opened(session, start, state)
    with torch.no_grad():
        pairs = [
            (forward.frozen_features(tiny.vit(), d.pixels), learner.features(d.pixels))
            for d in data
        ]
    parts = [rows(joined(*pair), d.targets) for pair, d in zip(pairs, data, strict=True)]
    states = [SimpleCIL().statistics(part, 0) for part in parts]
    total = states[0]
    for other in states[1:]:
        total = SimpleCIL().add(total, other)
    learned = [*first, seen, 4, 5, 6]
    fitted = SimpleCIL().solve(total, states[-1], learned, 0)
    # The mean of all rows of a class, whenever they came.
    own = torch.cat([part.features[part.labels == 0] for part in parts])
    torch.testing.assert_close(fitted["prototypes"][0], own.mean(dim=0))
    for part in parts:
        scores = SimpleCIL().logits(fitted, part.features, 0)
        found = torch.tensor(learned)[scores.argmax(dim=1)]
        assert torch.equal(found, part.labels)


def test_c_halves_are_the_two_branches(trained: list[tuple[Tensor, Tensor]], tmp_path: Path):
    stored: dict[str, Tensor] = dict(zip(("features", "adapted"), trained[0], strict=True))
    store = Store(str(tmp_path))
    # The rows of twelve images of one class, as a fit on both branches reads them.
    digests = np.arange(12 * 32, dtype=np.uint8).reshape(12, 32)
    numbers = np.zeros(12, dtype=np.int32)
    index = SplitIndex(digests=digests, labels=numbers, domains=numbers)
    dataset = Stage(operator="dataset", parameters={})
    store.commit(dataset.assignment(), Result(files={"index.parquet": encode_index(index)}), 0.0)
    shards = {
        role: Stage(operator="features", parameters={"images": digest_of(digests), "of": role})
        for role in stored
    }
    for role in stored:
        stage = shards[role]
        content = {"features.parquet": features.encode_shard(stored[role].numpy())}
        store.commit(stage.assignment(), Result(files=content), 0.0)
    reads = {"dataset": (dataset,), **{role: (shards[role],) for role in ("adapted", "features")}}
    work = Stage(operator="fit", parameters={}, reads=reads).assignment()
    chosen = selection.Chosen(index=index, source=np.zeros(12, np.int64), position=np.arange(12))
    found = selection.matrix(work, store, Selection(shards=((0, 0),)), chosen)
    assert found is not None
    row = torch.from_numpy(found)
    assert row.shape == (12, 2 * tiny.WIDTH)
    # Pitfall ii: the frozen backbone stands first.
    assert torch.equal(row[:, : tiny.WIDTH], stored["features"])
    assert torch.equal(row[:, tiny.WIDTH :], stored["adapted"])
    assert torch.equal(row, joined(*trained[0]))
    assert (stored["features"] - stored["adapted"]).abs().max() > 0.1


def test_one_cosine_weights_the_branches_by_their_norms(trained: list[tuple[Tensor, Tensor]]):
    parts = [rows(joined(*pair), data.targets) for pair, data in zip(trained, DATA, strict=True)]
    state, test = fit(parts), parts[1].features
    a, b = test.double().split(tiny.WIDTH, dim=1)
    p, q = state["prototypes"].double().split(tiny.WIDTH, dim=1)
    norms = (a.norm(dim=1)[:, None] * p.norm(dim=1), b.norm(dim=1)[:, None] * q.norm(dim=1))
    cosines = ((a @ p.T) / norms[0], (b @ q.T) / norms[1])
    whole = test.double().norm(dim=1)[:, None] * state["prototypes"].double().norm(dim=1)
    expected = (norms[0] * cosines[0] + norms[1] * cosines[1]) / whole
    scores = SimpleCIL().logits(state, test, 0).double()
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    # Pitfall i: not the mean of the branches' cosines.
    assert (scores - (cosines[0] + cosines[1]) / 2).abs().max() > 1e-4


def test_d_order_and_split_of_later_tasks_do_not_matter(trained: list[tuple[Tensor, Tensor]]):
    first, second, third = (
        rows(joined(*pair), data.targets) for pair, data in zip(trained, DATA, strict=True)
    )
    both = torch.cat([second.features, third.features])
    labels = torch.cat([second.labels, third.labels])
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0)).split(7)
    expected = fit([first, second, third])["prototypes"]
    for parts in ([third, second], [rows(both[i], labels[i]) for i in shuffled]):
        torch.testing.assert_close(fit([first, *parts])["prototypes"], expected, rtol=0, atol=1e-6)


def test_pitfall_vi_the_first_task_decides_the_features(trained: list[tuple[Tensor, Tensor]]):
    session = adapted("aper_ssf", epochs=2, batch_size=6, lr=0.1)
    other = tiny.images(TASKS[0], seed=1)
    state, _ = loop.train_task(
        session, tiny.vit(), TASKS[0], other, None, settings.Settings(seed=0)
    )
    assert (branches(session, state)[0][1] - trained[0][1]).abs().max() > 1e-3


@each
def test_planning_sees_the_parts_as_json(name: str):
    facts, problems = catalogue.method(name, {"lr": 1})
    assert problems == []
    assert json.loads(json.dumps(facts)) == facts
    session = facts["parts"]["first_session"]
    assert (session["name"], session["version"]) == ("first_session", 1)
    assert session["hyperparameters"]["lr"] == 1.0
    again = methods.build(session["name"], session["hyperparameters"])
    assert again == adapted(name, lr=1)
    assert facts["parts"]["keeps_frozen"] is True
    assert facts["parts"]["classifier"] == {
        "name": "simplecil",
        "version": 1,
        "hyperparameters": {},
        "separable": True,
        "uses_seed": False,
    }
    card = Card(**facts["card"])
    assert (card.contract, card.uses_seed, card.separable) == ("adapted", True, False)


@each
def test_what_the_first_session_refuses_is_refused_by_its_name(name: str):
    facts, problems = catalogue.method(name, {"epochs": 0, "lr": -1.0, "rank": 3})
    assert facts == {}
    assert {path for path, _ in problems} == {f".{name}.{f}" for f in ("epochs", "lr", "rank")}
