"""The sections `merge` and `ensemble` of a spec: combinations of its methods.

An entry is `NAME: {of: ..., over: ..., name: ..., further fields}`; what the fields of a merge or a
rule are is known to `operators/merging` and `operators/ensembling`, and checked while planning.
"""

from dataclasses import dataclass
from typing import Any, Literal

from graftwork.pipelines.spec.fields import Rule, choice, refuse, text
from graftwork.pipelines.spec.problems import shown

Entry = tuple[str, dict[str, Any]]
"""Name of a merge or a rule, and its fields as written."""

OVER = {"merge": ("tasks", "seeds", "methods"), "ensemble": ("methods", "seeds")}
"""Ways in which members of a combination may differ; the first is the default for one method."""
HEADS = ("merge", "newest")


@dataclass(frozen=True, kw_only=True)
class Combination:
    """An entry, understood.

    Args:
        section: `merge` or `ensemble`.
        path: of the entry in the spec, with its name: `merge.0.ties`.
        kind: name of the merge or the rule.
        of: methods, as the spec calls them.
        over: what the members differ in.
        name: for people; empty if none was given.
        head: of a merge: what happens to classifiers; None leaves it to the merge.
        given: the other fields.
    """

    section: str
    path: str
    kind: str
    of: tuple[str, ...]
    over: str
    name: str
    head: Literal["merge", "newest"] | None
    given: dict[str, Any]


def rule(section: str) -> Rule:
    """Check of an entry; it is kept as written."""
    example = (
        "{ties: {of: finetune}}" if section == "merge" else "{mean_prob: {of: [ranpac, slca]}}"
    )

    def check(value: Any) -> Entry:
        if isinstance(value, tuple) and len(value) == 2:
            value = {value[0]: value[1]}
        if not isinstance(value, dict) or len(value) != 1:
            raise refuse(f"must be one combination like {example}, got {shown(value)}")
        ((kind, fields),) = value.items()
        if not isinstance(kind, str) or not kind or not isinstance(fields, dict):
            raise refuse(f"must be one combination like {example}, got {shown(fields)}", (kind,))
        _check(section, kind, fields)
        return kind, dict(fields)

    return Rule(check, f"combination like {example}")


def read(section: str, number: int, entry: Entry) -> Combination:
    """An entry that was checked."""
    kind, fields = entry
    of = fields["of"]
    own = ("of", "over", "name", *(("head",) if section == "merge" else ()))
    return Combination(
        section=section,
        path=f"{section}.{number}.{kind}",
        kind=kind,
        of=(of,) if isinstance(of, str) else tuple(of),
        over=_over(section, fields),
        name=fields.get("name", ""),
        head=fields.get("head"),
        given={name: value for name, value in fields.items() if name not in own},
    )


def _over(section: str, fields: dict[str, Any]) -> str:
    alone = isinstance(fields["of"], str)
    return fields.get("over") or (OVER[section][0] if alone else "methods")


def _check(section: str, kind: str, fields: dict[str, Any]) -> None:
    """Raises what is wrong with the fields that all combinations have."""
    if "of" not in fields:
        raise refuse("missing; name a method of this spec, or a list of them", (kind, "of"))
    of = fields["of"]
    names = [of] if isinstance(of, str) else of
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) and n for n in names):
        raise refuse(f"must be a method's name or a list of them, got {shown(of)}", (kind, "of"))
    if len(set(names)) != len(names):
        raise refuse("must not name a method twice", (kind, "of"))
    for name, accepts in {
        "over": choice(OVER[section]),
        "name": text(100),
        **({"head": choice(HEADS)} if section == "merge" else {}),
    }.items():
        if name in fields:
            try:
                accepts.check(fields[name])
            except Exception as error:
                raise refuse(_message(error), (kind, name)) from error
    over = _over(section, fields)
    if over == "methods" and len(names) < 2:
        raise refuse(f"needs at least 2 methods to combine, got {len(names)}", (kind, "of"))
    if over != "methods" and len(names) != 1:
        raise refuse(f"must be one method to combine over {over}, got {len(names)}", (kind, "of"))


def _message(error: Any) -> str:
    return error.context["message"]
