"""Bounds on what rounding may do, for numbers that two paths or two processors must share."""

import math

import torch

EPS = torch.finfo(torch.float32).eps


def rounding(width: int, depth: int, size: float = 1.0) -> float:
    """The largest difference of float32 results of a transformer when sums run in other orders.

    Kernels differ between processors and numbers of rows, in the order of their sums alone. A sum
    of n products then differs by about eps sqrt(n) of its size; an MLP sums 4 x width of them, and
    each of `depth` blocks adds two such sums to its residual stream.

    Args:
        width: of the tokens.
        depth: number of blocks.
        size: largest magnitude of what is compared.
    """
    return EPS * math.sqrt(4 * width) * 2 * depth * size
