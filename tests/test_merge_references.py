"""Merges against the formulas of mergekit and fusion_bench, written once more in numpy.

Their own code was run beside ours on the same tensors, see docs/parity.md: these are the formulas
that it follows.
"""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from graftwork.operators import merging
from graftwork.operators.merging.apply import Merged
from graftwork.operators.merging.readers import InMemory

Array = np.ndarray
SHAPE = (24, 17)


def models(seed: int, count: int = 4, common: float = 1.0) -> tuple[list[Array], Array]:
    """Models around a start, which have gone the same way in part."""
    draw = np.random.default_rng(seed)
    base, way = draw.normal(size=SHAPE), draw.normal(size=SHAPE)
    return [base + common * way + 0.5 * draw.normal(size=SHAPE) for _ in range(count)], base


def merged(
    name: str,
    given: Sequence[Array],
    base: Array | None = None,
    statistics: Sequence[Array] | None = None,
    **values: object,
) -> Array:
    def reader(array: Array) -> InMemory:
        return InMemory({"w": torch.from_numpy(array)})

    found = Merged(
        merging.build(name, values),
        [reader(array) for array in given],
        None if base is None else reader(base),
        None if statistics is None else [reader(array) for array in statistics],
    )
    return found.read("w").numpy()


def close(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def largest(vector: Array, count: int) -> Array:
    kept = np.zeros(vector.size)
    places = np.argsort(-np.abs(vector.ravel()), kind="stable")[:count]
    kept[places] = vector.ravel()[places]
    return kept.reshape(vector.shape)


def consensus(vectors: Array) -> Array:
    """mergekit's: of each entry the mean of those with the sign of the sum, 0 counting as +."""
    sign = np.where(vectors.sum(axis=0) >= 0, 1, -1)
    agree = np.sign(vectors) == sign
    return (vectors * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.37, 0.999, 1.0])
def test_ties_of_each_tensor_is_that_of_mergekit(density: float) -> None:
    given, base = models(1, common=0.1)
    count = int(density * base.size)
    trimmed = np.stack([largest(model - base, count) for model in given])
    close(merged("ties", given, base, density=density, trim="tensor"), base + consensus(trimmed))


@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
def test_ties_of_the_whole_model_is_that_of_its_authors(combine: str) -> None:
    """But for one entry: theirs keeps k + 1 of the largest, see `kept_count`."""
    given, base = models(2, common=0.0)
    vectors = np.stack([largest(model - base, int(0.3 * base.size)) for model in given])
    sign = np.sign(vectors.sum(axis=0))
    sign[sign == 0] = np.sign(sign.sum())
    agree = np.where(sign > 0, vectors > 0, vectors < 0)
    expected = {
        "mean": (vectors * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1),
        "sum": (vectors * agree).sum(axis=0),
        "max": np.abs(vectors * agree).max(axis=0) * sign,
    }[combine]
    close(merged("ties", given, base, density=0.3, combine=combine), base + expected)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["any", "zero", "near"])
def test_slerp_is_that_of_mergekit(alpha: float, kind: str) -> None:
    [start, other], _ = models(3, count=2)
    end = {"any": other, "zero": 0 * other, "near": start + 1e-3 * other}[kind]
    norms = [np.linalg.norm(array) for array in (start, end)]
    cosine = (start * end).sum() / (norms[0] * norms[1]) if all(norms) else 0.0
    if abs(cosine) > 0.9995:
        expected = (1 - alpha) * start + alpha * end
    else:
        angle = math.acos(cosine)
        weights = [math.sin(part * angle) / math.sin(angle) for part in (1 - alpha, alpha)]
        expected = weights[0] * start + weights[1] * end
    close(merged("slerp", [start, end], alpha=alpha), expected)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_is_that_of_mergekit_where_changes_agree(count: int) -> None:
    given, base = models(4, count=count)
    vectors = [(model - base).ravel() for model in given]
    cosines = [
        a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        for i, a in enumerate(vectors)
        for b in vectors[i + 1 :]
    ]
    cosine = float(np.mean(cosines))
    assert cosine > 0.5
    share = count * cosine / (1 + (count - 1) * cosine)
    close(merged("model_stock", given, base), share * np.mean(given, axis=0) + (1 - share) * base)


def test_magmax_is_that_of_its_authors_and_of_fusion_bench() -> None:
    given, base = models(5, common=0.0)
    vectors = np.stack([model - base for model in given])
    place = np.abs(vectors).argmax(axis=0)
    expected = np.take_along_axis(vectors, place[None], axis=0)[0]
    close(merged("magmax", given, base, scale=0.5), base + 0.5 * expected)


@pytest.mark.parametrize("normalise", [True, False])
def test_fisher_is_that_of_fusion_bench_without_its_floor(normalise: bool) -> None:
    given, _ = models(6)
    draw = np.random.default_rng(7)
    measured = [draw.normal(size=SHAPE) ** 2 * 10.0**number for number in range(4)]
    weights = [1 / np.linalg.norm(one) if normalise else 1.0 for one in measured]
    parts = list(zip(weights, measured, given, strict=True))
    expected = np.asarray(sum(w * f * m for w, f, m in parts) / sum(w * f for w, f, _ in parts))
    found = merged("fisher", given, None, measured, floor=0.0, normalise=normalise)
    close(found, expected)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
def test_regmean_is_that_of_fusion_bench(off_diagonal: float) -> None:
    given, _ = models(8)
    draw = np.random.default_rng(9)
    rows = [draw.normal(size=(60, SHAPE[1])) for _ in given]
    grams = [x.T @ x / 60 for x in rows]
    reduced = [off_diagonal * g + (1 - off_diagonal) * np.diag(np.diag(g)) for g in grams]
    right = sum(g @ w.T for g, w in zip(reduced, given, strict=True))
    expected = (np.linalg.inv(sum(reduced)) @ right).T
    found = merged("regmean", given, None, grams, off_diagonal=off_diagonal, ridge=1e-14)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-7)


def test_dare_under_ties_is_that_of_mergekit_and_trims_as_its_authors_do() -> None:
    from graftwork.operators.merging.dare import dare, drop

    given, base = models(10, common=0.1)
    start, tensors = torch.from_numpy(base), [torch.from_numpy(model) for model in given]

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in range(len(given))]

    dropped: list[Tensor] = [
        drop(tensor - start, 0.5, generator)
        for tensor, generator in zip(tensors, generators(), strict=True)
    ]
    vectors = np.stack([vector.numpy() for vector in dropped])
    for density in (1.0, 0.2):
        kept = np.stack([largest(vector, int(density * base.size)) for vector in vectors])
        found = dare(
            tensors, start, generators(), share=0.5, scale=1.0, combine="ties", density=density
        )
        close(found.numpy(), base + consensus(kept))
