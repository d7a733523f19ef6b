"""A whole file under a name that nobody has yet: at once, and for one of several writers only.

A hard link does it: it fails where the name exists. Folders of FUSE, SMB, some NFS and of FAT have
no hard links. There Linux's rename that replaces nothing does it, and where a file system lacks
that, too, a claim: a file that is made exclusively, held for the moment of an ordinary rename.
"""

import contextlib
import ctypes
import errno
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

NO_LINKS = (
    *(errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS),
    *(errno.EMLINK, errno.EXDEV, errno.EINVAL),
)
"""Answers to a hard link that say that there are none here; EPERM is Linux's own."""

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
"""Answers to an fsync of a file system that has none; a disk that fails says EIO."""

STALE = 10.0
"""Seconds after which a claim was left by a process that died: it is held for milliseconds."""

_AT_FDCWD, _NOREPLACE = -100, 1


def appear(whole: Path, path: Path) -> bool:
    """Gives a file that is whole its name, unless the name is taken.

    Args:
        whole: a file in the folder of `path`. It may stay there, and is the caller's to remove.
        path: the name.

    Returns:
        False if there is such a file already; it is untouched.

    Raises:
        OSError: it cannot be done.
    """
    try:
        os.link(whole, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
    if os.path.lexists(path):
        return False
    moved = _renamed(whole, path)
    return _claimed(whole, path) if moved is None else moved


def sync_folder(folder: Path) -> None:
    """Forces to disk which files a folder has, where the file system can.

    Raises:
        OSError: the disk failed.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Forces an open file to disk, where the file system can.

    Raises:
        OSError: the disk failed.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


@cache
def _renameat2() -> Any:
    """The C library's function; None where there is none, as outside of Linux."""
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def _renamed(whole: Path, path: Path) -> bool | None:
    """Renames without replacing; False if the name is taken, None if this cannot be had here."""
    rename = _renameat2()
    if rename is None:
        return None
    if not rename(_AT_FDCWD, os.fsencode(whole), _AT_FDCWD, os.fsencode(path), _NOREPLACE):
        return True
    number = ctypes.get_errno()
    if number == errno.EEXIST:
        return False
    if number in NO_LINKS:
        return None
    raise OSError(number, os.strerror(number), str(path))


def _claimed(whole: Path, path: Path) -> bool:
    """Renames while holding a claim, so that no two writers do so at once."""
    claim = path.with_name(f"{path.name}.claim")
    while not _claim(claim):
        if os.path.lexists(path):
            return False
        # The clock of the file system, which also said when the claim was made.
        os.utime(whole)
        with contextlib.suppress(FileNotFoundError):
            if whole.stat().st_mtime - claim.stat().st_mtime > STALE:
                claim.unlink()
                continue
        time.sleep(0.01)
    try:
        if os.path.lexists(path):
            return False
        os.rename(whole, path)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _claim(claim: Path) -> bool:
    try:
        os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    except FileExistsError:
        return False
    return True
