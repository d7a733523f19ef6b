"""A task of a stream that brings its own images."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from graftwork.operators.data.dataset import Dataset
from graftwork.operators.streams.stream import Piece


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A task that brings its own images.

    Args:
        name: of the task.
        dataset: its images.
        only: names of the classes that count; None for all.
        rename: names in the data set -> names in the stream.
        domain: name of the domain.
        apart: whether its classes are no other task's, whatever their names are.
    """

    name: str
    dataset: Dataset
    only: tuple[str, ...] | None
    rename: Mapping[str, str]
    domain: str
    apart: bool

    @property
    def taken(self) -> list[int]:
        """Numbers of the classes that count, in the data set."""
        names = enumerate(self.dataset.classes)
        return [n for n, name in names if self.only is None or name in self.only]

    @property
    def called(self) -> tuple[str, ...]:
        """Names in the stream of all classes of the data set, by number."""
        names = (self.rename.get(name, name) for name in self.dataset.classes)
        return tuple(f"{self.name}/{name}" if self.apart else name for name in names)

    def piece(self) -> Piece:
        """The rows of its classes."""
        # Of its own, whoever else takes rows of the same source: other tasks may number otherwise.
        train, test = replace(self.dataset.train), replace(self.dataset.test)
        wanted = self.taken
        return Piece(
            name=self.name,
            train=train,
            rows=np.flatnonzero(np.isin(train.labels, wanted)),
            test=test,
            tested=np.flatnonzero(np.isin(test.labels, wanted)),
            classes=self.called,
            # By the names in the source: another name is no other place.
            order=wanted,
            domains=(self.domain,) * len(self.dataset.domains),
        )
