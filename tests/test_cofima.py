"""CoFiMA: Fisher information and the merge that it weighs, computed a second time."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.methods.contracts.trained import Trained
from graftwork.methods.mixtures.cofima import CoFiMA, CoFiMALearner
from graftwork.methods.mixtures.coma import CoMA
from graftwork.methods.representations.slca import SLCA
from graftwork.operators.training import forward, loop
from graftwork.operators.training.batches import row_batches
from graftwork.operators.training.settings import Log, Settings
from tests import tiny

COMMON = {
    "epochs": 2,
    "batch_size": 5,
    "lr": 0.02,
    "backbone_lr_scale": 0.5,
    "milestone": 1,
    "alignment_epochs": 1,
    "samples_per_class": 16,
}
SMALL = CoFiMA(**COMMON)  # type: ignore[arg-type]
LINEAR = CoMA(**COMMON)  # type: ignore[arg-type]
PLAIN = SLCA(**COMMON)  # type: ignore[arg-type]


def train(method: Trained, tasks: int = 2) -> list[State]:
    return tiny.train(method, tasks, depth=2)


def one_more(method: Trained, index: int, state: State | None) -> State:
    """What a task leaves that begins with a stored state; other methods' tensors are left out."""
    task, settings = tiny.task(index), Settings(seed=0)
    if not isinstance(method, CoFiMA) and state is not None:
        state = {n: t for n, t in state.items() if not n.startswith("fisher.")}
    left, _ = loop.train_task(method, tiny.vit(2), task, tiny.images(task), state, settings)
    return left


def fisher(state: State) -> State:
    """By the names of the weights."""
    found = {n: t for n, t in state.items() if n.startswith("fisher.")}
    return {n.removeprefix("fisher.").replace("/", "."): t for n, t in found.items()}


def rest(state: State) -> State:
    return {n: t for n, t in state.items() if not n.startswith("fisher.")}


def furthest(a: State, b: State) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def by_hand(state: State, index: int, batch_size: int) -> State:
    """Mean squared gradients of the cross-entropy over all columns, by `backward`."""
    task = tiny.task(index)
    data = tiny.images(task)
    learner = tiny.opened(PLAIN, task, rest(state), depth=2)
    recipe = dataclasses.replace(SMALL.recipe(task), batch_size=batch_size)
    batches = row_batches(12, recipe, 0, index, SMALL.epochs)
    total: State = {}
    for rows in batches:
        learner.zero_grad()
        features = learner.features(data.batch(rows, SMALL.epochs, "slca"))
        scores = F.linear(features, state["head.weight"], state["head.bias"])
        F.cross_entropy(scores, data.targets[rows]).backward()
        for name, weight in learner.network.named_parameters():
            assert weight.grad is not None
            total[name] = total.get(name, 0) + weight.grad**2 / len(batches)
    return total


@pytest.fixture(scope="module")
def states() -> list[State]:
    return train(SMALL, 3)


@pytest.fixture(scope="module")
def trained(states: list[State]) -> State:
    """The second task before its merge."""
    return one_more(PLAIN, 1, states[0])


def test_i_end_points_are_those_of_coma_bitwise() -> None:
    for weight in (0.0, 1.0):
        found = train(dataclasses.replace(SMALL, weight=weight))[-1]
        linear = train(dataclasses.replace(LINEAR, weight=weight))[-1]
        assert furthest(rest(found), linear) == 0


def test_ii_equal_information_is_coma() -> None:
    # All of it is below the floor.
    found = train(dataclasses.replace(SMALL, fisher_floor=1e9))[-1]
    assert furthest(rest(found), train(LINEAR)[-1]) < 1e-5


def test_iii_where_only_the_new_task_knows_something_its_weights_are_taken(
    states: list[State], trained: State
) -> None:
    place = "blocks.0.attn.proj.weight"
    state = {n: t.clone() for n, t in states[0].items()}
    state["fisher." + place.replace(".", "/")].zero_()
    method = dataclasses.replace(SMALL, fisher_floor=0.0)
    found = one_more(method, 1, state)[f"vit.{place}"]
    assert torch.equal(found, trained[f"vit.{place}"])
    assert not torch.equal(states[1][f"vit.{place}"], trained[f"vit.{place}"])


def test_iv_the_new_head_is_as_it_was_trained(states: list[State], trained: State) -> None:
    method = dataclasses.replace(SMALL, alignment_epochs=0)
    found = one_more(method, 1, states[0])
    for kind in ("weight", "bias"):
        assert torch.equal(found[f"aligned_{kind}"], trained[f"head.{kind}"])
        assert torch.equal(states[1][f"head.{kind}"], trained[f"head.{kind}"])


@pytest.mark.parametrize("floor", [0.0, 1e-12])
def test_v_without_any_information_weights_are_averaged(
    states: list[State], trained: State, floor: float
) -> None:
    # Attention does not change with the bias of its keys: what is left is rounding.
    keys = slice(tiny.WIDTH, 2 * tiny.WIDTH)
    for state in states:
        biases = fisher(state)["blocks.0.attn.qkv.bias"]
        assert float(biases[keys].max()) < 1e-12 < float(biases[2 * tiny.WIDTH :].max())
    name = "vit.blocks.0.attn.qkv.bias"
    state = {n: t.clone() for n, t in states[0].items()}
    if not floor:
        for tensor in fisher(state).values():
            tensor.zero_()
    found = one_more(dataclasses.replace(SMALL, fisher_floor=floor), 1, state)
    assert [n for n, t in found.items() if not bool(t.isfinite().all())] == []
    if floor:
        wanted = 0.6 * state[name] + 0.4 * trained[name]
        assert torch.allclose(found[name][keys], wanted[keys], atol=1e-7)


def test_vi_the_information_is_that_of_the_weights_before_the_merge_which_it_weighs(
    states: list[State], trained: State
) -> None:
    state, after = states[0], states[1]
    old = {n: t.clamp(max=1e-4) for n, t in by_hand(state, 0, 5).items()}
    assert furthest(fisher(state), old) < 1e-8
    new = {n: t.clamp(max=1e-4) for n, t in by_hand(trained, 1, 5).items()}
    assert furthest(fisher(after), new) < 1e-8
    for name, f1 in new.items():
        f0, f1 = fisher(state)[name].clamp(min=1e-12), f1.clamp(min=1e-12)
        w0, w1 = state[f"vit.{name}"], trained[f"vit.{name}"]
        wanted = (0.6 * f0 * w0 + 0.4 * f1 * w1) / (0.6 * f0 + 0.4 * f1)
        assert torch.allclose(after[f"vit.{name}"], wanted, atol=1e-5)
    assert torch.equal(after["head.weight"], trained["head.weight"])


def test_vii_with_equal_information_the_uniform_average_is_the_mean() -> None:
    method = dataclasses.replace(SMALL, average="uniform", fisher_floor=1e9)
    first, second = train(method)
    new = one_more(PLAIN, 1, first)
    for name in (n for n in first if n.startswith("vit.")):
        assert torch.allclose(second[name], (first[name] + new[name]) / 2, atol=1e-6)


def measured(method: CoFiMA, state: State) -> State:
    task = tiny.task(0)
    learner = tiny.opened(method, task, state, depth=2)
    assert isinstance(learner, CoFiMALearner)
    data = forward.PlainImages(
        learner, tiny.images(task), Settings(seed=0), Log(), method.recipe(task)
    )
    found = learner._measured(data)
    assert all(p.grad is None for p in learner.parameters())
    return found


def test_information_per_image_is_larger_and_free_of_cross_terms(states: list[State]) -> None:
    method = dataclasses.replace(SMALL, fisher="per_sample", fisher_cap=0.0)
    found, wanted = measured(method, states[0]), by_hand(states[0], 0, 1)
    assert furthest(found, wanted) < 1e-6
    by_batch = measured(dataclasses.replace(SMALL, fisher_cap=0.0), states[0])
    total: Tensor = sum(t.sum() for t in found.values())  # type: ignore[assignment]
    of_batches: Tensor = sum(t.sum() for t in by_batch.values())  # type: ignore[assignment]
    assert float(total) > float(of_batches)


def test_information_is_capped_and_may_be_measured_on_images_as_they_are(
    states: list[State],
) -> None:
    assert max(float(t.max()) for t in fisher(states[0]).values()) == pytest.approx(1e-4)
    plain = measured(dataclasses.replace(SMALL, fisher_augmented=False), states[0])
    assert furthest(plain, fisher(states[0])) > 1e-6


def test_accumulated_information_is_an_average(states: list[State]) -> None:
    method = dataclasses.replace(SMALL, accumulate=True)
    first = one_more(method, 0, None)
    assert furthest(first, states[0]) == 0
    second = one_more(method, 1, first)
    assert furthest(rest(second), rest(states[1])) == 0
    for name, found in fisher(second).items():
        wanted = 0.6 * fisher(states[0])[name] + 0.4 * fisher(states[1])[name]
        assert torch.allclose(found, wanted, atol=1e-9)


def test_only_the_last_weights_and_information_are_kept(states: list[State]) -> None:
    for state in states:
        assert fisher(state).keys() == {n for n, _ in tiny.vit(2).named_parameters()}
        assert len(fisher(state)) == sum(n.startswith("vit.") for n in state)


def test_wrong_values_are_refused_together() -> None:
    with pytest.raises(HyperparameterError) as error:
        CoFiMA(weight=-0.1, fisher_cap=-1, fisher_floor=-1)
    assert [name for name, _ in error.value.problems] == ["weight", "fisher_cap", "fisher_floor"]
