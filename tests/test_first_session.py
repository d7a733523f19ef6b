"""The first session: what each kind of adaptation trains, where it starts, what it leaves."""

import dataclasses
import math
from typing import Any, get_args

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from graftwork import methods
from graftwork.methods.contracts import hyperparameters
from graftwork.methods.contracts.trained import Task
from graftwork.methods.parts import first_session
from graftwork.methods.parts.first_session import FirstSession, FirstSessionLearner, Peft
from graftwork.methods.parts.peft import Adapter
from graftwork.methods.parts.prompt_tokens import PromptInit
from graftwork.methods.representations.ranpac import RanPAC
from graftwork.operators.training import forward, loop, settings
from tests import tiny

KINDS: tuple[Peft, ...] = get_args(Peft)
TASK = tiny.task(0, count=2)
each_kind = pytest.mark.parametrize("kind", KINDS)


def session(kind: Peft, **changes: Any) -> FirstSession:
    small = {"epochs": 2, "batch_size": 6, "lr": 0.1, "bottleneck": 8, "augmentation": "none"}
    return FirstSession(peft=kind, **{**small, **changes})


def fresh(method: FirstSession, vit: VisionTransformer | None = None) -> FirstSessionLearner:
    torch.manual_seed(0)
    return method.learner(tiny.vit() if vit is None else vit, TASK)


def frozen(vit: VisionTransformer, images: Tensor) -> Tensor:
    return forward.frozen_features(vit, images)


def trained_names(learner: FirstSessionLearner) -> set[str]:
    return {name for name, p in learner.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("finetune", 85_798_656),
        ("vpt_shallow", 3_840),
        ("vpt_deep", 46_080),
        ("ssf", 205_824),
        ("adapter", 1_189_632),
    ],
)
def test_e_counts_of_the_paper_on_vit_base(kind: Peft, count: int):
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0).requires_grad_(False)
        assert isinstance(vit, VisionTransformer)
        learner = FirstSession(peft=kind).learner(vit, TASK)
    trained = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    assert trained.pop("head.weight").shape == (3, 768)
    assert trained.pop("head.scale").shape == ()
    assert sum(p.numel() for p in trained.values()) == count


@each_kind
def test_e_only_the_expected_tensors_are_trained_and_stored(kind: Peft):
    learner = fresh(session(kind))
    head, blocks = {"head.weight", "head.scale"}, range(6)
    layers = ["norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    sites = [
        "patch_embed.norm",
        "norm",
        *(f"blocks.{b}.{layer}" for b in blocks for layer in layers),
    ]
    parts = ["down.weight", "down.bias", "up.weight", "up.bias"]
    expected = {
        "finetune": {f"vit.{name}" for name, _ in tiny.vit().named_parameters()},
        "vpt_shallow": {"prompt.tokens"},
        "vpt_deep": {"prompt.tokens"},
        "ssf": {f"vit.{site}.{part}" for site in sites for part in ("scale", "shift")},
        "adapter": {f"adapters.{b}.{part}" for b in blocks for part in parts},
    }
    assert trained_names(learner) == expected[kind] | head
    (state,) = tiny.train(session(kind, epochs=1), 1)
    assert state.keys() == expected[kind] | head


@each_kind
def test_e_the_backbone_is_bitwise_unchanged_but_for_fine_tuning(kind: Peft):
    network, before = tiny.vit(), tiny.vit().state_dict()
    loop.train_task(
        session(kind), network, TASK, tiny.images(TASK), None, settings.Settings(seed=0)
    )
    after = {name.replace(".base.", "."): t for name, t in network.state_dict().items()}
    same = [torch.equal(after[name], tensor) for name, tensor in before.items()]
    assert not any(same) if kind == "finetune" else all(same)


@each_kind
def test_features_after_training_are_those_of_the_stored_state(kind: Peft):
    method, images = session(kind), tiny.images(TASK)
    (state,) = tiny.train(method, 1)
    learner = tiny.opened(method, TASK, state)
    features = learner.features(images.pixels)
    assert features.shape == (len(images.targets), tiny.WIDTH)
    # Training moved them; in eval mode nothing is drawn, and no image sees another one.
    assert (features - fresh(method).eval().features(images.pixels)).abs().max() > 1e-3
    assert torch.equal(learner.features(images.pixels), features)
    torch.testing.assert_close(learner.features(images.pixels[:3]), features[:3])
    cosines = F.normalize(features) @ F.normalize(state["head.weight"]).T
    torch.testing.assert_close(learner.logits(images.pixels, None), state["head.scale"] * cosines)


def test_a_adapter_at_the_start_is_bitwise_the_backbone():
    images = tiny.images(TASK).pixels
    for mode in (True, False):
        learner = fresh(session("adapter")).train(mode)
        assert torch.equal(learner.features(images), frozen(tiny.vit(), images))


@pytest.mark.parametrize("init", get_args(PromptInit))
@pytest.mark.parametrize("kind", ["vpt_shallow", "vpt_deep"])
def test_b_prompts_at_the_start_are_not_the_backbone(kind: Peft, init: str):
    images = tiny.images(TASK).pixels
    learner = fresh(session(kind, vpt_init=init))
    assert (learner.features(images) - frozen(tiny.vit(), images)).abs().max() > 1e-2


def test_b_scales_and_shifts_at_the_start_are_not_the_backbone():
    images = tiny.images(TASK).pixels
    learner = fresh(session("ssf"))
    assert (learner.features(images) - frozen(tiny.vit(), images)).abs().max() > 1e-2
    values = {end: [] for end in ("scale", "shift")}
    for name, p in learner.network.named_parameters():
        if p.requires_grad:
            values[name.rpartition(".")[2]].append(p.detach())
    for end, mean in (("scale", 1.0), ("shift", 0.0)):
        drawn = torch.cat(values[end])
        assert drawn.mean().item() == pytest.approx(mean, abs=2e-3)
        assert drawn.std().item() == pytest.approx(0.02, rel=0.1)


def test_adapter_is_the_formula():
    adapter, tokens = Adapter(tiny.WIDTH, 8).eval(), torch.randn(2, 5, tiny.WIDTH)
    torch.nn.init.normal_(adapter.up.weight)
    torch.nn.init.normal_(adapter.up.bias)
    down = (tokens @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
    expected = 0.1 * (down @ adapter.up.weight.T + adapter.up.bias)
    torch.testing.assert_close(adapter(tokens), expected)
    bound = 1 / math.sqrt(tiny.WIDTH)
    assert 0.9 * bound < adapter.down.weight.abs().max() <= bound
    assert not adapter.down.bias.any()


def test_pitfall_iii_dropout_is_for_training_alone():
    learner = fresh(session("adapter", dropout=0.5))
    assert learner.adapters is not None
    for adapter in learner.adapters:
        assert isinstance(adapter, Adapter)
        torch.nn.init.normal_(adapter.up.weight)
    images = tiny.images(TASK).pixels
    noisy, other, *plain = [
        learner.train(mode).features(images) for mode in (True, True, False, False)
    ]
    assert (noisy - other).abs().max() > 0.1
    assert torch.equal(*plain)


@pytest.mark.parametrize(("init", "differ"), [("uniform", True), ("zeros", False)])
@pytest.mark.parametrize("kind", ["vpt_shallow", "vpt_deep"])
def test_prompts_that_start_equal_stay_equal(kind: Peft, init: str, differ: bool):
    (state,) = tiny.train(session(kind, vpt_init=init), 1)
    tokens = state["prompt.tokens"]
    assert tokens.shape == (1 if kind == "vpt_shallow" else 6, 5, tiny.WIDTH)
    assert tokens.abs().max() > 1e-4
    assert ((tokens - tokens[:, :1]).abs().max() > 1e-2) == differ
    if not differ:
        torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens), rtol=1e-3, atol=1e-6)


def test_cosine_head_and_loss_are_the_formula():
    learner, images = fresh(session("adapter")), tiny.images(TASK)
    bound = 1 / math.sqrt(tiny.WIDTH)
    assert 0.9 * bound < learner.head.weight.abs().max() <= bound
    assert learner.head.scale == 1
    scores = learner.logits(images.pixels, None)
    a, b = frozen(tiny.vit(), images.pixels), learner.head.weight
    cosines = (a @ b.T) / (a.norm(dim=1, keepdim=True) * b.norm(dim=1))
    torch.testing.assert_close(scores, cosines)
    loss = learner(images.pixels, images.targets, None)["loss"]
    expected = -scores.log_softmax(1)[torch.arange(12), images.targets].mean()
    torch.testing.assert_close(loss, expected)


@each_kind
def test_recipe_is_sgd_with_decay_on_all_that_is_trained(kind: Peft):
    method = FirstSession(peft=kind)
    recipe, learner = method.recipe(TASK), fresh(method)
    optimizer = recipe.optimizer(learner.groups())
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.9, 5e-4)
    assert len(group["params"]) == len(trained_names(learner))
    parameter = torch.zeros(1, requires_grad=True)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([parameter], lr=1.0), 20)
    for epoch in range(20):
        assert recipe.schedule(epoch, 20) == pytest.approx(torchs.get_last_lr()[0], abs=1e-12)
        torchs.optimizer.step()
        torchs.step()
    assert (recipe.epochs, recipe.batch_size, recipe.augmentation) == (20, 48, "lamda")


@each_kind
@pytest.mark.parametrize(
    "changes",
    [
        {"reg_tokens": 4},
        {"class_token": False, "global_pool": "avg"},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
    ],
)
def test_other_read_outs(kind: Peft, changes: dict[str, Any]):
    images = tiny.images(TASK).pixels
    learner = fresh(session(kind), tiny.vit(2, **changes)).eval()
    features = learner.features(images)
    assert features.shape == (12, tiny.WIDTH)
    start = frozen(tiny.vit(2, **changes), images)
    if kind in ("finetune", "adapter"):
        assert torch.equal(features, start)
    features.sum().backward()
    inside = [p for name, p in learner.named_parameters() if not name.startswith("head")]
    assert all(p.grad is not None for p in inside if p.requires_grad)


def test_loss_is_float32_under_autocast():
    learner, images = fresh(session("ssf")), tiny.images(TASK)
    exact = learner(images.pixels, images.targets, None)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = learner(images.pixels, images.targets, None)["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), abs=0.02)


def test_domain_incremental_task_with_all_classes():
    task = Task(index=0, count=4, current=tuple(range(5)), before=0, seen=5)
    state, log = loop.train_task(
        session("adapter", epochs=3),
        tiny.vit(),
        task,
        tiny.images(task),
        None,
        settings.Settings(seed=0),
    )
    assert state["head.weight"].shape == (5, tiny.WIDTH)
    assert log.epochs[-1]["loss"] < log.epochs[0]["loss"]


def test_methods_share_a_session_that_differs_only_in_what_it_does_not_use():
    a = RanPAC(first_session="adapter", prompt_length=30)
    b = RanPAC(first_session="adapter", projection_dim=500, vpt_init="zeros")
    assert first_session.of("adapter", a) == first_session.of("adapter", b) == FirstSession()
    assert first_session.of("vpt_deep", a) == FirstSession(peft="vpt_deep", prompt_length=30)
    assert first_session.of("ssf", a) == FirstSession(peft="ssf")
    assert first_session.of("adapter", RanPAC(bottleneck=8)).bottleneck == 8
    names = {field.name for field in dataclasses.fields(FirstSession)}
    assert {name for used in first_session.USED.values() for name in used} < names


def test_the_session_is_a_part_and_no_method_of_its_own():
    assert "first_session" not in methods.METHODS
    assert methods.load("first_session") is FirstSession
    assert methods.build("first_session", {"peft": "ssf"}) == FirstSession(peft="ssf")
    assert all(field.doc.endswith(".") for field in methods.fields("first_session"))
    with pytest.raises(hyperparameters.HyperparameterError) as caught:
        FirstSession(epochs=0, batch_size=0, lr=0, weight_decay=-1, prompt_length=0, dropout=1)
    assert len(caught.value.problems) == 6
