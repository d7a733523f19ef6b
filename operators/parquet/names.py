"""Names that Parquet files give to their integer labels, in the metadata of Hugging Face."""

import json
from collections.abc import Iterable, Mapping

from graftwork.operators.names import folded, normal

Claims = Iterable[tuple[str, tuple[str, ...]]]
"""Place of a file, and the names that it gives to the classes 0, 1, 2, ..."""


def claimed(metadata: Mapping[bytes, bytes] | None, column: str) -> tuple[str, ...]:
    """The names of a column's integers, in NFC; empty where the file gives none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError):  # written by another program
        return ()
    if isinstance(names, Mapping):  # as older versions wrote them: {"0": "cat", ...}
        names = [names.get(str(number)) for number in range(len(names))]
    if not isinstance(names, list):
        return ()
    texts = [normal(name) for name in names if isinstance(name, str)]
    return tuple(texts) if len(texts) == len(names) else ()


def disagreement(claims: Claims) -> str:
    """The first class that two files call by different names, for people; empty if none."""
    first: dict[int, tuple[str, str]] = {}
    for place, names in claims:
        for number, name in enumerate(names):
            other, before = first.setdefault(number, (place, name))
            if folded(name) != folded(before):
                return (
                    f'class {number} is "{before}" by the metadata of {other} and "{name}" by '
                    f"that of {place}: labels of one of them are probably mixed up"
                )
    return ""
