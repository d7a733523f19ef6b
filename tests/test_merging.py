"""Merges: closed forms, laws that all of them keep, and what happens to unusual tensors."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftwork.methods.contracts.hyperparameters import HyperparameterError
from graftwork.methods.parts.averaging import lerp
from graftwork.operators import merging
from graftwork.operators.errors import Diverged, IncompatibleError
from graftwork.operators.merging import MERGES, fisher, means, model_stock, regmean, task_vectors
from graftwork.operators.merging.apply import PLAIN, Merged
from graftwork.operators.merging.contract import Merge
from graftwork.operators.merging.dare import drop
from graftwork.operators.merging.policy import Policy
from graftwork.operators.merging.readers import Finite, InMemory, TensorFile, to_bytes
from graftwork.operators.merging.slerp import slerp
from graftwork.operators.merging.ties import agreeing, ties
from graftwork.operators.merging.trim import cut, kept_count, trimmed

IDENTITY: dict[str, dict[str, Any]] = {
    "mean": {},
    "ema": {"decay": 0.3},
    "swa": {},
    "wise_ft": {"alpha": 1.0},
    "slerp": {},
    "fisher": {},
    "regmean": {},
    "task_arithmetic": {"scale": 1.0, "combine": "mean"},
    "magmax": {"scale": 1.0},
    "model_stock": {},
    "ties": {"density": 1.0},
    "dare": {"drop": 0.0},
}
"""Values with which several copies of a model are that model."""
MERGED = Policy(head="merge")
"""Classifiers are merged in the rows that all have, whatever the merge does to them."""
SYMMETRIC = ("mean", "fisher", "regmean", "task_arithmetic", "model_stock", "ties")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state(seed: int, classes: int = 4) -> dict[str, Tensor]:
    """A small model's tensors."""
    return {
        "layer.weight": normal(6, 5, seed=10 * seed),
        "layer.bias": normal(6, seed=10 * seed + 1),
        "scale": normal(seed=10 * seed + 2),
        "head.weight": normal(classes, 6, seed=10 * seed + 3),
        "half": normal(7, seed=10 * seed + 4).bfloat16(),
        "double": normal(3, 2, seed=10 * seed + 5).double(),
        "count": torch.tensor([seed, 7]),
        "flag": torch.tensor(bool(seed % 2)),
    }


def statistics(kind: str, seed: int) -> dict[str, Tensor] | None:
    if kind == "fisher":
        floats = {n: t for n, t in state(seed).items() if t.is_floating_point()}
        return {name: tensor.float() ** 2 for name, tensor in floats.items()}
    if kind == "gram":
        rows = {"layer.weight": normal(40, 5, seed=seed), "head.weight": normal(40, 6, seed=seed)}
        return {name: x.T @ x / 40 for name, x in rows.items()}
    return None


def merge_states(
    merge: Merge,
    states: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    statistics: Sequence[Mapping[str, Tensor]] | None = None,
    policy: Policy = PLAIN,
) -> dict[str, Tensor]:
    """The merged state of states in memory."""
    given = None if statistics is None else [InMemory(one) for one in statistics]
    models = [InMemory(one) for one in states]
    start = None if base is None else InMemory(base)
    return dict(Merged(merge, models, start, given, policy))


def merged(
    merge: Merge, states: Sequence[Mapping[str, Tensor]], seeds: Sequence[int] = ()
) -> dict[str, Tensor]:
    given = [statistics(merge.card.statistics, s) for s in seeds or range(1, len(states) + 1)]
    return merge_states(
        merge,
        states,
        state(0) if merge.card.base else None,
        [s for s in given if s is not None] or None,
    )


def close(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], rtol: float = 1e-5, atol: float = 1e-5
) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=atol)


# --- laws of all merges -----------------------------------------------------------------------


@pytest.mark.parametrize("name", MERGES)
def test_copies_of_a_model_are_that_model(name: str) -> None:
    copies = [state(3)] * 3
    close(merged(merging.build(name, IDENTITY[name]), copies), state(3), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(("density", "scale"), [(0.2, 1.0), (0.2, 0.55), (0.5, 1.0)])
def test_copies_under_ties_keep_their_largest_changes(density: float, scale: float) -> None:
    base, tuned = {"w": normal(10, 10)}, {"w": normal(10, 10, seed=1)}
    change = tuned["w"] - base["w"]
    kept = change.abs().flatten().topk(round(100 * density)).indices
    expected = base["w"].flatten().clone()
    expected[kept] += scale * change.flatten()[kept]
    found = merge_states(
        merging.build("ties", {"density": density, "scale": scale}), [tuned] * 2, base
    )
    torch.testing.assert_close(found["w"].flatten(), expected)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_the_order_of_models_does_not_matter(name: str) -> None:
    merge = merging.build(name, {})
    assert not merge.card.ordered
    # Of integers the newest is taken, whatever the order.
    same = {"count": torch.tensor([1, 7]), "flag": torch.tensor(True)}
    results = [
        merged(merge, [state(seed) | same for seed in seeds], seeds)
        for seeds in itertools.permutations((1, 2, 3))
    ]
    for result in results[1:]:
        close(result, results[0], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", ["ema", "slerp"])
def test_the_order_matters_where_the_card_says_so(name: str) -> None:
    merge = merging.build(name, {"slerp": {"alpha": 0.3}, "ema": {"decay": 0.3}}[name])
    assert merge.card.ordered
    one, two = (merged(merge, [state(a), state(b)]) for a, b in ((1, 2), (2, 1)))
    assert not torch.allclose(one["layer.weight"], two["layer.weight"])


@pytest.mark.parametrize("name", MERGES)
def test_inputs_stay_as_they_are(name: str) -> None:
    states, base = [state(1), state(2), state(3)], state(0)
    before = [{n: t.clone() for n, t in s.items()} for s in [*states, base]]
    merge = merging.build(name, {})
    given = [statistics(merge.card.statistics, s) or {} for s in (1, 2, 3)]
    kept = [{n: t.clone() for n, t in s.items()} for s in given]
    merge_states(merge, states, base, given)
    for now, then in zip([*states, base, *given], [*before, *kept], strict=True):
        assert all(torch.equal(now[n], then[n]) for n in then)


@pytest.mark.parametrize("name", MERGES)
def test_results_are_finite_and_keep_types_and_shapes(name: str) -> None:
    result = merged(merging.build(name, {}), [state(1), state(2), state(3)])
    for tensor_name, tensor in state(3).items():
        found = result[tensor_name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert bool(torch.isfinite(found).all())
    assert torch.equal(result["count"], state(3)["count"])  # integers of the newest model
    assert torch.equal(result["flag"], state(3)["flag"])


def test_the_mean_of_linear_models_gives_the_mean_output() -> None:
    states, x = [state(seed) for seed in (1, 2, 3)], normal(8, 5, seed=99)
    weight = merged(means.Mean(), states)["layer.weight"]
    outputs = torch.stack([x @ s["layer.weight"].T for s in states])
    torch.testing.assert_close(x @ weight.T, outputs.mean(0))


@pytest.mark.parametrize("name", MERGES)
def test_a_single_model_is_left_alone_where_a_merge_needs_more(name: str) -> None:
    merge = merging.build(name, {})
    result = merged(merge, [state(1)])
    if merge.card.least > 1 or name in ("mean", "ema", "swa"):
        assert all(torch.equal(result[n], t) for n, t in state(1).items())
    else:
        assert not torch.equal(result["layer.weight"], state(1)["layer.weight"])


# --- unusual tensors --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MERGES)
def test_a_head_that_grows_is_merged_where_all_have_rows(name: str) -> None:
    merge = merging.build(name, {})
    states = [state(1, classes=2), state(2, classes=3), state(3, classes=4)]
    base = state(0, classes=2)
    given = [statistics(merge.card.statistics, s) or {} for s in (1, 2, 3)]
    head = merge_states(merge, states, base, given, MERGED)["head.weight"]
    assert head.shape == (4, 6)
    shared = 3 if name == "slerp" else 2  # the newest two have three rows in common
    assert torch.equal(head[shared:], states[2]["head.weight"][shared:])
    assert not torch.equal(head[0], states[2]["head.weight"][0])
    if name not in ("fisher", "ties", "slerp"):  # other rows have a say, or are shared
        fewer = [s | {"head.weight": s["head.weight"][:2]} for s in states]
        expected = merge_states(merge, fewer, base, given, MERGED)["head.weight"]
        torch.testing.assert_close(head[:2], expected)
    newest = merge_states(merge, states, base, given, Policy(head="newest"))["head.weight"]
    assert torch.equal(newest, states[2]["head.weight"])
    # The rows of the first task alone would be scaled by what is added to a base.
    plain = merge_states(merge, states, base, given)["head.weight"]
    assert torch.equal(plain, newest if merge.card.base else head)


@pytest.mark.parametrize("name", [name for name in MERGES if merging.load(name).card.base])
def test_parts_of_later_tasks_are_not_measured_by_the_first_alone(name: str) -> None:
    """A part per task, as ESN has: all keep the size that training gave them."""
    merge = merging.build(name, {})
    base = {"body": normal(4), "parts.0.w": normal(4, seed=1)}
    states = [
        {"body": normal(4, seed=5 + t)} | {f"parts.{i}.w": normal(4, seed=9 + i) for i in range(t)}
        for t in (1, 2, 3)
    ]
    found = merge_states(merge, states, base)
    assert all(torch.equal(found[f"parts.{i}.w"], states[2][f"parts.{i}.w"]) for i in range(3))
    assert not torch.equal(found["body"], states[2]["body"])
    scaled = merge_states(merge, states, base, policy=MERGED)
    assert not torch.equal(scaled["parts.0.w"], states[2]["parts.0.w"])
    assert torch.equal(scaled["parts.2.w"], states[2]["parts.2.w"])


def test_rows_of_all_classes_have_one_measure_after_a_merge_of_task_vectors() -> None:
    """Ten tasks of one class: the first row was scaled, and the nine others were not."""
    rows = normal(10, 8, seed=1)
    base = {"head.weight": torch.zeros(1, 8)}
    states = [{"head.weight": rows[: task + 1]} for task in range(10)]
    for name, scaled in (("task_arithmetic", 3.0), ("dare", 1.0), ("wise_ft", 0.5)):
        merge = merging.build(name, {"drop": 0.0} if name == "dare" else {})
        assert torch.equal(merge_states(merge, states, base)["head.weight"], rows)
        found = merge_states(merge, states, base, policy=MERGED)["head.weight"]
        torch.testing.assert_close(found[0], scaled * rows[0])
        assert torch.equal(found[1:], rows[1:])


def test_a_head_of_one_size_is_newest_if_it_is_named() -> None:
    states = [state(1), state(2)]
    policy = Policy(head="newest", heads=frozenset({"head.weight"}))
    result = merge_states(means.Mean(), states, policy=policy)
    assert torch.equal(result["head.weight"], states[1]["head.weight"])
    torch.testing.assert_close(
        result["layer.bias"], (states[0]["layer.bias"] + states[1]["layer.bias"]) / 2
    )


def test_rows_are_those_of_the_model_that_has_them() -> None:
    states = [{"w": normal(4, 2, seed=1)}, {"w": normal(2, 2, seed=2)}]
    result = merge_states(means.Mean(), states)["w"]
    torch.testing.assert_close(result[:2], (states[0]["w"][:2] + states[1]["w"]) / 2)
    assert torch.equal(result[2:], states[0]["w"][2:])


@pytest.mark.parametrize("name", [n for n in MERGES if n != "wise_ft"])  # it has one model
def test_a_tensor_of_some_models_only_is_taken_as_it_is(name: str) -> None:
    merge = merging.build(name, {})
    extra = {"heads.1.weight": normal(2, 6, seed=77)}
    for states in ([state(1), state(2) | extra], [state(1) | extra, state(2)]):
        assert torch.equal(merged(merge, states)["heads.1.weight"], extra["heads.1.weight"])
        with pytest.raises(IncompatibleError, match=r"heads\.1\.weight is missing in model"):
            merge_states(
                merge, states, state(0), [statistics(merge.card.statistics, 1) or {}] * 2,
                Policy(same_names=True),
            )  # fmt: skip


def test_statistics_follow_a_mean_and_are_the_newest_otherwise() -> None:
    states, policy = [state(1), state(2)], Policy(statistics=frozenset({"layer.bias"}))
    biases = [s["layer.bias"] for s in states]

    def bias(name: str, **values: Any) -> Tensor:
        merge = merging.build(name, values)
        given = [statistics(merge.card.statistics, s) or {} for s in (1, 2)]
        for one in given:
            one.pop("layer.bias", None)  # nothing is measured of a statistic
        base = state(0) if merge.card.base else None
        return merge_states(merge, states, base, given, policy)["layer.bias"]

    for name in ("mean", "fisher", "regmean"):
        torch.testing.assert_close(bias(name), (biases[0] + biases[1]) / 2)
    torch.testing.assert_close(bias("ema", decay=0.9), 0.9 * biases[0] + 0.1 * biases[1])
    assert torch.equal(bias("ema", decay=0), biases[1])
    assert torch.equal(bias("ema", decay=1), biases[0])
    assert torch.equal(bias("swa", start=1), biases[1])
    torch.testing.assert_close(bias("slerp", alpha=0.3), 0.7 * biases[0] + 0.3 * biases[1])
    assert torch.equal(bias("wise_ft"), biases[1])  # before training there are no statistics
    for name in ("task_arithmetic", "ties", "magmax", "dare", "model_stock"):
        assert torch.equal(bias(name), biases[1])


@pytest.mark.parametrize("name", MERGES)
def test_counters_and_empty_tensors_are_the_newest(name: str) -> None:
    merge = merging.build(name, {})
    states = [state(s) | {"nothing": torch.empty(0, 3)} for s in (1, 2)]
    base = state(0) | {"nothing": torch.empty(0, 3)} if merge.card.base else None
    given = [statistics(merge.card.statistics, s) or {} for s in (1, 2)]
    policy = Policy(counters=frozenset({"layer.bias"}))
    found = merge_states(merge, states, base, given, policy)
    assert torch.equal(found["layer.bias"], states[1]["layer.bias"])
    assert found["nothing"].shape == (0, 3)


def test_what_has_no_start_is_averaged() -> None:
    base = state(0)
    del base["layer.bias"]
    states = [state(1), state(2)]
    result = merge_states(merging.build("task_arithmetic", {"scale": 2.0}), states, base)
    torch.testing.assert_close(
        result["layer.bias"], (states[0]["layer.bias"] + states[1]["layer.bias"]) / 2
    )


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"layer.weight": torch.zeros(6, 4)}, "layer.weight [6, 5], [6, 4]"),
        ({"layer.weight": torch.zeros(6)}, "layer.weight [6, 5], [6]"),
        ({"scale": torch.zeros(1)}, "scale [], [1]"),
        ({"count": torch.zeros(2)}, "count [2], [2]"),
    ],
)
def test_models_that_do_not_fit_are_refused_with_names(other: dict[str, Tensor], said: str) -> None:
    with pytest.raises(IncompatibleError) as caught:
        merge_states(means.Mean(), [state(1), state(2) | other])
    assert str(caught.value) == (
        f"models do not fit together (1 tensors differ): {said}; "
        "merge models of one method and one backbone"
    )


def test_many_differences_are_shortened() -> None:
    one = {f"w{i}": torch.zeros(2, 2) for i in range(9)}
    two = {f"w{i}": torch.zeros(2, 3) for i in range(9)}
    with pytest.raises(IncompatibleError, match=r"\(9 tensors differ\): w0 .* and 4 more"):
        merge_states(means.Mean(), [one, two])


def test_what_a_card_asks_for_must_be_there() -> None:
    with pytest.raises(ValueError, match="TIES needs the state before training"):
        merge_states(merging.build("ties", {}), [state(1)])
    with pytest.raises(ValueError, match="Fisher merging needs statistics"):
        merge_states(merging.build("fisher", {}), [state(1), state(2)])


# --- means ------------------------------------------------------------------------------------


def test_the_start_of_an_ema_has_weight_d_to_the_n() -> None:
    start, rest = torch.ones(3).double(), torch.zeros(3).double()
    for decay, steps, expected in ((0.9999, 1000, 0.9048), (0.9999, 5000, 0.6065), (0.5, 3, 0.125)):
        found = means.ema([start] + [rest] * steps, decay)
        assert float(found[0]) == pytest.approx(decay**steps, rel=1e-9)
        assert float(found[0]) == pytest.approx(expected, abs=1e-4)
    models = [normal(5, seed=s) for s in range(3)]
    assert torch.equal(means.ema(models, 0.0), models[2])
    assert torch.equal(means.ema(models, 1.0), models[0])


def test_swa_averages_every_nth_model() -> None:
    models = [{"w": torch.full((2,), float(value))} for value in (1, 10, 100, 1000, 10000)]

    def swa(count: int, **values: int) -> float:
        return float(merge_states(merging.build("swa", values), models[:count])["w"][0])

    assert swa(5) == pytest.approx(11111 / 5)
    assert swa(5, start=1, every=2) == (10 + 1000) / 2
    assert swa(3, start=1, every=2) == 10
    assert swa(1, start=1) == 1  # nothing to average yet


def test_ends_of_an_interpolation_are_exact() -> None:
    start, end = torch.tensor([1.0, math.inf, 3.3]), torch.tensor([0.1, 2.0, -math.inf])
    for function in (lerp, slerp):
        assert torch.equal(function(start, end, 0.0), start)
        assert torch.equal(function(start, end, 1.0), end)
        assert function(start, end, 1.0).data_ptr() != end.data_ptr()
    states, base = [state(1), state(2)], state(0)
    none = merge_states(merging.build("wise_ft", {"alpha": 0.0}), states, base)
    whole = merge_states(merging.build("wise_ft", {"alpha": 1.0}), states, base)
    for name, tensor in states[1].items():
        if tensor.is_floating_point():
            assert torch.equal(none[name], base[name])
        assert torch.equal(whole[name], tensor)


# --- SLERP ------------------------------------------------------------------------------------


def test_slerp_goes_along_the_arc() -> None:
    start, end = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for alpha in (0.25, 0.5, 0.9):
        angle = alpha * math.pi / 2
        expected = torch.tensor([math.cos(angle), math.sin(angle)])
        torch.testing.assert_close(slerp(start, end, alpha), expected)
    a, b = normal(3, 4, seed=1), normal(3, 4, seed=2)
    torch.testing.assert_close(slerp(a, b, 0.3), slerp(b, a, 0.7))


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0])
def test_slerp_of_parallel_vectors_is_straight(factor: float) -> None:
    start = normal(6, seed=1)
    torch.testing.assert_close(slerp(start, factor * start, 0.25), (0.75 + 0.25 * factor) * start)


def test_slerp_with_a_vector_without_direction_is_at_a_right_angle() -> None:
    start, zero = normal(6, seed=1), torch.zeros(6)
    torch.testing.assert_close(slerp(start, zero, 0.5), math.sqrt(0.5) * start)
    torch.testing.assert_close(slerp(zero, start, 0.25), math.sin(math.pi / 8) * start)
    assert torch.equal(slerp(zero, zero, 0.5), zero)


# --- Fisher -----------------------------------------------------------------------------------


def test_fisher_weights_each_entry() -> None:
    a, b = torch.tensor([1.0, 2.0, 5.0, 7.0]), torch.tensor([3.0, 4.0, 9.0, 1.0])
    f, g = torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([3.0, 2.0, 0.0, 0.0])
    found = fisher.fisher([a, b], [f, g])
    assert found.tolist() == [2.5, 4.0, 5.0, 4.0]  # nobody knows the last: the mean
    weighted = fisher.fisher([a, b], [torch.ones(4), torch.ones(4)], weights=[1.0, 3.0])
    torch.testing.assert_close(weighted, 0.25 * a + 0.75 * b)
    tiny = fisher.fisher([a, b], [f * 1e-44, g * 1e-44])
    assert tiny[0] == pytest.approx(2.5, rel=0.1) and bool(torch.isfinite(tiny).all())


def test_equal_fishers_give_the_mean_and_floors_keep_it_finite() -> None:
    states = [state(1), state(2)]
    same = [{n: torch.full(t.shape, 0.3) for n, t in state(0).items()}] * 2
    close(
        merge_states(merging.build("fisher", {}), states, statistics=same),
        merge_states(means.Mean(), states),
    )
    nothing = [{n: torch.zeros(t.shape) for n, t in state(0).items()}] * 2
    for floor in (0.0, 1e-6):
        close(
            merge_states(merging.build("fisher", {"floor": floor}), states, statistics=nothing),
            merge_states(means.Mean(), states),
        )


def test_normalising_takes_the_scale_out_of_a_fisher() -> None:
    states = [state(1), state(2)]
    given = [statistics("fisher", 1) or {}, statistics("fisher", 2) or {}]
    larger = [given[0], {name: 1000 * tensor for name, tensor in given[1].items()}]
    merge = merging.build("fisher", {"normalise": True})
    close(
        merge_states(merge, states, statistics=larger),
        merge_states(merge, states, statistics=given),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip
    assert merging.build("fisher", {}) == merge  # as both references do
    plain = replace(merge, normalise=False)
    one = merge_states(plain, states, statistics=larger)["layer.weight"]
    assert not torch.allclose(one, merge_states(merge, states, statistics=larger)["layer.weight"])


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("floor", [0.0, 1e-6, 0.5])
def test_equal_fishers_are_equal_whatever_the_number_of_classes(
    normalise: bool, floor: float
) -> None:
    """Rows of later classes are merged with nothing, and have no say in how much a model counts."""
    states = [{"w": torch.zeros(2, 3)}, {"w": torch.ones(400, 3)}]
    ones = [{"w": torch.ones(s["w"].shape)} for s in states]
    merge = merging.build("fisher", {"normalise": normalise, "floor": floor})
    found = merge_states(merge, states, statistics=ones)["w"]
    assert found[:2].tolist() == [[0.5] * 3] * 2 and bool((found[2:] == 1).all())


# --- RegMean ----------------------------------------------------------------------------------


def test_regmean_is_least_squares_on_the_data_of_all_models() -> None:
    """The weight whose outputs are nearest to those of every model on its own inputs."""
    inputs = [normal(50, 5, seed=1), normal(50, 5, seed=2) * torch.tensor([3.0, 1, 1, 0.2, 1])]
    weights = [normal(4, 5, seed=3), normal(4, 5, seed=4)]
    grams = [x.T @ x / len(x) for x in inputs]
    found = regmean.regmean(weights, grams, off_diagonal=1.0, ridge=1e-12)
    outputs = torch.cat([x @ w.T for x, w in zip(inputs, weights, strict=True)])
    expected = np.linalg.lstsq(torch.cat(inputs).numpy(), outputs.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    # Without its off-diagonal entries a Gram matrix weighs each input by its own strength.
    diagonal = regmean.regmean(weights, grams, off_diagonal=0.0, ridge=1e-12)
    strengths = [gram.diagonal() for gram in grams]
    expected = sum(s * w for s, w in zip(strengths, weights, strict=True)) / sum(strengths)
    torch.testing.assert_close(diagonal, expected, rtol=1e-4, atol=1e-5)


def test_regmean_with_fewer_rows_than_inputs_is_finite() -> None:
    weights = [normal(4, 5, seed=3), normal(4, 5, seed=4)]
    x = normal(2, 5, seed=1)
    found = regmean.regmean(weights, [x.T @ x] * 2, off_diagonal=1.0, ridge=1e-6)
    torch.testing.assert_close(found, (weights[0] + weights[1]) / 2, rtol=1e-4, atol=1e-5)
    none = regmean.regmean(weights, [torch.zeros(5, 5)] * 2, off_diagonal=1.0, ridge=1e-6)
    torch.testing.assert_close(none, (weights[0] + weights[1]) / 2)


# --- task vectors -----------------------------------------------------------------------------


def test_task_arithmetic_adds_negates_and_averages() -> None:
    base, models = normal(6), [normal(6, seed=seed) for seed in (1, 2, 3)]
    found = task_vectors.task_arithmetic(models, base, 0.3)
    torch.testing.assert_close(found, base + 0.3 * sum(m - base for m in models))
    mean = task_vectors.task_arithmetic(models, base, 1.0, "mean")
    torch.testing.assert_close(mean, torch.stack(models).mean(0))
    torch.testing.assert_close(
        task_vectors.task_arithmetic(models[:1], base, -1.0), 2 * base - models[0]
    )


def test_magmax_takes_the_largest_change_and_ties_go_to_the_later() -> None:
    base = torch.zeros(4)
    one, two = torch.tensor([1.0, -5.0, 2.0, 0.0]), torch.tensor([-1.0, 3.0, 4.0, 0.0])
    assert task_vectors.magmax([one, two], base, 1.0).tolist() == [-1.0, -5.0, 4.0, 0.0]
    assert task_vectors.magmax([two, one], base, 1.0).tolist() == [1.0, -5.0, 4.0, 0.0]
    shifted = task_vectors.magmax([one + 7, two + 7], base + 7, 0.5)
    assert shifted.tolist() == [6.5, 4.5, 9.0, 7.0]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_follows_its_formula(count: int) -> None:
    base, models = normal(20), [normal(20, seed=seed) + 1 for seed in range(1, count + 1)]
    vectors = [(m - base).numpy() for m in models]
    cosine = np.mean(
        [
            a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            for a, b in itertools.combinations(vectors, 2)
        ]
    )
    t = float(count * cosine / (1 + (count - 1) * cosine))
    expected = t * torch.stack(models).mean(0) + (1 - t) * base
    assert 0 < t < 1
    torch.testing.assert_close(model_stock.model_stock(models, base), expected.float())


def test_model_stock_stays_at_the_start_for_opposite_changes() -> None:
    base, change = normal(9), normal(9, seed=1)
    assert torch.equal(model_stock.model_stock([base + change, base - change], base), base)
    assert torch.equal(model_stock.model_stock([base, base.clone()], base), base)
    assert [model_stock.ratio(c, 2) for c in (-1.0, 0.0, 1.0, 1.5)] == [0.0, 0.0, 1.0, 1.0]
    # One of two did not move: no angle, and no reason to move.
    assert torch.equal(model_stock.model_stock([base + change, base.clone()], base), base)


# --- TIES -------------------------------------------------------------------------------------


def test_ties_of_one_model_with_everything_is_that_model() -> None:
    base, model = normal(50), normal(50, seed=1)
    torch.testing.assert_close(ties([model], base, density=1.0, scale=1.0), model)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.9, 1.0])
def test_exactly_k_entries_stay(share: float) -> None:
    """A recipe with `kthvalue` keeps one more (3 of 10 for 0.2) and fails for all of them."""
    base, model = torch.zeros(10), torch.arange(1.0, 11.0)
    found = ties([model], base, density=share)
    assert int((found != 0).sum()) == int(10 * share)
    assert found.tolist() == [v if v > 10 - 10 * share + 1e-6 else 0 for v in model.tolist()]


def test_a_share_of_a_tensor_is_rounded_down_to_one_at_least() -> None:
    model = torch.arange(1.0, 11.0)
    assert [kept_count(share, 10) for share in (0.01, 0.25, 0.29, 0.99, 1.0)] == [1, 2, 2, 9, 10]
    for merge in (ties([model], torch.zeros(10), density=0.27), ties([model], model, density=0.27)):
        assert int((merge != 0).sum()) in (2, 10)
    assert ties([torch.empty(0)], torch.empty(0), density=0.2).shape == (0,)


def test_ties_elects_signs_and_averages_what_agrees() -> None:
    base = torch.zeros(4)
    vectors = [
        torch.tensor([3.0, 1.0, -2.0, 0.0]),
        torch.tensor([1.0, -2.0, -4.0, 0.0]),
        torch.tensor([-2.0, -2.0, 1.0, 0.0]),
    ]
    assert ties(vectors, base, density=1.0).tolist() == [2.0, -2.0, -3.0, 0.0]
    assert ties(vectors, base, density=1.0, combine="sum").tolist() == [4.0, -4.0, -6.0, 0.0]
    assert ties(vectors, base, density=1.0, combine="max").tolist() == [3.0, -2.0, -4.0, 0.0]
    assert ties(vectors, base + 1, density=1.0, scale=0.5).tolist() == pytest.approx(
        (1 + 0.5 * agreeing([v - 1 for v in vectors], "mean")).tolist()
    )


def test_vectors_that_cancel_take_the_sign_of_the_majority() -> None:
    down = [torch.tensor([2.0, -1.0, -1.0]), torch.tensor([-2.0, -1.0, -1.0])]
    assert agreeing(down, "mean", lambda: -1.0).tolist() == [-2.0, -1.0, -1.0]
    assert agreeing(down, "mean").tolist() == [2.0, -1.0, -1.0]
    # Of the whole model: another tensor decides.
    base = {"a": torch.zeros(1), "b": torch.zeros(3)}
    states = [{"a": torch.tensor([s * 2.0]), "b": torch.full((3,), -1.0)} for s in (1, -1)]
    whole = merge_states(merging.build("ties", {"density": 1.0}), states, base)
    assert whole["a"].tolist() == [-2.0]
    alone = merge_states(merging.build("ties", {"density": 1.0, "trim": "tensor"}), states, base)
    assert alone["a"].tolist() == [2.0]


def test_trimming_the_model_and_trimming_tensors_differ() -> None:
    base = {"small": torch.zeros(10), "large": torch.zeros(10)}
    model = {"small": torch.arange(1.0, 11.0) / 100, "large": torch.arange(1.0, 11.0)}

    def kept(trim: str) -> dict[str, int]:
        merge = merging.build("ties", {"density": 0.2, "trim": trim})
        return {n: int((t != 0).sum()) for n, t in merge_states(merge, [model], base).items()}

    assert kept("global") == {"small": 0, "large": 4}
    assert kept("tensor") == {"small": 2, "large": 2}


def test_trimming_the_model_is_topk_of_one_vector() -> None:
    base = {f"w{i}": normal(7, i + 1, seed=i) for i in range(6)}
    states = [
        {n: t + normal(*t.shape, seed=50 + 10 * s + i) for i, (n, t) in enumerate(base.items())}
        for s in range(3)
    ]
    flat = torch.cat([t.flatten() for t in base.values()])
    vectors = [torch.cat([t.flatten() for t in s.values()]) - flat for s in states]
    count = int(0.3 * len(flat))
    for vector in vectors:
        vector[vector.abs().argsort(descending=True)[count:]] = 0
    expected = flat + 0.55 * agreeing(vectors, "mean")
    found = merge_states(merging.build("ties", {"density": 0.3, "scale": 0.55}), states, base)
    torch.testing.assert_close(torch.cat([t.flatten() for t in found.values()]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 17, 500, 999, 1000])
def test_a_cut_is_the_kth_largest_magnitude(dtype: torch.dtype, count: int) -> None:
    vector = (normal(1000) * 10 ** (normal(1000, seed=1) * 4)).to(dtype)
    parts = vector.split([1, 99, 900])
    at = cut(lambda: iter(parts), count)
    assert at.threshold == float(vector.abs().sort(descending=True).values[count - 1])
    assert at.equal == 1
    assert int((trimmed(vector, at) != 0).sum()) == count


def test_equal_magnitudes_stay_from_the_front() -> None:
    vector = torch.tensor([1.0, -2.0, 2.0, 3.0, -2.0, 0.0])
    at = cut(lambda: iter([vector]), 3)
    assert (at.threshold, at.equal) == (2.0, 2)
    assert trimmed(vector, at).tolist() == [0, -2, 2, 3, 0, 0]
    base = {"a": torch.zeros(3), "b": torch.zeros(3)}
    model = {"a": vector[:3], "b": vector[3:]}
    merge = merging.build("ties", {"density": 0.5})
    found = merge_states(merge, [model], base)
    assert [*found["a"].tolist(), *found["b"].tolist()] == [0, -2, 2, 3, 0, 0]


# --- DARE -------------------------------------------------------------------------------------


def test_dropping_keeps_the_expectation() -> None:
    vector = normal(10, seed=3)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([drop(vector, 0.7, generator) for _ in range(2000)])
    kept = draws[draws != 0].numel() / draws.numel()
    assert kept == pytest.approx(0.3, abs=0.01)
    scale = vector.abs() * math.sqrt(0.7 / 0.3 / 2000)
    assert bool(((draws.mean(0) - vector).abs() < 4 * scale).all())
    torch.testing.assert_close(draws[draws != 0].unique(), (vector / 0.3).unique())


def test_draws_depend_on_model_and_name_alone() -> None:
    names = ("a", "b", "c")
    base = {n: torch.zeros(40) for n in names}
    models = [{n: torch.ones(40) for n in names} for _ in range(2)]
    merge = merging.build("dare", {"drop": 0.5})
    whole = merge_states(merge, models, base)
    part = merge_states(merge, [{"b": m["b"]} for m in models], base)
    assert torch.equal(part["b"], whole["b"])
    assert not torch.equal(whole["a"], whole["b"])
    assert sorted(set(whole["a"].tolist())) == [0, 1, 2]  # both dropped, one, none
    other = merge_states(replace(merge, seed=1), models, base)
    assert not torch.equal(other["a"], whole["a"])


def test_dare_combines_as_it_is_told() -> None:
    base, models = {"w": normal(6, 5), "b": normal(6)}, [
        {"w": normal(6, 5, seed=s), "b": normal(6, seed=s)} for s in (1, 2)
    ]  # fmt: skip
    for combine, same in (("mean", "mean"), ("sum", "sum")):
        found = merge_states(
            merging.build("dare", {"drop": 0.0, "combine": combine, "scale": 0.7}), models, base
        )
        expected = merging.build("task_arithmetic", {"scale": 0.7, "combine": same})
        close(found, merge_states(expected, models, base))
    found = merge_states(merging.build("dare", {"drop": 0.0, "combine": "ties"}), models, base)
    tensor = {"trim": "tensor"}
    close(found, merge_states(merging.build("ties", {"density": 1.0, **tensor}), models, base))
    trims = merging.build("dare", {"drop": 0.0, "combine": "ties", "density": 0.3})
    expected = merging.build("ties", {"density": 0.3, **tensor})
    close(merge_states(trims, models, base), merge_states(expected, models, base))
    only = merge_states(merging.build("dare", {"only_matrices": True}), models, base)
    torch.testing.assert_close(only["b"], (models[0]["b"] + models[1]["b"]) / 2)
    assert not torch.allclose(only["w"], (models[0]["w"] + models[1]["w"]) / 2)


# --- NaN and infinity -------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", MERGES)
def test_what_is_not_finite_stays_visible(name: str, wrong: float, which: int) -> None:
    """A merge that took the other model's entry, or the start, would look like a good one."""
    states = [state(1), state(2)]
    states[which] = states[which] | {"layer.weight": states[which]["layer.weight"].clone()}
    states[which]["layer.weight"][2, 3] = wrong
    found = merged(merging.build(name, {}), states)["layer.weight"]
    if name == "wise_ft" and which == 0:
        assert bool(torch.isfinite(found).all())  # it has the newest model only
    else:
        assert not math.isfinite(float(found[2, 3]))


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_statistics_that_are_not_finite_stay_visible(name: str) -> None:
    merge = merging.build(name, {})
    given = [statistics(merge.card.statistics, s) or {} for s in (1, 2)]
    given[0]["layer.weight"][0, 0] = torch.nan
    found = merge_states(merge, [state(1), state(2)], None, given)["layer.weight"]
    assert bool(found.isnan().any())


def test_an_average_of_nothing_but_one_model_does_not_read_the_others() -> None:
    bad, good = torch.tensor([torch.inf, 1.0]), torch.tensor([3.0, 4.0])
    assert torch.equal(means.ema([bad, good], 0.0), good)
    assert torch.equal(means.ema([good, bad], 1.0), good)


def test_a_model_that_is_not_finite_is_named(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        given = {"w": torch.tensor([1.0, torch.nan]).to(dtype), "n": torch.tensor([1])}
        reader = Finite(InMemory(given), "ema: model 2 of 3")
        assert int(reader.read("n")) == 1
        with pytest.raises(Diverged, match="ema: model 2 of 3: w is NaN or infinite"):
            reader.read("w")


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in MERGES if n not in ("fisher", "regmean")])
def test_merging_files_is_merging_states(name: str, tmp_path: Path) -> None:
    merge, states = merging.build(name, {}), [state(1), state(2), state(3)]
    places = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for place, one in zip(places, states, strict=True):
        save_file(one, place)
    save_file(state(0), tmp_path / "base.safetensors")
    base = TensorFile(tmp_path / "base.safetensors") if merge.card.base else None
    whole = Merged(merge, [TensorFile(place) for place in places], base)
    (tmp_path / "out.safetensors").write_bytes(to_bytes(whole.specs, whole))
    found, expected = load_file(tmp_path / "out.safetensors"), merged(merge, states)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_tensors_are_written_and_read_as_they_were(tmp_path: Path) -> None:
    tensors = state(1) | {"empty": torch.zeros(0, 3), "bytes": torch.arange(5).to(torch.uint8)}
    reader = InMemory(tensors)
    path = tmp_path / "x.safetensors"
    names = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    path.write_bytes(to_bytes(reader.specs, ((n, tensors[n]) for n in names)))
    loaded = load_file(path)
    file = TensorFile(path)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and torch.equal(file.read(name), tensor)
        assert file.read(name).dtype == tensor.dtype
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is shorter than its header says"):
        TensorFile(path)


def test_files_of_other_programs_are_read_too(tmp_path: Path) -> None:
    """Tensors that do not stand at multiples of their size."""
    text = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "w": {"dtype": "F32", "shape": [2, 1], "data_offsets": [3, 11]},
        }
    ).encode()
    content = bytes([1, 2, 3]) + np.array([1.5, -2], np.float32).tobytes()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + content)
    file = TensorFile(tmp_path / "x")
    assert file.read("odd").tolist() == [1, 2, 3] and file.read("w").tolist() == [[1.5], [-2]]


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64],
    ids=str,
)
def test_files_of_rarer_types_are_merged(dtype: torch.dtype, tmp_path: Path) -> None:
    values = [[2, 6], [4, 8]]
    for number, own in enumerate(values):
        save_file({"w": torch.tensor(own).to(dtype)}, tmp_path / f"{number}.safetensors")
    models = [TensorFile(tmp_path / f"{number}.safetensors") for number in range(2)]
    found = dict(Merged(means.Mean(), models))
    assert found["w"].dtype == dtype
    # Of integers there is no mean: the newest model has them.
    assert found["w"].float().tolist() == ([3, 7] if dtype.is_floating_point else [4, 8])
    path = tmp_path / "merged.safetensors"
    path.write_bytes(to_bytes({"w": models[0].specs["w"]}, found.items()))
    assert torch.equal(load_file(path)["w"].float(), found["w"].float())


def test_a_type_that_cannot_be_merged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "complex.safetensors"
    save_file({"w": torch.ones(2), "z": torch.ones(2, dtype=torch.complex64)}, path)
    with pytest.raises(IncompatibleError, match="z is of type C64, which cannot be merged; store"):
        TensorFile(path)


def test_a_merge_reads_each_tensor_when_its_turn_comes(tmp_path: Path) -> None:
    places = []
    for number in range(3):
        places.append(tmp_path / f"{number}.safetensors")
        save_file({f"w{i}": normal(4, seed=10 * number + i) for i in range(5)}, places[-1])
    read: list[str] = []

    class Watched(TensorFile):
        def read(self, name: str) -> Tensor:
            read.append(name)
            return super().read(name)

    result = Merged(means.Mean(), [Watched(place) for place in places])
    for count, (name, _) in enumerate(result, start=1):
        assert len(read) == 3 * count and read[-3:] == [name] * 3


# --- names, fields, cards ---------------------------------------------------------------------


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_explains_itself(name: str) -> None:
    kind = merging.load(name)
    assert kind.card.paper.startswith("https://") and kind.card.paper in (kind.__doc__ or "")
    for field in merging.fields(name):
        assert field.doc and field.default is not None
    assert kind() == merging.build(name, {})


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("ties", {"density": 0}, "density: must be above 0 and at most 1, got 0.0"),
        ("ties", {"densty": 1}, "densty: must be a field of ties (did you mean density?), got 1"),
        ("ties", {"trim": "all"}, "trim: must be one of global, tensor, got 'all'"),
        ("dare", {"drop": 1.0}, "drop: must be at least 0 and below 1, got 1.0"),
        ("dare", {"seed": -1}, "seed: must be at least 0, got -1"),
        ("ema", {"decay": 2}, "decay: must be in 0..1, got 2.0"),
        ("swa", {"every": 0}, "every: must be at least 1, got 0"),
        ("swa", {"start": -1}, "start: must be at least 0, got -1"),
        ("wise_ft", {"alpha": -0.1}, "alpha: must be in 0..1, got -0.1"),
        ("slerp", {"straight_above": 1.0}, "straight_above: must be at least 0 and below 1, got 1"),
        ("fisher", {"images": 0}, "images: must be at least 1, got 0"),
        ("regmean", {"ridge": 0.0}, "ridge: must be above 0, got 0.0"),
        ("regmean", {"off_diagonal": 1.1}, "off_diagonal: must be in 0..1, got 1.1"),
        ("magmax", {"scale": 0.0}, "scale: must be above 0, got 0.0"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(name: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(HyperparameterError) as caught:
        merging.build(name, values)
    assert str(caught.value).startswith(said)


def test_an_unknown_merge_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean ties"):
        merging.build("tise", {})
