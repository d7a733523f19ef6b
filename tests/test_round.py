"""The round: what it reads of a run of the tests, and what it makes of it."""

import sys
from pathlib import Path

import pytest

from tests import round
from tests.round import KERNELS, Outcome, Row

VERSIONS = 'print(\'{"python": "3", "torch": "2", "kernels": "K"}\')'
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_x[1]" time="0.1"/>
<testcase classname="tests.test_a" name="test_x[2]" time="0.1"><failure message="no">E</failure></testcase>
<testcase classname="tests.test_a" name="test_y" time="0"><skipped message="why"/></testcase>
<testcase classname="tests.test_b" name="test_z" time="0"><error message="setup">E</error></testcase>
<testcase classname="tests.test_b" name="test_w" time="0"><system-out>text</system-out></testcase>
</testsuite></testsuites>"""  # noqa: E501


def test_outcomes_of_tests_are_counted() -> None:
    failed = ["tests.test_a::test_x[2]", "tests.test_b::test_z"]
    assert round.read_junit(JUNIT) == (2, failed, 1)


def test_every_row_says_how_many_threads_and_has_a_name_of_its_own() -> None:
    rows = round.rows(["/envs/py312/bin/python", "/envs/py313/bin/python"])
    assert len({row.name for row in rows}) == len(rows) == len(KERNELS) + 4
    assert all("OMP_NUM_THREADS" in row.variables for row in rows)
    assert [row.python for row in rows[-2:]] == ["/envs/py312/bin/python", "/envs/py313/bin/python"]
    assert {row.python for row in rows[:-2]} == {sys.executable}


@pytest.mark.parametrize(
    ("body", "passed", "failed", "good"),
    [
        ("import os\ndef test_a(): assert os.environ['KIND'] == 'k'", 1, 0, True),
        ("import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('so')", 1, 0, True),
        ("def test_a(): pass\ndef test_b(): assert False", 1, 1, False),
        ("import pytest\ndef test_b(): pytest.skip('so')", 0, 0, False),
        ("", 0, 0, False),
        ("import no_such_module", 0, 1, False),
    ],
)
def test_a_row_runs(tmp_path: Path, body: str, passed: int, failed: int, good: bool) -> None:
    (tmp_path / "test_row.py").write_text(body)
    row = Row("it", {"KIND": "k"}, sys.executable)
    words = [str(tmp_path), "-c", "/dev/null", "-p", "no:cacheprovider"]
    found = round.run(row, words, VERSIONS)
    assert (found.passed, len(found.failed), found.good) == (passed, failed, good)


def test_the_table_has_a_line_for_each_row() -> None:
    versions = {"python": "3.11.7", "torch": "2.14.1", "kernels": "AVX2"}
    plain = Outcome(Row("as it is", {}, "python"), versions, 12, (), 3, 4.4)
    other = Outcome(Row("A=B", {"A": "B"}, "python"), versions, 11, ("t::x",), 3, 5.6)
    head, _, first, second = round.table([plain, other]).splitlines()
    assert head.count("|") == first.count("|") == second.count("|")
    assert first == "| as it is | 3.11.7 | 2.14.1 | AVX2 | 12 | 0 | 3 | 4 |"
    assert second == "| `A=B` | 3.11.7 | 2.14.1 | AVX2 | 11 | 1 | 3 | 6 |"
