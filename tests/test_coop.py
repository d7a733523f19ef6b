"""CoOp: contexts of known words are those words; what is frozen stays; the rate of the paper."""

import dataclasses
import math

import pytest
import torch

from graftwork.methods.networks.clip import cosines, phrases
from graftwork.methods.prompts.coop import CoOp, CoOpLearner
from graftwork.operators.training import loop, settings
from tests import tiny

SMALL = CoOp(epochs=2, batch_size=6, lr=0.1, warmup_epochs=0, context_length=4)
SETTINGS = settings.Settings(seed=0)


def opened(method: CoOp, index: int = 0) -> CoOpLearner:
    task = tiny.task(index)
    learner, _ = loop.open_learner(method, tiny.clip(), task, None, SETTINGS)
    assert isinstance(learner, CoOpLearner)
    return learner.eval()


@pytest.mark.parametrize("specific", [False, True])
def test_a_context_of_known_words_gives_the_text_with_these_words(specific: bool) -> None:
    learner = opened(dataclasses.replace(SMALL, class_specific=specific))
    clip = learner.network
    words = clip.embed(clip.tokenise(["a photo of a"]))[:, 1:5]
    with torch.no_grad():
        learner.context.copy_(words.expand_as(learner.context))
        expected = clip.text(clip.tokenise(phrases(tiny.NAMES[:3], "a photo of a {}.")))
        assert torch.allclose(learner.texts(), expected, atol=1e-6)


def test_scores_are_scaled_cosines_with_the_query() -> None:
    learner, images = opened(SMALL), tiny.images(tiny.task(0)).pixels
    query = learner.network.image(images)
    found = learner.logits(images, query)
    assert torch.allclose(
        found, learner.network.logit_scale.exp() * cosines(query, learner.texts())
    )
    assert torch.equal(learner.features(images), query)
    assert math.exp(float(learner.network.logit_scale)) == pytest.approx(1 / 0.07)


def test_contexts_of_earlier_classes_stay_to_the_bit_and_others_move() -> None:
    method = dataclasses.replace(SMALL, class_specific=True, loss="seen")
    states = []
    for index in range(2):
        task = tiny.task(index)
        before = states[-1] if states else None
        state, _ = loop.train_task(
            method,
            tiny.clip(),
            task,
            tiny.images(task),
            before,
            SETTINGS,
        )
        states.append(state)
    first, second = (state["context"] for state in states)
    assert (len(first), len(second)) == (3, 6)
    assert torch.equal(second[:3], first)
    task = tiny.task(1)
    start, _ = loop.open_learner(method, tiny.clip(), task, states[0], SETTINGS)
    assert isinstance(start, CoOpLearner)
    assert not torch.equal(second[3:], start.context.detach()[3:])


def test_a_shared_context_is_trained_on() -> None:
    states = []
    for index in range(2):
        task = tiny.task(index)
        before = states[-1] if states else None
        state, _ = loop.train_task(
            SMALL,
            tiny.clip(),
            task,
            tiny.images(task),
            before,
            SETTINGS,
        )
        states.append(state)
    assert states[0].keys() == states[1].keys() == {"context"}
    assert states[0]["context"].shape == states[1]["context"].shape == (1, 4, 16)
    assert not torch.equal(states[0]["context"], states[1]["context"])


def test_the_rate_is_low_for_one_epoch_and_then_a_cosine_over_all() -> None:
    schedule = CoOp().recipe(tiny.task(0)).schedule
    found = [2e-3 * schedule(epoch, 50) for epoch in (0, 1, 26, 49)]
    cosine = [0.5 * (1 + math.cos(math.pi * e / 50)) for e in (0, 25, 48)]
    assert found == pytest.approx([1e-5, *(2e-3 * c for c in cosine)])
