"""Upkeep of the store: what it holds, whether it is sound, and what may go."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from graftwork.operators.data import records
from graftwork.operators.data.dataset import Split
from graftwork.operators.data.records import Records
from graftwork.operators.errors import DamagedStage, StorageError
from graftwork.operators.stage import OPERATORS
from graftwork.operators.store import Store

RUNS = "runs"
"""Folder of run records: `<root>/runs/<pipeline>/<time>.json`, each names the stages it used."""


def inventory(store: Store) -> list[dict[str, Any]]:
    """Number of stored stages per operator, their bytes, and the newest one's age in seconds."""
    rows = []
    for operator in OPERATORS:
        files = store.blobs.files(operator)
        stages = sum(name.endswith("/manifest.json") for name in files)
        rows.append(
            {
                "operator": operator,
                "stages": stages,
                "bytes": sum(size for size, _ in files.values()),
                "newest_seconds": (
                    round(time.time() - max(t for _, t in files.values()), 1) if files else None
                ),
            }
        )
    return rows


def verify(store: Store, repair: bool) -> dict[str, Any]:
    """Reads every stored stage and compares it with its manifest, and every record of an index.

    Args:
        repair: set damaged stages aside, so that the next run computes them again. A record stays:
            a run that sees the images replaces it.
    """
    damaged, stages = [], 0
    for operator in OPERATORS:
        for key in sorted(store.keys(operator)):
            stages += 1
            try:
                store.verify(operator, key)
            except DamagedStage as error:
                damaged.append({"operator": operator, "key": key, "reason": error.reason})
                if repair:
                    store.quarantine(operator, key)
    aside = repair and bool(damaged)
    for name in Records(store.blobs).names():
        try:
            Records(store.blobs).find(name)
        except StorageError as error:
            damaged.append({"operator": records.FOLDER, "key": name, "reason": str(error)})
    return {"stages": stages, "damaged": damaged, "set_aside": aside}


def collect(store: Store, days: float, unused: bool, delete: bool) -> dict[str, Any]:
    """Garbage: files that no manifest names, what was set aside or given up, unused stages.

    Roots are the manifests and, for `unused`, the run records and the seals: a committed stage is
    garbage only when no recorded run used it and no sealed task lives on it. Records of indexes
    are never garbage.

    Args:
        days: only what is older; a running pipeline's files are young.
        unused: also committed stages that no run record names, and no sealed task needs.
        delete: remove them; otherwise only list.
    """
    horizon = time.time() - days * 86400
    used = _used_keys(store) | _sealed_keys(store) if unused else set()
    garbage: dict[str, tuple[int, str]] = {}
    for operator in OPERATORS:
        folders: dict[str, dict[str, tuple[int, float]]] = {}
        for name, entry in store.blobs.files(operator).items():
            folders.setdefault(name.split("/")[1], {})[name] = entry
        for key, files in folders.items():
            manifest = f"{operator}/{key}/manifest.json"
            if manifest in files and unused and key not in used:
                if files[manifest][1] < horizon:
                    garbage |= {name: (size, "unused stage") for name, (size, _) in files.items()}
                continue
            kept = {manifest} | _named_files(store, operator, key, manifest in files)
            for name, (size, modified) in files.items():
                if name not in kept and modified < horizon:
                    garbage[name] = size, "left by a crash"
    committed = store.blobs.files("fit").keys() - garbage.keys()
    for folder, reason in (
        ("quarantine", "set aside as damaged"),
        # A running task's snapshot and a held lease are replaced all the time.
        ("unfinished", "snapshot of a task that was given up"),
        # Without them a longer stream sums all rows again.
        ("sums", "sums of a fit that nothing went on from"),
        ("leases", "lease of a run that ended"),
        ("memo", "leftover"),
        (records.FOLDER, "leftover"),
    ):
        for name, (size, modified) in store.blobs.files(folder).items():
            kept = folder in ("memo", records.FOLDER)
            leftover = not kept or name.endswith(".tmp") or "/probe-" in name
            fit = name.partition("/")[2].removesuffix(".json")
            if folder == "sums" and f"fit/{fit}/manifest.json" in committed:
                continue  # a longer stream goes on from them
            if leftover and modified < horizon:
                garbage[name] = size, reason
    if delete:
        # Manifests first: a stage without its manifest is not there, one without data is damaged.
        for name in sorted(garbage, key=lambda n: not n.endswith("/manifest.json")):
            store.blobs.remove(name)
    reasons = Counter(reason for _, reason in garbage.values())
    return {
        "deleted": delete,
        "days": days,
        "files": sorted(garbage),
        "bytes": sum(size for size, _ in garbage.values()),
        "reasons": dict(reasons),
    }


def _named_files(store: Store, operator: str, key: str, committed: bool) -> set[str]:
    if not committed:
        return set()
    try:
        manifest = store.manifest(operator, key)
    except DamagedStage:
        # Not ours to judge: `cache verify` sets it aside, later it is garbage as such.
        return set(store.blobs.files(f"{operator}/{key}"))
    return {f"{operator}/{key}/{entry['stored']}" for entry in manifest["files"].values()}


def _sealed_keys(store: Store) -> set[str]:
    """Keys of the stages that sealed tasks live on.

    Those of every spec that had them sealed when it was planned or run; and whatever the spec, the
    features of their images, which nothing could compute again.
    """
    found: set[str] = set()
    splits: list[Split] = []
    for name, keys in Records(store.blobs).sealed():
        found |= keys
        if (dataset := Records(store.blobs).find(name)) is not None:
            splits += [dataset.train, dataset.test]
    if not splits:
        return found
    found |= {split.stage().key for split in splits}
    digests: dict[int, set[str]] = {}
    for key in store.keys("features") - found:
        try:
            manifest = store.manifest("features", key)
        except DamagedStage:
            continue  # `cache verify` sets it aside
        rows = manifest["facts"]["images_forwarded"]
        if rows not in digests:
            digests[rows] = {d for split in splits for d in _shard_digests(split, rows)}
        made_of = manifest["preimage"]
        if made_of["parameters"]["images"] in digests[rows]:
            # And what adapted the backbone: it was trained on images, too.
            found |= {key, *(key for keys in made_of["inputs"].values() for key in keys)}
    return found


def _shard_digests(split: Split, rows: int) -> Iterator[str]:
    """Digests of the images of all shards of so many rows, and of a last one that is no longer."""
    for start in range(0, len(split) - rows + 1, max(1, rows)):
        yield split.images_digest(start, start + rows)
    if 0 < rows <= len(split):
        yield split.images_digest(len(split) - rows, len(split))


def _used_keys(store: Store) -> set[str]:
    used: set[str] = set()
    for name in store.blobs.files(RUNS):
        if name.endswith(".json") and (data := store.blobs.get(name)) is not None:
            try:
                used.update(json.loads(data)["stages"])
            except (ValueError, KeyError, TypeError) as error:
                raise StorageError(
                    f"run record {store.blobs.root}/{name} is damaged, and may have named stages "
                    "that are in use; remove it if that run does not matter any more"
                ) from error
    return used
