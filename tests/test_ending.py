"""How a command ends when the machine, and not the user or the program, is what is odd."""

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from graftwork.operators.errors import ConfigError, OutOfMemory, StorageError
from graftwork.pipelines.commands.ending import of_the_system
from graftwork.pipelines.spec.loading import load_resolved
from tests.test_cli import Command, call, write_spec

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
__all__ = ["call"]  # a fixture


def system(number: int, name: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), name)


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (
            system(errno.ENOSPC, "a/b"),
            "a/b: No space left on device; free space and run again",
            6,
        ),
        (system(errno.ENOSPC), "output: No space left on device; free space and run again", 6),
        (system(errno.EACCES, "x"), "x: Permission denied", 6),
        (system(errno.EROFS, "x"), "x: Read-only file system; write somewhere else", 6),
        (system(errno.EMFILE, "x"), "x: Too many open files; see `ulimit -n`", 6),
        (
            system(errno.EFBIG, "x"),
            "x: File too large; files may not grow that large here; see `ulimit -f`",
            6,
        ),
        (
            system(errno.ELOOP, "x"),
            "x: Too many levels of symbolic links; a link leads to itself",
            6,
        ),
        (system(errno.ENAMETOOLONG, "x"), "x: File name too long; use a shorter name", 6),
        (MemoryError(), "this process needs more memory than it may have", 10),
        (
            FileNotFoundError(2, "No usable temporary directory found in ['/x']"),
            "no folder for temporary files can be written; set TMPDIR to one",
            2,
        ),
    ],
)
def test_errors_of_the_machine_are_told_with_what_to_do(
    error: Exception, line: str, status: int
) -> None:
    told = of_the_system(error)
    assert told is not None
    assert (str(told), told.exit_code) == (line, status)


def test_a_mistake_of_ours_is_no_error_of_the_machine() -> None:
    assert of_the_system(system(errno.ENOENT, "x")) is None
    assert of_the_system(ValueError("x")) is None


def test_a_deleted_working_directory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    told = of_the_system(system(errno.ENOENT))
    assert isinstance(told, ConfigError) and "working directory was deleted" in str(told)


def test_classes_of_these_errors() -> None:
    assert isinstance(of_the_system(system(errno.EIO, "x")), StorageError)
    assert isinstance(of_the_system(MemoryError()), OutOfMemory)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_streams_that_were_closed_are_no_error(number: int) -> None:
    command = [sys.executable, "-m", "graftwork.pipelines", "methods"]
    shell = f"exec {shlex.join(command)} {number}>&-"
    done = subprocess.run(["sh", "-c", shell], env=ENVIRONMENT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("words", [["methods"], ["methods", "simplecil", "--json"]])
def test_a_pipe_that_nobody_reads_is_no_error(words: list[str]) -> None:
    """rich ends a process with status 1 for it; `print` raises."""
    end, mine = os.pipe()
    os.close(end)
    command = [sys.executable, "-m", "graftwork.pipelines", *words]
    done = subprocess.run(command, stdout=mine, stderr=subprocess.PIPE, env=ENVIRONMENT)
    os.close(mine)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    command = [sys.executable, "-m", "graftwork.pipelines", "methods", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT)
    lines = done.stderr.decode().splitlines()
    assert lines[0] == "error: output: No space left on device; free space and run again"
    assert done.returncode == 6 or len(lines) > 1


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("数" * 81, "must have at most 240 bytes in UTF-8, .* got 243 of 81 characters"),
        ("🙂" * 61, "got 244 of 61 characters"),
        ("..", "must be the name of a folder"),
        ("a/b", 'must not hold "/"'),
        ("\ud800", "pipeline: invalid character"),
    ],
)
def test_names_that_no_file_can_have_are_refused_before_anything_is_computed(
    tmp_path: Path, name: str, problem: str
) -> None:
    escaped = name.encode("unicode_escape").decode() if name == "\ud800" else name
    write_spec(tmp_path / "spec.yaml")
    text = (tmp_path / "spec.yaml").read_text()
    text = text.replace("pipeline: tiny", f'pipeline: "{escaped}"')
    (tmp_path / "spec.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=problem):
        load_resolved(str(tmp_path / "spec.yaml"))


@pytest.mark.parametrize("name", ["数" * 80, "%20", "a#b?c", "-rf", "quo'te\\", "🙂", "a: b"])
def test_names_that_files_can_have_are_taken(tmp_path: Path, name: str) -> None:
    write_spec(tmp_path / "spec.yaml", pipeline=name)
    assert load_resolved(str(tmp_path / "spec.yaml")).spec.pipeline == name


@pytest.mark.parametrize("address", ["http://[::1", "http://h:port", "nonsense", ""])
def test_an_address_that_is_none_is_named(call: Command, address: str) -> None:
    done = call("status", "job", "--address", address)
    assert done.code == 2
    assert "expected the dashboard, http://HEAD:8265" in done.err


@pytest.mark.parametrize("command", ["plan", "doctor"])
def test_commands_that_look_make_no_store(call: Command, tmp_path: Path, command: str) -> None:
    write_spec(tmp_path / "spec.yaml")
    done = call(command, "spec.yaml", "--store", "none")
    assert done.code == 0, done.err
    assert [path.name for path in tmp_path.iterdir()] == ["spec.yaml"]


def test_odd_situations_end_in_order() -> None:
    """A few of `benchmarks/odd.py`; all of them take minutes."""
    command = [sys.executable, "-m", "benchmarks.odd", "--seed", "5000", "--count", "20"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "20 situations, 0 wrong" in done.stdout
