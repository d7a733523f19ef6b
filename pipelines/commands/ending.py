"""End of a command that could not do its work: a line for each problem, and an exit status."""

import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from graftwork.operators.errors import GraftworkError, Interrupted
from graftwork.pipelines.spec.problems import one_line


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
    sys.stdout.flush()
    if debug:
        traceback.print_exception(error)
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
    for line in lines:
        print(one_line(line), file=sys.stderr)
    sys.exit(status)


def _usage(error: typer.TyperException) -> str:
    """A mistake on the command line: what is wrong, and where to read on."""
    what = error.format_message().rstrip(".").replace("Value error, ", "")
    what = what.replace("Invalid value for ", "").replace("Got unexpected", "unexpected")
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "graftwork"
    return f"error: {what[:1].lower()}{what[1:]}; see {path} -h"
