"""L2P: selection from the pool, what is read out, and what each term of the loss reaches."""

import dataclasses
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.methods.networks.vit import forward_tokens
from graftwork.methods.parts.heads import current_cross_entropy
from graftwork.methods.prompts import selection
from graftwork.methods.prompts.l2p import L2P, L2PLearner
from graftwork.operators.training import loop, settings
from tests import tiny

SMALL: dict[str, Any] = {"epochs": 1, "batch_size": 6, "pool_size": 8, "top_n": 2}


def learner(index: int = 0, depth: int = 2, **changes: Any) -> L2PLearner:
    made = tiny.opened(L2P(**{**SMALL, **changes}), tiny.task(index), None, depth)
    assert isinstance(made, L2PLearner)
    return made


def batch(count: int = 6, index: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images, columns of the task's classes, and queries that differ widely."""
    draw = torch.Generator().manual_seed(2)
    images = torch.randn(count, 3, tiny.SIZE, tiny.SIZE, generator=draw)
    targets = torch.arange(count) % 3 + 3 * index
    return images, targets, torch.randn(count, tiny.WIDTH, generator=draw)


def touched(gradient: Tensor | None) -> set[int]:
    """Rows with a gradient."""
    assert gradient is not None
    return set(gradient.flatten(1).abs().sum(dim=1).nonzero().flatten().tolist())


def test_selection_takes_the_nearest_keys_of_a_row():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9], [0.3, 0.3, 0.3, 0.2]])
    assert selection.nearest(scores, 3).tolist() == [[1, 3, 2], [0, 1, 2]]
    query, key = torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0, 0.0], [0.0, 0.1], [-3.0, -4.0]])
    torch.testing.assert_close(selection.similarity(query, key), torch.tensor([[0.6, 0.8, -1.0]]))


def test_selection_votes_and_ties_go_to_the_lowest_id():
    chosen = torch.tensor([[3, 1], [3, 2], [0, 2], [3, 0]])
    assert selection.histogram(chosen, 5).tolist() == [2, 1, 2, 3, 0]
    assert selection.vote(chosen, 5).tolist() == [[3, 0]]


def test_selection_counts_the_votes_of_all_workers(monkeypatch):
    """Each worker sees a part of the batch; all must decide as one would alone."""
    parts = torch.tensor([[0, 1], [0, 1], [2, 3]]), torch.tensor([[2, 3], [2, 3], [2, 0]])
    whole = selection.vote(torch.cat(parts), 4)
    assert whole.tolist() == [[2, 0]]
    assert [selection.vote(part, 4).tolist() for part in parts] == [[[0, 1]], [[2, 3]]]
    for part, other in zip(parts, parts[::-1], strict=True):
        rest = torch.bincount(other.flatten(), minlength=4)
        monkeypatch.setattr(selection, "all_sum", lambda counts, rest=rest: counts + rest)
        assert selection.vote(part, 4).tolist() == whole.tolist()


def test_selection_is_in_float32_under_autocast():
    query, key = torch.randn(5, 64), torch.randn(9, 64)
    plain = selection.similarity(query, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selection.similarity(query, key), plain)


def test_l1_without_pull_no_key_gets_a_gradient():
    made = learner(pull_weight=0.0)
    made(*batch())["loss"].backward()
    assert made.key.grad is None or not made.key.grad.any()
    assert made.pool.grad is not None and made.pool.grad.any()


@pytest.mark.parametrize("by", ["batch_vote", "instance"])
def test_l1_the_pull_reaches_the_chosen_keys_and_nothing_else(by):
    images, targets, query = batch()
    made = learner(train_selection=by)
    ids = selection.select(selection.similarity(query, made.key).detach(), 2, by)
    terms = made(images, targets, query)
    terms["pull"].backward()
    assert touched(made.key.grad) == set(ids.flatten().tolist())
    assert made.pool.grad is None and made.head.weight.grad is None
    # The mean over images of the sum over their chosen keys.
    cosine = torch.nn.functional.cosine_similarity
    rows = zip(query, ids.expand(6, -1), strict=True)
    expected = (
        sum(float(cosine(q, made.key[i].detach(), dim=0)) for q, row in rows for i in row) / 6
    )
    assert abs(terms["pull"].item() - expected) < 1e-6
    torch.testing.assert_close(
        terms["loss"], terms["cross_entropy"] - 0.1 * terms["pull"], rtol=0, atol=1e-7
    )


def test_l2_only_the_chosen_prompts_get_a_gradient_from_the_cross_entropy():
    images, targets, _ = batch()
    made = learner()
    query = made.key.detach()[[5]].expand(6, -1) + made.key.detach()[[2]]
    made(images, targets, query)["cross_entropy"].backward()
    assert touched(made.pool.grad) == {2, 5}
    assert made.key.grad is None
    assert all(p.grad is None for p in made.network.parameters())


def test_l2_prompts_that_a_task_never_chose_stay_to_the_last_bit():
    first, second = tiny.train(L2P(**SMALL), depth=2)
    assert second["selected"].shape == (2, 8)
    assert torch.equal(second["selected"][0], first["selected"][0])
    # 12 images, 2 prompts each.
    assert second["selected"].sum(dim=1).tolist() == [24, 24]
    for name in ("pool", "key"):
        moved = (second[name] != first[name]).flatten(1).any(dim=1)
        assert torch.equal(moved, second["selected"][1] > 0)
    assert torch.equal(second["head.weight"][:3], first["head.weight"])
    assert torch.equal(second["head.bias"][:3], first["head.bias"])


def test_l3_a_vote_of_one_image_is_its_own_choice():
    images, _, query = batch()
    own, vote = learner(), learner(eval_selection="batch_vote")
    vote.load_state_dict(own.state_dict())
    alone = [vote.logits(images[[i]], query[[i]]) for i in range(6)]
    torch.testing.assert_close(torch.cat(alone), own.logits(images, query), rtol=0, atol=1e-6)
    # In a batch of unlike images the vote decides otherwise, or the switch would do nothing.
    assert (vote.logits(images, query) - own.logits(images, query)).abs().max() > 1e-4


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 2}, {"class_token": False}])
def test_l4_the_feature_is_the_mean_of_the_outputs_of_the_prompts(changes):
    if "class_token" in changes:
        changes = {**changes, "global_pool": "avg"}
    images, _, query = batch()
    vit = tiny.vit(2, **changes)
    made = L2P(top_n=5).learner(vit, tiny.task(0)).eval()
    assert isinstance(made, L2PLearner)
    ids = selection.nearest(selection.similarity(query, made.key), 5)
    prompt = torch.stack([torch.cat([made.pool[i] for i in row]) for row in ids])
    tokens = forward_tokens(vit, images, prompt=prompt)
    start = vit.num_prefix_tokens
    assert tokens.shape[1] == start + 25 + 16
    expected = made.head(vit.fc_norm(tokens[:, start : start + 25].mean(dim=1)))
    torch.testing.assert_close(made.logits(images, query), expected)
    class_token = made.head(vit.fc_norm(tokens[:, 0]))
    assert (class_token - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("classes", "count"), [(100, 122_980), (200, 199_880)])
def test_l5_number_of_trained_parameters(classes, count):
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0).requires_grad_(False)
        assert isinstance(vit, VisionTransformer)
        made = L2P().learner(vit, tiny.task(0, classes))
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == count


def test_the_prompts_have_the_position_of_the_class_token_if_wanted():
    images, _, query = batch()
    plain, placed = learner(), learner(prompt_pos="cls")
    placed.load_state_dict(plain.state_dict())
    assert placed.network.pos_embed is not None
    assert not torch.equal(placed.logits(images, query), plain.logits(images, query))
    with torch.no_grad():
        plain.pool.add_(placed.network.pos_embed[0, 0])
    torch.testing.assert_close(placed.logits(images, query), plain.logits(images, query))
    for changes in ({"class_token": False, "global_pool": "avg"}, {"no_embed_class": True}):
        with pytest.raises(ValueError, match="prompt_pos: must be none"):
            L2P(prompt_pos="cls").learner(tiny.vit(1, **changes), tiny.task(0))


def test_a_block_of_prompts_for_each_task_starts_as_a_copy_and_moves_alone():
    method = L2P(**SMALL, train_selection="task")
    first, second = tiny.train(method, depth=2)
    changed = (second["pool"] != first["pool"]).flatten(1).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [2, 3]
    # Keys are not copied, and only the block's own are pulled.
    assert (second["key"] != first["key"]).any(dim=1).nonzero().flatten().tolist() == [2, 3]
    assert second["selected"].tolist() == [[12, 12, *[0] * 6], [0, 0, 12, 12, *[0] * 4]]
    opened, _ = loop.open_learner(
        method, tiny.vit(2), tiny.task(1), first, settings.Settings(seed=0)
    )
    assert isinstance(opened, L2PLearner)
    assert torch.equal(opened.pool, first["pool"])
    opened.begin()
    assert torch.equal(opened.pool[2:4], first["pool"][:2])
    with pytest.raises(ValueError, match=r"at least top_n for each task .*, 10 for task 5, got 8"):
        method.learner(tiny.vit(2), dataclasses.replace(tiny.task(4), count=None))


def test_the_start_of_prompts_and_keys():
    for init, low, high in (("wide", -1.0, 1.0), ("narrow", 0.0, 0.01)):
        made = learner(prompt_init=init)
        for drawn in (made.pool, made.key):
            share = (drawn.detach() - low) / (high - low)
            assert 0 <= share.min() < 0.02 and 0.98 < share.max() <= 1
            assert (share.mean() - 0.5).abs() < 0.05


def test_the_loss_is_over_the_classes_of_the_task():
    images, targets, query = batch(index=1)
    made = learner(1)
    with torch.no_grad():
        made.head.bias[:3] += 100
    terms = made(images, targets, query)
    ids = selection.select(selection.similarity(query, made.key).detach(), 2, "batch_vote")
    scores = made.head(made._features(images, ids))
    expected = torch.nn.functional.cross_entropy(scores[:, 3:], targets - 3)
    torch.testing.assert_close(terms["cross_entropy"], expected)
    torch.testing.assert_close(current_cross_entropy(scores, targets, made.task), expected)


def test_wrong_fields_are_named_together():
    with pytest.raises(HyperparameterError) as caught:
        L2P(top_n=11, prompt_length=0, pull_weight=-1.0)
    assert [name for name, _ in caught.value.problems] == ["top_n", "prompt_length", "pull_weight"]
