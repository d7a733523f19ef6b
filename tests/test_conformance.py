"""What every trained method owes the pipeline, checked over all of METHODS.

A new method takes part by its line in METHODS. It needs an entry in a table below only where its
defaults do not fit a tiny ViT, or where a paper asks for an exception.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from graftwork import methods
from graftwork.methods.contracts import hyperparameters
from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.roles import roles
from graftwork.methods.contracts.trained import Learner, Task, Trained, shared, trains
from graftwork.methods.networks.network import Network
from graftwork.operators import merging
from graftwork.operators.errors import Diverged
from graftwork.operators.merging import MERGES
from graftwork.operators.merging.apply import Merged
from graftwork.operators.merging.policy import Policy
from graftwork.operators.merging.readers import InMemory
from graftwork.operators.stages import statistics
from graftwork.operators.training import batches, forward, loop
from graftwork.operators.training.settings import Settings, Snapshot, World
from tests import tiny

ROOT = Path(__file__).parent.parent
SMALL = {
    "epochs": 2,
    "batch_size": 6,
    "alignment_epochs": 1,
    "samples_per_class": 16,
    "bottleneck": 4,
    "rank": 2,
    "milestone": 1,
    "freeze_epochs": 1,
    "ema_decay": 0.9,
    "candidates": "fast",
}
"""Given to every method that has a field of the name."""
FITTING: dict[str, dict[str, Any]] = {
    "esn": {"prompt_length": 5},
    "coop": {"warmup_epochs": 0},
    "promptfusion_clip": {"context_length": 4, "image_prompt_length": 3},
    "promptfusion_vit": {"vit_prompt_length": 3},
    "zscl": {"lr": 1e-3, "warmup": 2, "average_every": 2, "constraint": 0.1},
}
"""Changes for a tiny ViT: 6 blocks of width 48, 17 tokens; or a tiny CLIP."""
QUICK: dict[str, dict[str, Any]] = {
    # Energies take more steps to reach -10.
    "esn": {"anchor": -2.0},
    # Half of the changes would halve what 16 steps have learnt.
    "magmax": {"lr": 1e-3, "head_lr": 0.05, "scale": 1.0},
    "magmax_independent": {"lr": 1e-3, "head_lr": 0.05, "scale": 1.0},
    # Texts of a random tower have nothing that one context for all classes could bring out.
    "coop": {"optimizer": "adam", "schedule": "constant", "lr": 0.1, "class_specific": True},
    "zscl": {
        "lr": 1e-3,
        "warmup": 0,
        "distillation": 0.0,
        "constraint": 0.0,
        "average_every": 0,
    },
}
"""Changes with which 16 steps per task suffice to learn an easy one."""
UNUSED: dict[str, tuple[str, ...]] = {}
"""Ends of names of trained parameters that need no gradient in every task, with the reason."""
UNCHANGED_AT_START = (
    *("finetune", "joint", "bitfit", "lora", "first_session-adapter"),
    *("lae-adapter", "lae-lora", "magmax", "coop-shared", "coop-specific", "zscl"),
)
"""Features before the first step are those of the untouched backbone."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    f"first_session-{kind}": ("first_session", {"peft": kind})
    for kind in ("finetune", "vpt_shallow", "vpt_deep", "ssf", "adapter")
} | {
    "coop-shared": ("coop", {}),
    "coop-specific": ("coop", {"class_specific": True}),
}
# One of them frozen at the start of a task, so that two workers are tried both ways.
VARIANTS |= {
    "lae-adapter": ("lae", {"pet": "adapter", "freeze_epochs": 0}),
    "lae-lora": ("lae", {"pet": "lora"}),
    "lae-prefix": ("lae", {"pet": "prefix", "freeze_epochs": 0}),
}
"""Cases of one name with several sets of trained parameters."""
FIRST_TASK_ALONE = ("first_session",)

B = sum(p.numel() for p in tiny.vit().parameters())
CLIP = sum(p.numel() for p in tiny.clip().parameters())
D, L = tiny.WIDTH, 6
ADAPTERS = L * (2 * 4 * D + 4 + D)
BUFFERS: dict[str, dict[str, str]] = {
    **{
        name: {
            "aligned_weight": "weight",
            "aligned_bias": "weight",
            "mean": "statistic",
            "covariance": "statistic",
            "fisher.*": "statistic",
        }
        for name in ("slca", "coma", "cofima")
    },
    "magmax": {"tau": "weight"},
    "magmax_independent": {"tau": "weight", "heads.weight": "weight", "heads.bias": "weight"},
    "esn": {
        "prompt": "weight",
        "heads.weight": "weight",
        "heads.bias": "weight",
        "temperatures": "counter",
    },
    "ease": {"spaces.0.prototypes": "statistic", "spaces.1.prototypes": "statistic"},
    "s_prompts": {"centres": "counter"},
    "hide_prompt": {
        name: "counter"
        for name in ("plain.mean", "plain.spread", "prompted.mean", "prompted.spread")
    },
    "proof": {"fusion.prototypes": "statistic", "fusion.counts": "counter"},
}
"""Roles of stored buffers with numbers that are no integers."""
NO_GRADIENT: dict[str, tuple[str, ...]] = {
    # What predicts is made of them after the training.
    **dict.fromkeys(("slca", "coma", "cofima"), ("head.",)),
    "magmax": ("vit.",),
    # They choose one of several, which has no gradient.
    "l2p": ("key",),
    "dualprompt": ("key",),
    "hide_prompt": ("tii.",),
    "dap": ("keys",),
    # Used while training alone.
    "proof": ("scale",),
    "promptfusion_clip": ("mask.",),
    "promptfusion_vit": ("mask.",),
}
"""Beginnings of names of weights that no score has a gradient for, with the reason."""
STORED: dict[str, Callable[[int, int], int]] = {
    "finetune": lambda C, T: B + C * (D + 1),
    "joint": lambda C, T: B + C * D + 1,
    "slca": lambda C, T: B + C * D * D + 3 * C * D + 4 * C,
    "ease": lambda C, T: T * (ADAPTERS + C * D + C),
    "vpt_shallow": lambda C, T: 5 * D + C * (D + 1),
    "vpt_deep": lambda C, T: L * 5 * D + C * (D + 1),
    "l2p": lambda C, T: 10 * (5 + 1) * D + 10 * T + C * (D + 1),
    "dualprompt": lambda C, T: 2 * 2 * 5 * D + T * (3 * 2 * 5 * D + D) + C * (D + 1),
    "bitfit": lambda C, T: (L * 11 + 2) * D + C * (D + 1),
    "lora": lambda C, T: L * 4 * 2 * D + C * (D + 1),
    "coda_prompt": lambda C, T: 5 * (100 * T // 2) * (8 + 2) * D + C * (D + 1),
    "s_prompts": lambda C, T: T * (10 + 5) * D + C * (D + 1) + 2 * C,
    "hide_prompt": lambda C, T: (
        2 * T * 5 * 5 * D + 4 * D * D + 5 * D + 2 * C * (D + 1) + 2 * C * 10 * (2 * D + 1) + 2 * C
    ),
    "lae-adapter": lambda C, T: min(T, 2) * 5 * (2 * 4 * D + 4 + D + 1) + C * (D + 1),
    "lae-lora": lambda C, T: min(T, 2) * 5 * (4 * 2 * D + 2) + C * (D + 1),
    "lae-prefix": lambda C, T: min(T, 2) * 5 * (2 * 10 * D + 2) + C * (D + 1),
    "coma": lambda C, T: B + C * D * D + 3 * C * D + 4 * C,
    "cofima": lambda C, T: 2 * B + C * D * D + 3 * C * D + 4 * C,
    "esn": lambda C, T: 5 * D + T * (5 * D * D + 21 * D // 2 + 1) + C * (D + 3),
    "magmax": lambda C, T: 2 * B + C * (D + 1),
    "magmax_independent": lambda C, T: B + C * (D + 3),
    "coop-shared": lambda C, T: 16 * 16,
    "coop-specific": lambda C, T: C * 16 * 16,
    "zscl": lambda C, T: CLIP - 1,
    "promptfusion_clip": lambda C, T: C * 4 * 16 + 3 * D + C,
    "promptfusion_vit": lambda C, T: 3 * D + C * (D + 2),
    "proof": lambda C, T: T * (2 * 24 * 25 + 3 * 24) + 4 * 24 * 24 + 3 * 24 + C * 25 + 1,
    "first_session-finetune": lambda C, T: B + C * D + 1,
    "first_session-vpt_shallow": lambda C, T: 5 * D + C * D + 1,
    "first_session-vpt_deep": lambda C, T: L * 5 * D + C * D + 1,
    "first_session-ssf": lambda C, T: 2 * (L * 11 * D + 2 * D) + C * D + 1,
    "first_session-adapter": lambda C, T: ADAPTERS + C * D + 1,
}
"""Numbers that are stored after T tasks with C classes, as the card's `memory` says."""


@dataclass(frozen=True)
class Case:
    """A method, with small hyper-parameters."""

    label: str
    name: str
    values: tuple[tuple[str, Any], ...]

    @property
    def method(self) -> Trained:
        return methods.build(self.name, dict(self.values))

    @property
    def on(self) -> str:
        return self.method.card.network

    @property
    def tasks(self) -> int:
        return 1 if self.name in FIRST_TASK_ALONE else 2

    def but(self, **changes: Any) -> "Case":
        """With other values for the fields that the method has."""
        known = {field.name for field in dataclasses.fields(methods.load(self.name))}
        changes = {name: value for name, value in changes.items() if name in known}
        return dataclasses.replace(self, values=tuple({**dict(self.values), **changes}.items()))


def cases() -> list[Case]:
    found = []
    registered = [*methods.METHODS, *getattr(methods, "PARTS", {})]
    for name in registered:
        try:
            trained = methods.load(name).card.contract == "trained"
        except ImportError:
            trained = False  # `test_every_method_can_be_loaded` says so
        if not trained:
            continue
        variants = {label: v for label, (of, v) in VARIANTS.items() if of == name} or {name: {}}
        for label, values in variants.items():
            bare = Case(label, name, tuple({**FITTING.get(name, {}), **values}.items()))
            found.append(bare.but(**SMALL | dict(bare.values)))
    return found


CASES = cases()
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)


def stream(of: Case, kind: str = "class") -> list[Task]:
    """Tasks of three classes each, or of the same three in other images."""
    if kind == "class":
        return [tiny.task(index, 3, of.tasks) for index in range(of.tasks)]
    return [
        dataclasses.replace(tiny.task(0, 3, of.tasks), index=i, before=3 if i else 0)
        for i in range(of.tasks)
    ]


def network(of: Case, gain: float = 1.0, **changes: Any) -> Network:
    """A tiny network; with a gain its features depend on the image as much as trained ones do."""
    made = tiny.clip(**changes) if of.on == "clip" else tiny.vit(**changes)
    for name, parameter in made.named_parameters():
        if "blocks." in name and name.endswith("weight") and parameter.ndim > 1:
            parameter.mul_(gain)
    return made


def reference(of: Case) -> tiny.Reference | None:
    return tiny.Reference() if of.method.card.reference else None


def images(task: Task, per_class: int = 4) -> tiny.TensorImages:
    return tiny.images(task, per_class, seed=0)


def start_of(case: Case, states: list[State]) -> State | None:
    """What the training of the next task begins with."""
    if not case.method.card.independent:
        return states[-1] if states else None
    return shared(case.method, states[0]) if states else None


def joined(case: Case, task: Task, states: list[State], state: State, **changes: Any) -> State:
    """What is stored after a task of which `state` was trained."""
    if not case.method.card.independent:
        return state
    before, own = states[-1] if states else None, network(case, **changes)
    settings = Settings(seed=0)
    return loop.join_task(case.method, own, task, images(task), before, state, settings)[0]


def train(
    case: Case,
    tasks: list[Task] | None = None,
    *,
    seed: int = 0,
    precision: str = "fp32",
    states: list[State] | None = None,
    say: Callable[..., None] = lambda **facts: None,
    **changes: Any,
) -> list[State]:
    """What is stored after each task, by the real loop; goes on after `states`."""
    states = list(states or [])
    settings = Settings(seed=seed, precision=precision)
    for task in (stream(case) if tasks is None else tasks)[len(states) :]:
        start, own = start_of(case, states), network(case, **changes)
        state, _ = loop.train_task(
            trains(case.method),
            own,
            task,
            images(task),
            start,
            settings,
            reference=reference(case),
            say=say,
        )
        states.append(joined(case, task, states, state, **changes))
    return states


@functools.cache
def trained(case: Case) -> list[State]:
    """Shared by the checks that only look at it."""
    return train(case)


@dataclass(frozen=True)
class Again:
    """The same training once more, and what was to be seen on the way."""

    states: list[State]
    backbone: State
    """The tensors of the network that the first task was trained on, known from before it."""
    snapshots: list[Snapshot]
    """One after each step of the last task."""


@functools.cache
def trained_again(case: Case) -> Again:
    """Shared, too: three checks ask what a second training does."""
    states: list[State] = []
    backbones: list[State] = []
    kept: list[Snapshot] = []
    for task in stream(case):
        own = network(case)
        backbones.append(dict(own.state_dict(keep_vars=True)))
        kept.clear()
        state, _ = loop.train_task(
            trains(case.method),
            own,
            task,
            images(task),
            start_of(case, states),
            Settings(seed=0, every=0),
            reference=reference(case),
            keep=kept.append,
        )
        states.append(joined(case, task, states, state))
    return Again(states, backbones[0], kept)


def opened(case: Case, task: Task, state: State | None, **changes: Any) -> Learner:
    settings = Settings(seed=0)
    learner, _ = loop.open_learner(case.method, network(case, **changes), task, state, settings)
    learner.reference = reference(case)
    return learner.eval()


@torch.no_grad()
def scores(learner: Learner, pixels: Tensor) -> Tensor:
    query = forward.frozen_features(learner.network, pixels) if learner.needs_query else None
    return learner.logits(pixels, query)


def last(case: Case) -> tuple[Learner, Task]:
    """The learner after the stream, and its task."""
    task = stream(case)[-1]
    return opened(case, task, trained(case)[-1]), task


def running(case: Case, pixels: tiny.TensorImages | None = None) -> Any:
    """The last task, about to take its first step."""
    task, states = stream(case)[-1], trained(case)[:-1]
    settings = Settings(seed=0)
    learner, backbone = loop.open_learner(
        trains(case.method), network(case), task, start_of(case, states), settings
    )
    learner.reference = reference(case)
    learner.begin()
    pixels = pixels or images(task)
    recipe = case.method.recipe(task)
    return loop._Run(learner, backbone, recipe, pixels, settings, World())


def assert_same(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_can_be_loaded(name: str) -> None:
    assert methods.load(name).card.contract in ("fitted", "trained", "adapted", "fused")


@every
def test_card_and_learner_agree(case: Case) -> None:
    learner, _ = last(case)
    assert case.method.card.uses_seed
    assert case.method.card.query == learner.needs_query


@every
def test_a_frozen_backbone_is_unchanged_and_has_no_gradient(case: Case) -> None:
    tensors, untouched = trained_again(case).backbone, network(case).state_dict()
    assert tensors.keys() == untouched.keys()
    frozen = {name: tensor for name, tensor in tensors.items() if not tensor.requires_grad}
    assert [n for n in frozen if not torch.equal(frozen[n], untouched[n])] == []
    assert [n for n in frozen if frozen[n].grad is not None] == []


@every
def test_what_is_declared_and_nothing_else_gets_gradients(case: Case) -> None:
    run = running(case)
    learner: Learner = run._learner
    named = dict(learner.named_parameters())
    wanted = {name for name, p in named.items() if p.requires_grad}
    given = [id(p) for group in learner.groups() for p in group["params"]]
    assert len(given) == len(set(given))
    assert set(given) == {id(named[name]) for name in wanted}
    touched: set[str] = set()
    for _ in run.steps():
        touched |= {
            name for name, p in named.items() if p.grad is not None and bool((p.grad != 0).any())
        }
    spared = UNUSED.get(case.label, ())
    assert {name for name in wanted - touched if not name.endswith(spared)} == set()
    assert touched <= wanted


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.label in UNCHANGED_AT_START], ids=lambda case: case.label
)
def test_start_is_the_untouched_backbone(case: Case) -> None:
    task = stream(case)[0]
    learner = opened(case, task, None)
    pixels = images(task).pixels
    with torch.no_grad():
        own = learner.features(pixels)
    assert torch.equal(own, forward.frozen_features(network(case), pixels))


@every
def test_one_seed_twice_gives_the_same_bits_and_another_seed_others(case: Case) -> None:
    for a, b in zip(trained(case), trained_again(case).states, strict=True):
        assert_same(a, b)
    (other,) = train(case, stream(case)[:1], seed=1)
    assert any(not torch.equal(other[n], t) for n, t in trained(case)[0].items())


@every
def test_interrupted_and_resumed_is_uninterrupted(case: Case) -> None:
    task, (*states, whole) = stream(case)[-1], trained(case)
    # The first step of the second epoch is taken, the second is not.
    snapshot = trained_again(case).snapshots[2]
    assert (snapshot.epoch, snapshot.step) == (1, 1)
    snapshot = dataclasses.replace(snapshot, tensors=load(save(snapshot.tensors)))
    resumed, _ = loop.train_task(
        trains(case.method),
        network(case),
        task,
        images(task),
        start_of(case, states),
        Settings(seed=0, every=0),
        reference=reference(case),
        resume=snapshot,
    )
    assert_same(joined(case, task, states, resumed), whole)


@every
def test_logits_have_a_column_for_each_class_seen(case: Case) -> None:
    for task, state in zip(stream(case), trained(case), strict=True):
        learner = opened(case, task, state)
        assert scores(learner, images(task).pixels[:2]).shape == (2, task.seen)


@every
def test_the_prediction_of_an_image_does_not_depend_on_its_batch(case: Case) -> None:
    learner, _ = last(case)
    pixels = torch.cat([images(task, 6).pixels for task in stream(case)])[:32]
    whole = scores(learner, pixels)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    shuffled = torch.empty_like(whole)
    shuffled[order] = scores(learner, pixels[order])
    parts = [
        torch.cat([scores(learner, part) for part in pixels[:14].split(size)]) for size in (1, 7)
    ]
    assert (shuffled - whole).abs().max() <= 1e-5
    assert all((part - whole[:14]).abs().max() <= 1e-5 for part in parts)


@every
def test_bf16_autocast_trains_with_a_loss_in_float32(case: Case) -> None:
    case, task = case.but(epochs=1), stream(case)[0]
    (state, *_) = train(case, [task], precision="bf16")
    assert [n for n, t in state.items() if not bool(t.isfinite().all())] == []
    assert [n for n, t in state.items() if t.dtype in (torch.bfloat16, torch.float16)] == []
    settings = Settings(seed=0)
    learner, _ = loop.open_learner(trains(case.method), network(case), task, None, settings)
    learner.reference = reference(case)
    pixels = images(task).pixels
    learner.eval().begin()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query = forward.frozen_features(learner.network, pixels) if learner.needs_query else None
        terms = learner(pixels, images(task).targets, query)
    assert {name: term.dtype for name, term in terms.items()} == dict.fromkeys(terms, torch.float32)


@every
def test_hyperparameters_survive_json(case: Case) -> None:
    plain = json.loads(json.dumps(dataclasses.asdict(case.method)))  # type: ignore[arg-type]
    assert methods.build(case.name, plain) == case.method


@every
def test_an_unknown_field_is_refused_and_every_field_is_explained(case: Case) -> None:
    with pytest.raises(hyperparameters.HyperparameterError, match="epoch_s"):
        methods.build(case.name, {"epoch_s": 1})
    with pytest.raises(hyperparameters.HyperparameterError, match="epochs: must be at least 1"):
        methods.build(case.name, {"epochs": 0})
    assert [field.name for field in methods.fields(case.name) if not field.doc] == []


@every
def test_stored_is_what_was_trained_and_nothing_more(case: Case) -> None:
    plain = network(case).state_dict()
    sizes = []
    for index, (task, state) in enumerate(zip(stream(case), trained(case), strict=True)):
        same = [
            name
            for name, tensor in state.items()
            if name.removeprefix("vit.") in plain and torch.equal(tensor, plain[name[4:]])
        ]
        assert same == []
        learner = opened(case, task, state)
        assert state.keys() <= learner.state_dict().keys()
        sizes.append(sum(tensor.numel() for tensor in state.values()))
        if case.label in STORED:
            assert sizes[-1] == STORED[case.label](task.seen, index + 1)
    assert sizes == sorted(sizes)


@every
def test_what_is_stored_has_a_role_in_merges(case: Case) -> None:
    """A buffer that predicts and is no weight to a merge would be left as it is, or averaged."""
    state, (learner, _) = trained(case)[-1], last(case)
    known = roles(learner)
    floats = {name for name, tensor in state.items() if tensor.is_floating_point()}
    assert {n for n, role in known.items() if role == "counter"} >= state.keys() - floats
    expected = BUFFERS.get(case.name, {})
    assert {name: known[name] for name, _ in learner.named_buffers() if name in floats} == {
        name: role for name, role in expected.items() if "*" not in name
    } | {
        name: role
        for start, role in expected.items()
        for name in floats
        if "*" in start and name.startswith(start.removesuffix("*"))
    }


@every
def test_only_methods_with_weights_per_task_have_nothing_to_merge_over_tasks(case: Case) -> None:
    states = trained(case)
    if len(states) < 2:
        pytest.skip("it trains on one task alone")
    learner, _ = last(case)
    weights = {name for name, role in roles(learner).items() if role == "weight"}
    first, second = states[:2]
    moved = [
        name
        for name in weights & first.keys()
        if not torch.equal(_shared(second[name], first[name]), first[name])
    ]
    if case.label in ("coda_prompt", "coop-specific"):
        assert moved == []  # but where classes recur, rows of theirs are trained again
        assert not case.method.card.apart
    else:
        assert bool(moved) != case.method.card.apart


def _shared(later: Tensor, earlier: Tensor) -> Tensor:
    return later[: len(earlier)] if earlier.ndim else later


@every
def test_a_merge_moves_what_predicts(case: Case) -> None:
    """Three synthetic models: the scores of the merged one are those of none of them."""
    learner, task = last(case)
    known, state = roles(learner), trained(case)[-1]
    pixels = tiny.images(task, 2, seed=5).pixels

    def other(seed: int) -> State:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) * spread(tensor)
            if known[name] == "weight"
            else tensor
            for name, tensor in sorted(state.items())
        }

    models, base = [other(1), other(2), other(3)], other(0)
    policy = Policy(
        statistics=frozenset(n for n, role in known.items() if role == "statistic"),
        counters=frozenset(n for n, role in known.items() if role == "counter"),
    )
    each = [scores(opened(case, task, model), pixels) for model in models]
    for name in MERGES:
        merge = merging.build(name, {})
        start = InMemory(base) if merge.card.base else None
        nothing = [InMemory({})] * 3 if merge.card.statistics else None
        found = dict(Merged(merge, [InMemory(m) for m in models], start, nothing, policy))
        got = scores(opened(case, task, found), pixels)
        assert bool(torch.isfinite(got).all()), name
        assert all(not torch.allclose(got, one, atol=1e-4) for one in each), name


def spread(tensor: Tensor) -> float:
    """Standard deviation of a tensor, and something where it has none."""
    return float(tensor.std()) if tensor.numel() > 1 and float(tensor.std()) > 0 else 0.02


@every
def test_fisher_information_is_measured_of_all_that_predicts(case: Case) -> None:
    learner, task = last(case)
    weights = statistics.learned_weights(learner, trained(case)[-1])
    if case.name in NO_GRADIENT:
        weights = {n: t for n, t in weights.items() if not n.startswith(NO_GRADIENT[case.name])}
    given = tiny.images(task, 2)
    labels = [0] * len(given.targets)
    found = statistics.squared_gradients(
        learner, weights, given, Settings(seed=0), "model_expectation", labels
    )
    assert found.keys() == weights.keys()
    silent = {name for name, sums in found.items() if float(sums.sum()) == 0}
    assert silent == set()


@every
def test_regmean_measures_what_the_card_says(case: Case) -> None:
    """Of every matrix among the buffers that predict, there are inputs to measure, or none."""
    learner, task = last(case)
    weights = statistics.learned_weights(learner, trained(case)[-1])
    buffers = {name for name, _ in learner.named_buffers() if name in weights}
    given = tiny.images(task, 1)
    found = statistics.gram_matrices(learner, weights, given, Settings(seed=0))
    assert found.keys() <= weights.keys()
    assert all(gram.shape == (weights[n].shape[1],) * 2 for n, gram in found.items())
    matrices = {name for name in buffers if weights[name].ndim == 2 or name == "tau"}
    assert (matrices <= found.keys()) == case.method.card.linear_layers


@every
def test_learns_an_easy_task(case: Case) -> None:
    case = case.but(epochs=8, lr=0.05, augmentation="none").but(**QUICK.get(case.name, {}))
    tasks, gain = stream(case), 5.0 if case.on == "vit" else 2.0
    # What is asked is the last task, which has to be learned after others.
    before = train(case.but(epochs=1), tasks[:-1], gain=gain)
    state = train(case, tasks, states=before, gain=gain)[-1]
    test = tiny.images(tasks[-1], 10, seed=0)
    learner = opened(case, tasks[-1], state, gain=gain)
    found = scores(learner, test.pixels)[:, list(tasks[-1].current)]
    right = torch.tensor(tasks[-1].current)[found.argmax(dim=1)] == test.targets
    assert float(right.float().mean()) >= 0.8


@every
def test_a_domain_incremental_stream_works(case: Case) -> None:
    case = case.but(epochs=1)
    tasks = stream(case, "domain")
    state = train(case, tasks)[-1]
    found = scores(opened(case, tasks[-1], state), images(tasks[-1]).pixels)
    assert found.shape == (12, 3)
    assert bool(found.isfinite().all())


OTHERS = {
    "vit": {
        "registers": {"reg_tokens": 2},
        "no class token": {"class_token": False, "global_pool": "avg"},
    },
    "clip": {"timm's tower": {"tower": "timm"}},
}


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        pytest.param(case, changes, id=f"{what}-{case.label}")
        for case in CASES
        for what, changes in OTHERS[case.on].items()
    ],
)
def test_other_networks_work(case: Case, changes: dict[str, Any]) -> None:
    case, task = case.but(epochs=1), stream(case)[0]
    (state,) = train(case, [task], **changes)
    found = scores(opened(case, task, state, **changes), images(task).pixels)
    assert found.shape == (12, 3)
    assert bool(found.isfinite().all())


@every
def test_nan_is_named_before_anything_changes(case: Case) -> None:
    task = stream(case)[-1]
    pixels = images(task)
    pixels.pixels.fill_(torch.nan)
    run = running(case, pixels)
    before = {name: p.detach().clone() for name, p in run._learner.named_parameters()}
    message = rf"task {task.index}, epoch 1, step 1: .*images: image \d+, .* and 2 more"
    with pytest.raises(Diverged, match=message):
        next(run.steps())
    assert_same(dict(run._learner.named_parameters()), before)


def test_there_is_a_method_to_check() -> None:
    assert {"finetune", "joint", "slca", "ease"} <= {case.label for case in CASES}


# Other processes: one pair of workers for all methods.


@dataclass(frozen=True)
class Elsewhere:
    """What the processes wrote into a folder."""

    folder: Path

    def read(self, case: Case, what: str) -> State:
        path = self.folder / f"{case.label}.{what}"
        if not path.exists():
            pytest.fail(self._said(case))
        return load_file(path)

    def _said(self, case: Case) -> str:
        error = self.folder / f"{case.label}.error"
        return error.read_text() if error.exists() else "not reached"


@pytest.fixture(scope="module")
def elsewhere(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Elsewhere:
    folder = tmp_path_factory.mktemp("elsewhere")
    # Those that were chosen on the command line.
    names = " ".join(item.name for item in request.session.items)
    left = [case for case in CASES if f"[{case.label}]" in names]
    for case in left:
        save_file(trained(case)[-1], folder / f"{case.label}.state")
        first = train(still(case), stream(case)[:1]) if case.tasks > 1 else [{}]
        save_file(first[0] or {"none": torch.zeros(())}, folder / f"{case.label}.first")
    while left:
        labels = ",".join(case.label for case in left)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        (folder / "meeting").unlink(missing_ok=True)
        workers = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, str(rank), str(folder), labels],
                env=environment,
            )
            for rank in (0, 1)
        ]
        for worker in workers:
            worker.wait()
        # A method that failed ended its workers; the ones after it get new ones.
        done = [case for case in left if (folder / f"{case.label}.done").exists()]
        left = left[len(done) + 1 :]
    return Elsewhere(folder)


def still(case: Case) -> Case:
    """Steps without random numbers, of which each worker has its own; 12 images as 5 + 5 (+ 2).

    SGD, since Adam makes a step of any size out of a gradient that is nothing but rounding.
    """
    return case.but(dropout=0.0, optimizer="sgd", batch_size=5, epochs=1)


@every
def test_a_fresh_process_gives_the_same_logits(case: Case, elsewhere: Elsewhere) -> None:
    learner, task = last(case)
    own = scores(learner, images(task).pixels)
    assert torch.equal(elsewhere.read(case, "logits")["logits"], own)


@every
def test_two_workers_are_one(case: Case, elsewhere: Elsewhere) -> None:
    both = elsewhere.read(case, "both")
    first = load_file(elsewhere.folder / f"{case.label}.first")
    alone = last_task(still(case), first)
    steps = batches.row_batches(12, still(case).method.recipe(stream(case)[-1]), 0, 0, 0)
    assert len(alone["losses"]) == len(both["losses"]) == len(steps) >= 2
    assert alone.keys() == both.keys()
    far = {n: float((alone[n].double() - both[n].double()).abs().max()) for n in alone}
    assert {name: value for name, value in far.items() if value > 1e-5} == {}


def last_task(case: Case, first: State) -> State:
    """The state after the last task, and the losses of its steps."""
    losses: list[float] = []
    states = [first] if case.tasks > 1 else []
    (*_, state) = train(case, states=states, say=lambda **facts: losses.append(facts["loss"]))
    return {**state, "losses": torch.tensor(losses, dtype=torch.float64)}


def work(rank: int, folder: Path, labels: list[str]) -> None:
    """A worker's life: fresh logits, then the last task of every method with another worker."""
    known = {case.label: case for case in CASES}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for label in labels:
        case = known[label]
        try:
            if rank == 0:
                task = stream(case)[-1]
                learner = opened(case, task, load_file(folder / f"{label}.state"))
                fresh = scores(learner, images(task).pixels)
                save_file({"logits": fresh}, folder / f"{label}.logits")
            both = last_task(still(case), load_file(folder / f"{label}.first"))
            if rank == 0:
                save_file(both, folder / f"{label}.both")
                (folder / f"{label}.done").touch()
        except Exception:
            (folder / f"{label}.error").write_text(traceback.format_exc())
            os._exit(1)  # the other one notices
    dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","))
