"""The methods of a spec with every hyper-parameter resolved."""

import json
from dataclasses import dataclass
from typing import Any

from graftwork.operators.keys import program_digest
from graftwork.operators.store.memo import Memo
from graftwork.pipelines.spec.loading import Loaded


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of the spec with every hyper-parameter resolved.

    Args:
        name: name in `METHODS`.
        hyperparameters: all of them, defaults included.
        card: the method's card as JSON values.
        label: the name, with what the spec sets where a method stands in it twice.
        parts: of an adapted method: its first session, the classifier that is fitted afterwards,
            and whether the frozen features stay in front; of a fused one its two branches.
    """

    name: str
    hyperparameters: dict[str, Any]
    card: dict[str, Any]
    label: str
    parts: dict[str, Any] | None = None

    @property
    def description(self) -> dict[str, Any]:
        """The method as keys hold it."""
        return {
            "name": self.name,
            "version": self.card["version"],
            "hyperparameters": self.hyperparameters,
        }

    @property
    def first_session(self) -> dict[str, Any] | None:
        """Description of what is trained on the first task before anything is fitted."""
        return self.parts and self.parts.get("first_session")

    def branch(self, role: str) -> "Method":
        """One of the two branches of a fused method, as a method of its own."""
        assert self.parts is not None
        return Method(label=f"{self.label} {role}", **self.parts[role])

    @property
    def trains(self) -> bool:
        """Whether images are needed, not only features."""
        return self.card["contract"] in ("trained", "fused") or self.first_session is not None

    @property
    def recipe(self) -> dict[str, Any]:
        """Hyper-parameters of what is trained."""
        first = self.first_session
        return first["hyperparameters"] if first else self.hyperparameters


def resolve_methods(loaded: Loaded, memo: Memo) -> tuple[Method, ...]:
    """The spec's methods with all hyper-parameters; asks the memo before importing torch.

    Raises:
        ConfigError: unknown methods or hyper-parameters, all of them at once.
    """
    program = program_digest()
    requested = loaded.spec.methods
    names = [name for name, _ in requested]
    resolved, problems = [], []
    for number, (name, given) in enumerate(requested):
        preimage = {"kind": "method", "name": name, "given": given, "source": program}
        known = memo.get(preimage)
        if known is None:
            from graftwork.operators import catalogue  # imports torch

            found, wrong = catalogue.method(name, given)
            problems += [(f"methods.{number}{path}", what) for path, what in wrong]
            if wrong:
                continue
            known = json.dumps(found).encode()
            memo.put(preimage, known)
        facts = json.loads(known)
        label = name if names.count(name) == 1 else f"{name} {_short(given)}".strip()
        if facts["card"]["batch_information_at_test"]:
            label += " (sees the test batch)"  # wherever its numbers are shown
        resolved.append(Method(name=name, label=label, **facts))
    if problems:
        raise loaded.error(problems)
    return tuple(resolved)


def _short(given: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in given.items())
