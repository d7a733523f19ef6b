"""Applies a merge to models, tensor by tensor.

Besides the result, memory holds what one tensor of all models takes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from graftwork.operators.merging import means, readers
from graftwork.operators.merging.contract import Group, Merge
from graftwork.operators.merging.policy import Entry, Policy, decide
from graftwork.operators.merging.readers import Reader, Spec

State = dict[str, Tensor]
PLAIN = Policy()
"""Nothing is known of the tensors besides their shapes."""


class Merged:
    """The result of a merge, computed as it is read.

    Args:
        merge: the merge; of the models it takes no more than its card says, the newest.
        models: oldest first; at least one.
        base: the state before training, if the card asks for it.
        statistics: of each model, if the card asks for them.
        policy: what is known of the tensors.

    Raises:
        IncompatibleError: the models do not fit together.
        ValueError: base or statistics are missing.
    """

    def __init__(
        self,
        merge: Merge,
        models: Sequence[Reader],
        base: Reader | None = None,
        statistics: Sequence[Reader] | None = None,
        policy: Policy = PLAIN,
    ) -> None:
        card = merge.card
        if card.base and base is None:
            raise ValueError(f"{card.title} needs the state before training")
        if card.statistics and statistics is None:
            raise ValueError(f"{card.title} needs statistics of every model")
        kept = slice(-card.most if card.most else None, None)
        self._models = models[kept]
        self._statistics = statistics[kept] if card.statistics and statistics else None
        self._base = base if card.base else None
        self._entries = {
            entry.name: entry for entry in decide(self._models, self._base, card.averages, policy)
        }
        self.specs: Mapping[str, Spec] = {n: e.spec for n, e in self._entries.items()}
        if len(self._models) < card.least:
            self._merger: Callable[[Group], Tensor] = lambda group: group.models[-1]
        else:
            self._merger = merge.merger(self._groups)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, in the order of a file."""
        for name in readers.order(self.specs):
            yield name, self.read(name)

    def read(self, name: str) -> Tensor:
        """A merged tensor; where nothing is merged, the model's own."""
        entry = self._entries[name]
        owner = self._models[entry.owner]
        if entry.action == "copy":
            return owner.read(name)
        group = _Group(entry, self._models, self._base, self._statistics)
        merged = means.mean(group.models) if entry.action == "mean" else self._merger(group)
        merged = merged.to(entry.spec.dtype)
        if entry.rows is None:
            return merged
        whole = owner.read(name).clone()
        whole[: entry.rows] = merged
        return whole

    def _groups(self) -> Iterator[Group]:
        for entry in self._entries.values():
            if entry.action == "merge":
                yield _Group(entry, self._models, self._base, self._statistics)


class _Group:
    """See `contract.Group`."""

    def __init__(
        self,
        entry: Entry,
        models: Sequence[Reader],
        base: Reader | None,
        statistics: Sequence[Reader] | None,
    ) -> None:
        self.name, self.learned, self._entry = entry.name, entry.learned, entry
        self._models, self._base, self._statistics = models, base, statistics

    @property
    def models(self) -> Sequence[Tensor]:
        return _Lazy([lambda m=model: self._read(m) for model in self._models])

    @property
    def base(self) -> Tensor:
        assert self._base is not None, "the card says that no base is needed"
        return self._read(self._base)

    @property
    def statistics(self) -> Sequence[Tensor] | None:
        given = self._statistics
        if given is None or any(self.name not in reader.specs for reader in given):
            return None
        return _Lazy([lambda r=reader: r.read(self.name) for reader in given])

    def _read(self, reader: Reader) -> Tensor:
        tensor = reader.read(self.name)
        # Half precision loses the small differences that a merge is about.
        kind = torch.float64 if self._entry.spec.dtype == torch.float64 else torch.float32
        rows = self._entry.rows
        return (tensor if rows is None else tensor[:rows]).to(kind)


class _Lazy(Sequence[Tensor]):
    """Tensors that are read each time one is asked for."""

    def __init__(self, reads: Sequence[Callable[[], Tensor]]) -> None:
        self._reads = reads

    def __len__(self) -> int:
        return len(self._reads)

    def __getitem__(self, place: int) -> Tensor:  # type: ignore[override]
        return self._reads[place]()
