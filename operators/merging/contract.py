"""Contract of merges: a card, and a function from one tensor of all models to the merged one.

Shapes: a tensor has the same shape in all models here; `policy.py` saw to it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MergeCard:
    """Facts about a merge.

    Args:
        title: its name for people.
        paper: URL.
        summary: what it does, in a sentence.
        version: raised when results change; part of keys.
        least: fewest models; fewer are left as they are.
        most: as many models at most; of a longer series the newest are taken. 0 for any number.
        base: whether it needs the state before training.
        statistics: of training images for each model, if any: diagonal Fisher information, or the
            Gram matrices of the inputs of linear layers.
        averages: whether it is a weighted mean, which statistics take part in, too.
        ordered: whether the order of the models matters.
    """

    title: str
    paper: str
    summary: str
    version: int = 1
    least: int = 2
    most: int = 0
    base: bool = False
    statistics: Literal["", "fisher", "gram"] = ""
    averages: bool = True
    ordered: bool = False


class Group(Protocol):
    """One tensor of all models, read when it is asked for, and not to be changed."""

    name: str
    learned: bool
    """Whether these are weights that training set; otherwise statistics of images."""

    @property
    def models(self) -> Sequence[Tensor]:
        """Tensors of the models, in order; float32, or float64 where the models are."""
        ...

    @property
    def base(self) -> Tensor:
        """The tensor before training; of the same shape."""
        ...

    @property
    def statistics(self) -> Sequence[Tensor] | None:
        """Statistics of each model, None if this tensor was not measured."""
        ...


Groups = Callable[[], Iterator[Group]]
"""All tensors that are merged, always in the same order; may be walked through several times."""


class Merge(Protocol):
    """A merge with its hyper-parameters; a frozen keyword-only dataclass."""

    card: ClassVar[MergeCard]

    def merger(self, groups: Groups) -> Callable[[Group], Tensor]:
        """The function that merges one tensor; looks at all of them before, if it must."""
        ...
