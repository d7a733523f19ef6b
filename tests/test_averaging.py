"""Averages of weights: closed forms, end points, and what rounding must not do."""

import pytest
import torch
from torch import Tensor

from graftwork.methods.parts import averaging


def two(seed: int = 0, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, *(shape or (7, 5)), generator=generator)
    return a, b


def test_lerp_is_the_convex_combination() -> None:
    a, b = two()
    found = averaging.lerp(a, b, 0.3)
    assert torch.allclose(found, 0.7 * a + 0.3 * b, atol=1e-7)
    assert torch.equal(averaging.lerp(a, a, 0.3), a)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_end_points_are_the_inputs_bitwise_and_no_alias(weight: float) -> None:
    a, b = two()
    # What is left out may be anything.
    kept, other = (b, a) if weight else (a, b)
    other[0, 0] = torch.inf
    other[0, 1] = torch.nan
    fisher = torch.zeros_like(a)
    for found in (
        averaging.lerp(a, b, weight),
        averaging.fisher_mean(a, b, fisher, fisher, weight),
    ):
        assert torch.equal(found, kept)
        assert found.data_ptr() not in (a.data_ptr(), b.data_ptr())


def test_inputs_stay_as_they_are() -> None:
    a, b = two()
    fa, fb = (t.abs() for t in two(1))
    copies = [t.clone() for t in (a, b, fa, fb)]
    averaging.lerp(a, b, 0.4)
    averaging.fisher_mean(a, b, fa, fb, 0.4, floor=1.0)
    assert all(torch.equal(*pair) for pair in zip((a, b, fa, fb), copies, strict=True))


def test_fisher_mean_is_the_formula() -> None:
    a, b = two()
    fa, fb = (t.square() for t in two(1))
    found = averaging.fisher_mean(a, b, fa, fb, 0.4)
    wanted = (0.6 * fa * a + 0.4 * fb * b) / (0.6 * fa + 0.4 * fb)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_equal_information_is_the_plain_average() -> None:
    a, b = two()
    fisher = two(1)[0].square()
    found = averaging.fisher_mean(a, b, fisher, fisher, 0.4)
    assert torch.allclose(found, averaging.lerp(a, b, 0.4), atol=1e-7)


def test_who_alone_knows_something_decides_and_nobody_falls_back_to_the_average() -> None:
    a, b = two()
    none, some = torch.zeros_like(a), torch.full_like(a, 1e-6)
    assert torch.equal(averaging.fisher_mean(a, b, none, some, 0.1), b)
    assert torch.equal(averaging.fisher_mean(a, b, some, none, 0.1), a)
    assert torch.equal(averaging.fisher_mean(a, b, none, none, 0.1), averaging.lerp(a, b, 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2.0**-149, 2.0**-140, 2.0**-126, 1e-30, 1e-20, 1e-4])
@pytest.mark.parametrize("ratio", [1.0, 3.0, 1e4])
def test_the_smallest_information_there_is_counts_by_the_formula(
    dtype: torch.dtype, size: float, ratio: float
) -> None:
    a, b = (t.to(dtype) for t in two())
    fa = torch.full_like(a, size)
    fb = torch.full_like(b, ratio * size)
    for first, second in ((fa, fb), (fb, fa)):
        found = averaging.fisher_mean(a, b, first, second, 0.3)
        share = 0.3 * second.double() / (0.7 * first.double() + 0.3 * second.double())
        wanted = a.double() + share * (b.double() - a.double())
        assert torch.allclose(found.double(), wanted, atol=1e-6)


def test_below_the_floor_information_is_noise() -> None:
    a, b = two()
    noise = two(1)[0].square() * 1e-13
    found = averaging.fisher_mean(a, b, noise, torch.zeros_like(a), 0.3, floor=1e-12)
    assert torch.allclose(found, averaging.lerp(a, b, 0.3), atol=1e-7)


def test_the_fisher_mean_of_one_model_with_itself_is_that_model_bitwise() -> None:
    a, _ = two()
    fa, fb = (t.square() for t in two(1))
    assert torch.equal(averaging.fisher_mean(a, a, fa, fb, 0.37), a)


def test_the_start_of_an_ema_weighs_decay_to_the_power_of_the_steps() -> None:
    average, zero = torch.ones(3), torch.zeros(3)
    for _ in range(1000):
        averaging.ema_(average, zero, 0.9999)
    assert average.tolist() == pytest.approx([0.9999**1000] * 3, rel=1e-4)
    assert float(average[0]) == pytest.approx(0.905, abs=1e-3)


def test_an_ema_with_decay_1_stays_and_with_decay_0_follows() -> None:
    a, b = two()
    average = a.clone()
    averaging.ema_(average, b, 1.0)
    assert torch.equal(average, a)
    averaging.ema_(average, b, 0.0)
    assert torch.equal(average, b) and average.data_ptr() != b.data_ptr()


def test_running_averages_in_half_precision_are_refused() -> None:
    half = torch.zeros(2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"must be float32 or float64, got torch\.bfloat16"):
        averaging.ema_(half, torch.ones(2), 1)


def test_what_does_not_fit_is_refused() -> None:
    a, b = torch.zeros(2, 3), torch.zeros(3)
    with pytest.raises(ValueError, match=r"one shape are averaged, got \[2, 3\], \[3\]"):
        averaging.lerp(a, b, 0.5)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        averaging.lerp(a, a, 1.5)
    with pytest.raises(ValueError, match=r"Fisher information of shape \[3\] and \[2, 3\]"):
        averaging.fisher_mean(a, a, b, a, 0.5)
