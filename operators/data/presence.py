"""Tells which files of images are gone, without opening one."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from graftwork.operators.data import builtin, sources
from graftwork.operators.errors import BadDataError
from graftwork.operators.files.access import as_os_errors, file_system, reason
from graftwork.operators.images.prefetch import batched, prefetch

_REQUESTS = 16
"""Concurrent requests: they wait, they do not compute."""
_CHUNK = 256
"""Files of a local folder that one thread asks for at once."""
_LISTED = 32
"""Files of a remote folder from which on it is listed, in place of a request for each."""


def files_of(hints: Mapping[str, Any]) -> Iterator[str]:
    """The files that `sources.read` opens; none for built-in data and for no images."""
    if hints.get("kind") == sources.SEVERAL:
        for part in hints["parts"]:
            yield from files_of(part)
    elif hints and hints["kind"] not in builtin.BUILTIN:
        yield from hints["files"]


def gone(files: Iterable[str]) -> set[str]:
    """Those of some files that are not there.

    Raises:
        BadDataError: whether a file is there cannot be told.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for file in dict.fromkeys(files):
        folders[file.rpartition("/")[0] if "://" in file else ""].append(file)
    local = batched(folders.pop("", []), _CHUNK)
    found = {file for part in prefetch(_not_there, local, workers=_REQUESTS) for file in part}
    several = [(f, own) for f, own in folders.items() if len(own) >= _LISTED]
    alone = [[file] for own in folders.values() if len(own) < _LISTED for file in own]
    for part in prefetch(_not_listed, several, workers=_REQUESTS):
        found |= part
    return found.union(*prefetch(_not_there, alone, workers=_REQUESTS))


def _not_there(files: Sequence[str]) -> set[str]:
    return {file for file in files if not _is_there(file)}


def _is_there(file: str) -> bool:
    try:
        if "://" not in file:
            os.stat(file)
            return True
        with as_os_errors():
            filesystem, path = file_system(file)
            filesystem.invalidate_cache()
            # Not `exists`: it takes every failure for an absence.
            filesystem.info(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise BadDataError(reason(error), value=file) from error
    return True


def _not_listed(of: tuple[str, Sequence[str]]) -> set[str]:
    folder, files = of
    try:
        with as_os_errors():
            filesystem, path = file_system(folder)
            filesystem.invalidate_cache()
            names = {name.rpartition("/")[2] for name in filesystem.ls(path, detail=False)}
    except (FileNotFoundError, NotADirectoryError):
        return set(files)
    except OSError as error:
        raise BadDataError(reason(error), value=folder) from error
    return {file for file in files if file.rpartition("/")[2] not in names}
