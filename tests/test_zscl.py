"""ZSCL: the laws of its loss, of its averaged weights and of its reference data."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.trained import learned
from graftwork.methods.mixtures.zscl import ZSCL, ZSCLLearner, distillation
from graftwork.methods.networks.clip import class_texts, unit
from graftwork.operators.training import loop, settings
from tests import tiny

SMALL = ZSCL(epochs=2, batch_size=6, lr=1e-3, warmup=2, average_every=2, constraint=0.1)
SETTINGS = settings.Settings(seed=0)


def run(method: ZSCL, index: int = 0, state: State | None = None) -> tuple[ZSCLLearner, Any]:
    """A learner about to take its first step, and the loop that takes it."""
    task = tiny.task(index)
    learner, backbone = loop.open_learner(method, tiny.clip(), task, state, SETTINGS)
    learner.reference = tiny.Reference()
    learner.begin()
    assert isinstance(learner, ZSCLLearner)
    recipe = method.recipe(task)
    return learner, loop._Run(
        learner, backbone, recipe, tiny.images(task), SETTINGS, settings.World()
    )


def weights(learner: ZSCLLearner) -> list[Tensor]:
    return [p.detach().clone() for p in learner.network.parameters() if p.requires_grad]


def iterates(method: ZSCL) -> tuple[ZSCLLearner, list[list[Tensor]]]:
    """The learner after a task, and its weights before the first step and after each."""
    learner, steps = run(method)
    found = [weights(learner)]
    for _ in steps.steps():
        found.append(weights(learner))
    learner.finish(None)
    return learner, found


def test_i_without_a_step_the_average_is_the_start_to_the_bit() -> None:
    learner, found = iterates(dataclasses.replace(SMALL, lr=0.0))
    for mean, start in zip(weights(learner), found[0], strict=True):
        assert torch.equal(mean, start)


def test_ii_the_average_is_the_mean_of_the_sampled_iterates() -> None:
    learner, found = iterates(SMALL)
    assert len(found) == 5
    # Steps 0 and 2 of 0..3: the weights after them, and those before the task.
    sampled = [found[0], found[1], found[3]]
    for mean, *parts in zip(weights(learner), *sampled, strict=True):
        assert torch.allclose(mean, torch.stack(parts).mean(dim=0), rtol=0, atol=1e-6)
    assert not torch.equal(weights(learner)[0], found[-1][0])


def test_iii_the_zero_shot_model_is_where_distillation_has_no_gradient() -> None:
    learner, _ = run(SMALL)
    learner.eval()
    term = learner._distilled()
    term.backward()
    largest = max(
        float(p.grad.abs().max()) for p in learner.network.parameters() if p.grad is not None
    )
    assert largest <= 1e-5
    images = learner._reference_images()
    texts = unit(learner.network.text(learner.network.tokenise(tiny.Reference.texts)))
    scores = (
        learner.network.logit_scale.exp() * unit(learner.network.image(images)) @ texts.T / 2
    ).detach()
    entropy = sum(
        -(4 * s.softmax(dim=1) * s.log_softmax(dim=1)).sum(dim=1).mean() for s in (scores, scores.T)
    )
    assert term.item() == pytest.approx(float(entropy), rel=1e-4)
    assert term.item() > 1


def test_reference_images_come_in_shuffled_passes_as_from_a_loader() -> None:
    learner, _ = run(SMALL)
    shown: list[list[int]] = []
    known = {image.numpy().tobytes(): row for row, image in enumerate(tiny.Reference().pixels)}
    assert learner.steps is not None
    for _ in range(7):
        images = learner._reference_images()
        shown.append([known[image.numpy().tobytes()] for image in images])
        # An interrupted task goes on with the same batch.
        assert torch.equal(images, learner._reference_images())
        learner.steps += 1
    assert [len(rows) for rows in shown] == [6, 6, 4, 6, 6, 4, 6]
    passes = [[row for rows in shown[start : start + 3] for row in rows] for start in (0, 3)]
    assert [sorted(rows) for rows in passes] == [list(range(16))] * 2
    assert passes[0] != passes[1] and passes[0] != sorted(passes[0])
    other, _ = run(SMALL, 1)
    first = [known[image.numpy().tobytes()] for image in other._reference_images()]
    assert first != shown[0]


def test_iv_the_scale_of_the_logits_stays() -> None:
    start = tiny.clip().logit_scale.clone()
    learner, _ = iterates(SMALL)
    assert torch.equal(learner.network.logit_scale, start)
    assert not learner.network.logit_scale.requires_grad


def test_v_what_the_reference_gives_is_constant() -> None:
    learner, steps = run(SMALL)
    zero_shot, images = learner._zero_shot[0], tiny.Reference().pixels
    before, texts = zero_shot.image(images), learner._reference_texts
    assert texts is not None
    kept = texts.clone()
    for _ in steps.steps():
        assert not torch.equal(learner.network.image(images), before)
    assert torch.equal(zero_shot.image(images), before)
    assert torch.equal(texts, kept)
    assert torch.equal(before, tiny.clip().image(images))


def test_v_of_a_later_task_the_reference_still_is_the_untouched_model() -> None:
    learner, steps = run(SMALL)
    for _ in steps.steps():
        pass
    learner.finish(None)
    state = {
        f"vit.{n}": p.detach() for n, p in learner.network.named_parameters() if p.requires_grad
    }
    later, _ = run(SMALL, 1, state)
    images = tiny.Reference().pixels
    assert torch.equal(later.network.image(images), learner.network.image(images))
    assert torch.equal(later._zero_shot[0].image(images), tiny.clip().image(images))
    assert all(torch.equal(a, p) for a, p in zip(later._anchor, later._trained(), strict=True))


def test_vi_a_rare_average_holds_the_start_and_the_first_iterate() -> None:
    learner, found = iterates(dataclasses.replace(SMALL, average_every=100))
    for mean, start, first in zip(weights(learner), found[0], found[1], strict=True):
        assert torch.allclose(mean, (start + first) / 2, rtol=0, atol=1e-7)


def test_without_average_the_last_weights_stay_and_nothing_else_is_stored() -> None:
    learner, found = iterates(dataclasses.replace(SMALL, average_every=0))
    assert all(torch.equal(a, b) for a, b in zip(weights(learner), found[-1], strict=True))
    assert {name.split(".")[0] for name in learned(learner, [])} == {"vit"}


def test_the_loss_is_the_sum_of_its_terms() -> None:
    learner, steps = run(SMALL)
    next(steps.steps())
    images, task = tiny.images(learner.task), learner.task
    learner.eval()
    terms = learner(images.pixels, images.targets, None)
    clip = learner.network
    texts = class_texts(clip, task.names, ["a photo of a {}."])
    scores = clip.logit_scale.exp() * unit(clip.image(images.pixels)) @ texts.T
    expected = torch.nn.functional.cross_entropy(scores, images.targets, label_smoothing=0.2)
    assert terms["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms["constraint"].item() > 0
    total = expected + 5 * terms["distillation"] + 0.1 * terms["constraint"]
    assert terms["loss"].item() == pytest.approx(total.item(), rel=1e-5)


def test_the_constraint_is_the_squared_distance_from_the_start() -> None:
    learner, steps = run(SMALL)
    before = weights(learner)
    next(steps.steps())
    pairs = zip(weights(learner), before, strict=True)
    distance = sum(float((a - b).double().square().sum()) for a, b in pairs)
    terms = learner(*_batch(learner), None)
    assert terms["constraint"].item() == pytest.approx(distance, rel=1e-4)


def _batch(learner: ZSCLLearner) -> tuple[Tensor, Tensor]:
    images = tiny.images(learner.task)
    return images.pixels, images.targets


def test_only_the_current_classes_are_told_apart() -> None:
    learner, _ = run(SMALL, 1)
    images, targets = _batch(learner)
    assert targets.unique().tolist() == [3, 4, 5]
    texts = class_texts(learner.network, tiny.NAMES[3:6], ["a photo of a {}."])
    scores = learner.network.logit_scale.exp() * unit(learner.network.image(images)) @ texts.T
    expected = torch.nn.functional.cross_entropy(scores, targets - 3, label_smoothing=0.2)
    found = learner(images, targets, None)["cross_entropy"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert learner.logits(images, None).shape == (12, 6)


def test_scores_use_the_mean_of_all_templates() -> None:
    task = dataclasses.replace(tiny.task(0), templates=("a photo of a {}.", "the {}"))
    learner = SMALL.learner(tiny.clip(), task)
    images = tiny.images(task).pixels
    texts = class_texts(tiny.clip(), task.names, task.templates)
    with torch.no_grad():
        scores = learner.logits(images, None)
        expected = learner.network.logit_scale.exp() * unit(learner.network.image(images)) @ texts.T
    assert torch.allclose(scores, expected, atol=1e-4)


def test_distillation_of_equal_scores_is_their_entropy() -> None:
    scores = torch.tensor([[0.0, 0.0], [0.0, 2 * math.log(3)]])
    entropy = (math.log(2) + (0.25 * math.log(4) + 0.75 * math.log(4 / 3))) / 2
    assert distillation(scores, scores, 2.0).item() == pytest.approx(4 * entropy)


def test_the_rate_follows_the_steps_of_the_task() -> None:
    factor = SMALL.recipe(tiny.task(0)).step_schedule
    assert factor is not None
    found = [factor(step, 6) for step in range(6)]
    expected = [0.5, 1.0, 1.0, *(0.5 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3))]
    assert found == pytest.approx(expected)
    learner, steps = run(SMALL)
    rates = [steps._optimizer.param_groups[0]["lr"] for _ in steps.steps()]
    assert rates == pytest.approx([1e-3 * factor(step, 4) for step in range(4)])
    # 16 reference images are a pass of 6, 6 and 4; the fourth step begins the next one.
    assert steps.log.images_forwarded == 4 * 6 + 2 * (6 + 6 + 4 + 6)
    assert learner.images_beside == 12


def test_distillation_without_reference_is_refused() -> None:
    learner = SMALL.learner(tiny.clip(), tiny.task(0))
    with pytest.raises(ValueError, match="reference: must be images and texts"):
        learner.begin()
    plain = dataclasses.replace(SMALL, distillation=0.0, constraint=0.0, average_every=0)
    assert SMALL.needs_reference and not plain.needs_reference
    learner = plain.learner(copy.deepcopy(tiny.clip()), tiny.task(0))
    learner.begin()
    terms = learner(*_batch(learner), None)
    assert terms["loss"].item() == terms["cross_entropy"].item()
