"""Stages that were computed before, as their manifests tell of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from graftwork.operators.errors import DamagedStage
from graftwork.operators.images.prefetch import prefetch
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store

CANDIDATES = 500
"""At most so many stored stages of an operator are looked at."""
_REQUESTS = 16
"""Manifests read at once: in an object store they wait, they do not compute."""


@dataclass(frozen=True, kw_only=True)
class Former:
    """A stored stage.

    Args:
        key: its key.
        preimage: what the key is made of.
        seconds: that it took.
        images: that went through a network; 0 for none, or if nobody counted.
        created: when it was stored, in seconds since the epoch.
    """

    key: str
    preimage: Mapping[str, Any]
    seconds: float
    images: int
    created: float


class Formers:
    """Stored stages by operator, read when somebody asks for them.

    Args:
        store: where they are.
        stored: keys of all of them, by operator.
        plan: stages that come first, if they are stored: of more than `CANDIDATES` some are left
            out.
    """

    def __init__(self, store: Store, stored: Mapping[str, set[str]], plan: Iterable[Stage]) -> None:
        self._store, self._stored, self._plan = store, stored, tuple(plan)
        self._read: dict[str, tuple[Former, ...]] = {}

    def of(self, operator: str) -> tuple[Former, ...]:
        """The stored stages of an operator."""
        if operator not in self._read:
            stored = self._stored[operator]
            own = (s.key for s in self._plan if s.operator == operator and s.key in stored)
            keys = list(dict.fromkeys([*own, *sorted(stored)]))[:CANDIDATES]
            found = prefetch(partial(_former, self._store, operator), keys, workers=_REQUESTS)
            self._read[operator] = tuple(former for former in found if former is not None)
        return self._read[operator]


def _former(store: Store, operator: str, key: str) -> Former | None:
    """A stored stage; None for a damaged one, of which whoever reads it will tell."""
    try:
        manifest = store.manifest(operator, key)
    except DamagedStage:
        return None
    return Former(
        key=key,
        preimage=manifest["preimage"],
        seconds=manifest["seconds"],
        images=manifest["facts"].get("images_forwarded", 0),
        created=manifest["created"],
    )
