"""MagMax: what is kept against an offline merge of recorded checkpoints, and what predicts."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.methods.contracts.trained import Task
from graftwork.methods.mixtures.magmax import MagMax, MagMaxLearner, flat
from graftwork.methods.mixtures.magmax_independent import MagMaxIndependent
from graftwork.methods.networks.vit import forward_tokens, read_out
from graftwork.methods.parts.averaging import max_magnitude
from tests import tiny

QUICK = {"epochs": 2, "batch_size": 6, "lr": 1e-3, "head_lr": 0.01, "augmentation": "none"}
SEQUENTIAL, ALONE = MagMax(**QUICK), MagMaxIndependent(**QUICK)  # type: ignore[arg-type]
DEPTH, TASKS = 1, 3


@pytest.fixture(scope="module")
def sequential() -> list[State]:
    return tiny.train(SEQUENTIAL, TASKS, depth=DEPTH)


@pytest.fixture(scope="module")
def side_by_side() -> tuple[list[State], list[State]]:
    tasks = [tiny.task(index, count=TASKS) for index in range(TASKS)]
    return tiny.train_side_by_side(ALONE, tasks, DEPTH)


def weights(state: State) -> State:
    return {n.removeprefix("vit."): t for n, t in state.items() if n.startswith("vit.")}


def offline(states: list[State]) -> State:
    """The merge of checkpoints that are all there, weight by weight."""
    plain = tiny.vit(DEPTH).state_dict()
    merged = {}
    for name, start in plain.items():
        changes = torch.stack([weights(state)[name] - start for state in states])
        # The last of equal ones: argmax of the reversed stack is the first.
        newest_first = changes.flip(0)
        chosen = newest_first.abs().argmax(dim=0, keepdim=True)
        merged[name] = start + 0.5 * newest_first.gather(0, chosen)[0]
    return merged


def features_of(state: State, pixels: Tensor) -> Tensor:
    vit: VisionTransformer = tiny.vit(DEPTH)
    vit.load_state_dict(state)
    return read_out(vit, forward_tokens(vit, pixels))


def test_the_larger_magnitude_wins_and_a_tie_goes_to_the_later() -> None:
    kept, new = torch.tensor([1.0, -3.0, 2.0, -2.0, 0.0]), torch.tensor([-2.0, 1.0, -2.0, 2.0, 0.0])
    assert max_magnitude(kept, new).tolist() == [-2.0, -3.0, -2.0, 2.0, 0.0]
    assert max_magnitude(new, kept).tolist() == [-2.0, -3.0, 2.0, -2.0, 0.0]


def test_sequential_is_the_offline_merge_of_its_checkpoints(sequential: list[State]) -> None:
    pixels = tiny.images(tiny.task(0)).pixels
    for number in range(TASKS):
        learner = tiny.opened(SEQUENTIAL, tiny.task(number, count=TASKS), sequential[number], DEPTH)
        with torch.no_grad():
            expected = features_of(offline(sequential[: number + 1]), pixels)
            torch.testing.assert_close(learner.features(pixels), expected)
            head = sequential[number]
            scores = F.linear(expected, head["head.weight"], head["head.bias"])
            torch.testing.assert_close(learner.logits(pixels, None), scores)


def test_side_by_side_is_the_offline_merge_of_its_experts(
    side_by_side: tuple[list[State], list[State]],
) -> None:
    experts, joins = side_by_side
    pixels = tiny.images(tiny.task(0)).pixels
    for number in range(TASKS):
        learner = tiny.opened(ALONE, tiny.task(number, count=TASKS), joins[number], DEPTH)
        with torch.no_grad():
            expected = features_of(offline(experts[: number + 1]), pixels)
            torch.testing.assert_close(learner.features(pixels), expected)
            scores = [
                F.linear(expected, e["head.weight"], e["head.bias"]) for e in experts[: number + 1]
            ]
            torch.testing.assert_close(learner.logits(pixels, None), torch.cat(scores, dim=1))


def test_memory_is_that_of_one_backbone_or_two_however_many_tasks(
    sequential: list[State], side_by_side: tuple[list[State], list[State]]
) -> None:
    count = len(flat(tiny.vit(DEPTH)))
    for states, backbones, per_class in (
        (sequential, 2, tiny.WIDTH + 1),
        (side_by_side[1], 1, tiny.WIDTH + 3),
    ):
        assert [sum(t.numel() for t in state.values()) for state in states] == [
            backbones * count + 3 * (number + 1) * per_class for number in range(TASKS)
        ]


def test_experts_start_from_the_pretrained_weights(
    side_by_side: tuple[list[State], list[State]],
) -> None:
    """With scale 1 the first task's merge is its expert; a later expert knows nothing of it."""
    experts, joins = side_by_side
    start = flat(tiny.vit(DEPTH))
    moved = [torch.cat([t.flatten() for t in weights(e).values()]) - start for e in experts]
    torch.testing.assert_close(joins[0]["tau"], moved[0])
    alone = tiny.task(1, count=TASKS)
    [again], _ = tiny.train_side_by_side(ALONE, [alone], DEPTH)
    for name, tensor in again.items():
        assert torch.equal(tensor, experts[1][name]), name


def test_rows_of_earlier_classes_stay_bitwise(sequential: list[State]) -> None:
    for name in ("head.weight", "head.bias"):
        assert torch.equal(sequential[2][name][:6], sequential[1][name])


def test_training_sees_the_fine_tuned_weights_and_prediction_the_merged_ones(
    sequential: list[State],
) -> None:
    task = tiny.task(2, count=TASKS)
    learner = tiny.opened(SEQUENTIAL, task, sequential[2], DEPTH)
    assert isinstance(learner, MagMaxLearner)
    images = tiny.images(task)
    with torch.no_grad():
        own = learner.head(features_of(weights(sequential[2]), images.pixels))
        loss = learner(images.pixels, images.targets, None)["loss"]
        torch.testing.assert_close(loss, F.cross_entropy(own[:, 6:], images.targets - 6))
        assert float((learner.logits(images.pixels, None) - own).abs().max()) > 1e-3


def test_a_class_of_several_tasks_has_the_mean_of_their_scores() -> None:
    tasks = [
        Task(index=0, count=2, current=(0, 1), before=0, seen=4),
        Task(index=1, count=2, current=(1, 2), before=4, seen=4),
    ]
    experts, joins = tiny.train_side_by_side(ALONE, tasks, DEPTH)
    learner, pixels = tiny.opened(ALONE, tasks[1], joins[1], DEPTH), tiny.images(tasks[0]).pixels
    with torch.no_grad():
        features = learner.features(pixels)
        a, b = (F.linear(features, e["head.weight"], e["head.bias"]) for e in experts)
        known = torch.stack([a[:, 0], (a[:, 1] + b[:, 0]) / 2, b[:, 1]], dim=1)
        # Nobody has seen the last class.
        expected = torch.cat([known, known.amin(dim=1, keepdim=True)], dim=1)
        torch.testing.assert_close(learner.logits(pixels, None), expected)


@pytest.mark.parametrize("method", [MagMax, MagMaxIndependent])
def test_fields_out_of_range_are_refused_together(method: type) -> None:
    with pytest.raises(HyperparameterError) as caught:
        method(epochs=0, batch_size=0, lr=0, head_lr=0, weight_decay=-1, clip=-1, scale=-1)
    assert len(caught.value.problems) == 7
