"""Sums of statistics, and matrix products that do not depend on the number of rows."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.fitted import Rows

CLASS_AXES: dict[str, int | None] = {
    **dict.fromkeys(("count", "sum", "text"), 0),
    **dict.fromkeys(("cross", "held_cross"), 1),
    **dict.fromkeys(("gram", "held_gram", "held", "draw", "moment", "classes"), None),
    **dict.fromkeys(("features", "labels", "samples"), None),
}
"""Axis of the classes in sums of these names, None for no such axis. Sums of other names are made
again from the rows where classes have come."""

BLOCK = 64
"""Rows that matrix products for logits are padded to a multiple of."""


def sum_states(a: State, b: State) -> State:
    """Elementwise sum of two statistics with the same names and shapes.

    Raises:
        ValueError: names or shapes differ.
    """
    if a.keys() != b.keys():
        raise ValueError(f"statistics differ in names: {sorted(a.keys() ^ b.keys())}")
    for name in a:
        if a[name].shape != b[name].shape:
            shapes = f"{list(a[name].shape)}, {list(b[name].shape)}"
            raise ValueError(f"statistics differ in shape of {name}: {shapes}")
    return {name: a[name] + b[name] for name in a}


def class_sums(rows: Rows) -> tuple[Tensor, Tensor]:
    """Counts [K] int64 and feature sums [K, D] float64 per class."""
    features = rows.features.double()
    counts = torch.bincount(rows.labels, minlength=rows.num_classes)
    sums = features.new_zeros(rows.num_classes, features.shape[1])
    return counts, sums.index_add_(0, rows.labels, features)


def columns(count: Tensor, classes: Sequence[int]) -> Tensor:
    """The classes as an index tensor [C] int64, on the device of `count` [K].

    Raises:
        ValueError: a class without a row, which would get meaningless scores.
    """
    index = torch.tensor(list(classes), dtype=torch.int64, device=count.device)
    missing = index[count[index] == 0].tolist()
    if missing:
        raise ValueError(f"classes: must have at least one row each, got none of {missing}")
    return index


def by_row(score: Callable[[Tensor], Tensor], features: Tensor, rows: int = 4096) -> Tensor:
    """Scores [N, C] of features [N, D], in chunks of bounded memory and independent of the batch.

    BLAS picks other kernels for a few rows than for many, so that a row alone differs in its last
    bits from the same row in a batch. Zero rows fill each chunk up to a multiple of `BLOCK`, which
    made all results bitwise equal wherever it was tried.

    Args:
        score: from rows [n, D] to scores [n, C], each row on its own.
        features: [N, D].
        rows: most rows of a chunk, a multiple of `BLOCK`.
    """
    assert rows % BLOCK == 0, rows
    scores = []
    for chunk in features.split(rows):
        padding = chunk.new_zeros(-len(chunk) % BLOCK, chunk.shape[1])
        scores.append(score(torch.cat([chunk, padding]))[: len(chunk)])
    return torch.cat(scores)
