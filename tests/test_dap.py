"""DAP: generated prompts, the inferred task, and what is frozen after the first task."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.methods.contracts.trained import Task
from graftwork.methods.networks.vit import forward_tokens, read_out
from graftwork.methods.prompts.dap import DAP, DAPLearner, Generator
from graftwork.operators.training import forward
from tests import tiny

METHOD = DAP(epochs=2, batch_size=6, prompt_length=4, embedding=8)


def _learner(index: int, state: Mapping[str, Tensor] | None, **changes: Any) -> DAPLearner:
    method = DAP(**{"prompt_length": 4, "embedding": 8, **changes})
    learner = tiny.opened(method, tiny.task(index), dict(state) if state else None)
    assert isinstance(learner, DAPLearner)
    return learner


@pytest.fixture(scope="module")
def states() -> list[dict[str, Tensor]]:
    return tiny.train(METHOD)


@pytest.fixture(scope="module")
def mixed() -> tuple[Tensor, Tensor]:
    """Images of both tasks, and their queries."""
    parts = [tiny.images(tiny.task(index)).pixels for index in (0, 1)]
    pixels = torch.cat(parts)
    return pixels, forward.frozen_features(tiny.vit(), pixels)


def _near_own_key(learner: DAPLearner, query: Tensor) -> None:
    """Moves the keys so that the first 12 images are of task 0 and the others of task 1."""
    difference = query[:12].mean(dim=0) - query[12:].mean(dim=0)
    with torch.no_grad():
        learner.keys[0], learner.keys[1] = difference, -difference


def test_p1_the_task_of_an_image_is_independent_of_its_batch(states, mixed):
    _, query = mixed
    learner = _learner(1, states[1])
    _near_own_key(learner, query)
    together = learner.inferred(query)
    alone = torch.cat([learner.inferred(row[None]) for row in query])
    assert torch.equal(together, alone)
    assert together.unique().tolist() == [0, 1]


def test_p1_a_vote_gives_all_images_of_a_batch_one_task(states, mixed):
    images, query = mixed
    learner = _learner(1, states[1], eval_selection="batch_vote")
    _near_own_key(learner, query)
    instance = _learner(1, states[1])
    instance.load_state_dict(learner.state_dict())
    own = instance.inferred(query)
    vote = learner.inferred(query)
    assert vote.unique().numel() == 1
    assert int(vote[0]) == int(own.bincount().argmax())
    assert not torch.equal(own, vote)
    assert not torch.equal(learner.logits(images, query), instance.logits(images, query))
    # A tie goes to the older task.
    one_each = torch.stack([query[own == 1][0], query[own == 0][0]])
    assert learner.inferred(one_each).tolist() == [0, 0]


def test_p2_at_the_start_every_prompt_is_the_direction_of_the_shift():
    torch.manual_seed(0)
    generator = Generator(17, tiny.WIDTH, METHOD)
    embedding, tokens = torch.randn(3, 8), torch.randn(3, 17, tiny.WIDTH)
    prompts = generator(tokens, embedding)
    shift = generator.film(embedding)[:, tiny.WIDTH :]
    expected = F.normalize(shift, dim=1)[:, None].expand(3, 4, tiny.WIDTH)
    torch.testing.assert_close(prompts, expected)
    torch.testing.assert_close(prompts.norm(dim=2), torch.ones(3, 4))


def test_p2_prompts_of_a_zero_start_stay_equal_and_those_of_a_small_one_do_not(states):
    small = tiny.train(DAP(epochs=2, batch_size=6, prompt_length=4, embedding=8, down_init="small"))
    for number in range(6):
        weight = states[1][f"generators.{number}.down.weight"]
        assert weight.abs().max() > 0
        torch.testing.assert_close(weight, weight[:1].expand_as(weight), atol=1e-6, rtol=0)
        spread = small[1][f"generators.{number}.down.weight"].std(dim=0)
        assert spread.mean() > 0.01


def test_p2_the_formula_by_hand():
    torch.manual_seed(0)
    generator = Generator(5, 6, DAP(prompt_length=2, embedding=3, down_init="small"))
    tokens, embedding = torch.randn(1, 5, 6), torch.randn(1, 3)
    mixed = generator.down.weight @ F.layer_norm(tokens[0], (6,), eps=1e-6)  # [P, D]
    gain, shift = (F.normalize(part, dim=0) for part in generator.film(embedding)[0].chunk(2))
    torch.testing.assert_close(generator(tokens, embedding)[0], mixed * gain + shift)


def test_norms_of_gain_and_shift_pass_no_gradient():
    torch.manual_seed(0)
    generator = Generator(5, 6, DAP(prompt_length=2, embedding=3))
    target = torch.randn(1, 2, 6)
    (generator(torch.randn(1, 5, 6), torch.randn(1, 3)) * target).sum().backward()
    gradient = generator.film.bias.grad
    assert gradient is not None
    # With a norm that passes gradients, this would be orthogonal to the shift itself.
    torch.testing.assert_close(
        F.normalize(gradient[6:], dim=0), F.normalize(target.sum(dim=(0, 1)), dim=0)
    )


def test_p3_the_maps_from_tokens_are_frozen_after_the_first_task(states):
    names = [name for name in states[0] if ".down." in name]
    assert len(names) == 12
    for name in names:
        assert torch.equal(states[0][name], states[1][name]), name
    for name in (n for n in states[0] if ".film." in n or ".norm." in n):
        assert not torch.equal(states[0][name], states[1][name]), name
    learner = _learner(1, states[0])
    learner.begin()
    groups = {id(p) for p in learner.groups()[0]["params"]}
    assert not any(id(p) in groups for n, p in learner.named_parameters() if ".down." in n)


@pytest.mark.parametrize("skip", [False, True])
def test_p4_every_block_sees_the_prompts_of_its_own_alone(mixed, skip):
    images, query = mixed
    learner = _learner(0, None, skip_last_block=skip)
    lengths: list[int] = []
    for block in learner.network.blocks:
        # The seam calls a block's parts; its first norm sees what enters the attention.
        block.get_submodule("norm1").register_forward_pre_hook(
            lambda _, inputs: lengths.append(inputs[0].shape[1])
        )
    learner.logits(images, query)
    assert lengths == [21] * 5 + ([17] if skip else [21])


def test_p5_only_the_task_s_own_key_and_embedding_change(states):
    for name in ("keys", "embeddings"):
        assert torch.equal(states[1][name][:1], states[0][name]), name
    fresh = _learner(1, states[0])
    assert not torch.equal(states[1]["keys"][1], fresh.keys[1])
    for name in ("head.weight", "head.bias"):
        assert torch.equal(states[1][name][:3], states[0][name]), name


def test_p5_keys_get_their_gradient_from_the_pull_alone(states):
    data = tiny.images(tiny.task(1))
    query = forward.frozen_features(tiny.vit(), data.pixels)
    for pull in (0.0, 0.1):
        learner = _learner(1, states[0], pull=pull)
        terms = learner(data.pixels, data.targets, query)
        torch.testing.assert_close(terms["loss"], terms["cross_entropy"] - pull * terms["pull"])
        torch.testing.assert_close(
            terms["pull"], F.cosine_similarity(query, learner.keys[1:], dim=1).mean()
        )
        terms["loss"].backward()
        assert learner.keys.grad is not None
        assert learner.embeddings.grad is not None
        assert torch.equal(learner.keys.grad[0], torch.zeros(tiny.WIDTH))
        assert bool((learner.keys.grad[1] != 0).any()) == (pull > 0)
        assert torch.equal(learner.embeddings.grad[0], torch.zeros(8))
        assert (learner.embeddings.grad[1] != 0).all()


def test_p6_no_prompts_is_the_plain_backbone(mixed):
    images, query = mixed
    learner = _learner(0, None, prompt_length=0)
    plain = read_out(learner.network, forward_tokens(learner.network, images))
    assert torch.equal(learner.logits(images, query), learner.head(plain))


def test_masking_rules_out_the_classes_of_other_tasks(states, mixed):
    images, query = mixed
    learner = _learner(1, states[1], mask_to_inferred_task=True)
    _near_own_key(learner, query)
    plain = _learner(1, states[1])
    plain.load_state_dict(learner.state_dict())
    task, scores = learner.inferred(query), learner.logits(images, query)
    for row, own, score in zip(task.tolist(), plain.logits(images, query), scores, strict=True):
        inside = slice(3 * row, 3 * row + 3)
        torch.testing.assert_close(score[inside], own[inside])
        assert (score < -1e10).sum() == 3
    assert scores.isfinite().all()


def test_masking_leaves_domain_incremental_tasks_all_classes(mixed):
    images, query = mixed
    task = Task(index=1, count=2, current=(0, 1, 2), before=3, seen=3)
    learner = tiny.opened(DAP(prompt_length=4, mask_to_inferred_task=True), task, None)
    assert isinstance(learner, DAPLearner)
    # As version 1 stored it.
    given = learner.adopt({"columns": torch.tensor([[0, 3], [0, 3]])})
    assert given["classes"].tolist() == [[t, c] for t in (0, 1) for c in (0, 1, 2)]
    learner.classes.copy_(given["classes"])
    _near_own_key(learner, query)
    assert (learner.logits(images, query) > -1e10).all()


def test_starts_are_those_of_the_authors_code():
    torch.manual_seed(0)
    learner = tiny.opened(DAP(), tiny.task(0, 50, 2), None)
    assert isinstance(learner, DAPLearner)
    torch.testing.assert_close(learner.head.bias, torch.full((50,), -math.log(99)))
    assert abs(float(learner.head.weight.detach().std()) - math.sqrt(2 / 100)) < 0.005
    bound = math.sqrt(6 / (3 * 8 * 8 + tiny.WIDTH))
    assert 0.9 * bound < float(learner.keys.detach().abs().max()) <= bound
    assert learner.embeddings.shape == (1, 16)
    generator = learner.generators[0]
    assert isinstance(generator, Generator)
    assert generator.down.weight.shape == (10, 17)
    assert generator.film.weight.shape == (2 * tiny.WIDTH, 16)


@pytest.mark.parametrize(
    "changes", [{"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}]
)
def test_other_prefix_tokens(mixed, changes):
    images, _ = mixed
    network = tiny.vit(**changes)
    learner = DAP(prompt_length=4).learner(network, tiny.task(0)).eval()
    query = forward.frozen_features(network, images)
    scores = learner.logits(images, query)
    assert scores.shape == (24, 3)
    torch.testing.assert_close(scores[5:6], learner.logits(images[5:6], query[5:6]))
