"""Data sets that come with the package: one module each, one line in `BUILTIN`.

Importing this module imports none of them.
"""

import importlib
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    import numpy as np

BUILTIN: dict[str, str] = {
    "digits": "graftwork.operators.data.digits",
}


class Builtin(Protocol):
    """Content of a module of `BUILTIN`. A split is "train" or "test"."""

    CLASSES: tuple[str, ...]
    VERSION: int
    """Raised when the bytes, the order or the split change."""

    def labels(self, split: str) -> "np.ndarray":
        """int64 [N] class numbers."""
        ...

    def images(self, split: str) -> tuple[bytes, ...]:
        """The encoded images; their bytes must not depend on any library's version."""
        ...


def load(name: str) -> Builtin:
    """The module of a built-in data set."""
    return cast(Builtin, importlib.import_module(BUILTIN[name]))
