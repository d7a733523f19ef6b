"""Records of indexes: a sealed task is taken from its record, without a look at its images.

    <root>/indexes/<name>                the newest index of what the name stands for
    <root>/indexes/<name>.sealed.json    keys of the stages of specs that have it sealed

Unlike the memo these files are no accelerators: once the images are gone, nothing else knows which
rows a task had. `cache gc` removes none of them.

Shapes: N samples of both splits.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from graftwork.operators.data.dataset import ROWS, Dataset, encode_rows, split_of
from graftwork.operators.errors import StorageError
from graftwork.operators.keys import digest
from graftwork.operators.store.blobs import Blobs

FOLDER = "indexes"
VERSION = 1
"""Of the format. A newer one is refused; an older one has to stay readable."""
_MARK = ".sealed.json"


def name_of(description: Mapping[str, Any]) -> str:
    """Name of the record of what a description stands for, 64 hex digits.

    Args:
        description: a JSON value without defaults, so that a key that a later version of this
            program brings leaves the name as it is.
    """
    return digest({"kind": "index", **description})


@dataclass(frozen=True)
class Records:
    """The records of a store.

    Args:
        blobs: files of the store.
    """

    blobs: Blobs

    def has(self, name: str) -> bool:
        """Tells whether there is a record."""
        return bool(self.blobs.exists([f"{FOLDER}/{name}"]))

    def names(self) -> list[str]:
        """Names of all records, sorted."""
        files = (file.removeprefix(f"{FOLDER}/") for file in self.blobs.files(FOLDER))
        return sorted(name for name in files if "." not in name)

    def find(self, name: str) -> Dataset | None:
        """The data set that was kept; None if none was.

        Raises:
            StorageError: the record is damaged, or was written by a newer version.
        """
        data = self.blobs.get(f"{FOLDER}/{name}")
        return None if data is None else _decoded(data, name)

    def keep(self, name: str, dataset: Dataset) -> None:
        """Keeps a data set; the newest wins."""
        data = _encoded(dataset)
        if self.blobs.get(f"{FOLDER}/{name}") != data:
            self.blobs.replace(f"{FOLDER}/{name}", data)

    def seal(self, name: str, stages: Iterable[str]) -> None:
        """Marks a record as one that a spec has sealed.

        Args:
            stages: keys of what `cache gc` is to keep for it, besides those that were said before.
        """
        known, stages = self._marked(name), set(stages)
        if known is None or not stages <= known:
            mark = {"stages": sorted(stages | (known or set()))}
            self.blobs.replace(f"{FOLDER}/{name}{_MARK}", json.dumps(mark).encode())

    def sealed(self) -> Iterator[tuple[str, set[str]]]:
        """Names of the records that a spec has sealed, and keys of what to keep for each."""
        for file in sorted(self.blobs.files(FOLDER)):
            if file.endswith(_MARK):
                name = file.removeprefix(f"{FOLDER}/").removesuffix(_MARK)
                yield name, self._marked(name) or set()

    def _marked(self, name: str) -> set[str] | None:
        data = self.blobs.get(f"{FOLDER}/{name}{_MARK}")
        if data is None:
            return None
        try:
            return set(json.loads(data)["stages"])
        except (ValueError, KeyError, TypeError) as error:
            file = f"{self.blobs.root}/{FOLDER}/{name}{_MARK}"
            raise StorageError(f"{file} is damaged; remove it, and plan what it sealed") from error


def _encoded(dataset: Dataset) -> bytes:
    facts = {
        "version": VERSION,
        "classes": dataset.classes,
        "domains": dataset.domains,
        "bad_images": dataset.bad_images,
        "splits": {
            split.name: {
                "rows": len(split),
                "kind": split.where.kind,
                "image": split.where.image,
                "files": split.where.files,
                "description": split.description,
            }
            for split in (dataset.train, dataset.test)
        },
    }
    content = encode_rows(dataset, facts)
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def _decoded(data: bytes, name: str) -> Dataset:
    checksum, _, content = data.partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != checksum:
        raise StorageError(
            f"record {FOLDER}/{name} is damaged; remove it, and run once without sealed while the "
            "images are there"
        )
    with pa.ipc.open_file(pa.py_buffer(content)) as reader:
        facts = json.loads((reader.schema.metadata or {})[b"facts"])
        # The schema is checked before any data is read: extension types could run code.
        if facts["version"] > VERSION or not reader.schema.equals(ROWS):
            raise StorageError(
                f"record {FOLDER}/{name} has version {facts['version']}, this program reads up to "
                f"{VERSION}; update graftwork"
            )
        table = reader.read_all()
    classes, domains = tuple(facts["classes"]), tuple(facts["domains"])
    splits, start = {}, 0
    for split in ("train", "test"):
        about = facts["splits"][split]
        splits[split] = split_of(
            table.slice(start, about["rows"]),
            split,
            kind=about["kind"],
            image=about["image"],
            files=tuple(about["files"]),
            classes=classes,
            domains=domains,
            description=about["description"],
            record=name,
        )
        start += about["rows"]
    bad = tuple(facts["bad_images"])
    return Dataset(classes=classes, domains=domains, bad_images=bad, **splits)
