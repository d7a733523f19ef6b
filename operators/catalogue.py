"""A method as planning sees it; imports the method, and torch with it."""

import difflib
from dataclasses import asdict
from typing import Any

from graftwork import methods
from graftwork.methods.contracts.adapted import Adapted
from graftwork.methods.contracts.batches import neighbours
from graftwork.methods.contracts.fitted import separable, uses_seed
from graftwork.methods.contracts.hyperparameters import resolved
from graftwork.methods.contracts.stream import stream_needs
from graftwork.operators import ensembling, merging
from graftwork.operators.errors import ConfigError

COMBINATIONS: dict[str, Any] = {"merge": merging, "ensemble": ensembling}
"""Section of a spec -> the package that knows its names."""


def method(name: str, given: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Resolved hyper-parameters and card of a method, and what is wrong with the request.

    Returns:
        `{"hyperparameters": ..., "card": ..., "needs": ...}`, for `adapted` and `fused` also
        `"parts"`; empty when there are problems, and the problems as (key path below the spec's
        entry, sentence).
    """
    if name not in methods.METHODS:
        return {}, [("", _unknown("method", name, list(methods.METHODS)))]
    known = [field.name for field in methods.fields(name)]
    strangers = [
        (f".{name}.{field}", _unknown("hyper-parameter", field, known))
        for field in given
        if field not in known
    ]
    try:
        built = methods.build(name, {k: v for k, v in given.items() if k in known})
    except methods.HyperparameterError as error:
        return {}, strangers + [(f".{name}.{field}", what) for field, what in error.problems]
    if strangers:
        return {}, strangers
    facts: dict[str, Any] = {"hyperparameters": resolved(built), "card": _card(built)}
    facts["neighbours"] = _neighbours(built)
    # A choice by the neighbours in a batch is no choice by the image alone.
    facts["card"]["batch_information_at_test"] = facts["neighbours"] is not None
    facts["card"]["exemplars"] = getattr(built, "exemplars", built.card.exemplars)
    # A weight of 0 needs no reference.
    facts["card"]["reference"] = getattr(built, "needs_reference", built.card.reference)
    facts["card"]["separable"] = separable(built)
    facts["card"]["uses_seed"] = uses_seed(built)
    facts["needs"] = asdict(stream_needs(built))
    if built.card.contract == "adapted":
        facts["parts"] = _parts(name, built)
        facts["needs"] = asdict(stream_needs(built.parts().first_session))
    if built.card.contract == "fused":
        facts["parts"] = _branches(built)
    return facts, []


def _card(built: Any) -> dict[str, Any]:
    """A method's card as JSON values."""
    return {**asdict(built.card), "shared": list(built.card.shared)}


def _neighbours(built: Any) -> dict[str, Any] | None:
    """The test batches of a method that decides by them, as JSON values."""
    found = neighbours(built)
    return None if found is None else asdict(found)


def _branches(built: Any) -> dict[str, Any]:
    """The learners of a fused method, each with its card and all hyper-parameters.

    That is one of each branch, "clip" and "vit", or a "joint" one.
    """
    found, joint = {}, built.joint()
    parts = vars(built.branches()) if joint is None else {"joint": joint}
    for role, (name, given) in parts.items():
        branch = methods.build(name, given)
        found[role] = {
            "name": name,
            "hyperparameters": resolved(branch),
            "card": _card(branch),
            "needs": asdict(stream_needs(branch)),
            "neighbours": _neighbours(branch),
        }
    return found


def combination(
    section: str, name: str, given: dict[str, Any]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Resolves a merge or a rule of an ensemble, as `method` does a method.

    Args:
        section: "merge" or "ensemble".

    Returns:
        The paths are below the entry with its name; an unknown name is said at the entry.
    """
    package = COMBINATIONS[section]
    names = list(package.RULES if section == "ensemble" else package.MERGES)
    if name not in names:
        return {}, [("", _unknown(section, name, names))]
    known = [field.name for field in package.fields(name)]
    strangers = [
        (f".{field}", _unknown("field", field, [*known, "of", "over", "name"]))
        for field in given
        if field not in known
    ]
    try:
        built = package.build(name, {k: v for k, v in given.items() if k in known})
    except methods.HyperparameterError as error:
        return {}, strangers + [(f".{field}", what) for field, what in error.problems]
    return {"hyperparameters": asdict(built), "card": asdict(built.card)}, strangers


def _parts(name: str, built: Adapted) -> dict[str, Any]:
    """Parts of an adapted method, each with all hyper-parameters."""
    parts = built.parts()
    session, classifier = parts.first_session, built
    if parts.classifier is not None:
        name, given = parts.classifier
        classifier = methods.build(name, given)
    return {
        "first_session": None
        if session is None
        else {
            "name": "first_session",
            "version": session.card.version,
            "hyperparameters": resolved(session),
        },
        "keeps_frozen": parts.keeps_frozen,
        "classifier": {
            "name": name,
            "version": classifier.card.version,
            "hyperparameters": resolved(classifier),
            "separable": separable(classifier),
            "uses_seed": uses_seed(classifier),
        },
    }


def cards() -> dict[str, dict[str, Any]]:
    """The card of every method, merge and rule, by name."""
    return {name: card(name)[0] for name in _known()}


def card(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Card and hyper-parameters of a method, a merge or a rule; `contract` says which it is.

    Raises:
        ConfigError: nothing of this name.
    """
    if name not in (known := _known()):
        raise ConfigError(f"{_unknown('method', name, list(known))}", key="methods")
    contract, package, name = known[name]
    facts = asdict(package.load(name).card)
    facts = facts if contract is None else {**facts, "contract": contract}
    return facts, [asdict(field) for field in package.fields(name)]


def _known() -> dict[str, tuple[str | None, Any, str]]:
    """Everything that has a card: contract (None: the card names it), package, name there."""
    known: dict[str, tuple[str | None, Any, str]] = {
        name: (None, methods, name) for name in methods.METHODS
    }
    for contract, package, names in (
        ("merge", merging, merging.MERGES),
        ("ensemble", ensembling, ensembling.RULES),
    ):
        for name in names:
            # A method may have the name of the merge that it uses.
            shown = f"{name} ({contract})" if name in known else name
            known[shown] = (contract, package, name)
    return known


def _unknown(kind: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name[:100], known, 1)
    if near:
        return f'unknown {kind} "{name}"; did you mean "{near[0]}"?'
    return f'unknown {kind} "{name}"; known: {", ".join(known) or "none"}'
