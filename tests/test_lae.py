"""LAE: what is trained, what follows, what decides; and a plain loop in PyTorch beside it."""

import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.methods.mixtures.lae import LAE, LAELearner
from graftwork.operators.training import batches, forward, loop
from graftwork.operators.training.settings import Settings, Snapshot
from tests import tiny

SMALL = LAE(
    epochs=2,
    batch_size=6,
    lr=0.01,
    blocks=2,
    bottleneck=4,
    rank=2,
    length=3,
    ema_decay=0.9,
    freeze_epochs=0,
    augmentation="none",
)
PETS = ("adapter", "lora", "prefix")
SIZES = {"adapter": 42_270, "lora": 76_810, "prefix": 76_810}
each_pet = pytest.mark.parametrize("pet", PETS)


def method(pet: str = "adapter", **changes: object) -> LAE:
    return dataclasses.replace(SMALL, pet=pet, **changes)  # type: ignore[arg-type]


def train(of: LAE, tasks: int = 2) -> list[State]:
    return tiny.train(of, tasks, depth=2)


def opened(of: LAE, index: int, state: State | None) -> LAELearner:
    learner = tiny.opened(of, tiny.task(index), state, depth=2)
    assert isinstance(learner, LAELearner)
    return learner


def part(state: State, name: str) -> State:
    return {n.removeprefix(name): t for n, t in state.items() if n.startswith(name)}


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def pixels(index: int = 0) -> Tensor:
    return tiny.images(tiny.task(index)).pixels


@pytest.mark.parametrize(("pet", "numbers"), SIZES.items())
def test_sizes_are_those_of_the_paper(pet: str, numbers: int) -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert isinstance(vit, VisionTransformer)
        learner = LAELearner(vit.requires_grad_(False), tiny.task(1), LAE(pet=pet))  # type: ignore
    assert sum(p.numel() for p in learner.online.parameters()) == numbers
    trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    assert trained == numbers + 6 * 769


def test_i_with_decay_1_offline_is_what_the_first_task_left() -> None:
    states = train(method(ema_decay=1.0), 3)
    assert not part(states[0], "offline.")
    for state in states[1:]:
        assert equal(part(state, "offline."), part(states[0], "online."))
    assert not equal(part(states[2], "online."), part(states[1], "online."))


@each_pet
def test_i_with_decay_0_offline_is_online_and_the_ensemble_is_one_model(pet: str) -> None:
    state = train(method(pet, ema_decay=0.0))[-1]
    assert equal(part(state, "offline."), part(state, "online."))
    learner = opened(method(pet), 1, state)
    with torch.no_grad():
        alone = F.log_softmax(learner.head(learner.features(pixels())), dim=1)
        assert torch.equal(learner.logits(pixels(), None), alone)


def test_ii_offline_has_no_gradient_and_is_in_no_group() -> None:
    learner = opened(method(), 1, train(method(), 1)[0])
    learner.train()
    learner.begin()
    learner(pixels(1), tiny.images(tiny.task(1)).targets, None)["loss"].backward()
    given = {id(p) for group in learner.groups() for p in group["params"]}
    assert given == {id(p) for p in [*learner.online.parameters(), *learner.head.parameters()]}
    assert all(p.grad is None and not p.requires_grad for p in learner.offline.parameters())
    assert any(p.grad is not None for p in learner.online.parameters())


@each_pet
def test_iii_deciding_changes_nothing_of_the_network(pet: str) -> None:
    learner = opened(method(pet), 1, train(method(pet))[-1])
    names, state = [n for n, _ in learner.named_modules()], dict(learner.state_dict())
    with torch.no_grad():
        before = learner.features(pixels())
        learner.logits(pixels(), None)
        assert torch.equal(learner.features(pixels()), before)
    assert [n for n, _ in learner.named_modules()] == names
    assert equal(dict(learner.state_dict()), state)
    assert not any(module._forward_hooks for module in learner.modules())


def test_iv_rows_of_earlier_classes_stay_bitwise_in_spite_of_decay() -> None:
    first, second = train(method(weight_decay=0.3))
    assert torch.equal(second["head.weight"][:3], first["head.weight"])
    assert torch.equal(second["head.bias"][:3], first["head.bias"])


@each_pet
def test_v_updates_that_are_zero_leave_the_features_as_they_are(pet: str) -> None:
    learner = opened(method(pet), 0, None)
    with torch.no_grad():
        plain = forward.frozen_features(tiny.vit(2), pixels())
        assert torch.equal(learner.features(pixels()), plain) == (pet != "prefix")


def test_scores_are_logarithms_of_the_higher_probability() -> None:
    learner = opened(method(), 1, train(method(ema_decay=0.99))[-1])
    with torch.no_grad():
        experts = torch.stack(
            [
                learner.head(learner._through(modules, pixels())).softmax(dim=1)
                for modules in (learner.online, learner.offline)
            ]
        )
        found = learner.logits(pixels(), None).exp()
    assert torch.allclose(found, experts.amax(dim=0), atol=1e-6)
    assert not torch.allclose(experts[0], experts[1], atol=1e-4)


def test_frozen_epochs_train_the_new_head_alone_while_offline_approaches() -> None:
    never = method(freeze_epochs=2)
    first, second, third = train(never, 3)
    for state in (second, third):
        assert equal(part(state, "online."), part(first, "online."))
    assert bool((second["head.weight"][3:] != 0).all())
    # The first task has no frozen epochs.
    assert bool((first["online.0.up.weight"] != 0).any())
    half = train(method(freeze_epochs=1))[-1]
    assert not equal(part(half, "online."), part(first, "online."))


def test_a_task_interrupted_while_frozen_goes_on_to_the_same_bits() -> None:
    of, task = method(freeze_epochs=1), tiny.task(1)
    first = train(of, 1)[0]
    kept: list[Snapshot] = []
    settings, images = Settings(seed=0, every=0), tiny.images(task)
    whole, _ = loop.train_task(of, tiny.vit(2), task, images, first, settings, keep=kept.append)
    for at in (0, 1, 2):
        resumed, _ = loop.train_task(
            of, tiny.vit(2), task, images, first, settings, resume=kept[at]
        )
        assert equal(resumed, whole)
    assert (kept[0].epoch, kept[0].step) == (0, 1)


def test_two_tasks_are_a_plain_loop() -> None:
    """Adapters in Adam of torch; frozen at first, so that Adam begins with the second epoch."""
    of = method(freeze_epochs=1, lr=0.003)
    vit = tiny.vit(2)
    states = train(of)
    online: dict[str, Tensor] = {}
    offline: dict[str, Tensor] = {}

    def features(weights: dict[str, Tensor], images: Tensor) -> Tensor:
        tokens = vit._pos_embed(vit.patch_embed(images))
        for number, block in enumerate(vit.blocks):
            normed = block.norm1(tokens)  # type: ignore[operator]
            own = part(weights, f"{number}.")
            hidden = F.gelu(F.linear(normed, own["down.weight"], own["down.bias"]))
            beside = own["scale"] * F.linear(hidden, own["up.weight"], own["up.bias"])
            tokens = tokens + block.attn(normed) + beside  # type: ignore[operator]
            tokens = tokens + block.mlp(block.norm2(tokens))  # type: ignore[operator]
        return vit.norm(tokens)[:, 0]

    for index, state in enumerate(states):
        task, images = tiny.task(index), tiny.images(tiny.task(index))
        start = tiny.opened(of, task, None, depth=2).state_dict()
        if index == 0:
            online = {n: t.clone().requires_grad_() for n, t in part(start, "online.").items()}
        else:
            offline = {n: t.detach().clone() for n, t in online.items()}
        head = [start[f"head.{n}"][-3:].clone().requires_grad_() for n in ("weight", "bias")]
        adam = torch.optim.Adam([*online.values(), *head], lr=0.003)
        for epoch in (0, 1):
            for rows in batches.row_batches(12, of.recipe(task), 0, index, epoch):
                found = features(online, images.pixels[rows])
                if index and epoch == 0:
                    found = found.detach()
                adam.zero_grad()
                F.cross_entropy(F.linear(found, *head), images.targets[rows] - 3 * index).backward()
                adam.step()
                for name in offline:
                    offline[name] = 0.9 * offline[name] + 0.1 * online[name].detach()
        torch.testing.assert_close(state["head.weight"][-3:], head[0].detach())
        for name, tensor in online.items():
            torch.testing.assert_close(state[f"online.{name}"], tensor.detach())
        for name, tensor in offline.items():
            torch.testing.assert_close(state[f"offline.{name}"], tensor)


def test_more_blocks_than_the_backbone_has_are_refused() -> None:
    with pytest.raises(ValueError, match="at most the 2 of the backbone, got 5"):
        tiny.opened(LAE(), tiny.task(0), None, depth=2)


def test_fields_out_of_range_are_refused_together() -> None:
    with pytest.raises(HyperparameterError) as caught:
        LAE(blocks=0, bottleneck=0, rank=0, length=0, ema_decay=1.5, freeze_epochs=-1)
    assert len(caught.value.problems) == 6
