"""CoMA: the order of what happens after a task, against SLCA and plain averages."""

import dataclasses

import pytest
import torch

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.methods.contracts.trained import Trained
from graftwork.methods.mixtures.coma import CoMA
from graftwork.methods.representations.slca import SLCA
from graftwork.operators.training import loop
from graftwork.operators.training.settings import Settings
from tests import tiny

COMMON = {
    "epochs": 2,
    "batch_size": 6,
    "lr": 0.02,
    "backbone_lr_scale": 0.5,
    "milestone": 1,
    "alignment_epochs": 2,
    "samples_per_class": 16,
}
SMALL = CoMA(**COMMON)  # type: ignore[arg-type]
PLAIN = SLCA(**COMMON)  # type: ignore[arg-type]


def train(method: Trained, tasks: int = 2) -> list[State]:
    return tiny.train(method, tasks, depth=2)


def one_more(method: Trained, index: int, state: State | None) -> State:
    """What a task leaves that begins with a stored state."""
    task, settings = tiny.task(index), Settings(seed=0)
    left, _ = loop.train_task(method, tiny.vit(2), task, tiny.images(task), state, settings)
    return left


def backbone(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name.startswith("vit.")}


def differing(a: State, b: State) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.fixture(scope="module")
def states() -> list[State]:
    return train(SMALL, 3)


def test_i_with_weight_1_it_is_slca_bitwise() -> None:
    found, plain = train(dataclasses.replace(SMALL, weight=1.0), 3), train(PLAIN, 3)
    assert [differing(*pair) for pair in zip(found, plain, strict=True)] == [set()] * 3


def test_i_with_weight_0_the_backbone_stays_that_of_the_first_task() -> None:
    first, second = train(dataclasses.replace(SMALL, weight=0.0))
    assert differing(backbone(first), backbone(second)) == set()
    assert torch.equal(first["head.weight"], second["head.weight"][:3])


def test_iv_the_new_head_is_as_it_was_trained_before_and_after_the_merge() -> None:
    for old_heads in ("keep", "merge"):
        method = dataclasses.replace(SMALL, alignment_epochs=0, old_heads=old_heads)
        first, second = train(method)
        trained = one_more(PLAIN, 1, first)
        assert torch.equal(second["head.weight"], trained["head.weight"])
        assert torch.equal(second["aligned_weight"][3:], trained["head.weight"][3:])
        assert torch.equal(second["aligned_bias"][3:], trained["head.bias"][3:])


def test_vi_the_next_task_starts_from_the_merged_backbone_and_the_heads_before_alignment(
    states: list[State],
) -> None:
    for index in (1, 2):
        before, after = states[index - 1], states[index]
        trained = one_more(PLAIN, index, before)
        for name, new in backbone(trained).items():
            wanted = 0.6 * before[name] + 0.4 * new
            assert torch.allclose(after[name], wanted, atol=1e-7)
        assert torch.equal(after["head.weight"], trained["head.weight"])
        assert torch.equal(after["head.weight"][: 3 * index], before["head.weight"])
        assert (after["aligned_weight"] != after["head.weight"]).any(dim=1).all()


def test_vii_the_uniform_average_is_the_mean_over_the_tasks() -> None:
    merged = train(dataclasses.replace(SMALL, average="uniform"), 3)
    trained = [merged[0], *(one_more(PLAIN, i, merged[i - 1]) for i in (1, 2))]
    for count in (2, 3):
        for name, found in backbone(merged[count - 1]).items():
            mean = torch.stack([state[name] for state in trained[:count]]).mean(dim=0)
            assert torch.allclose(found, mean, atol=1e-6)


def test_statistics_are_those_of_the_merged_backbone(states: list[State]) -> None:
    task = tiny.task(1)
    data = tiny.images(task)
    learner = tiny.opened(SMALL, task, states[1], depth=2)
    with torch.no_grad():
        features = learner.features(data.pixels)
    for column in task.current:
        own = features[data.targets == column].double().mean(dim=0).float()
        assert torch.allclose(states[1]["mean"][column], own, atol=1e-6)
    assert torch.equal(states[2]["mean"][:6], states[1]["mean"])


def test_old_heads_start_their_alignment_as_trained_or_averaged_with_the_aligned(
    states: list[State],
) -> None:
    keep = dataclasses.replace(SMALL, alignment_epochs=0)
    found = one_more(keep, 2, states[1])
    assert torch.equal(found["aligned_weight"][:6], states[1]["head.weight"])
    found = one_more(dataclasses.replace(keep, old_heads="merge"), 2, states[1])
    for kind in ("weight", "bias"):
        wanted = 0.6 * states[1][f"aligned_{kind}"] + 0.4 * states[1][f"head.{kind}"]
        assert torch.allclose(found[f"aligned_{kind}"][:6], wanted, atol=1e-7)


def test_nothing_is_kept_of_earlier_backbones(states: list[State]) -> None:
    names = backbone(states[0]).keys()
    assert [backbone(state).keys() for state in states[1:]] == [names, names]
    rest = [name for name in states[2] if name not in names]
    assert all(len(states[2][name]) == 9 for name in rest)


def test_wrong_values_are_refused_together() -> None:
    with pytest.raises(HyperparameterError) as error:
        CoMA(weight=1.5, milestone=-1)
    assert [name for name, _ in error.value.problems] == ["milestone", "weight"]
