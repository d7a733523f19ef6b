"""SLCA, and the Gaussians that its alignment samples from."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.methods.contracts.trained import Task
from graftwork.methods.mixtures.cofima import CoFiMA
from graftwork.methods.mixtures.coma import CoMA
from graftwork.methods.parts import alignment, gaussians
from graftwork.methods.parts.alignment import drift, normalised, reset_final_norm
from graftwork.methods.representations.slca import SLCA, SLCALearner
from graftwork.operators.training import loop, settings
from tests import tiny

SMALL = SLCA(epochs=2, batch_size=6, milestone=1, alignment_epochs=2, samples_per_class=32)


def rows(number: int = 40, width: int = 6, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(number) % classes
    scale = torch.rand(classes, width, generator=generator) + 0.5
    noise = torch.randn(number, width, generator=generator)
    return targets[:, None] + noise * scale[targets], targets


def train(method: SLCA, tasks: list[Task], **images: Any) -> list[State]:
    states: list[State] = []
    for task in tasks:
        state, _ = loop.train_task(
            method,
            tiny.vit(depth=2),
            task,
            tiny.images(task, **images),
            states[-1] if states else None,
            settings.Settings(seed=0),
        )
        states.append(state)
    return states


def test_a_without_alignment_the_heads_in_use_are_those_that_were_trained() -> None:
    off = dataclasses.replace(SMALL, alignment_epochs=0)
    for state in tiny.train(off, 2, depth=2):
        assert torch.equal(state["aligned_weight"], state["head.weight"])
        assert torch.equal(state["aligned_bias"], state["head.bias"])


def test_a_the_first_task_is_not_aligned() -> None:
    (state,) = tiny.train(SMALL, 1, depth=2)
    assert torch.equal(state["aligned_weight"], state["head.weight"])


def test_b_moments_of_the_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 4, generator=generator)
    root = torch.randn(2, 4, 4, generator=generator)
    covariance = root @ root.mT
    torch.manual_seed(0)
    drawn = gaussians.sample(mean, gaussians.factor(covariance), 100_000)
    assert drawn.shape == (2, 100_000, 4)
    for one, wanted, spread in zip(drawn, mean, covariance, strict=True):
        assert (one.mean(dim=0) - wanted).abs().max() < 0.02
        assert (torch.cov(one.T) - spread).abs().max() < 0.02 * spread.abs().max()


def test_c_training_goes_on_from_the_heads_before_the_alignment() -> None:
    off = dataclasses.replace(SMALL, alignment_epochs=0)
    aligned, plain = tiny.train(SMALL, 3, depth=2)[-1], tiny.train(off, 3, depth=2)[-1]
    differing = {name for name in aligned if not torch.equal(aligned[name], plain[name])}
    assert differing == {"aligned_weight", "aligned_bias"}


def test_d_the_backbone_learns_a_hundred_times_slower() -> None:
    learner = tiny.opened(SLCA(), tiny.task(0), None, depth=2)
    backbone, head = SLCA().recipe(tiny.task(0)).optimizer(learner.groups()).param_groups
    assert head["lr"] / backbone["lr"] == 100
    assert sum(p.numel() for p in head["params"]) == 3 * tiny.WIDTH + 3
    assert head["weight_decay"] == backbone["weight_decay"] == 5e-4


def test_e_older_means_shrink_by_the_task_of_their_class_not_by_its_number() -> None:
    # Tasks of 2, 1 and 3 classes.
    task_of = torch.tensor([0, 0, 1, 2, 2, 2])
    wanted = [0.9 + 0.1 / 3, 0.9 + 0.1 / 3, 0.9 + 0.2 / 3, 1.0, 1.0, 1.0]
    assert drift(task_of, 2).tolist() == pytest.approx(wanted)


def test_f_normalised_logits_do_not_depend_on_their_scale() -> None:
    scores, task_of = torch.tensor([[3.0, 4.0, 5.0, 12.0]]), torch.tensor([0, 0, 1, 1])
    assert torch.allclose(normalised(scores, task_of), scores / 9)
    assert torch.allclose(normalised(7 * scores, task_of), normalised(scores, task_of))


def test_heads_of_earlier_tasks_stay_as_they_are_even_under_decay() -> None:
    method = dataclasses.replace(SMALL, weight_decay=0.5)
    first, second = tiny.train(method, 2, depth=2)
    assert torch.equal(second["head.weight"][:3], first["head.weight"])
    assert torch.equal(second["head.bias"][:3], first["head.bias"])
    # The alignment moves all heads.
    assert (second["aligned_weight"] != second["head.weight"]).any(dim=1).all()


def test_statistics_are_those_of_the_trained_backbone_and_never_refreshed() -> None:
    first, second = tiny.train(SMALL, 2, depth=2)
    for number, state in enumerate((first, second)):
        task = tiny.task(number)
        data = tiny.images(task)
        learner = tiny.opened(SMALL, task, state, depth=2)
        with torch.no_grad():
            features = learner.features(data.pixels)
        for column in task.current:
            own = features[data.targets == column].double()
            assert torch.allclose(state["mean"][column], own.mean(dim=0).float(), atol=1e-6)
            assert torch.allclose(state["covariance"][column], torch.cov(own.T).float(), atol=1e-6)
    for name in ("mean", "covariance", "count", "task_of"):
        assert torch.equal(second[name][:3], first[name])
    assert second["task_of"].tolist() == [0, 0, 0, 1, 1, 1]
    assert second["count"].tolist() == [4] * 6


def test_tasks_of_unequal_size_and_a_class_with_one_image() -> None:
    tasks = [
        Task(index=0, count=2, current=(0, 1, 2), before=0, seen=3),
        Task(index=1, count=2, current=(3,), before=3, seen=4),
    ]
    *_, state = train(SMALL, tasks, per_class=1)
    assert state["task_of"].tolist() == [0, 0, 0, 1]
    assert bool(state["aligned_weight"].isfinite().all())


def test_alignment_separates_what_the_local_losses_leave_unordered() -> None:
    # Heads of two tasks that were never compared: the new one is far louder than the old one.
    method = dataclasses.replace(SMALL, alignment_epochs=10, lr=0.1)
    learner, width = tiny.opened(method, tiny.task(1), None, depth=2), tiny.WIDTH
    assert isinstance(learner, SLCALearner)
    learner.mean = 3 * torch.eye(6, width)
    learner.covariance = 0.01 * torch.eye(width).expand(6, width, width).clone()
    learner.count = torch.full((6,), 4)
    learner.task_of = torch.tensor([0, 0, 0, 1, 1, 1])
    weight = torch.eye(6, width)
    bias = torch.tensor([0.0, 0.0, 0.0, 4.0, 4.0, 4.0])
    assert F.linear(learner.mean, weight, bias).argmax(dim=1).tolist() != list(range(6))
    torch.manual_seed(0)
    weight, bias = alignment.align(learner, weight, bias, method)
    assert F.linear(learner.mean, weight, bias).argmax(dim=1).tolist() == list(range(6))


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_a_class_without_images_is_never_sampled(temperature: float) -> None:
    method = dataclasses.replace(SMALL, temperature=temperature, weight_decay=0.0, lr=0.1)
    width, generator = tiny.WIDTH, torch.Generator().manual_seed(0)
    mean = torch.randn(3, width, generator=generator)
    covariance = 0.1 * torch.eye(width).repeat(3, 1, 1)
    weight = torch.randn(3, width, generator=generator)
    # Of column 1 nothing is known, and it can win nothing.
    mean[1], covariance[1], weight[1] = torch.nan, torch.nan, 0.0
    bias = torch.tensor([0.0, 0.0 if temperature else -1e9, 0.0])

    def aligned(columns: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        current = tuple(range(len(columns)))
        task = Task(index=1, current=current, before=len(columns), seen=len(columns))
        learner = tiny.opened(method, task, None, depth=2)
        assert isinstance(learner, SLCALearner)
        learner.mean, learner.covariance = mean[columns], covariance[columns]
        learner.count = torch.tensor([4, 0, 4])[columns]
        learner.task_of = torch.tensor([0, 0, 1])[columns]
        torch.manual_seed(0)
        return alignment.align(learner, weight[columns], bias[columns], method)

    found, alone = aligned([0, 1, 2]), aligned([0, 2])
    for part in found:
        assert bool(part.isfinite().all())
    if not temperature:
        torch.testing.assert_close(found[0][[0, 2]], alone[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[1][[0, 2]], alone[1], rtol=0, atol=1e-5)
        assert torch.equal(found[0][1], weight[1]) and found[1][1] == bias[1]
    assert not torch.allclose(found[0][0], weight[0], atol=1e-3)


@pytest.mark.parametrize("method", [SLCA, CoMA, CoFiMA])
def test_what_returns_is_counted_and_what_never_came_is_not(method: type[SLCA]) -> None:
    values = {name: getattr(SMALL, name) for name in ("epochs", "batch_size", "alignment_epochs")}
    # Three columns from the start: class 1 has images in the last task alone.
    tasks = [
        Task(index=0, current=(0, 2), before=0, seen=3),
        Task(index=1, current=(0,), before=3, seen=3),
        Task(index=2, current=(0, 1), before=3, seen=3),
    ]
    first, second, third = train(method(**values, samples_per_class=32), tasks)
    assert first["count"].tolist() == [4, 0, 4]
    assert second["count"].tolist() == [8, 0, 4]
    assert third["count"].tolist() == [12, 4, 4]
    assert not second["mean"][1].any() and not second["covariance"][1].any()
    assert third["task_of"].tolist() == [2, 2, 0]
    # Of class 2, which does not return, everything stays.
    for name in ("mean", "covariance"):
        assert torch.equal(third[name][2], first[name][2]), name
    assert bool(third["aligned_weight"].isfinite().all())


def test_a_domain_incremental_stream_pools_the_gaussians_of_a_class() -> None:
    tasks = [
        Task(index=i, count=2, current=(0, 1, 2), before=3 * min(i, 1), seen=3) for i in range(2)
    ]
    first, second = train(SMALL, tasks)
    assert second["count"].tolist() == [8, 8, 8]
    assert second["task_of"].tolist() == [1, 1, 1]
    assert not torch.equal(first["head.weight"], second["head.weight"])


def test_measured_is_torchs_mean_and_covariance() -> None:
    features, targets = rows()
    found = gaussians.measure(features, targets, 4)
    assert found.count.tolist() == [14, 13, 13, 0]
    for column in range(3):
        own = features[targets == column].double()
        assert torch.allclose(found.mean[column], own.mean(dim=0).float(), atol=1e-6)
        assert torch.allclose(found.covariance[column], torch.cov(own.T).float(), atol=1e-6)
    assert not found.covariance[3].any()


def test_a_single_row_gets_the_pooled_covariance() -> None:
    features, targets = rows()
    targets[targets == 2] = torch.arange(13).clamp(max=2)  # column 2 keeps what is left
    targets = torch.cat([targets, torch.tensor([3])])
    features = torch.cat([features, torch.ones(1, 6)])
    found = gaussians.measure(features, targets, 4)
    weights = (found.count[:3] - 1).double()
    pooled = (weights[:, None, None] * found.covariance[:3]).sum(dim=0) / weights.sum()
    assert torch.allclose(found.covariance[3], pooled.float(), atol=1e-6)
    alone = gaussians.measure(torch.ones(2, 6), torch.tensor([0, 1]), 2)
    assert not alone.covariance.any()


def test_pooled_is_measured_together() -> None:
    features, targets = rows(90)
    both = gaussians.measure(features, targets, 3)
    parts = [
        gaussians.measure(features[part], targets[part], 3)
        for part in (slice(0, 31), slice(31, 90))
    ]
    found = gaussians.pool(*parts)
    assert torch.equal(found.count, both.count)
    assert torch.allclose(found.mean, both.mean, atol=1e-6)
    assert torch.allclose(found.covariance, both.covariance, atol=1e-5)
    empty = gaussians.measure(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64), 3)
    assert torch.equal(gaussians.pool(empty, both).covariance, both.covariance)
    assert torch.equal(gaussians.pool(both, empty).covariance, both.covariance)


def test_a_covariance_that_was_lent_is_not_counted_when_the_class_returns() -> None:
    features, targets = rows(90)
    # One row of class 2 comes with all of the others, the rest of it in a later task.
    late = (targets == 2) & (torch.arange(90) > 2)
    first = gaussians.measure(features[~late], targets[~late], 3)
    assert first.count[2] == 1 and first.covariance[2].any()
    found = gaussians.pool(first, gaussians.measure(features[late], targets[late], 3))
    both = gaussians.measure(features, targets, 3)
    assert torch.equal(found.count, both.count)
    assert torch.allclose(found.mean, both.mean, atol=1e-6)
    assert torch.allclose(found.covariance, both.covariance, atol=1e-5)
    # Two single rows make a covariance of rank 1.
    a, b = (gaussians.measure(features[[i]], torch.zeros(1, dtype=torch.int64), 1) for i in (0, 1))
    pooled = gaussians.pool(a, b)
    assert torch.allclose(pooled.covariance[0], torch.cov(features[:2].T), atol=1e-6)


def test_factors_of_covariances_without_full_rank() -> None:
    root = torch.randn(1, 8, 2, generator=torch.Generator().manual_seed(0))
    covariance = root @ root.mT
    lower = gaussians.factor(covariance)
    assert torch.allclose(lower @ lower.mT, covariance + 1e-4 * torch.eye(8), atol=1e-6)
    # Rounding may leave a covariance slightly negative: the jitter is raised.
    slightly = torch.diag(torch.tensor([1.0, -5e-4]))[None]
    lower = gaussians.factor(slightly)
    assert (lower @ lower.mT)[0, 1, 1] == pytest.approx(5e-4, rel=1e-3)
    with pytest.raises(ValueError, match=r"not positive with 0\.01 on its diagonal"):
        gaussians.factor(torch.diag(torch.tensor([1.0, -1.0]))[None])


@pytest.mark.parametrize("network", [{}, {"class_token": False, "global_pool": "avg"}])
def test_the_final_norm_is_as_new(network: dict[str, Any]) -> None:
    vit = tiny.vit(depth=1, **network)
    for name, parameter in vit.named_parameters():
        if "norm" in name:
            parameter.fill_(2.0)
    reset_final_norm(vit)
    final = vit.norm if vit.cls_token is not None else vit.fc_norm
    assert isinstance(final, torch.nn.LayerNorm)
    assert (final.weight == 1).all() and (final.bias == 0).all() and final.eps == 1e-5
    assert bool((vit.get_parameter("blocks.0.norm1.weight") == 2).all())


def test_the_final_norm_of_the_backbone_may_stay() -> None:
    keep = dataclasses.replace(SMALL, reset_final_norm=False)
    learner = tiny.opened(keep, tiny.task(0), None, depth=2)
    assert isinstance(learner.network.norm, torch.nn.LayerNorm)
    assert learner.network.norm.eps == 1e-6


def test_wrong_values_are_refused_together() -> None:
    with pytest.raises(HyperparameterError) as error:
        SLCA(backbone_lr_scale=0, samples_per_class=0, temperature=-1)
    assert [name for name, _ in error.value.problems] == [
        "backbone_lr_scale",
        "samples_per_class",
        "temperature",
    ]
