"""Two test processes at once: one works through the files that start Ray, in turn."""

import os
import re
from pathlib import Path, PurePath
from typing import Any

import pytest

from tests import ray_cluster

# Workers of Ray do not look into the working directory, where operators of tests would be found.
ROOT = str(Path(__file__).resolve().parent.parent)
PATHS = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
if ROOT not in PATHS:
    os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, ROOT])

HEAVY = (
    *("test_executor", "test_training", "test_pipeline", "test_serving"),
    *("test_session", "test_jobs"),
)
"""Two of them at once would wait for each other's clusters on a small machine. In this order: the
two that share a cluster come last, so that it can end before the other files begin."""
SHARED = ("test_session", "test_jobs")
SINGLE = (
    "test_signals_end_a_run_in_order",
    "test_the_examples_of_the_functions_work_in_their_order",
    "test_workers_find_what_one_process_finds",
    "test_a_run_indexes_and_computes_on_one_ray",
    "test_no_module_of_the_working_directory_is_imported",
)
"""Tests that start Ray, in files whose other tests start none."""
SHAPED = ("test_ragged_conformance",)
"""All methods on streams of several shapes; the results of a shape are made once."""
ELSEWHERE = ("test_a_fresh_process_gives_the_same_logits", "test_two_workers_are_one")
"""Tests of all methods that share a pair of processes, whose start takes most of their time."""


def group(nodeid: str) -> str:
    """The tests that one process has to run, named by what they share: all heavy ones, those of one
    method in `test_conformance` (trainings) or of one shape, otherwise those of a file (fixtures).
    """
    path, _, name = nodeid.partition("::")
    file = PurePath(path).stem
    if file in HEAVY or name in SINGLE:
        return "heavy"
    if file in SHAPED:
        shape = name.partition("[")[2].partition("-")[0].rstrip("]")
        return f"{file} {shape}".rstrip()
    if file != "test_conformance":
        return file
    function, _, case = name.partition("[")
    case = re.sub(r"^(registers|no class token)-", "", case)
    return f"{file} elsewhere" if function in ELSEWHERE else f"{file} {case.rstrip(']')}"


def turn(nodeid: str) -> tuple[int, int, str]:
    """What takes long comes first: the heavy files, then the groups of `test_conformance`."""
    found, file = group(nodeid), PurePath(nodeid.partition("::")[0]).stem
    if found == "heavy":
        return 0, HEAVY.index(file) if file in HEAVY else -1, ""
    return (1, 0, found) if file == "test_conformance" else (2, 0, "")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the heavy tests with `ray`, before pytest picks by `-m`, and sorts all."""
    for item in items:
        if group(item.nodeid) == "heavy":
            item.add_marker("ray")
    items.sort(key=lambda item: turn(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Our groups in our order. The mark `xdist_group` would not do: with pytest 9.2, xdist 3.8
    ignores it without a word, and every test goes to any process."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ends the cluster of two nodes after the last test that uses it: idle, it costs a tenth of a
    CPU."""
    if item.path.stem in SHARED and (nextitem is None or nextitem.path.stem not in SHARED):
        ray_cluster.stop()
