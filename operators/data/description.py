"""The `dataset` section of a spec, made complete: what an index is built from, anywhere."""

import json
from collections.abc import Mapping
from typing import Any

from graftwork.operators.data import builtin, sources
from graftwork.operators.errors import BadDataError, ConfigError
from graftwork.operators.files import access
from graftwork.operators.names import normal

SPLITS = ("train", "test")


def resolve(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description with defaults, absolute places, and class names instead of their file.

    Raises:
        ConfigError: a place that may not be used, or class names that are none.
    """
    limits = description.get("limit_per_class") or {}
    common = {
        "limit_per_class": {split: limits.get(split) for split in SPLITS},
        "on_bad_image": description.get("on_bad_image") or "error",
        "max_pixels": description.get("max_pixels"),
        "classes": _class_names(description.get("classes")),
        "part": bool(description.get("part")),
    }
    if name := description.get("builtin"):
        if name not in builtin.BUILTIN:
            known = ", ".join(builtin.BUILTIN)
            raise ConfigError(f'unknown "{name}"; known are {known}', key="dataset.builtin")
        return common | {"builtin": name, "classes": list(builtin.load(name).CLASSES)}
    return common | {
        "train": [access.absolute(entry) for entry in description["train"]],
        "test": [access.absolute(entry) for entry in description["test"]],
        "image": description.get("image") or "image",
        "label": description.get("label") or "label",
        "domain": description.get("domain"),
    }


def texts(given: Any) -> list[str]:
    """The texts of `reference.texts`: as given, or of a JSON file with a list of them.

    Raises:
        ConfigError: no such file, or something else in it.
    """
    given = _listed(given, "reference.texts")
    if not (isinstance(given, (list, tuple)) and given and all(type(n) is str for n in given)):
        raise ConfigError("must be a list of texts, or a JSON file with one", key="reference.texts")
    return list(given)


def _listed(given: Any, key: str) -> Any:
    """The content of a JSON file, if a path is given."""
    if not isinstance(given, str):
        return given
    url = access.absolute(given)
    try:
        with access.open_file(url) as file:
            return json.loads(file.read(64 << 20).decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        why = access.reason(error) if isinstance(error, OSError) else str(error)
        raise ConfigError(why, key=key, value=url) from error


def _class_names(given: Any) -> list[str] | None:
    if (given := _listed(given, "dataset.classes")) is None:
        return None
    if not (isinstance(given, (list, tuple)) and given and all(type(n) is str for n in given)):
        raise ConfigError("must be a list of names, or a JSON file with one", key="dataset.classes")
    given = [normal(name) for name in given]
    if doubled := sorted({n for n in given if given.count(n) > 1}):
        raise ConfigError(f'"{doubled[0]}" occurs twice', key="dataset.classes")
    return given


def locate(description: Mapping[str, Any], split: str) -> list[sources.Source]:
    """Finds the sources of a split of a resolved description.

    Raises:
        MissingData: nothing is there.
        BadDataError: sources of different kinds, or what cannot be used.
    """
    if "builtin" in description:
        return [sources.builtin_source(description["builtin"], split)]
    try:
        found = sources.locate(description[split])
    except (BadDataError, ConfigError) as error:
        raise error.about(f"dataset.{split}") from error
    if len({source.kind for source in found}) != 1:
        raise BadDataError(
            "needs Parquet files or folders, not both or neither", key=f"dataset.{split}"
        )
    return found
