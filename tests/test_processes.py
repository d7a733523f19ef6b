"""The tests' own processes: nothing stays of them, and a failure shows what they said."""

import sys

import pytest

from tests.processes import started

CRASH = "import faulthandler, os; faulthandler.enable(); print('begun', flush=True); os.abort()"


def test_a_failing_block_shows_what_the_process_said_and_leaves_no_pipe() -> None:
    with (
        pytest.raises(AssertionError) as caught,
        started([sys.executable, "-c", CRASH]) as process,
    ):
        process.wait(timeout=60)
        raise AssertionError
    [note] = caught.value.__notes__
    assert note.startswith("exit status -6\nstdout: begun\n")
    assert "Fatal Python error: Aborted" in note
    assert process.stdout is not None and process.stdout.closed
    assert process.stderr is not None and process.stderr.closed


def test_a_process_ends_with_its_block() -> None:
    with started([sys.executable, "-c", "import time; time.sleep(60)"], text=True) as process:
        assert process.poll() is None
    assert process.returncode == -9
