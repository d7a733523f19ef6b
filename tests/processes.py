"""Processes that a test starts: they end with it, and say what happened when it fails."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process with pipes at its standard output and error, for the length of a `with` block.

    However the block ends, the process is dead and the pipes are closed after it. Pipes that a
    failed test leaves open would fail a later one, whichever collects the garbage. What the process
    said, a trace of a crash included, stands under the error of a block that fails.

    Args:
        command: program and arguments.
        options: of `subprocess.Popen`.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    ) as process:
        try:
            yield process
        except BaseException as error:
            error.add_note(_last_words(process))
            raise
        finally:
            process.kill()


def _last_words(process: subprocess.Popen[Any]) -> str:
    """How a process ended, and what it wrote that nobody has read."""
    ended = process.poll()
    process.kill()
    out = err = None
    # A child of its own may hold the pipes.
    with suppress(subprocess.TimeoutExpired, ValueError):
        out, err = process.communicate(timeout=10)
    return f"exit status {ended}\nstdout: {_text(out)}\nstderr: {_text(err)}"


def _text(written: bytes | str | None) -> str:
    return written.decode(errors="replace") if isinstance(written, bytes) else str(written)
