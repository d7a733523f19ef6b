"""The methods of a spec with every hyper-parameter resolved."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from graftwork.methods.contracts.stream import Passes, Room, StreamNeeds
from graftwork.operators.keys import program_digest
from graftwork.operators.parameters.learners import MethodRef
from graftwork.operators.parameters.tasks import Budget
from graftwork.operators.store.memo import Memo
from graftwork.pipelines.spec.loading import Loaded


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Facts that planning reads of a card; see `methods.contracts.card.Card`, which imports torch.

    The contract of a combination is `merge` or `ensemble`.
    """

    contract: str
    version: int
    exemplars: int = 0
    batch_information_at_test: bool = False
    uses_seed: bool = False
    separable: bool = False
    upper_bound: bool = False
    query: bool = False
    independent: bool = False
    shared: tuple[str, ...] = ()
    apart: bool = False
    linear_layers: bool = True
    images: bool = True
    network: str = "vit"
    reference: bool = False
    zero_shot: bool = False


@dataclass(frozen=True, kw_only=True)
class Exemplars:
    """Exemplars that a method keeps of earlier tasks.

    Args:
        count: of all classes together, or of each.
        budget: which of the two.
        selection: "herding" or "random".
    """

    count: int
    budget: Budget
    selection: str


@dataclass(frozen=True, kw_only=True)
class TrainedFacts:
    """Facts that planning reads of the hyper-parameters of what is trained.

    Args:
        epochs: passes over a task's images; 1 for a method that has no such number.
        augmentation: key of `AUGMENTATIONS`.
        exemplars: what is kept of earlier tasks; None for nothing.
        vote_batch: images per batch of a method that decides by the batch; None for one that
            decides each image on its own.
    """

    epochs: int
    augmentation: str
    exemplars: Exemplars | None
    vote_batch: int | None


def trained_facts(hyperparameters: Mapping[str, Any]) -> TrainedFacts:
    """Reads hyper-parameters with well-known names; a method need not have any of them."""
    given = hyperparameters.get
    kept, votes = given("exemplars", 0), given("eval_selection", "instance") != "instance"
    return TrainedFacts(
        epochs=given("epochs", 1),
        augmentation=given("augmentation", "none"),
        exemplars=Exemplars(
            count=kept,
            budget=hyperparameters["exemplar_budget"],
            selection=hyperparameters["exemplar_selection"],
        )
        if kept
        else None,
        vote_batch=hyperparameters["batch_size"] if votes else None,
    )


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Classifier of a fit.

    Args:
        method: the closed-form method.
        separable: a class's scores depend on that class's statistics alone.
        uses_seed: draws random numbers.
    """

    method: MethodRef
    separable: bool
    uses_seed: bool


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """Parts of a method of the contract `adapted`.

    Args:
        first_session: what is trained on the first task; None for nothing.
        keeps_frozen: whether the frozen features stay in front.
        classifier: what is fitted afterwards.
    """

    first_session: MethodRef | None
    keeps_frozen: bool
    classifier: Classifier


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of the spec with every hyper-parameter resolved.

    Args:
        name: name in `METHODS`.
        hyperparameters: all of them, defaults included.
        facts: of its card.
        label: the name, with what the spec sets where a method stands in it twice.
        adapted: parts of an adapted method.
        branches: of a fused method, by role: "clip" and "vit".
        needs: what it asks of a stream of tasks; of an adapted method, what its first session
            does.
        key: where the spec names it, `methods.INDEX.NAME`; empty for a branch.
    """

    name: str
    hyperparameters: dict[str, Any]
    facts: CardFacts
    label: str
    adapted: Adapted | None = None
    branches: Mapping[str, "Method"] = field(default_factory=dict)
    needs: StreamNeeds = field(default_factory=StreamNeeds)
    key: str = ""

    @property
    def description(self) -> MethodRef:
        """The method as keys hold it."""
        return MethodRef(
            name=self.name, version=self.facts.version, hyperparameters=self.hyperparameters
        )

    @property
    def first_session(self) -> MethodRef | None:
        """Training on the first task before anything is fitted."""
        return self.adapted.first_session if self.adapted else None

    @property
    def classifier(self) -> Classifier:
        """Classifier that is fitted: a part of an adapted method, or a fitted method itself."""
        if self.adapted:
            return self.adapted.classifier
        return Classifier(
            method=self.description,
            separable=self.facts.separable,
            uses_seed=self.facts.uses_seed,
        )

    @property
    def trains(self) -> bool:
        """Tells whether images are needed, not only features."""
        return self.facts.contract in ("trained", "fused") or self.first_session is not None

    @property
    def training(self) -> TrainedFacts:
        """Facts of the hyper-parameters of what is trained."""
        first = self.first_session
        return trained_facts(first.hyperparameters if first else self.hyperparameters)


def method_of(name: str, label: str, described: Mapping[str, Any]) -> Method:
    """A method from what `operators.catalogue.method` says of it."""
    card, parts = described["card"], described.get("parts", {})
    facts = CardFacts(
        **{each.name: card[each.name] for each in fields(CardFacts) if each.name != "shared"},
        shared=tuple(card["shared"]),
    )
    return Method(
        name=name,
        hyperparameters=described["hyperparameters"],
        facts=facts,
        label=label,
        adapted=_adapted(parts) if facts.contract == "adapted" else None,
        branches={
            role: method_of(branch["name"], f"{label} {role}", branch)
            for role, branch in parts.items()
            if facts.contract == "fused"
        },
        needs=_needs(described["needs"]),
    )


def _needs(described: Mapping[str, Any]) -> StreamNeeds:
    room, passes = described["room"], described["passes"]
    return StreamNeeds(
        count=described["count"], room=room and Room(**room), passes=passes and Passes(**passes)
    )


def _adapted(parts: Mapping[str, Any]) -> Adapted:
    first = parts["first_session"]
    given = dict(parts["classifier"])
    separable, uses_seed = given.pop("separable"), given.pop("uses_seed")
    return Adapted(
        first_session=MethodRef(**first) if first else None,
        keeps_frozen=parts["keeps_frozen"],
        classifier=Classifier(method=MethodRef(**given), separable=separable, uses_seed=uses_seed),
    )


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
        label = name if names.count(name) == 1 else f"{name} {_short(given)}".strip()
        method = method_of(name, label, json.loads(known))
        method = replace(method, key=f"methods.{number}.{name}")
        if method.facts.batch_information_at_test:
            # Wherever its numbers are shown.
            method = replace(method, label=f"{label} (sees the test batch)")
        resolved.append(method)
    if problems:
        raise loaded.error(problems)
    return tuple(resolved)


def _short(given: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in given.items())
