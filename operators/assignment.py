"""Values that travel to a worker and back: an assignment and its result."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Files = Mapping[str, bytes | bytearray]
"""Files that an operator returns: file name -> content, committed together or not at all."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A stage as a worker sees it: inputs are keys, everything pickles small."""

    key: str
    preimage: dict[str, Any]
    hints: dict[str, Any]
    input_operators: dict[str, str]
    label: str
    reads: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)

    @property
    def operator(self) -> str:
        return self.preimage["operator"]

    @property
    def parameters(self) -> dict[str, Any]:
        return self.preimage["parameters"]

    def inputs(self, role: str) -> list[tuple[str, str]]:
        """(operator, key) of each stage with this role, in order: an input, or what is read."""
        if role in self.reads:
            return list(self.reads[role])
        operator = self.input_operators.get(role, "")
        return [(operator, key) for key in self.preimage["inputs"].get(role, [])]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result that an operator hands back.

    Args:
        files: committed together or not at all.
        facts: for the manifest and MLflow.
        obsolete: names of blobs in the store that nobody needs once the files are committed.
    """

    files: Files
    facts: Mapping[str, Any] = field(default_factory=dict)
    obsolete: tuple[str, ...] = ()
