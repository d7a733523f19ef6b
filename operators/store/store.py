"""The store: every stage's result under its content key, committed whole or not at all.

    <root>/<operator>/<key>/<file>.<nonce>     data, under names that no other writer uses
    <root>/<operator>/<key>/manifest.json      written last: the commit
    <root>/memo/<key>                          accelerators; may be deleted at any time
    <root>/quarantine/<operator>-<key>-<nonce> what was found damaged

No manifest means that nothing is there. A manifest says what the key was made of, and each file's
size and sha256; it holds a digest of itself. Readers check all of them on every read: sha256 costs
less than decoding, and a flipped bit in a feature is silent otherwise. Two writers of one key are
harmless: the manifest of the first stands, the second discards its own files.
"""

import hashlib
import json
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.errors import DamagedStage, StorageError
from graftwork.operators.keys import digest
from graftwork.operators.store.blobs import Blobs, open_blobs
from graftwork.operators.store.looking import Looking
from graftwork.operators.store.memo import Memo
from graftwork.operators.versions import library_versions

SCHEMA = 1
"""Version of the manifest. A newer one is refused, never overwritten."""
PIECE = 4 << 20
"""Bytes that a copy holds in memory."""


@dataclass(frozen=True)
class Store:
    """A store at a local path or an fsspec URL. A value: it pickles as its URL."""

    url: str

    @cached_property
    def blobs(self) -> Blobs:
        return open_blobs(self.url)

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    def for_looking(self) -> "Store":
        """The same store for a command that computes nothing: it need not be writable, or there."""
        found = Store(self.url)
        found.__dict__["blobs"] = Looking(self.blobs)  # in place of the cached property
        return found

    def probe(self) -> None:
        """Writes, reads and removes a file, before hours of work depend on it.

        Raises:
            StorageError: the store cannot be written or read.
        """
        name = f"memo/probe-{uuid.uuid4().hex}"
        if not self.blobs.put_if_absent(name, b"probe") or self.blobs.get(name) != b"probe":
            raise StorageError(f"store {self.url}: a file just written could not be read back")
        self.blobs.remove(name)

    # --- stages -------------------------------------------------------------------------------

    def commit(self, work: Assignment, result: Result, seconds: float) -> dict[str, Any]:
        """Stores a stage's files, and returns the manifest that stands: ours or an earlier one.

        Raises:
            StorageError: the store is full, read-only or unreachable; nothing is visible then.
        """
        folder, nonce = f"{work.operator}/{work.key}", uuid.uuid4().hex[:12]
        files = {
            name: {
                "stored": f"{name}.{nonce}",
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            for name, data in result.files.items()
        }
        body = {
            "schema": SCHEMA,
            "key": work.key,
            "preimage": work.preimage,
            "files": files,
            "facts": dict(result.facts),
            "label": work.label,
            "seconds": round(seconds, 6),
            "host": socket.gethostname(),
            "created": time.time(),
            "versions": library_versions(),
        }
        manifest = {**body, "digest": digest(body)}
        written: list[str] = []
        won = False
        try:
            for name, data in result.files.items():
                written.append(f"{folder}/{files[name]['stored']}")
                self.blobs.put(written[-1], data)
            text = json.dumps(manifest, indent=1, allow_nan=False).encode()
            won = self.blobs.put_if_absent(f"{folder}/manifest.json", text)
        finally:
            if not won:
                for name in written:
                    self.blobs.remove(name)
        for name in result.obsolete:
            self.blobs.remove(name)
        return manifest if won else self.manifest(work.operator, work.key)

    def has(self, operator: str, key: str) -> bool:
        """Tells whether a stage is stored (has a manifest; its content is checked on reading)."""
        return bool(self.blobs.exists([f"{operator}/{key}/manifest.json"]))

    def keys(self, operator: str) -> set[str]:
        """Keys of all stored stages of an operator."""
        names = {f"{operator}/{key}/manifest.json": key for key in self.blobs.folders(operator)}
        return {names[name] for name in self.blobs.exists(list(names))}

    def manifest(self, operator: str, key: str) -> dict[str, Any]:
        """The manifest of a stored stage.

        Raises:
            DamagedStage: it is missing or altered.
            StorageError: it was written by a newer version of this program.
        """
        data = self.blobs.get(f"{operator}/{key}/manifest.json")
        if data is None:
            raise DamagedStage(operator, key, "manifest.json is missing")
        try:
            manifest = json.loads(data)
            body = {name: value for name, value in manifest.items() if name != "digest"}
            sound = manifest["digest"] == digest(body) and manifest["key"] == key
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedStage(operator, key, "manifest.json does not parse") from error
        if not sound:
            raise DamagedStage(operator, key, "manifest.json was altered")
        if manifest["schema"] > SCHEMA:
            raise StorageError(
                f"store {self.url}: stage {operator}/{key[:12]} has schema {manifest['schema']}, "
                f"this program reads up to {SCHEMA}; update graftwork"
            )
        return manifest

    def read(
        self, operator: str, key: str, name: str, manifest: Mapping[str, Any] | None = None
    ) -> bytes:
        """A file of a stored stage, its size and sha256 checked.

        Raises:
            DamagedStage: the file is missing, truncated or altered.
        """
        entry = (manifest or self.manifest(operator, key))["files"].get(name)
        if entry is None:
            raise DamagedStage(operator, key, f"the manifest names no file {name}")
        data = self.blobs.get(f"{operator}/{key}/{entry['stored']}")
        if data is None:
            raise DamagedStage(operator, key, f"{name} is missing")
        if len(data) != entry["bytes"]:
            raise DamagedStage(operator, key, f"{name} has {len(data)} bytes, not {entry['bytes']}")
        if (found := hashlib.sha256(data).hexdigest()) != entry["sha256"]:
            raise DamagedStage(
                operator, key, f"{name} has sha256 {found[:12]}, not {entry['sha256'][:12]}"
            )
        return data

    def copy(self, operator: str, key: str, name: str, path: Path) -> None:
        """Writes a file of a stored stage to a local path, piece by piece, and checks it.

        Raises:
            DamagedStage: the file is missing, truncated or altered; nothing is left at the path.
        """
        entry = self.manifest(operator, key)["files"].get(name)
        if entry is None:
            raise DamagedStage(operator, key, f"the manifest names no file {name}")
        source = self.blobs.open(f"{operator}/{key}/{entry['stored']}")
        if source is None:
            raise DamagedStage(operator, key, f"{name} is missing")
        total, size = hashlib.sha256(), 0
        with source, path.open("wb") as target:
            while piece := source.read(PIECE):
                target.write(piece)
                total.update(piece)
                size += len(piece)
        if size != entry["bytes"] or total.hexdigest() != entry["sha256"]:
            path.unlink()
            what = f"{name} has {size} bytes, sha256 {total.hexdigest()[:12]}"
            wanted = f"{entry['bytes']} bytes, {entry['sha256'][:12]}"
            raise DamagedStage(operator, key, f"{what}, not {wanted}")

    @contextmanager
    def file(self, operator: str, key: str, name: str) -> Iterator[Path]:
        """A path under which a file of a stored stage can be read in parts, once it was checked.

        A local store's own file, whose content is not held in memory; of an object store a copy
        that goes with the context.

        Raises:
            DamagedStage: the file is missing, truncated or altered.
        """
        entry = self.manifest(operator, key)["files"].get(name)
        path = entry and self.blobs.path(f"{operator}/{key}/{entry['stored']}")
        if path is None:
            with tempfile.NamedTemporaryFile() as copy:
                copy.write(self.read(operator, key, name))
                copy.flush()
                yield Path(copy.name)
            return
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError as error:
            raise DamagedStage(operator, key, f"{name} is missing") from error
        if found != entry["sha256"]:
            raise DamagedStage(
                operator, key, f"{name} has sha256 {found[:12]}, not {entry['sha256'][:12]}"
            )
        yield path

    def verify(self, operator: str, key: str) -> None:
        """Reads everything of a stored stage.

        Raises:
            DamagedStage: anything is not what it was when it was committed.
        """
        manifest = self.manifest(operator, key)
        for name in manifest["files"]:
            self.read(operator, key, name, manifest)

    def quarantine(self, operator: str, key: str) -> None:
        """Sets a damaged stage aside; afterwards it is not stored, and nothing was deleted."""
        self.blobs.move(f"{operator}/{key}", f"quarantine/{operator}-{key}-{uuid.uuid4().hex[:12]}")

    # --- accelerators -------------------------------------------------------------------------

    @property
    def memo(self) -> "Memo":
        """Facts derived from bytes that need not be read again; safe to delete."""
        return Memo(self.blobs)
