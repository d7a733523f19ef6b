"""Snapshots of a task in the middle of its training, so that a crash costs minutes.

They stand beside the stages, under one name per stage that is replaced again and again; whatever
is wrong with one, the task starts over. The stage's commit removes its snapshot.
"""

import hashlib
import json

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from graftwork.operators.store import Store
from graftwork.operators.training.settings import Snapshot

FOLDER = "unfinished"


def name(key: str) -> str:
    """Place of a stage's snapshot in the store."""
    return f"{FOLDER}/{key}"


def keep(store: Store, key: str, snapshot: Snapshot) -> None:
    """Replaces the snapshot of a stage, atomically."""
    store.blobs.replace(name(key), encode(snapshot))


def find(store: Store, key: str) -> Snapshot | None:
    """The snapshot of a stage; None if there is none, or if it is damaged."""
    data = store.blobs.get(name(key))
    return None if data is None else decode(data)


def encode(snapshot: Snapshot) -> bytes:
    """sha256 of the rest, a line of JSON, safetensors."""
    head = {name: getattr(snapshot, name) for name in ("epoch", "step", "log", "sums", "counts")}
    body = json.dumps(head).encode() + b"\n"
    body += save_tensors({name: t.cpu().contiguous() for name, t in snapshot.tensors.items()})
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def decode(data: bytes) -> Snapshot | None:
    """The inverse of `encode`; None if the bytes were altered."""
    checksum, _, body = data.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        return None
    head, _, tensors = body.partition(b"\n")
    try:
        return Snapshot(tensors=load_tensors(tensors), **json.loads(head))
    except (SafetensorError, ValueError, TypeError):
        return None  # written by another version of this program
