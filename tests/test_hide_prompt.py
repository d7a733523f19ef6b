"""HiDe-Prompt: inference of the task, prefixes, the contrast, and classifiers that are aligned."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.methods.contracts.trained import Task
from graftwork.methods.networks.vit import forward_tokens, heads, read_out
from graftwork.methods.prompts import contrast, gaussian_mixtures
from graftwork.methods.prompts.contrast import apart
from graftwork.methods.prompts.gaussian_mixtures import Mixtures, align
from graftwork.methods.prompts.hide_prompt import HiDePrompt, HiDePromptLearner
from graftwork.operators.training import forward, loop
from graftwork.operators.training.settings import Log, Settings
from tests import tiny
from tests.bounds import rounding

SMALL: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 6,
    "prompt_length": 3,
    "first_block": 0,
    "last_block": 1,
    "centroids": 2,
    "alignment_epochs": 2,
    "samples_per_class": 16,
    "tii_samples_per_class": 8,
    "prompt_momentum": 0.25,
    "contrast_weight": 0.5,
}
ENDS = ("weight", "bias")


def opened(index: int, state: State | None = None, **changes: Any) -> HiDePromptLearner:
    method = HiDePrompt(**{**SMALL, **changes})
    made = tiny.opened(method, tiny.task(index, count=3), state, depth=3)
    assert isinstance(made, HiDePromptLearner)
    return made


def train(**changes: Any) -> list[State]:
    return tiny.train(HiDePrompt(**{**SMALL, **changes}), tasks=3, depth=3)


@pytest.fixture(scope="module")
def states() -> list[State]:
    return train()


@pytest.fixture(scope="module")
def unaligned() -> list[State]:
    return train(alignment_epochs=0)


def batch(count: int = 6, index: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images, columns of the task's classes, and queries that differ widely."""
    draw = torch.Generator().manual_seed(2)
    images = torch.randn(count, 3, tiny.SIZE, tiny.SIZE, generator=draw)
    targets = torch.arange(count) % 3 + 3 * index
    return images, targets, torch.randn(count, tiny.WIDTH, generator=draw)


def make_infer(learner: HiDePromptLearner, query: Tensor) -> list[int]:
    """Makes query i one of task i modulo 3: the head reads off which of three queries it is."""
    with torch.no_grad():
        query.copy_(query[:3].repeat(len(query), 1)[: len(query)])
        for layer in (learner.tii.down, learner.tii.head):
            layer.weight.zero_()
        learner.tii.head.weight[[0, 4, 8]] = F.layer_norm(query[:3], query.shape[1:])
    return [i % 3 for i in range(len(query))]


def test_task_inference_is_a_residual_layer_a_norm_and_a_head():
    network, (_, _, query) = opened(1).tii, batch()
    hidden = F.gelu(query @ network.up.weight.T + network.up.bias)
    rows = query + hidden @ network.down.weight.T + network.down.bias
    centred = rows - rows.mean(dim=1, keepdim=True)
    normal = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    expected = normal @ network.head.weight.T + network.head.bias
    assert network.up.weight.shape == (2 * tiny.WIDTH, tiny.WIDTH) and expected.shape == (6, 6)
    torch.testing.assert_close(network(query), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(query), network(query.float()))
        assert network(query).dtype == torch.float32


def test_the_task_of_an_image_is_that_of_its_best_class(states):
    images, _, query = batch(9)
    learner = opened(2, states[2])
    assert make_infer(learner, query) == learner.inferred(query).tolist() == [0, 1, 2] * 3
    for task in range(3):
        prefixes = learner.prefixes(learner.e[[task]], 3)
        tokens = forward_tokens(learner.network, images[task::3], prefixes=prefixes)
        expected = learner.head(read_out(learner.network, tokens))
        found = learner.logits(images, query)[task::3]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_each_image_gets_the_keys_and_values_of_its_own_task(states):
    learner = opened(2, states[2])
    tasks = torch.tensor([2, 0, 1, 0])
    found = learner.prefixes(learner.e[tasks], 4)
    assert [pair is not None for pair in found] == [True, True, False]
    for block in (0, 1):
        pair = found[block]
        assert pair is not None
        for part, given in enumerate(pair):
            assert given.shape == (4, heads(learner.network)[0], 3, heads(learner.network)[1])
            for row, task in enumerate(tasks):
                assert torch.equal(given[row].transpose(0, 1), learner.e[task, block, part])


def test_only_the_scrambled_layout_makes_an_image_depend_on_its_batch(states):
    images, _, query = batch(9)
    far = {}
    for layout in ("correct", "scrambled"):
        learner = opened(2, states[2], kv_layout=layout)
        make_infer(learner, query)
        alone = torch.cat([learner.logits(images[[i]], query[[i]]) for i in range(9)])
        far[layout] = (learner.logits(images, query) - alone).abs().max()
    assert far["correct"] < 1e-6 and far["scrambled"] > 1e-3
    # One task for all: the first half sees keys as values, the second values as keys.
    found = learner.prefixes(learner.e[[1]], 4)[1]
    assert found is not None
    for row in range(4):
        same = learner.e[1, 1, row // 2].transpose(0, 1)
        assert torch.equal(found[0][row], same) and torch.equal(found[1][row], same)


def test_a_prefix_starts_as_the_one_before_and_is_mixed_with_the_mean_of_all(states):
    learner = opened(2, states[1])
    assert not torch.equal(learner.e[2], learner.e[1])
    learner.begin()
    assert torch.equal(learner.e[2], learner.e[1])
    assert torch.equal(learner.e[:2], states[1]["e"])
    with torch.no_grad():
        learner.e[2] = 1.0
    expected = 0.75 + 0.25 * states[1]["e"].mean(dim=0)
    torch.testing.assert_close(learner.mixed()[0], expected)
    # What is trained is what is stored.
    task = tiny.task(2, count=3)
    settings, recipe = Settings(seed=0), HiDePrompt(**SMALL).recipe(task)
    learner.finish(forward.PlainImages(learner, tiny.images(task), settings, Log(), recipe))
    torch.testing.assert_close(learner.e[2], expected)
    first = opened(0, prompt_momentum=0.5)
    assert torch.equal(first.mixed(), first.e) and torch.equal(
        opened(2, states[2], prompt_momentum=0.0).mixed()[0], states[2]["e"][2]
    )


def test_the_contrast_by_hand():
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    products = torch.tensor([[1.0, 0.0, 1.0], [0.0, 4.0, 2.0], [1.0, 2.0, 2.0]]) / 0.8
    expected = (products.logsumexp(dim=1) - products.diagonal()).mean()
    torch.testing.assert_close(apart(rows, 0.8), expected)


def test_the_loss_and_its_terms(states):
    images, targets, query = batch(index=1)
    learner = opened(1, states[0])
    learner.begin()
    terms = learner(images, targets, query)
    features = learner._features(images, learner.mixed())
    entropy = F.cross_entropy(learner.head(features)[:, 3:], targets - 3)
    tii = F.cross_entropy(learner.tii(query)[:, 3:], targets - 3)
    # Two centroids of each of the three classes before.
    means = states[0]["prompted.mean"].flatten(0, 1)
    assert means.shape == (6, tiny.WIDTH)
    separate = apart(torch.cat([means, features]), 0.8)
    torch.testing.assert_close(terms["cross_entropy"], entropy)
    torch.testing.assert_close(terms["task_inference"], tii)
    torch.testing.assert_close(terms["contrast"], separate)
    torch.testing.assert_close(terms["loss"], entropy + 0.5 * separate + tii)
    assert separate > 0.1
    first = opened(0)
    features = first._features(images, first.e)
    found = first(images, targets - 3, query)["contrast"]
    torch.testing.assert_close(found, apart(features, 0.8))


def test_who_gets_a_gradient_from_which_term(states):
    images, targets, query = batch(index=1)
    learner = opened(1, states[0])
    learner.begin()

    def touched(term: str) -> dict[str, list[bool]]:
        learner.zero_grad()
        learner(images, targets, query)[term].backward()
        return {
            name: p.grad.flatten(1).any(dim=1).tolist() if p.ndim > 1 else []
            for name, p in learner.named_parameters()
            if p.grad is not None
        }

    entropy, separate, tii = map(touched, ("cross_entropy", "contrast", "task_inference"))
    assert entropy.keys() == {"e", "head.weight", "head.bias"}
    assert entropy["e"] == [False, True]
    assert entropy["head.weight"] == [False] * 3 + [True] * 3
    assert separate.keys() == {"e"} and separate["e"] == [False, True]
    assert tii.keys() == {f"tii.{n}" for n, _ in learner.tii.named_parameters()}
    assert tii["tii.head.weight"] == [False] * 3 + [True] * 3


def test_workers_together_have_the_gradient_of_the_whole_batch(states, monkeypatch):
    images, targets, query = batch(5, index=1)
    learner = opened(1, states[0])
    learner.begin()

    def gradient(rows: slice) -> Tensor:
        learner.zero_grad()
        learner(images[rows], targets[rows], query[rows])["contrast"].backward()
        assert learner.e.grad is not None
        return learner.e.grad

    whole = gradient(slice(None))
    with torch.no_grad():
        features = learner._features(images, learner.mixed())
    mine, others = slice(0, 2), slice(2, 5)
    parts = []
    for own, rest in ((mine, others), (others, mine)):
        monkeypatch.setattr(contrast, "of_other_workers", lambda rows, rest=rest: features[rest])
        parts.append(gradient(own))
    together = 2 / 5 * parts[0] + 3 / 5 * parts[1]
    vit = learner.network
    # Batches of other sizes take other kernels; the blocks are passed forwards and backwards.
    bound = rounding(vit.embed_dim, 2 * len(vit.blocks), float(whole.abs().max()))
    torch.testing.assert_close(together, whole, rtol=0, atol=bound)
    assert whole.abs().max() > 1e-4


def test_training_changes_nothing_of_earlier_tasks(unaligned):
    for index in (1, 2):
        before, after = unaligned[index - 1], unaligned[index]
        growing = {"e": index}
        growing |= dict.fromkeys(("head.weight", "head.bias", "entries"), 3 * index)
        growing |= dict.fromkeys(("tii.head.weight", "tii.head.bias"), 3 * index)
        for part in ("plain", "prompted"):
            growing |= {f"{part}.{name}": 3 * index for name in ("count", "mean", "spread")}
        for name, kept in growing.items():
            assert torch.equal(after[name][:kept], before[name]) and len(after[name]) > kept
        rest = {
            f"tii.{name}.{end}" for name in ("up", "down", "norm") for end in ("weight", "bias")
        }
        assert after.keys() == growing.keys() | rest
        assert all((after[name] != before[name]).any() for name in rest)


def test_both_classifiers_are_aligned_from_the_second_task_on(states, unaligned):
    def different(index: int) -> set[str]:
        a, b = states[index], unaligned[index]
        return {name for name in a if not torch.equal(a[name], b[name])}

    assert different(0) == set()
    ends = {f"tii.{part}.{end}" for part in ("up", "down", "norm", "head") for end in ENDS}
    assert different(1) == ends | {"head.weight", "head.bias"}
    for name in ("tii.head.weight", "head.weight"):
        assert (states[1][name] != unaligned[1][name]).any(dim=1).all()


def test_what_is_stored_of_a_class_is_without_and_with_the_prefix_of_its_task(states):
    task = tiny.task(1, count=3)
    learner, data = opened(1, states[1]), tiny.images(task)
    with torch.no_grad():
        query = forward.frozen_features(learner.network, data.pixels)
        prompted = learner._features(data.pixels, learner.e[[1]])
    for part, features in (("plain", query), ("prompted", prompted)):
        count, mean = states[1][f"{part}.count"], states[1][f"{part}.mean"]
        assert count.sum(dim=1).tolist() == [4] * 6
        for column in task.current:
            own = features[data.targets == column]
            weighted = (count[column][:, None] * mean[column]).sum(dim=0) / 4
            torch.testing.assert_close(weighted, own.mean(dim=0), rtol=0, atol=1e-5)


def test_covariances_are_those_of_the_features_of_a_class():
    changes: dict[str, Any] = {**SMALL, "statistics": "covariance"}
    state = tiny.train(HiDePrompt(**changes), tasks=2, depth=3)[1]
    task = tiny.task(1)
    learner, data = opened(1, state, statistics="covariance"), tiny.images(task)
    with torch.no_grad():
        rows = learner._features(data.pixels, learner.e[[1]])
    for column in task.current:
        expected = rows[data.targets == column].T.cov()
        found = state["prompted.spread"][column, 0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert state["plain.spread"].shape == (6, 1, tiny.WIDTH, tiny.WIDTH)


def test_variances_are_the_diagonal_of_the_covariance():
    full, own = mixture("covariance"), mixture("variance")
    assert own.count.tolist() == full.count.tolist() and torch.equal(own.mean, full.mean)
    assert own.spread.shape == (3, 1, 4)
    torch.testing.assert_close(own.spread[1:, 0], full.spread[1:, 0].diagonal(dim1=1, dim2=2))
    # The reference adds the jitter once, to what it stores; here it is added where it is used.
    torch.testing.assert_close(own.factors().square(), own.spread[1:, 0] + 1e-4)


def test_the_norm_of_the_task_inference_is_torchs_default_as_in_the_authors_code():
    made = HiDePrompt().learner(tiny.vit(6), tiny.task(0))
    assert made.tii.norm.eps == 1e-5


def test_learning_rates_and_their_schedule():
    method = HiDePrompt()
    learner = method.learner(tiny.vit(6), tiny.task(0))
    recipe = method.recipe(tiny.task(0))
    prefix, head, tii = recipe.optimizer(learner.groups()).param_groups
    assert prefix["lr"] == 0.03 * 24 / 256 and tii["lr"] == 0.0005 * 24 / 256
    assert head["lr"] == pytest.approx(prefix["lr"] / 10)
    assert [group["weight_decay"] for group in (prefix, head, tii)] == [0, 0, 0]
    assert sum(p.numel() for p in head["params"]) == 3 * (tiny.WIDTH + 1)
    assert [recipe.schedule(epoch, 50) for epoch in (0, 30, 31, 49)] == [1, 1, 0.1, 0.1]
    assert HiDePrompt(schedule="cosine").recipe(tiny.task(0)).schedule(25, 50) == pytest.approx(0.5)


def test_number_of_parameters():
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert isinstance(vit, VisionTransformer)
        made = HiDePrompt().learner(vit, tiny.task(9, 10, 10))
    assert made.e.numel() == 10 * 5 * 2 * 5 * 768
    assert sum(p.numel() for p in made.tii.parameters()) == 4 * 768**2 + 5 * 768 + 769 * 100
    assert sum(p.numel() for p in made.head.parameters()) == 769 * 100
    assert sum(b.numel() for b in made.prompted.buffers()) == 100 * 10 * (2 * 768 + 1)


def test_a_domain_incremental_stream_keeps_the_classes_of_each_task_apart():
    method, state = HiDePrompt(**SMALL), None
    tasks = [Task(index=i, count=2, current=(0, 1, 2), before=3 * i, seen=3) for i in range(2)]
    for index, task in enumerate(tasks):
        data = tiny.images(task, seed=index)
        state, _ = loop.train_task(method, tiny.vit(3), task, data, state, Settings(seed=0))
    assert state is not None
    assert state["entries"].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert state["tii.head.weight"].shape == (6, tiny.WIDTH)
    assert state["head.weight"].shape == (3, tiny.WIDTH)
    learner = tiny.opened(method, tasks[1], state, depth=3)
    assert isinstance(learner, HiDePromptLearner)
    with torch.no_grad():
        learner.tii.head.bias[4] += 100.0
    images, _, query = batch()
    assert learner.inferred(query).tolist() == [1] * 6
    assert learner.logits(images, query).shape == (6, 3)


def mixture(kind: gaussian_mixtures.Statistics = "centroids", width: int = 4) -> Mixtures:
    """Two entries: one of two far apart clouds, one of a single cloud."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(300, width, generator=draw) * torch.arange(1.0, width + 1) / width
    rows[:50] += 20.0
    rows[50:100] -= 20.0
    made = Mixtures(3, width, kind, 2)
    made.measure(rows, (torch.arange(300) >= 100).long(), 2)
    return made


def test_components_are_the_clouds_of_a_class():
    made = mixture()
    assert not made.count[0].any() and made.count[1].tolist() == [50, 50]
    assert sorted(made.mean[1].mean(dim=1).round().tolist()) == [-20, 20]
    spread = made.spread[1].sqrt().mean(dim=0)
    torch.testing.assert_close(spread, torch.arange(1.0, 5) / 4, rtol=0, atol=0.1)
    assert made.means().shape == (4, 4)
    full = mixture("covariance")
    assert full.count.tolist() == [[0], [100], [200]] and full.spread.shape == (3, 1, 4, 4)
    assert full.spread[1, 0].diagonal().min() > 300


@pytest.mark.parametrize(
    ("kind", "components"), [("centroids", 4), ("covariance", 2), ("variance", 2)]
)
def test_samples_have_the_moments_of_their_components(kind, components):
    made = mixture(kind)
    torch.manual_seed(0)
    drawn = list(made.samples(made.factors(), 5_000, 100))
    # No more than were asked of each component.
    assert [len(rows) for rows, _ in drawn] == [5_000] * components
    rows, entries = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    assert entries.bincount().tolist() == [0, 5_000 * components // 2, 5_000 * components // 2]
    own = rows[entries == 2]
    whole = made.mean[2].mean(dim=0)
    torch.testing.assert_close(own.mean(dim=0), whole, atol=0.03, rtol=0)
    if kind == "covariance":
        torch.testing.assert_close(own.T.cov(), made.spread[2, 0], atol=0.1, rtol=0)
    elif kind == "variance":
        torch.testing.assert_close(own.T.cov(), made.spread[2, 0].diag(), atol=0.1, rtol=0)
    else:
        near = rows[(rows - made.mean[1, 0]).norm(dim=1) < 10]
        torch.testing.assert_close(near.var(dim=0), made.spread[1, 0], atol=0.1, rtol=0)
    first = next(made.samples(made.factors(), 5_000, 1))
    # Batches are mixed.
    assert (first[1].bincount()[1:] > 2_000).all()


def test_a_centroid_of_a_single_row_is_left_out_unless_there_is_no_other():
    made = Mixtures(2, 2, "centroids", 2)
    rows = torch.tensor([[0.0, 0.0], [0.1, 0.0], [9.0, 9.0], [5.0, 5.0], [-5.0, 5.0]])
    made.measure(rows, torch.tensor([0, 0, 0, 1, 1]), 2)
    assert sorted(made.count[0].tolist()) == [1, 2] and made.count[1].tolist() == [1, 1]
    assert torch.equal(made.used()[0], made.count[0] == 2) and made.used()[1].all()
    assert len(made.means()) == 4 and made.factors().shape == (3, 2)
    # And fewer rows than centroids leave some away.
    one = Mixtures(1, 2, "centroids", 3)
    one.measure(rows[:1], torch.tensor([0]), 1)
    assert sorted(one.count[0].tolist()) == [0, 0, 1] and one.used().sum() == 1


def test_alignment_orders_what_local_losses_leave_unordered():
    made = Mixtures(6, 6, "covariance", 1)
    made.count.fill_(9)
    made.mean[:, 0] = 3 * torch.eye(6)
    made.spread[:, 0] = 0.01 * torch.eye(6)
    # Entries in another order than their columns, as in a stream of domains; the newer half of
    # the head is far louder.
    labels = torch.tensor([1, 0, 2, 3, 5, 4])
    head = torch.nn.Linear(6, 6)
    with torch.no_grad():
        head.weight.copy_(torch.eye(6)[labels])
        head.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 4.0, 4.0, 4.0]))
    assert head(made.means()).argmax(dim=1).tolist() != labels.tolist()
    torch.manual_seed(0)
    align(made, labels, head, list(head.parameters()), lr=0.1, epochs=10, size=32, steps=3)
    assert head(made.means()).argmax(dim=1).tolist() == labels.tolist()
    assert head.weight.grad is None


def test_a_backbone_with_too_few_blocks_is_refused():
    with pytest.raises(ValueError, match=r"last_block: must be below 4, the number .* got 4"):
        HiDePrompt().learner(tiny.vit(4), tiny.task(0))


def test_wrong_fields_are_named_together():
    with pytest.raises(HyperparameterError) as caught:
        HiDePrompt(first_block=3, last_block=2, prompt_momentum=1.0, centroids=0, tii_lr=0.0)
    names = [name for name, _ in caught.value.problems]
    assert names == ["tii_lr", "last_block", "prompt_momentum", "centroids"]
