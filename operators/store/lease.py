"""Leases: who trains a chain now, so that no second run trains the same one meanwhile.

    <root>/leases/<name>.json     what is held, by which process of which host, since when

A lease saves work and never decides what is right: a stage is stored once, no matter who computes
it. So it may be taken over from a process that is dead, or that was silent for a minute on the
clock of the store; the clocks of the machines do not matter.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftwork.operators.errors import RunHeld, StorageError
from graftwork.operators.store.blobs import Blobs
from graftwork.operators.store.store import Store

BEAT = 10.0
"""Seconds between two signs of life."""
SILENCE = 60.0
"""Seconds without one after which a lease is free."""


@contextmanager
def held(store: Store, names: Mapping[str, str], beat: float = BEAT) -> Iterator[None]:
    """Holds leases for the length of a `with` block.

    Args:
        store: where they are.
        names: name of each lease -> what people call the thing that it stands for.
        beat: seconds between two signs of life.

    Raises:
        RunHeld: another process holds one of them; none is held then.
    """
    if not names:
        yield
        return
    nonce, ended = uuid.uuid4().hex, threading.Event()
    files = {_file(name): _body(nonce, what) for name, what in names.items()}
    beats = threading.Thread(
        target=_beat, args=(store.blobs, files, nonce, beat, ended), name="leases", daemon=True
    )
    taken: list[str] = []
    try:
        for file, body in files.items():
            _take(store.blobs, file, body)
            taken.append(file)
        beats.start()
        yield
    finally:
        ended.set()
        if beats.ident is not None:
            beats.join()
        for file in taken:
            if _nonce(store.blobs.get(file)) == nonce:
                store.blobs.remove(file)


def _file(name: str) -> str:
    return f"leases/{name}.json"


def _body(nonce: str, what: str) -> bytes:
    pid = os.getpid()
    record = {
        "what": what,
        "host": socket.gethostname(),
        "machine": machine(),
        "pid": pid,
        "started": process_start(pid),
        "nonce": nonce,
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }
    return json.dumps(record).encode()


def _take(blobs: Blobs, file: str, body: bytes) -> None:
    if blobs.put_if_absent(file, body):
        return
    holder = _parse(blobs.get(file))
    if holder is not None and not _dead(holder) and not _silent(blobs, file):
        raise RunHeld(
            f"{holder['what']} is being trained by {holder['host']}/{holder['pid']} since "
            f"{holder['since']}; wait for it, or run again after it ended"
        )
    # Two runs may get here at once. Then both train, and the first result of each stage stands.
    blobs.replace(file, body)


def _parse(data: bytes | None) -> dict[str, Any] | None:
    """The record of a lease, None if it is gone or no record: then nobody holds it."""
    try:
        record = json.loads(data or b"")
    except ValueError:
        return None
    fields = {"what", "host", "machine", "pid", "started", "nonce", "since"}
    return record if isinstance(record, dict) and fields <= record.keys() else None


def _nonce(data: bytes | None) -> str | None:
    record = _parse(data)
    return record["nonce"] if record else None


def _dead(holder: Mapping[str, Any]) -> bool:
    """Tells whether the holder is known to have ended, as only one on this machine can be."""
    return holder["machine"] == machine() and process_start(int(holder["pid"])) != holder["started"]


def _silent(blobs: Blobs, file: str) -> bool:
    """Tells whether a lease got no sign of life for too long, compared with a file written now."""
    probe = f"leases/clock-{uuid.uuid4().hex}"
    blobs.put(probe, b"")
    try:
        now, then = blobs.modified(probe), blobs.modified(file)
    finally:
        blobs.remove(probe)
    return now is None or then is None or now - then > SILENCE


def machine() -> str:
    """Scope in which process numbers are unique: one boot of one host, one container of it."""
    parts = [socket.gethostname()]
    if Path("/proc/self/ns/pid").exists():
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def process_start(pid: int) -> str | None:
    """Mark that tells a process from a later one with its number; None if it does not run."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            state, *fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if state in "ZX" else fields[18]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""  # somebody else's
    return ""  # no /proc: its number has to do


def _beat(
    blobs: Blobs, files: Mapping[str, bytes], nonce: str, beat: float, ended: threading.Event
) -> None:
    """Writes each lease anew from time to time, as long as it is ours."""
    while not ended.wait(beat):
        for file, body in files.items():
            try:
                if _nonce(blobs.get(file)) == nonce:
                    blobs.replace(file, body)
            except StorageError:
                # The lease grows old, as it is meant to; the run finds out by itself.
                continue
