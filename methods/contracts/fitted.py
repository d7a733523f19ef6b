"""The contract of fitted methods: sums over cached features, and a closed-form solve."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from graftwork.methods.contracts.card import Card, State


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Features of some samples of one task.

    Args:
        features: [N, D], any float dtype.
        labels: [N] int64, class ids in the dataset's own numbering, 0 .. K-1.
        samples: [N] uint64-like ids held as int64, derived from the images' digests: stable
            under any order, split or sharding (for hash-based validation splits).
        num_classes: K.
        texts: [T, K, E] features of every class's name in T templates, from CLIP's text tower;
            only for methods whose card asks for CLIP.

    Example:
        >>> rows = graftwork.Rows(
        ...     features=torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]),
        ...     labels=torch.tensor([0, 0, 1]),
        ...     samples=torch.arange(3),
        ...     num_classes=2,
        ... )
    """

    features: Tensor
    labels: Tensor
    samples: Tensor
    num_classes: int
    texts: Tensor | None = None


def separable(method: Any) -> bool:
    """Tells whether a class's scores depend on that class alone, with these hyper-parameters.

    That is what the card says, unless a method has a property `separable` that says otherwise.
    """
    return getattr(method, "separable", method.card.separable)


def uses_seed(method: Any) -> bool:
    """Tells whether a method draws random numbers, with these hyper-parameters.

    That is what the card says, unless a method has a property `uses_seed` that says otherwise.
    """
    return getattr(method, "uses_seed", method.card.uses_seed)


class Fitted(Protocol):
    """A method fitted in closed form: a commutative sum over rows, then a solve.

    `statistics` and `add` make a commutative monoid: any sharding, order or task split of the rows
    gives the same sum up to rounding. The implementing class is a frozen keyword-only dataclass
    whose fields are the hyper-parameters with the paper's defaults. All sums are float64.

    Example:
        >>> method: graftwork.Fitted = build("simplecil", {})
        >>> total = method.statistics(rows, seed=0)
        >>> state = method.solve(total, total, classes=[1, 0], seed=0)  # class 1 was learned first
        >>> method.logits(state, rows.features, seed=0).argmax(dim=1).tolist()
        [1, 1, 0]
    """

    card: ClassVar[Card]

    def statistics(self, rows: Rows, seed: int) -> State:
        """Sums over the rows."""
        ...

    def add(self, a: State, b: State) -> State:
        """The statistics of both sets of rows."""
        ...

    def solve(self, total: State, task: State, classes: Sequence[int], seed: int) -> State:
        """Solves for the tensors that `logits` needs, after a task.

        Args:
            total: statistics of all tasks seen so far.
            task: statistics of the newest task alone.
            classes: ids of the classes seen so far, in the order learned; the columns of `logits`.
            seed: the run's seed, the same as given to `statistics`.

        Returns:
            Tensors as they are stored and served (float32 unless the method needs more);
            a separable method gives rows per class, first axis = `classes`.
        """
        ...

    def logits(self, state: State, features: Tensor, seed: int) -> Tensor:
        """Scores [N, C] over the classes seen, in the order of `classes`; larger is likelier.

        Decides per row: no row's scores depend on another row.
        """
        ...

    def report(self, state: State) -> dict[str, Any]:
        """Facts of a solve worth a line in MLflow, such as the ridge strength that was chosen."""
        ...
