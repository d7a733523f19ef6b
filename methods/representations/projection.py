"""Frozen random layers: drawn once from a seed, never trained, never stored.

D feature width, M projection width.
"""

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=4)
def gaussian(seed: int, width: int, dim: int) -> Tensor:
    """[D, M] float32, independent standard normal numbers from a generator of their own.

    Args:
        seed: seed of the generator.
        width: D.
        dim: M.
    """
    generator = torch.Generator().manual_seed(seed)
    # Drawn in float64 and rounded: torch's float32 normal numbers depend on the vector
    # instructions of the CPU, so that two nodes could draw different matrices.
    return torch.randn(width, dim, generator=generator, dtype=torch.float64).float()


@lru_cache(maxsize=4)
def uniform(seed: int, width: int, dim: int) -> Tensor:
    """[D, M] float32, uniform in +-1/sqrt(D): the weights of an untrained `nn.Linear`."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(width, dim, generator=generator, dtype=torch.float64)
    return ((2 * numbers - 1) / math.sqrt(width)).float()


def digest(weight: Tensor) -> Tensor:
    """SHA-256 of the matrix's bytes, [32] uint8: a tensor, so that it can be stored in a state."""
    return torch.tensor(list(hashlib.sha256(weight.numpy().tobytes()).digest()), dtype=torch.uint8)


def check(weight: Tensor, stored: Tensor) -> None:
    """Refuse to predict with another matrix than the one that the state was fitted with.

    Raises:
        ValueError: the digests differ.
    """
    if not torch.equal(digest(weight), stored.cpu()):
        raise ValueError(
            "random projection: must be the one of the fit, got other numbers for the same seed; "
            "was the state fitted with another seed or another version of torch?"
        )


def relu_layer(features: Tensor, weight: Tensor) -> Tensor:
    """relu(features @ weight) [N, M] in the dtype of the features."""
    return (features @ weight.to(features)).relu_()


def text(stored: Tensor) -> str:
    """A digest [32] uint8 as hexadecimal text."""
    return bytes(stored.tolist()).hex()


def same_draw(a: Tensor, b: Tensor) -> None:
    """Refuse to add statistics of different projections: `a` and `b` are (seed, D).

    Raises:
        ValueError: they differ.
    """
    if not torch.equal(a, b):
        raise ValueError(f"seed and feature width: must be {a.tolist()}, got {b.tolist()}")
