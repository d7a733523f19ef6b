"""Which tests run in one process: what is shared is made once."""

import os
from pathlib import Path

import pytest

from tests.conftest import ELSEWHERE, HEAVY, SHAPED, SINGLE, group, turn

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("nodeid", "wanted"),
    [
        ("tests/test_session.py::test_a[x::y]", "heavy"),
        *((f"tests/test_cli.py::{name}", "heavy") for name in SINGLE),
        ("tests/test_cli.py::test_the_version", "test_cli"),
        ("tests/test_conformance.py::test_x[first_session-ssf]", "first_session-ssf"),
        ("tests/test_conformance.py::test_x[registers-first_session-ssf]", "first_session-ssf"),
        ("tests/test_conformance.py::test_x[no class token-slca]", "slca"),
        (f"tests/test_conformance.py::{ELSEWHERE[0]}[slca]", "elsewhere"),
        (f"tests/{SHAPED[0]}.py::test_x[equal images-ties merge]", f"{SHAPED[0]} equal images"),
        (f"tests/{SHAPED[0]}.py::test_y[equal images]", f"{SHAPED[0]} equal images"),
        (f"tests/{SHAPED[0]}.py::test_z", SHAPED[0]),
    ],
)
def test_groups(nodeid: str, wanted: str) -> None:
    assert group(nodeid).removeprefix("test_conformance ") == wanted


def test_heavy_files_come_first() -> None:
    files = ["test_vit", "test_conformance", *reversed(HEAVY)]
    ordered = sorted((f"tests/{file}.py::test_x" for file in files), key=turn)
    assert [Path(n.partition("::")[0]).stem for n in ordered] == [*HEAVY, *reversed(files[:2])]


def test_the_names_are_those_of_tests() -> None:
    assert all((HERE / f"{file}.py").exists() for file in (*HEAVY, *SHAPED))
    files = ("test_cli.py", "test_api.py", "test_indexing.py", "test_indexing.py")
    files += ("test_shadow.py",)
    for name, file in zip(SINGLE, files, strict=True):
        assert f"def {name}(" in (HERE / file).read_text()
    conformance = (HERE / "test_conformance.py").read_text()
    assert all(f"def {name}(" in conformance for name in ELSEWHERE)


@pytest.mark.parametrize("number", range(4))
def test_one_process_runs_a_file(number: int, seen: set[int] = set()) -> None:  # noqa: B006
    """Fails where the scheduler spreads the tests of a group: each of these has met the earlier."""
    assert seen == set(range(number)) or "PYTEST_XDIST_WORKER" not in os.environ
    seen.add(number)
