"""DualPrompt: which prefix a block sees, for which image, and what a task changes."""

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.methods.networks.vit import forward_tokens, heads, read_out
from graftwork.methods.prompts.dualprompt import DualPrompt, DualPromptLearner
from tests import tiny

BLOCKS = {"g_first": 0, "g_last": 0, "e_first": 1, "e_last": 2}
SMALL: dict[str, Any] = {
    "epochs": 1, "batch_size": 6, "g_length": 2, "e_length": 3, **BLOCKS
}  # fmt: skip


def opened(index: int, state: State | None = None, count: int = 3, **changes: Any):
    method = DualPrompt(**{**SMALL, **changes})
    made = tiny.opened(method, tiny.task(index, count=count), state, depth=3)
    assert isinstance(made, DualPromptLearner)
    return made


@pytest.fixture(scope="module")
def states() -> list[State]:
    return tiny.train(DualPrompt(**SMALL), tasks=3, depth=3)


def batch(count: int = 6, index: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images, columns of the task's classes, and queries that differ widely."""
    draw = torch.Generator().manual_seed(2)
    images = torch.randn(count, 3, tiny.SIZE, tiny.SIZE, generator=draw)
    targets = torch.arange(count) % 3 + 3 * index
    return images, targets, torch.randn(count, tiny.WIDTH, generator=draw)


def pull_apart(learner: DualPromptLearner, query: Tensor) -> list[int]:
    """Makes image i one of task i modulo the number of keys; these tasks."""
    with torch.no_grad():
        learner.key.copy_(query[: len(learner.key)])
        query.copy_(query[: len(learner.key)].repeat(len(query), 1)[: len(query)])
    return [i % len(learner.key) for i in range(len(query))]


def test_d1_each_image_gets_the_keys_and_values_of_its_own_task(states):
    learner = opened(2, states[2])
    ids = torch.tensor([2, 0, 1, 0])
    found = learner.prefixes(ids, 4)
    for block in (1, 2):
        pair = found[block]
        assert pair is not None
        for part, given in enumerate(pair):
            assert given.shape == (4, *heads(learner.network)[:1], 3, heads(learner.network)[1])
            for row, task in enumerate(ids):
                for position in range(3):
                    expected = learner.e[task, block - 1, part, position]
                    assert torch.equal(given[row, :, position], expected)
    assert found[0] is not None
    for part, given in enumerate(found[0]):
        assert torch.equal(given[0].transpose(0, 1), learner.g[0, part])


def test_d2_scores_depend_neither_on_the_place_in_the_batch_nor_on_its_size(states):
    images, _, query = batch(9)
    scores = {}
    for layout in ("correct", "scrambled"):
        learner = opened(2, states[2], kv_layout=layout)
        assert pull_apart(learner, query) == [0, 1, 2] * 3
        whole = learner.logits(images, query)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
        back = torch.empty_like(whole)
        back[order] = learner.logits(images[order], query[order])
        alone = torch.cat([learner.logits(images[[i]], query[[i]]) for i in range(9)])
        scores[layout] = whole, back, alone
    whole, back, alone = scores["correct"]
    torch.testing.assert_close(back, whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-6)
    # The law that the scrambled layout breaks; with one image alone it is right by chance.
    torch.testing.assert_close(scores["scrambled"][2], alone, rtol=0, atol=1e-6)
    assert (scores["scrambled"][0] - alone).abs().max() > 1e-3
    assert (scores["scrambled"][0] - scores["scrambled"][1]).abs().max() > 1e-3


def test_the_scrambled_layout_mixes_keys_with_values_and_images_with_each_other(states):
    learner = opened(2, states[2], kv_layout="scrambled")
    # One task for all: the first half sees keys as values, the second values as keys.
    found = learner.prefixes(torch.tensor([1]), 4)[1]
    assert found is not None
    for row in range(4):
        same = learner.e[1, 0, row // 2].transpose(0, 1)
        assert torch.equal(found[0][row], same) and torch.equal(found[1][row], same)
    # Image b sees what images 2 b and 2 b + 1 chose.
    ids = torch.tensor([2, 0, 1, 0])
    found = learner.prefixes(ids, 4)[1]
    assert found is not None
    for row in range(4):
        for part in range(2):
            flat = 2 * row + part
            expected = learner.e[ids[flat % 4], 0, flat // 4].transpose(0, 1)
            assert torch.equal(found[part][row], expected)


def test_d3_a_task_changes_its_own_prefix_and_key_the_shared_prefix_and_its_rows(states):
    for index in (1, 2):
        before, after = states[index - 1], states[index]
        assert after.keys() == {"g", "e", "key", "head.weight", "head.bias"}
        for name, kept in (("e", index), ("key", index), ("head.weight", 3 * index)):
            assert torch.equal(after[name][:kept], before[name])
            assert len(after[name]) > kept
        assert torch.equal(after["head.bias"][: 3 * index], before["head.bias"])
        assert (after["g"] != before["g"]).all()
        assert (after["e"][index] != before["e"][index - 1]).all()


def test_d3_who_gets_a_gradient_from_which_term():
    images, targets, query = batch(index=1)
    learner = opened(1)
    terms = learner(images, targets, query)
    terms["pull"].backward()
    assert learner.key.grad is not None
    assert learner.key.grad.any(dim=1).tolist() == [False, True]
    assert learner.e.grad is None and learner.g.grad is None and learner.head.weight.grad is None
    learner.zero_grad()
    learner(images, targets, query)["cross_entropy"].backward()
    assert learner.key.grad is None
    assert learner.e.grad is not None and learner.g.grad is not None
    assert not learner.e.grad[0].any() and learner.e.grad[1].flatten(2).any(dim=2).all()
    assert learner.g.grad.flatten(2).any(dim=2).all()
    assert learner.head.weight.grad is not None
    assert learner.head.weight.grad.any(dim=1).tolist() == [False] * 3 + [True] * 3
    assert all(p.grad is None for p in learner.network.parameters())


def test_the_loss_and_its_terms():
    images, targets, query = batch(index=1)
    learner = opened(1, pull_weight=0.5)
    with torch.no_grad():
        learner.key[0] = query[:4].mean(dim=0)
    terms = learner(images, targets, query)
    tokens = forward_tokens(
        learner.network, images, prefixes=learner.prefixes(torch.tensor([1]), 6)
    )
    scores = learner.head(read_out(learner.network, tokens))
    entropy = torch.nn.functional.cross_entropy(scores[:, 3:], targets - 3)
    cosines = torch.nn.functional.cosine_similarity(query[:, None], learner.key[None], dim=2)
    torch.testing.assert_close(terms["cross_entropy"], entropy)
    torch.testing.assert_close(terms["pull"], cosines[:, 1].mean())
    torch.testing.assert_close(terms["loss"], entropy - 0.5 * cosines[:, 1].mean())
    assert terms["task_found"] == (cosines.argmax(dim=1) == 1).float().mean()
    assert 0 < terms["task_found"] < 1


def test_d4_no_image_gets_the_prefix_of_a_task_to_come(states):
    images, _, query = batch(9)
    seen, every = opened(1, states[1]), opened(1, candidate_keys="all")
    assert len(seen.key) == len(seen.e) == 2 and len(every.key) == len(every.e) == 3
    state = {**states[1], "key": query[:2].clone(), "e": states[1]["e"]}
    seen.load_state_dict({**seen.state_dict(), **state})
    with torch.no_grad():
        for name in ("g", "e", "key"):
            own, other = getattr(every, name), getattr(seen, name)
            own[: len(other)] = other
        every.head.load_state_dict(seen.head.state_dict())
        # The key of task 2 is where the last images are.
        every.key[2] = query[6:].mean(dim=0)
    close = torch.nn.functional.cosine_similarity(query[:, None], every.key[None], dim=2)
    strays = close.argmax(dim=1) == 2
    assert 0 < strays.sum() < 9
    difference = (seen.logits(images, query) - every.logits(images, query)).abs().amax(dim=1)
    assert torch.equal(difference > 1e-5, strays)


def test_a_vote_gives_all_images_of_a_batch_one_task(states):
    images, _, query = batch(8)
    own, vote = opened(2, states[2]), opened(2, states[2], eval_selection="batch_vote")
    for learner in (own, vote):
        tasks = pull_apart(learner, query)
    assert tasks == [0, 1, 2, 0, 1, 2, 0, 1]
    # Three images each for tasks 0 and 1: the tie goes to the older one.
    same = (vote.logits(images, query) - own.logits(images, query)).abs().amax(dim=1) < 1e-5
    assert same.tolist() == [task == 0 for task in tasks]
    alone = torch.cat([vote.logits(images[[i]], query[[i]]) for i in range(8)])
    torch.testing.assert_close(alone, own.logits(images, query), rtol=0, atol=1e-6)


@pytest.mark.parametrize("candidates", ["seen", "all"])
def test_d5_a_task_starts_from_the_prefix_before_and_a_random_key(states, candidates):
    state = states[0]
    if candidates == "all":
        state = tiny.train(DualPrompt(**SMALL, candidate_keys="all"), depth=3)[0]
    learner = opened(1, state, candidate_keys=candidates, count=2)
    assert not torch.equal(learner.e[1], learner.e[0])
    learner.begin()
    assert torch.equal(learner.e[1], learner.e[0]) and torch.equal(learner.e[0], state["e"][0])
    assert not (learner.key[1] == learner.key[0]).any()
    assert learner.key[1].abs().max() <= 1


@pytest.mark.parametrize(("length", "count"), [(5, 230_400), (20, 921_600)])
def test_d6_number_of_parameters(length, count):
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert isinstance(vit, VisionTransformer)
        made = DualPrompt(e_length=length).learner(vit, tiny.task(9, 10, 10))
    assert made.g.numel() == 15_360 and made.e.numel() == count and made.key.numel() == 7_680
    assert sum(p.numel() for p in made.head.parameters()) == 769 * 100


def test_without_prefixes_it_is_the_plain_model_and_zeros_are_not_nothing(states):
    images, _, query = batch()
    learner = opened(0, g_length=0, e_length=0)
    plain = learner.head(learner.network.forward_features(images)[:, 0])
    torch.testing.assert_close(learner.logits(images, query), plain, rtol=0, atol=1e-6)
    zeros = opened(0)
    zeros.head.load_state_dict(learner.head.state_dict())
    with torch.no_grad():
        for prefix in (zeros.g, zeros.e):
            prefix.zero_()
    assert (zeros.logits(images, query) - plain).abs().max() > 1e-3
    # And such a prefix can be left out of training.
    trained = tiny.train(DualPrompt(**{**SMALL, "e_length": 0}), depth=3)[1]
    assert trained["e"].shape == (2, 2, 2, 0, *heads(learner.network)) and trained["g"].any()


def test_the_prefixes_stand_in_their_blocks_and_the_sequence_keeps_its_length():
    made = DualPrompt().learner(tiny.vit(6), tiny.task(0))
    found = made.prefixes(torch.tensor([0]), 2)
    assert [pair is not None for pair in found] == [True] * 5 + [False]
    lengths = []
    for block in made.network.blocks:
        norm = block.get_submodule("norm1")
        norm.register_forward_pre_hook(lambda norm, args: lengths.append(args[0].shape[1]))
    images, _, query = batch(2)
    made.logits(images, query)
    assert lengths == [17] * 6


def test_a_backbone_with_too_few_blocks_is_refused():
    with pytest.raises(ValueError, match=r"e_last: must be below 4, the number .* got 4"):
        DualPrompt().learner(tiny.vit(4), tiny.task(0))
    with pytest.raises(ValueError, match="g_last: must be below 1"):
        DualPrompt().learner(tiny.vit(1), tiny.task(0))


def test_wrong_fields_are_named_together():
    with pytest.raises(HyperparameterError) as caught:
        DualPrompt(g_last=2, g_length=-1, lr=0.0)
    assert [name for name, _ in caught.value.problems] == ["lr", "g_length", "e_first"]
    # The task's prefix may also come first.
    assert DualPrompt(g_first=3, g_last=4, e_first=0, e_last=2).e_last == 2
