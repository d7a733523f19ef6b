"""A journal of what is to be recorded elsewhere: appended first, sent later, each entry once.

One writer has one journal, three names in one folder:

    <id>.jsonl   a header line, then one operation per line, each with its number from 0
    <id>.ack     one line per operation that has been sent: its number, and what it answered
    <id>.files/  files that operations refer to

The writer holds a lock on the `.jsonl` file for as long as it lives; the system drops the lock
when the process dies, however it dies. A journal that is there and not locked is therefore
orphaned, and the next one to lock it may send the rest. A line cut short by a crash counts as not
written. A journal is removed when everything in it has been sent.

Nothing is forced to disk: what is written survives the death of the process, not of the machine.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Operation = dict[str, Any]


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""Answers of a file system on which nothing can be locked, as of some networks."""


def on_this_machine() -> Path:
    """A folder for journals on a local disk, for stores that are remote or cannot lock."""
    try:
        return Path.home() / ".cache" / "graftwork" / "journal"
    except RuntimeError:  # neither HOME nor an entry for the user
        return Path(tempfile.gettempdir()) / f"graftwork-journal-{os.getuid()}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One operation of a journal.

    Args:
        number: position in the journal, from 0.
        operation: JSON value.
        seen: it may have been sent before by a process that died.
    """

    number: int
    operation: Operation
    seen: bool = False


@dataclass(kw_only=True)
class Journal:
    """An open, locked journal. Safe to use from several threads.

    Args:
        path: its `.jsonl` file.
        header: JSON value given when it was made.
    """

    path: Path
    header: Mapping[str, Any]
    _log: int
    _ack: int
    _entries: list[Entry] = field(default_factory=list)
    _answers: dict[int, Any] = field(default_factory=dict)
    _rejected: bool = False
    _next: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def create(cls, folder: Path, header: Mapping[str, Any]) -> "Journal":
        """A new journal in `folder`, which is made if missing.

        Raises:
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:12]}"
        path = folder / f"{name}.jsonl"
        # Locked and filled under another name: nobody may find it without a lock or a header.
        fresh = folder / f".{name}.new"
        log = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_EXCL, 0o600)
        try:
            fcntl.flock(log, fcntl.LOCK_EX)
            os.write(log, _line(header))
            os.rename(fresh, path)
        except OSError:
            os.close(log)
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise
        return cls(path=path, header=dict(header), _log=log, _ack=_open_ack(path))

    @classmethod
    def orphans(cls, folder: Path) -> Iterator["Journal"]:
        """Journals that no living process holds, oldest first; each comes locked."""
        for path in sorted(folder.glob("*.jsonl")):
            try:
                log = os.open(path, os.O_RDWR | os.O_APPEND)
            except OSError:
                continue  # no file of ours, or sent by another process since the listing
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # held, or there are no locks here
                os.close(log)
                continue
            lines = _lines(path) if os.fstat(log).st_nlink else []
            if not lines:  # removed since the listing, or not even a header
                os.close(log)
                continue
            journal = cls(path=path, header=lines[0], _log=log, _ack=_open_ack(path))
            journal._recall(lines[1:])
            yield journal

    def _recall(self, lines: list[tuple[int, Operation]]) -> None:
        for number, answer in _lines(self.path.with_suffix(".ack")):
            self._answers[number] = answer
        for number, operation in lines:
            for lost in range(len(self._entries), number):  # the disk had refused them
                self._entries.append(Entry(number=lost, operation={"kind": "lost"}, seen=True))
                self._answers.setdefault(lost, None)
            self._entries.append(Entry(number=number, operation=operation, seen=True))
        self._advance()

    def _advance(self) -> None:
        while self._next in self._answers:
            self._next += 1

    @property
    def id(self) -> str:
        return self.path.stem

    @property
    def files(self) -> Path:
        """Folder for files that operations refer to; made when the first one is written."""
        return self.path.with_suffix(".files")

    def append(self, *operations: Operation) -> None:
        """Writes operations, in one piece.

        They count as appended even when the disk refuses them, so that they are still sent.

        Raises:
            OSError: the disk refused them; they will be lost if the process dies before they
                are sent.
        """
        with self._lock:
            entries = [
                Entry(number=number, operation=operation)
                for number, operation in enumerate(operations, start=len(self._entries))
            ]
            self._entries += entries
            data = b"".join(_line([entry.number, entry.operation]) for entry in entries)
            size = os.fstat(self._log).st_size
            try:
                if os.write(self._log, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                os.ftruncate(self._log, size)
                raise

    def next(self) -> Entry | None:
        """The first operation that is not yet acknowledged."""
        with self._lock:
            return self._entries[self._next] if self._next < len(self._entries) else None

    def acknowledge(self, number: int, answer: Any = None, *, rejected: bool = False) -> None:
        """Notes that an operation was sent, with what later ones need of the answer.

        Args:
            rejected: it was refused for good; the journal's file is then kept for a person.
        """
        with self._lock:
            self._answers[number] = answer
            self._rejected |= rejected
            self._advance()
            # Not written: it would be sent again after a crash, which the sender must bear anyway.
            with contextlib.suppress(OSError):
                os.write(self._ack, _line([number, answer]))

    def answered(self) -> list[tuple[Operation, Any]]:
        """Operations that were sent, with their answers."""
        with self._lock:
            return [
                (entry.operation, self._answers[entry.number])
                for entry in self._entries
                if entry.number in self._answers
            ]

    @property
    def unsent(self) -> int:
        """Number of operations still to be sent."""
        with self._lock:
            return len(self._entries) - self._next

    def operations(self) -> list[Operation]:
        """All operations, sent or not."""
        with self._lock:
            return [entry.operation for entry in self._entries]

    @property
    def modified_ms(self) -> int:
        """Time of the last write, in milliseconds since 1970."""
        return os.fstat(self._log).st_mtime_ns // 1_000_000

    def close(self) -> None:
        """Removes the journal if everything was sent, and gives up the lock."""
        if self.unsent == 0:
            with contextlib.suppress(OSError):
                shutil.rmtree(self.files, ignore_errors=True)
                self.path.with_suffix(".ack").unlink(missing_ok=True)
                if self._rejected:
                    self.path.rename(self.path.with_suffix(".rejected"))
                else:
                    self.path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Gives up the lock and leaves the files to the process that opens them next."""
        for handle in (self._log, self._ack):
            os.close(handle)


def _line(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _lines(path: Path) -> list[Any]:
    """JSON lines of a file; what follows the last whole one is cut off."""
    values: list[Any] = []
    whole = 0
    data = path.read_bytes()
    for line in data.splitlines(keepends=True):
        try:
            value = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            value = None
        if value is None:
            break
        values.append(value)
        whole += len(line)
    if whole < len(data):
        os.truncate(path, whole)
    return values


def _open_ack(path: Path) -> int:
    return os.open(path.with_suffix(".ack"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
