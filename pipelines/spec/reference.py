"""Keys of a spec: for suggestions in messages, and for the table of `docs/spec.md`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from graftwork.pipelines.spec.fields import Before, Rule
from graftwork.pipelines.spec.model import PipelineSpec


@dataclass(frozen=True)
class Key:
    """One key of a spec.

    Args:
        path: dotted path.
        accepts: what its value may be, in words.
        default: JSON text, or `required`.
        description: what it is for.
    """

    path: str
    accepts: str
    default: str
    description: str


@cache
def keys() -> tuple[Key, ...]:
    """All keys, sections before what is in them; a key of two alternatives once."""
    return tuple({key.path: key for key in _walk(PipelineSpec, ())}.values())


@cache
def siblings(section: str) -> tuple[str, ...]:
    """Keys directly inside a section, given by its dotted path; empty for other paths."""
    start = f"{section}." if section else ""
    inside = (k.path[len(start) :] for k in keys() if k.path.startswith(start))
    return tuple(dict.fromkeys(name for name in inside if name and "." not in name))


def table() -> str:
    """The keys as a Markdown table."""
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key in keys():
        cells = [f"`{key.path}`", key.accepts, f"`{key.default}`", key.description]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _walk(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        here = (*path, name)
        dotted = ".".join(here)
        yield Key(dotted, _accepts(field), _default(field), field.description or "")
        for nested in _models(field.annotation):
            yield from _walk(nested, here)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation names, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _accepts(field: FieldInfo) -> str:
    rules = list(_rules(field.metadata)) or list(_nested_rules(field.annotation))
    words = [rule.says for rule in rules]
    if _models(field.annotation) and not any("mapping" in word for word in words):
        words.append("mapping")
    return ", or ".join(words)


def _rules(metadata: Any) -> Iterator[Rule | Before]:
    return (item for item in metadata if isinstance(item, (Rule, Before)))


def _nested_rules(annotation: Any) -> Iterator[Rule | Before]:
    for part in get_args(annotation):
        yield from _rules(getattr(part, "__metadata__", ()))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    # A section that is left out has the defaults of its keys, which have rows of their own.
    return "{}" if isinstance(value, BaseModel) else json.dumps(value)


if __name__ == "__main__":
    print(table())
