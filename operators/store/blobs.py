"""The few file operations that the store is built on, for local folders and object stores.

Everything durable rests on two of them: `put` writes a new file whole under a name that nobody
else uses, `put_if_absent` makes a small file appear whole or not at all, and only once. A local
folder has fsync and `operators/files/appear.py` for that, an object store its conditional put.
"""

import contextlib
import errno
import os
import uuid
from pathlib import Path
from typing import BinaryIO, Protocol

import fsspec

from graftwork.operators.errors import ConfigError, StorageError
from graftwork.operators.files.access import NoFileError, open_regular
from graftwork.operators.files.appear import appear, sync, sync_folder


class Blobs(Protocol):
    """Files below a root; names are relative, with `/`."""

    root: str

    def path(self, name: str) -> Path | None:
        """Path of a file on this machine, whether it exists or not; None if it has none."""
        ...

    def put(self, name: str, data: bytes | bytearray) -> None:
        """Writes a file durably; the name must be new and unique to the caller."""
        ...

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Makes a file appear whole, or returns False when it is there already."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Writes a file whole, in place of an earlier one; for what is no commit."""
        ...

    def get(self, name: str) -> bytes | None:
        """The file's bytes, None when there is no such file."""
        ...

    def open(self, name: str) -> BinaryIO | None:
        """The file for reading piece by piece, None when there is no such file."""
        ...

    def folders(self, name: str) -> list[str]:
        """Names of the folders right below `name`, sorted; [] when there is none."""
        ...

    def files(self, name: str) -> dict[str, tuple[int, float]]:
        """All files below `name`: relative name -> (bytes, seconds since the epoch)."""
        ...

    def modified(self, name: str) -> float | None:
        """Time when the file was written, in seconds on the store's clock; None without a file."""
        ...

    def exists(self, names: list[str]) -> set[str]:
        """Names of the files that exist."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file or a folder with all that it holds; no error when absent."""
        ...

    def move(self, name: str, new_name: str) -> None:
        """Moves a folder within the root."""
        ...


def open_blobs(url: str) -> Blobs:
    """The file operations for a local path or an fsspec URL."""
    protocol, _, path = url.partition("://")
    if not path:
        return LocalBlobs(url)
    return LocalBlobs(path) if protocol == "file" else ObjectBlobs(url)


class LocalBlobs:
    """A local (or network-mounted) folder."""

    def __init__(self, root: str) -> None:
        self.root = str(Path(root).absolute())

    def _path(self, name: str) -> Path:
        return Path(self.root, name)

    def path(self, name: str) -> Path | None:
        return self._path(name)

    def put(self, name: str, data: bytes | bytearray) -> None:
        path = self._path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                sync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):  # perhaps it was never created
                path.unlink()
            raise _storage_error(error, self.root, len(data)) from error

    def put_if_absent(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        temporary = _temporary(name)
        self.put(temporary, data)
        try:
            # Not by a plain rename, which would silently replace the winner.
            if not appear(self._path(temporary), path):
                return False
            sync_folder(path.parent)
        except OSError as error:
            raise _storage_error(error, self.root, len(data)) from error
        finally:
            self._path(temporary).unlink(missing_ok=True)
        return True

    def replace(self, name: str, data: bytes) -> None:
        temporary = _temporary(name)
        self.put(temporary, data)
        try:
            os.replace(self._path(temporary), self._path(name))
        except OSError as error:  # a folder of that name, for example
            self._path(temporary).unlink(missing_ok=True)
            raise _storage_error(error, self.root, len(data)) from error

    def get(self, name: str) -> bytes | None:
        file = self.open(name)
        if file is None:
            return None
        try:
            with file:
                return file.read()
        except OSError as error:
            raise _storage_error(error, self.root, 0) from error

    def open(self, name: str) -> BinaryIO | None:
        try:
            return open_regular(self._path(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except NoFileError as error:
            what = f"store {self.root}: {name}: it is no file; remove it"
            raise StorageError(what) from error
        except OSError as error:
            raise _storage_error(error, self.root, 0) from error

    def folders(self, name: str) -> list[str]:
        try:
            with os.scandir(self._path(name)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _storage_error(error, self.root, 0) from error

    def files(self, name: str) -> dict[str, tuple[int, float]]:
        found = {}
        for folder, _, names in os.walk(self._path(name)):
            for file in names:
                path = Path(folder, file)
                try:
                    found_at = path.stat()
                except FileNotFoundError:  # a writer's temporary name, gone in between
                    continue
                except OSError as error:
                    raise _storage_error(error, self.root, 0) from error
                found[path.relative_to(self.root).as_posix()] = (
                    found_at.st_size,
                    found_at.st_mtime,
                )
        return found

    def modified(self, name: str) -> float | None:
        try:
            return self._path(name).stat().st_mtime
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _storage_error(error, self.root, 0) from error

    def exists(self, names: list[str]) -> set[str]:
        return {name for name in names if os.path.exists(os.path.join(self.root, name))}

    def remove(self, name: str) -> None:
        path = self._path(name)
        try:
            if not path.is_dir() or path.is_symlink():
                path.unlink(missing_ok=True)
                return
            # Not shutil.rmtree: another process may remove or add files meanwhile.
            for child in list(path.iterdir()):
                self.remove(child.relative_to(self.root).as_posix())
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            raise _storage_error(error, self.root, 0) from error

    def move(self, name: str, new_name: str) -> None:
        target = self._path(new_name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(self._path(name), target)
        except FileNotFoundError:
            return  # another process was faster
        except OSError as error:
            raise _storage_error(error, self.root, 0) from error


class ObjectBlobs:
    """An object store through fsspec: s3, gs, abfs, and memory in tests."""

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/")
        try:
            self.fs, self._base = fsspec.url_to_fs(self.root)
        except ImportError as error:
            extra = '; pip install "graftwork[s3]"' if url.startswith("s3://") else ""
            raise ConfigError(f"store {url}: {error}{extra}") from error

    def _path(self, name: str) -> str:
        return f"{self._base.rstrip('/')}/{name}" if name else self._base

    def path(self, name: str) -> Path | None:
        return None

    def put(self, name: str, data: bytes | bytearray) -> None:
        # One put of the whole object: a stream that breaks off would leave a partial one behind.
        try:
            self.fs.pipe_file(self._path(name), data)
        except OSError as error:
            raise _storage_error(error, self.root, len(data)) from error

    def put_if_absent(self, name: str, data: bytes) -> bool:
        try:
            self.fs.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            # After a lost answer our own retry looks like a loss: the bytes tell.
            return self.get(name) == data
        except OSError as error:
            raise _storage_error(error, self.root, len(data)) from error
        return True

    def replace(self, name: str, data: bytes) -> None:
        self.put(name, data)

    def get(self, name: str) -> bytes | None:
        try:
            return bytes(self.fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _storage_error(error, self.root, 0) from error

    def open(self, name: str) -> BinaryIO | None:
        try:
            return self.fs.open(self._path(name), "rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _storage_error(error, self.root, 0) from error

    def folders(self, name: str) -> list[str]:
        try:
            entries = self.fs.ls(self._path(name), detail=True)
        except FileNotFoundError:
            return []
        return sorted(
            e["name"].rstrip("/").rpartition("/")[2] for e in entries if e["type"] == "directory"
        )

    def files(self, name: str) -> dict[str, tuple[int, float]]:
        try:
            entries = self.fs.find(self._path(name), detail=True)
        except FileNotFoundError:
            return {}
        prefix = len(self._base.rstrip("/")) + 1
        return {
            path[prefix:]: (entry["size"] or 0, self.fs.modified(path).timestamp())
            for path, entry in entries.items()
        }

    def modified(self, name: str) -> float | None:
        path = self._path(name)
        try:
            self.fs.invalidate_cache(path.rpartition("/")[0])  # another process may have written
            return self.fs.modified(path).timestamp()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _storage_error(error, self.root, 0) from error

    def exists(self, names: list[str]) -> set[str]:
        # One listing per folder of stages instead of one request per name.
        parents = {name.split("/")[0] for name in names}
        prefix = len(self._base.rstrip("/")) + 1
        stored: set[str] = set()
        for parent in parents:
            try:
                stored.update(path[prefix:] for path in self.fs.find(self._path(parent)))
            except FileNotFoundError:
                continue
        return stored & set(names)

    def remove(self, name: str) -> None:
        if self.fs.exists(self._path(name)):
            self.fs.rm(self._path(name), recursive=True)

    def move(self, name: str, new_name: str) -> None:
        self.fs.mv(self._path(name), self._path(new_name), recursive=True)


def _temporary(name: str) -> str:
    """A name in the same folder that nobody has; not made of the other, which may be long."""
    folder, slash, _ = name.rpartition("/")
    return f"{folder}{slash}{uuid.uuid4().hex}.tmp"


def _storage_error(error: OSError, root: str, needed: int) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"store {root} is full: {needed} bytes did not fit; free space and run again"
        )
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return StorageError(f"store {root}: no permission: {error.strerror or error}")
    within = not os.path.exists(root) or os.path.isdir(root)
    if within and isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
        where = error.filename2 or error.filename or root
        return StorageError(f"store {root}: {where}: a file where a folder belongs, or the reverse")
    return StorageError(f"store {root}: {error.strerror or error}")
