"""Second moments of expanded rows, kept as rows while these are fewer than their width.

N rows, D feature width, M width of the expanded rows, K all classes.
Few rows are smaller than an M x M matrix, and let the ridge regression use its dual form. Whether a
state holds rows or sums depends on the number of rows alone, never on how they were split.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.fitted import Rows
from graftwork.methods.parts.sums import sum_states
from graftwork.methods.representations import projection, ridge

ROWS = ("features", "labels", "samples")

Expand = Callable[[Tensor], Tensor]
"""From features [N, D] to expanded rows [N, M] float64."""


def collect(rows: Rows, seed: int, width: int, collapse: Callable[[State], State]) -> State:
    """Statistics of rows: `count` [K], `draw`, and the rows, or their sums if there are many.

    Args:
        rows: the rows.
        seed: seed of the frozen layer; `draw` holds it and D, which the layer is drawn from.
        width: M; from M rows on, sums are kept.
        collapse: from rows to sums; see `sums`.
    """
    state = {
        "count": torch.bincount(rows.labels, minlength=rows.num_classes),
        "draw": torch.tensor([seed, rows.features.shape[1]]),
        "features": rows.features,
        "labels": rows.labels,
        "samples": rows.samples,
    }
    return state if len(rows.features) < width else collapse(state)


def add(a: State, b: State, width: int, collapse: Callable[[State], State]) -> State:
    """The statistics of both sets of rows, as `collect` gives them for the union.

    Raises:
        ValueError: the two were made with different seeds or widths.
    """
    projection.same_draw(a["draw"], b["draw"])
    if "features" in a and "features" in b:
        both = {name: torch.cat([a[name], b[name]]) for name in ROWS}
        union = {**both, "count": a["count"] + b["count"], "draw": a["draw"]}
        return union if len(union["features"]) < width else collapse(union)
    first, second = (collapse(state) if "features" in state else state for state in (a, b))
    return {**sum_states(first, second), "draw": a["draw"]}


def sums(state: State, expand: Expand, width: int, held: Tensor | None) -> State:
    """A state that holds rows, as sums.

    Args:
        state: `features` [N, D], `labels` [N], `samples` [N], `count` [K]; other entries are kept.
        expand: the frozen layer before the regression.
        width: M.
        held: mask [N] of the held-out rows; None if none are wanted.

    Returns:
        `gram` [M, M] and `cross` [M, K] of the rows to fit; with a mask also `held_gram`,
        `held_cross` and `held`, the number of held-out rows. Sums are float64.
    """
    total = {name: tensor for name, tensor in state.items() if name not in ROWS}
    if held is None:
        parts = {"": torch.ones_like(state["labels"], dtype=torch.bool)}
    else:
        parts = {"": ~held, "held_": held}
        total["held"] = held.sum()
    for prefix, mask in parts.items():
        gram = torch.zeros(width, width, dtype=torch.float64, device=mask.device)
        cross = gram.new_zeros(width, len(state["count"]))
        for chunk in mask.nonzero()[:, 0].split(4096):
            rows = expand(state["features"][chunk])
            gram += ridge.gram(rows)
            cross += ridge.cross(rows, state["labels"][chunk], len(state["count"]))
        total |= {prefix + "gram": gram, prefix + "cross": cross}
    return total


def choose(state: State, expand: Expand, held: Callable[[Tensor], Tensor]) -> float | None:
    """The ridge strength with the smallest error on held-out rows; None if there are too few.

    While there are rows, those of a class that is not fitted are left out. Sums, of at least as
    many rows as they are wide, do not tell them apart.

    Args:
        state: rows or sums; sums with held-out rows.
        expand: the frozen layer before the regression.
        held: from samples [N] to the mask [N] of the held-out rows.
    """
    # Columns of other classes are zero in targets and outputs: they change no error.
    present = state["count"].nonzero()[:, 0]
    mask = held(state["samples"]) if "samples" in state else state["held"]
    number = int(mask.sum())
    if number in (0, int(state["count"].sum())):
        return None
    if "features" in state:
        right = ridge.targets(state["labels"], present)
        judges = ridge.judges(mask, right)
        if not judges.any():
            return None
        rows = expand(state["features"])
        return ridge.choose_rows(rows[~mask], right[~mask], rows[judges], right[judges])
    cross, held_cross = state["cross"][:, present], state["held_cross"][:, present]
    return ridge.choose(state["gram"], cross, state["held_gram"], held_cross, number)


def solve(state: State, expand: Expand, index: Tensor, strength: float) -> tuple[Tensor, float]:
    """Ridge weights [M, C] of all rows, held-out ones too, and the strength that was used.

    Args:
        state: rows or sums.
        expand: the frozen layer before the regression.
        index: the classes [C].
        strength: of the ridge regression.
    """
    if "features" in state:
        right = ridge.targets(state["labels"], index)
        return ridge.solve_rows(expand(state["features"]), right, strength)
    gram, cross = state["gram"], state["cross"][:, index]
    if "held" in state:
        gram, cross = gram + state["held_gram"], cross + state["held_cross"][:, index]
    return ridge.solve(gram, cross, strength)
