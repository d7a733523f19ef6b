"""PROOF: projections that add up, an attention that sees one image, prototypes that stay."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.methods.mixtures.proof import PROOF, ProofLearner
from graftwork.methods.mixtures.proof_fusion import Fusion, contrast
from graftwork.operators import catalogue
from graftwork.operators.training import forward, loop, settings
from tests import tiny

METHOD = PROOF(epochs=2, batch_size=6, exemplars=6)
WIDTH, TASKS, CLASSES, TEMPLATES = 16, 3, 6, 2


def fusion(**changes: object) -> Fusion:
    torch.manual_seed(0)
    made = Fusion(WIDTH, TASKS, CLASSES, dataclasses.replace(METHOD, **changes))  # type: ignore[arg-type]
    made.remember(torch.randn(12, WIDTH), torch.arange(12) % CLASSES)
    return made.eval()


def given() -> tuple[Tensor, Tensor]:
    """Frozen features of images and texts."""
    generator = torch.Generator().manual_seed(1)
    return (
        3 * torch.randn(5, WIDTH, generator=generator),
        3 * torch.randn(CLASSES, TEMPLATES, WIDTH, generator=generator),
    )


def task(index: int) -> "tiny.Task":
    return dataclasses.replace(
        tiny.task(index), names=tiny.NAMES[: 3 * index + 3], templates=("a photo of a {}.", "{}")
    )


@functools.cache
def states() -> list[State]:
    """After each of two tasks; the second one with exemplars of the first."""
    found: list[State] = []
    for index in range(2):
        found.append(trained(index, found[-1] if found else None))
    return found


def trained(index: int, before: State | None, method: PROOF = METHOD) -> State:
    images = tiny.images(task(index))
    if index:
        old = tiny.images(task(0), per_class=2, seed=1)
        images = tiny.TensorImages(
            torch.cat([images.pixels, old.pixels]),
            torch.cat([images.targets, old.targets]),
            exemplars=torch.arange(18) >= 12,
        )
    state, _ = loop.train_task(
        method, tiny.clip(), task(index), images, before, settings.Settings(seed=0)
    )
    return state


def test_the_sum_of_projections_is_one_projection() -> None:
    made, (images, _) = fusion(), given()
    assert len(made.images) == TASKS
    apart = torch.stack([layer(images) for layer in made.images]).sum(0)
    torch.testing.assert_close(made.image(images), apart)
    weight, bias = made.images.collapsed()
    torch.testing.assert_close(images @ weight.T + bias, apart)


@pytest.mark.parametrize("freeze", [False, True])
def test_old_projections_and_context_stay_to_the_bit(freeze: bool) -> None:
    method = dataclasses.replace(METHOD, freeze_text_projections=freeze)
    first = states()[0] if not freeze else trained(0, None, method)
    second = states()[1] if not freeze else trained(1, first, method)
    kept = ["images.0.weight", "images.0.bias", "context.0"]
    moved = ["attention.query.weight", "texts.0.weight"]
    (kept if freeze else moved).extend(["texts.0.bias"])
    if freeze:
        kept.append(moved.pop())
    for name in kept:
        assert torch.equal(first[f"fusion.{name}"], second[f"fusion.{name}"])
    for name in moved:
        assert not torch.equal(first[f"fusion.{name}"], second[f"fusion.{name}"])
    assert torch.equal(second["fusion.prototypes"][:3], first["fusion.prototypes"])
    assert "fusion.images.1.weight" in second
    assert "fusion.images.1.weight" not in first


def test_an_image_is_scored_alone_unless_asked_otherwise() -> None:
    images, texts = given()
    order = torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        whole = fusion().scores(images, texts)
        torch.testing.assert_close(fusion().scores(images[order], texts), whole[order])
        torch.testing.assert_close(fusion().scores(images[:1], texts), whole[:1])
        by_batch = fusion(eval_selection="batch_mean")
        assert (
            by_batch.scores(images, texts)[:1] - by_batch.scores(images[:1], texts)
        ).abs().max() > 1
        torch.testing.assert_close(by_batch.scores(images[:1], texts), whole[:1])
    facts, _ = catalogue.method("proof", {"eval_selection": "batch_mean"})
    assert facts["card"]["batch_information_at_test"]
    facts, _ = catalogue.method("proof", {"exemplars": 7})
    assert not facts["card"]["batch_information_at_test"]
    assert facts["card"]["exemplars"] == 7


def test_each_switch_changes_what_it_is_named_after_alone() -> None:
    images, texts = given()
    targets, scale = torch.arange(5), torch.tensor(1.0)

    def found(**changes: object) -> tuple[Tensor, Tensor]:
        made = fusion(**changes)
        losses = made.losses(images, texts, targets, scale, task(1))
        return losses["loss"].detach(), made.scores(images, texts).detach()

    loss, scores = found()
    tested, trained_ = found(eval_selection="batch_mean"), found(train_selection="batch_mean")
    assert torch.equal(tested[0], loss) and not torch.equal(tested[1], scores)
    assert torch.equal(trained_[1], scores) and not torch.equal(trained_[0], loss)


def test_every_class_has_a_column_and_a_prototype() -> None:
    for index, state in enumerate(states()):
        learner, _ = loop.open_learner(
            METHOD, tiny.clip(), task(index), state, settings.Settings(seed=0)
        )
        images = tiny.images(task(index))
        query = forward.frozen_features(learner.network, images.pixels)
        assert learner.eval().logits(images.pixels, query).shape == (12, 3 * index + 3)
        assert bool((state["fusion.prototypes"].norm(dim=1) > 0.1).all())
        own = F.normalize(query, dim=1).view(3, 4, -1).mean(1)
        torch.testing.assert_close(state["fusion.prototypes"][-3:], own)
        assert state["fusion.counts"].tolist() == [4.0] * (3 * index + 3)


def test_without_weights_everything_is_finite() -> None:
    made, (images, texts) = fusion(), given()
    torch.nn.init.zeros_(made.prototypes)
    for layer in (*made.images, *made.texts):
        layer.get_parameter("weight").data.zero_()
        layer.get_parameter("bias").data.zero_()
    terms = made.losses(images, texts, torch.arange(5), torch.tensor(2.0), tiny.task(0))
    terms["loss"].backward()
    assert bool(torch.stack(list(terms.values())).isfinite().all())
    gradients = [p.grad for p in made.parameters() if p.grad is not None]
    assert len(gradients) > 10
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert bool(made.scores(images, texts).isfinite().all())


def test_scores_are_the_formula() -> None:
    """In float64, image after image, without batches."""
    made, (images, texts) = fusion(plain_scale=2.0, text_scale=0.5, prototype_scale=3.0), given()
    P = {name: tensor.double().numpy() for name, tensor in made.state_dict().items()}

    def rows(name: str, x: np.ndarray) -> np.ndarray:
        parts = [x @ P[f"{name}.{t}.weight"].T + P[f"{name}.{t}.bias"] for t in range(TASKS)]
        return np.sum(parts, axis=0)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    text = unit(unit(rows("texts", texts.double().numpy())).mean(1))
    prototypes = unit(rows("images", P["prototypes"]))
    context = [P[f"context.{t}"] for t in range(TASKS)]
    expected = []
    for image in rows("images", images.double().numpy()):
        z = np.concatenate([image[None], text, prototypes, *context])
        q, k, v = (z @ P[f"attention.{n}.weight"].T for n in ("query", "key", "value"))
        weights = np.exp(q @ k.T / WIDTH**0.5)
        mixed = weights / weights.sum(1, keepdims=True) @ v
        out = z + mixed @ P["attention.out.weight"].T + P["attention.out.bias"]
        out = (out - out.mean(1, keepdims=True)) / np.sqrt(out.var(1, keepdims=True) + 1e-5)
        out = out * P["attention.norm.weight"] + P["attention.norm.bias"]
        by_text, by_prototype = out[1 : 1 + CLASSES], out[1 + CLASSES : 1 + 2 * CLASSES]
        expected.append(2 * text @ image + 0.5 * by_text @ out[0] + 3 * by_prototype @ out[0])
    with torch.no_grad():
        found = made.scores(images, texts)
    np.testing.assert_allclose(found.numpy(), np.stack(expected), rtol=1e-4, atol=1e-4)


def test_the_loss_is_three_cross_entropies() -> None:
    made, (images, texts), y = fusion(), given(), torch.tensor([0, 2, 2, 5, 1])
    image, text = F.normalize(made.image(images), dim=1), made.text(texts[:, :1])
    by_text, by_prototype = made.fused(image, text, "instance")
    similar = 7.0 * image @ text[y].T
    own = torch.arange(5)
    terms = {
        "text": F.cross_entropy(by_text, y),
        "contrast": (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2,
        "prototype": F.cross_entropy(by_prototype, y),
    }
    found = made.losses(images, texts, y, torch.tensor(7.0).log(), tiny.task(0))
    for name, term in terms.items():
        torch.testing.assert_close(found[name], term)
    torch.testing.assert_close(found["loss"], sum(terms.values()))
    alone = contrast(image[:1], text[:1], torch.tensor(7.0)).detach()
    assert float(alone) == 0  # there is no other text


@pytest.mark.parametrize(
    ("tasks", "logged"), [(1, 1_576_961), (2, 1_839_617), (3, 2_102_273), (9, 3_678_209)]
)
def test_as_much_is_trained_as_the_authors_log_says(tasks: int, logged: int) -> None:
    """On ViT-B/16: an attention, the newest projection of images and context, all of texts."""
    with torch.device("meta"):
        made = Fusion(512, tasks, 10 * tasks, PROOF())
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) + 1 == logged
    assert sum(p.numel() for p in made.attention.parameters()) == 4 * 512 * 512 + 3 * 512


def test_fields_out_of_range_are_refused_together() -> None:
    with pytest.raises(HyperparameterError) as caught:
        PROOF(epochs=0, batch_size=0, lr=0, weight_decay=-1, exemplars=-1, dropout=1.0)
    assert len(caught.value.problems) == 6
    assert isinstance(METHOD.learner(tiny.clip(), task(0)), ProofLearner)
