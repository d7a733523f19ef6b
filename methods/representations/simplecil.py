"""SimpleCIL: class means of the frozen backbone's features, compared by cosine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from graftwork.methods.contracts.card import Card, State
from graftwork.methods.contracts.fitted import Rows
from graftwork.methods.parts.sums import by_row, class_sums, columns, sum_states


@dataclass(frozen=True, kw_only=True)
class SimpleCIL:
    """Cosine similarity to class means; nothing is trained.

    Zhou et al., https://arxiv.org/abs/2303.07338, section 4.1. It has no hyper-parameters.
    Shapes: N rows, D feature width, C classes seen, K all classes.
    """

    card: ClassVar[Card] = Card(
        title="SimpleCIL",
        paper="https://arxiv.org/abs/2303.07338",
        summary="Class means of frozen features as the weights of a cosine classifier.",
        memory="C * D floats",
        separable=True,
    )

    def statistics(self, rows: Rows, seed: int) -> State:
        """`count` [K] int64 and `sum` [K, D] float64, of features as they are."""
        count, total = class_sums(rows)
        return {"count": count, "sum": total}

    def add(self, a: State, b: State) -> State:
        """The statistics of both sets of rows."""
        return sum_states(a, b)

    def solve(self, total: State, task: State, classes: Sequence[int], seed: int) -> State:
        """`prototypes` [C, D] float32: means of features, not of normalised features."""
        index = columns(total["count"], classes)
        means = total["sum"][index] / total["count"][index, None]
        return {"prototypes": means.float()}

    def logits(self, state: State, features: Tensor, seed: int) -> Tensor:
        """Cosines [N, C]. The learnt scale of the paper's head is 1 here: nothing trains it."""
        weight = F.normalize(state["prototypes"], dim=1)
        return by_row(lambda x: F.normalize(x.float(), dim=1) @ weight.T, features)

    def report(self, state: State) -> dict[str, Any]:
        """Nothing is chosen by the fit."""
        return {}
