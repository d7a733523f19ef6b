"""Weighted averages of weights, tensor by tensor: what merging methods and merge operators share.

No function changes or aliases what it is given, but those whose name ends in an underscore: they
update a running average in place. At weight 0 and 1 the results are the inputs, bit for bit.
"""

import torch
from torch import Tensor


def lerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """(1 - weight) a + weight b, a new tensor.

    Args:
        a: of any floating-point dtype.
        b: of the shape of `a`.
        weight: from 0 to 1.

    Raises:
        ValueError: the shapes differ, or the weight is outside.
    """
    _check(a, b, weight)
    # What is left out must not count: 0 times infinity is NaN.
    if weight in (0, 1):
        return (b if weight else a).clone()
    return torch.lerp(a, b, weight)


def fisher_mean(
    a: Tensor, b: Tensor, fisher_a: Tensor, fisher_b: Tensor, weight: float, floor: float = 0.0
) -> Tensor:
    """((1 - weight) F_a a + weight F_b b) / ((1 - weight) F_a + weight F_b), entry by entry.

    Matena and Raffel, https://arxiv.org/abs/2111.09832, for two models. Where both informations
    are 0, or both at most the floor, this is `lerp(a, b, weight)`.

    Args:
        a: of any floating-point dtype.
        b: of the shape of `a`.
        fisher_a: diagonal of the information about `a`, not negative, of its shape.
        fisher_b: of `b`.
        weight: from 0 to 1, of `b` before the information.
        floor: least information, so that rounding does not decide about an unused entry.

    Raises:
        ValueError: the shapes differ, or the weight is outside.
    """
    _check(a, b, weight)
    if not a.shape == fisher_a.shape == fisher_b.shape:
        raise ValueError(
            f"weights {list(a.shape)} have Fisher information of shape {list(fisher_a.shape)} "
            f"and {list(fisher_b.shape)}"
        )
    if weight in (0, 1):
        return (b if weight else a).clone()
    of_a, of_b = ((f.clamp(min=floor)) for f in (fisher_a, fisher_b))
    of_a, of_b = (1 - weight) * of_a, weight * of_b
    total = of_a + of_b
    share = torch.where(total > 0, of_b / total, weight)
    # A point between the two, and a itself where they are equal, whatever the rounding.
    return torch.lerp(a, b, share.to(a.dtype))


@torch.no_grad()
def ema_(average: Tensor, new: Tensor, decay: float) -> None:
    """average <- decay average + (1 - decay) new; after N steps the start weighs decay ** N.

    Args:
        average: float32 or float64; a narrower one would lose steps of 1 - decay.
        new: of its shape.
        decay: from 0, which copies, to 1, which does nothing.

    Raises:
        ValueError: the shapes differ, the decay is outside, or the average is too narrow.
    """
    _check(average, new, decay)
    _wide(average)
    average.copy_(lerp(average, new.to(average.dtype), 1 - decay))


def _check(a: Tensor, b: Tensor, weight: float) -> None:
    if a.shape != b.shape:
        raise ValueError(f"tensors of one shape are averaged, got {list(a.shape)}, {list(b.shape)}")
    if not 0 <= weight <= 1:
        raise ValueError(f"the weight of an average must be between 0 and 1, got {weight:g}")


def _wide(average: Tensor) -> None:
    if average.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a running average must be float32 or float64, got {average.dtype}")


def max_magnitude(kept: Tensor, new: Tensor) -> Tensor:
    """Entry by entry the one of larger magnitude; of equal ones the new; NaN stays."""
    # A comparison with NaN is false, which would drop it without a word.
    return torch.where((kept.abs() > new.abs()) | kept.isnan(), kept, new)
