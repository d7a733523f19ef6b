"""Zero-shot CLIP: images compared with the texts of class names; nothing is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graftwork.methods.contracts.card import Card, State
from graftwork.methods.contracts.fitted import Rows
from graftwork.methods.networks.clip import cosines, unit
from graftwork.methods.parts.sums import by_row, columns, sum_states


@dataclass(frozen=True, kw_only=True)
class ZeroShotCLIP:
    """Cosine similarity of an image to the text of every class seen.

    Radford et al., https://arxiv.org/abs/2103.00020, section 3.1. A class's text feature is the
    mean over the templates of features of unit length, scaled to unit length again. It has no
    hyper-parameters: names and templates are the spec's. Images of a class matter only in that
    there are some. Shapes: N rows, T templates, C classes seen, K all classes, E joint width.
    """

    card: ClassVar[Card] = Card(
        title="Zero-shot CLIP",
        paper="https://arxiv.org/abs/2103.00020",
        summary="Compares image features with text features of the class names; no training.",
        memory="C * E floats",
        separable=True,
        network="clip",
        zero_shot=True,
    )

    def statistics(self, rows: Rows, seed: int) -> State:
        """`count` [K] int64, and `text` [K, E] float64: every row adds its class's text feature."""
        if rows.texts is None:
            raise ValueError("texts: must be features of the class names, got None")
        count = torch.bincount(rows.labels, minlength=rows.num_classes)
        mean = unit(rows.texts).double().mean(dim=0)
        return {"count": count, "text": count[:, None] * mean}

    def add(self, a: State, b: State) -> State:
        """The statistics of both sets of rows."""
        return sum_states(a, b)

    def solve(self, total: State, task: State, classes: Sequence[int], seed: int) -> State:
        """`texts` [C, E] float32, of unit length."""
        index = columns(total["count"], classes)
        return {"texts": unit(total["text"][index] / total["count"][index, None])}

    def logits(self, state: State, features: Tensor, seed: int) -> Tensor:
        """Cosines [N, C]; a function of each row alone."""
        return by_row(lambda rows: cosines(rows, state["texts"]), features)

    def report(self, state: State) -> dict[str, Any]:
        """Nothing is chosen from the data."""
        return {}
