"""End of a command that could not do its work: a line for each problem, and an exit status."""

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import typer

from graftwork.operators.errors import (
    ConfigError,
    GraftworkError,
    Interrupted,
    OutOfMemory,
    StorageError,
)
from graftwork.pipelines.spec.problems import one_line

ADVICE = {
    errno.ENOSPC: "free space and run again",
    errno.EDQUOT: "the quota is used up; free space and run again",
    errno.EFBIG: "files may not grow that large here; see `ulimit -f`",
    errno.EMFILE: "see `ulimit -n`",
    errno.ENFILE: "the machine has too many files open",
    errno.EROFS: "write somewhere else",
    errno.EACCES: "",
    errno.EPERM: "",
    errno.EIO: "the disk or the network behind it fails",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "a link leads to itself",
    errno.ENOTDIR: "",
    errno.EISDIR: "",
    errno.ESTALE: "the network's file system went away",
    errno.ENODEV: "",
    errno.ENXIO: "",
}
"""Errors of the system that a person can act on, wherever they come up, and what to do."""


def ready() -> None:
    """Makes standard output and error streams that can be written, whatever they are.

    Python has none where they were closed, and one of ASCII in some environments.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def terminating() -> Iterator[None]:
    """Makes SIGTERM unwind as Ctrl-C does: temporary files go, and the exit status is 143."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def fail(error: BaseException, debug: bool) -> None:
    """Prints what went wrong, a line each, and exits."""
    with suppress(OSError):  # it is full; that is what is told
        sys.stdout.flush()
    if debug:
        traceback.print_exception(error)
    error = of_the_system(error) or error
    if isinstance(error, Interrupted):
        lines, status = [str(error)], error.exit_code
    elif isinstance(error, GraftworkError):
        found = [line or type(error).__name__ for line in error.lines()]
        lines, status = [f"error: {line}" for line in found], error.exit_code
    elif isinstance(error, typer.TyperException):
        # Without arguments the "error" is the help, which is printed already.
        silent = type(error).__name__ == "NoArgsIsHelpError"
        lines, status = [] if silent else [_usage(error)], error.exit_code
    else:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        lines, status = [f"error: unexpected {what}; --debug shows where; please report it"], 1
    with suppress(OSError):  # nobody can be told, but by the exit status
        for line in lines:
            print(one_line(line), file=sys.stderr)
    sys.exit(status)


def of_the_system(error: BaseException) -> GraftworkError | None:
    """An error of the machine in our words; None for any other."""
    if isinstance(error, MemoryError):
        return OutOfMemory("this process needs more memory than it may have")
    if not isinstance(error, OSError):
        return None
    try:
        os.getcwd()
    except FileNotFoundError:
        return ConfigError("the working directory was deleted; change to one that is there")
    except OSError as other:
        return ConfigError(f"the working directory cannot be used: {other.strerror}")
    if "No usable temporary directory" in str(error):
        return ConfigError("no folder for temporary files can be written; set TMPDIR to one")
    if error.errno not in ADVICE:
        return None
    place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "output"
    return StorageError(error.strerror or str(error), value=place, advice=ADVICE[error.errno])


def _usage(error: typer.TyperException) -> str:
    """A mistake on the command line: what is wrong, and where to read on."""
    what = error.format_message().rstrip(".").replace("Value error, ", "")
    what = what.replace("Invalid value for ", "").replace("Got unexpected", "unexpected")
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "graftwork"
    return f"error: {what[:1].lower()}{what[1:]}; see {path} -h"
