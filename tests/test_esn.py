"""ESN: energies in closed form, votes, isolation of stages, and what is stored."""

import itertools
import math
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.methods.contracts.trained import Task, trains
from graftwork.methods.mixtures.esn import (
    CANDIDATES,
    ESN,
    ESNExpert,
    ESNLearner,
    Stage,
    free_energy,
    impartial,
    tokens_of,
    vote,
    winners,
)
from graftwork.methods.networks.vit import forward_tokens
from graftwork.operators.seeds import derive
from graftwork.operators.training import loop, settings
from tests import tiny

METHOD = ESN(
    epochs=1, batch_size=8, lr=0.05, prompt_length=3, candidates="fast", augmentation="none"
)
DEPTH, D = 2, tiny.WIDTH
NO = float("-inf")


def unequal() -> list[Task]:
    """Tasks of three, one and two classes."""
    ends = [0, 3, 4, 6]
    return [
        Task(index=i, count=3, current=tuple(range(a, b)), before=a, seen=b)
        for i, (a, b) in enumerate(itertools.pairwise(ends))
    ]


@pytest.fixture(scope="module")
def trained() -> tuple[list[State], list[State]]:
    """Experts and joined states of three tasks of unequal sizes."""
    return tiny.train_side_by_side(METHOD, unequal(), DEPTH)


def opened(states: list[State], number: int) -> ESNLearner:
    learner = tiny.opened(METHOD, unequal()[number], states[number], DEPTH)
    assert isinstance(learner, ESNLearner)
    return learner


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.cat([tiny.images(task, 2).pixels for task in unequal()])


def scores_of(*stages: list[float]) -> Tensor:
    """One row [1, S, C]."""
    return torch.tensor([stages])


# --- energies and votes -----------------------------------------------------------------------


def test_free_energy_in_closed_form() -> None:
    same = torch.full((1, 4), 7.0)
    assert float(free_energy(same)) == pytest.approx(-(7 + math.log(4)))
    assert float(free_energy(same, "negated")) == pytest.approx(7 - math.log(4))
    one = torch.tensor([[50.0, 0.0, -50.0]])
    assert float(free_energy(one)) == pytest.approx(-50)
    assert float(free_energy(one, "negated")) == pytest.approx(-50)  # of the lowest logit


def test_v_the_coldest_temperature_follows_the_largest_logit() -> None:
    torch.manual_seed(0)
    scores = 5 * torch.randn(200, 4, 7)
    highest = scores.amax(dim=2).argmax(dim=1)
    assert torch.equal(winners(scores, 1e-4), highest)
    assert not torch.equal(winners(scores, 10.0), highest)


def test_warm_temperatures_prefer_stages_of_many_good_classes() -> None:
    scores = scores_of([3.0, 0.0, 0.0], [2.9, 2.9, 2.9])
    assert [int(winners(scores, t)) for t in (0.001, 1.0)] == [0, 1]


def test_a_vote_counts_temperatures_and_a_tie_goes_to_the_first_stage() -> None:
    scores = scores_of([3.0, 0.0, 0.0], [2.9, 2.9, 2.9])
    assert int(vote(scores, torch.tensor([0.001, 0.5, 1.0]))) == 1
    assert int(vote(scores, torch.tensor([0.001, 0.001, 1.0]))) == 0
    assert int(vote(scores, torch.tensor([1.0, 0.001]))) == 0
    assert int(winners(scores_of([1.0, NO], [NO, 1.0]), 0.1)) == 0


def test_iii_a_pool_of_one_temperature_is_plain_energy() -> None:
    torch.manual_seed(0)
    scores = 3 * torch.randn(100, 3, 5)
    plain = (0.3 * torch.logsumexp(scores / 0.3, dim=2)).argmax(dim=1)
    assert torch.equal(vote(scores, torch.tensor([0.3])), plain)


def test_large_logits_over_small_temperatures_stay_finite() -> None:
    scores = scores_of([300.0, NO], [NO, 299.0])
    assert int(winners(scores, 0.001)) == 0
    assert bool(impartial(scores, torch.tensor([1])).isfinite().all())


def test_impartial_scores_in_numbers() -> None:
    scores = scores_of([5.0, 2.0, NO, NO], [NO, NO, 1.0, 3.0])
    assert impartial(scores, torch.tensor([0])).tolist() == [[5.0, 2.0, -1.0, 1.0]]
    # Shifted by 1 + (5 - 1): all classes of the first stage are below both of the second.
    assert impartial(scores, torch.tensor([1])).tolist() == [[0.0, -3.0, 1.0, 3.0]]
    again = scores_of([5.0, 2.0], [1.0, 3.0])
    assert impartial(again, torch.tensor([1])).tolist() == [[1.0, 3.0]]
    lacking = scores_of([5.0, 2.0, NO], [NO, 3.0, NO])
    assert impartial(lacking, torch.tensor([1])).tolist() == [[2.0, 3.0, -1.0]]


def test_impartial_scores_decide_as_the_vote_and_keep_the_order_within_a_stage() -> None:
    torch.manual_seed(0)
    scores = torch.full((50, 3, 6), NO)
    for stage, columns in enumerate(([0, 1, 2], [3], [4, 5])):
        scores[:, stage, columns] = 9 * torch.randn(50, len(columns))
    chosen = vote(scores, torch.tensor([0.001, 0.5, 1.0]))
    found = impartial(scores, chosen)
    assert torch.equal(found.argmax(dim=1), scores[torch.arange(50), chosen].argmax(dim=1))
    for stage, columns in enumerate(([0, 1, 2], [4, 5])):
        own = scores[:, 2 * stage, columns]
        assert torch.equal(found[:, columns].argsort(dim=1), own.argsort(dim=1))


# --- stages -----------------------------------------------------------------------------------


def test_a_stage_has_as_many_weights_as_the_card_says() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert isinstance(vit, VisionTransformer)
        count = sum(p.numel() for p in Stage(vit).parameters())
    assert count == 5 * 768**2 + 21 * 768 // 2 == 2_957_184


def test_a_stage_begins_with_the_class_token() -> None:
    vit = tiny.vit(DEPTH)
    start = vit.cls_token
    assert start is not None
    start.data.normal_()
    assert torch.equal(Stage(vit).token, start)
    assert Stage(vit).token is not start


def test_tokens_are_taken_before_the_final_norm() -> None:
    vit, images = tiny.vit(DEPTH), tiny.images(tiny.task(0)).pixels
    for parameter in vit.norm.parameters():
        parameter.data.uniform_(0.5, 2.0)
    prompt = torch.randn(1, 3, D)
    raw = tokens_of(vit, images, prompt)
    assert raw.shape == (12, 1 + 3 + 16, D)
    assert torch.equal(vit.norm(raw), forward_tokens(vit, images, prompt=prompt))
    assert not torch.allclose(raw, vit.norm(raw))


def test_a_stage_is_class_attention_written_out() -> None:
    vit = tiny.vit(DEPTH)
    torch.manual_seed(0)
    stage, tokens = Stage(vit), torch.randn(2, 5, D)
    for parameter in stage.parameters():
        parameter.data.normal_(std=0.2)
    every = torch.cat([stage.token.expand(2, -1, -1), tokens], dim=1)
    normed, heads = stage.norm1(every), []
    q, k, v = stage.q(normed[:, 0]), stage.k(normed), stage.v(normed)
    for part in torch.arange(D).split(D // tiny.HEADS):
        weights = torch.einsum("bd,bxd->bx", q[:, part], k[..., part]) / math.sqrt(len(part))
        heads.append(torch.einsum("bx,bxd->bd", weights.softmax(dim=1), v[..., part]))
    own = stage.token[:, 0] + stage.proj(torch.cat(heads, dim=1))
    expected = own + stage.fc2(F.gelu(stage.fc1(stage.norm2(own))))
    torch.testing.assert_close(stage(tokens), expected)


def test_the_loss_is_cross_entropy_and_the_distance_to_the_anchor() -> None:
    task = tiny.task(1)
    given = ESN(prompt_length=3, anchor=-4.0, anchor_weight=0.3)
    for method, sign in ((given, 1), (replace(given, anchor_on="negated"), -1)):
        expert = method.expert(tiny.vit(DEPTH).requires_grad_(False), task)
        images = tiny.images(task)
        terms = expert(images.pixels, images.targets, None)
        scores = expert.own_logits(images.pixels)
        energy = -(sign * scores).exp().sum(dim=1).log()
        expected = F.cross_entropy(scores, images.targets - 3)
        torch.testing.assert_close(terms["cross_entropy"], expected)
        torch.testing.assert_close(terms["energy"], energy.mean())
        torch.testing.assert_close(terms["loss"], expected + 0.3 * ((energy + 4) ** 2).mean())


def test_ii_energies_approach_the_anchor() -> None:
    method = ESN(epochs=40, batch_size=12, lr=0.02, prompt_length=3, augmentation="none")
    task = tiny.task(0)
    vit = tiny.vit(1)
    _, log = loop.train_task(
        trains(method), vit, task, tiny.images(task), None, settings.Settings(seed=0)
    )
    first, last = log.epochs[0]["energy"], log.epochs[-1]["energy"]
    assert first > -4
    assert abs(last - method.anchor) < 1.0


# --- tasks side by side -----------------------------------------------------------------------


def test_the_first_task_trains_the_prompt_and_the_others_share_it(
    trained: tuple[list[State], list[State]],
) -> None:
    experts, joins = trained
    assert all(torch.equal(s["prompt"], experts[0]["prompt"]) for s in [*experts, *joins])
    first, later = (METHOD.expert(tiny.vit(DEPTH), task) for task in unequal()[:2])
    assert (first.prompt.requires_grad, later.prompt.requires_grad) == (True, False)
    torch.manual_seed(derive(0, "task", 0))
    start = METHOD.expert(tiny.vit(DEPTH), unequal()[0]).prompt
    assert not torch.equal(start, experts[0]["prompt"])


def test_i_logits_of_earlier_stages_stay_bitwise(
    trained: tuple[list[State], list[State]], pixels: Tensor
) -> None:
    _, joins = trained
    with torch.no_grad():
        early, late = (opened(joins, n).stage_logits(pixels) for n in (0, 2))
        assert torch.equal(early[:, 0], late[:, 0, :3])
        assert torch.equal(opened(joins, 1).stage_logits(pixels)[:, 1, 3], late[:, 1, 3])


def test_a_stage_of_the_joined_network_is_its_expert(
    trained: tuple[list[State], list[State]], pixels: Tensor
) -> None:
    experts, joins = trained
    joined = opened(joins, 2).stage_logits(pixels)
    for task, state in zip(unequal(), experts, strict=True):
        expert = tiny.opened(trains(METHOD), task, state, DEPTH)
        assert isinstance(expert, ESNExpert)
        torch.testing.assert_close(joined[:, task.index, task.current], expert.own_logits(pixels))


def test_iv_unequal_tasks_name_the_right_classes(
    trained: tuple[list[State], list[State]], pixels: Tensor
) -> None:
    learner = opened(trained[1], 2)
    columns = [(0, 1, 2), (3,), (4, 5)]
    with torch.no_grad():
        stages, found = learner.stage_logits(pixels), learner.logits(pixels, None)
        energies = [
            [t * torch.logsumexp(stages[:, s, list(c)] / t, dim=1) for s, c in enumerate(columns)]
            for t in learner.temperatures.tolist()
        ]
    for row, image in enumerate(found):
        votes = [max(range(3), key=lambda s, e=e: float(e[s][row])) for e in energies]
        winner = max(range(3), key=lambda s: (votes.count(s), -s))
        own = {c: float(stages[row, winner, c]) for c in columns[winner]}
        assert int(image.argmax()) == max(own, key=lambda c: own[c])
        assert all(float(image[c]) == score for c, score in own.items())


def test_ii_a_constant_on_one_stage_changes_who_wins(
    trained: tuple[list[State], list[State]], pixels: Tensor
) -> None:
    learner = opened(trained[1], 2)
    with torch.no_grad():
        before = vote(learner.stage_logits(pixels), learner.pool())
        learner.heads.bias[3] += 50
        after = vote(learner.stage_logits(pixels), learner.pool())
        assert torch.equal(learner.logits(pixels, None).argmax(dim=1), torch.full((12,), 3))
    assert set(before.tolist()) != {1}
    assert set(after.tolist()) == {1}


def test_each_task_chooses_the_temperature_that_claims_most_of_its_images(
    trained: tuple[list[State], list[State]],
) -> None:
    _, joins = trained
    assert joins[0]["temperatures"].tolist() == pytest.approx([0.001])
    for number in (1, 2):
        learner, images = opened(joins, number), tiny.images(unequal()[number])
        with torch.no_grad():
            scores = learner.stage_logits(images.pixels)
        share = [
            float((torch.logsumexp(scores / t, dim=2).argmax(dim=1) == number).float().mean())
            for t in CANDIDATES["fast"]
        ]
        best = CANDIDATES["fast"][share.index(max(share))]
        assert float(joins[number]["temperatures"][-1]) == pytest.approx(best)
    assert torch.equal(joins[2]["temperatures"][:2], joins[1]["temperatures"])


def test_temperatures_count_as_often_as_they_were_chosen_or_once() -> None:
    task = tiny.task(2, count=3)
    for dedup, expected in ((False, [0.5, 0.5, 1.0]), (True, [0.5, 1.0])):
        learner = ESN(prompt_length=3, dedup=dedup).learner(tiny.vit(DEPTH), task)
        learner.temperatures.copy_(torch.tensor([0.5, 0.5, 1.0]))
        assert learner.pool().tolist() == expected


def test_candidates_are_those_of_paper_and_code() -> None:
    assert len(CANDIDATES["slow"]) == 999
    assert CANDIDATES["slow"][::499] == (0.001, 0.5, 0.999)
    assert CANDIDATES["fast"][:4] == (0.001, 0.01, 0.1, 0.2)
    assert len(CANDIDATES["fast"]) == 12


def test_recurring_classes_are_those_of_the_winning_stage() -> None:
    tasks = [
        Task(index=i, count=2, current=(0, 1, 2), before=3 if i else 0, seen=3) for i in (0, 1)
    ]
    _, joins = tiny.train_side_by_side(METHOD, tasks, DEPTH)
    learner = tiny.opened(METHOD, tasks[1], joins[1], DEPTH)
    assert isinstance(learner, ESNLearner)
    images = tiny.images(tasks[1]).pixels
    with torch.no_grad():
        scores = learner.stage_logits(images)
        assert scores.shape == (12, 2, 3)
        chosen = vote(scores, learner.pool())
        assert torch.equal(learner.logits(images, None), scores[torch.arange(12), chosen])


def test_fields_out_of_range_are_refused_together() -> None:
    with pytest.raises(HyperparameterError) as caught:
        ESN(epochs=0, batch_size=0, lr=0, weight_decay=-1, prompt_length=0, anchor_weight=-1)
    assert len(caught.value.problems) == 6
