"""Opening files wherever they are: local paths, object stores, URLs."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from graftwork.operators.errors import ConfigError, GraftworkError
from graftwork.operators.files import urls
from graftwork.operators.files.spelling import spelled

ROWS_IN_MEMORY = 256


def absolute(url: str) -> str:
    """The place as any process on this machine can name it.

    Raises:
        ConfigError: the URL may not be used.
    """
    urls.check(url)
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    return url if "://" in url else os.path.abspath(url)


def identity(url: str) -> dict[str, Any]:
    """Value that changes when a file's content changes; no content is read.

    Raises:
        ConfigError: the URL may not be used, or there is no such file.
    """
    url = absolute(url)
    try:
        if "://" not in url:
            return {"url": url} | _fingerprint(os.stat(url))
        with as_os_errors():
            filesystem, path = file_system(url)
            filesystem.invalidate_cache()
            return {"url": url, "ukey": str(filesystem.ukey(path))}
    except OSError as error:
        raise ConfigError(reason(error), value=url) from error


def open_file(url: str) -> BinaryIO:
    """Opens a local or remote file for reading.

    Raises:
        OSError: it cannot be opened.
    """
    if "://" not in url:
        return open_regular(spelled(url))
    with as_os_errors():
        filesystem, path = file_system(url)
        return filesystem.open(path, "rb", cache_type="readahead", block_size=4 << 20)


class NoFileError(OSError):
    """A pipe or a device stands in the place of a file."""


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a local file for reading, without waiting for the other end of a named pipe.

    Raises:
        NoFileError: it is no file.
        OSError: it cannot be opened.
    """
    file = open(path, "rb", opener=_at_once)  # noqa: SIM115 (the caller closes it)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise NoFileError(errno.EINVAL, "no file, but a pipe or a device")
    return file


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def reason(error: OSError) -> str:
    """Reason why a file cannot be read, without its name."""
    if isinstance(error, FileNotFoundError):
        return "not found"
    if isinstance(error, PermissionError):
        return "no permission to read"
    return " ".join((error.strerror or str(error)).split())[:200] or type(error).__name__


def _fingerprint(found: os.stat_result) -> dict[str, int]:
    return {
        "size": found.st_size,
        "mtime": found.st_mtime_ns,
        "ctime": found.st_ctime_ns,
        "inode": found.st_ino,
    }


@contextmanager
def as_os_errors() -> Iterator[None]:
    """Turns the exceptions that clients of object stores define into OSErrors."""
    try:
        yield
    except (OSError, GraftworkError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


@lru_cache(maxsize=64)
def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path as it knows it.

    Raises:
        ConfigError: its library is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = '; pip install "graftwork[s3]"' if url.startswith("s3://") else ""
        raise ConfigError(f"{error}{extra}", value=url) from error
