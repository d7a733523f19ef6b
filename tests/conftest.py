"""Two test processes at once: one works through the files that start Ray, in turn."""

import pytest

from tests import ray_cluster

HEAVY = ("test_executor", "test_training", "test_pipeline", "test_session", "test_jobs")
"""Two of them at once would wait for each other's clusters on a small machine. In this order: the
two that share a cluster come last, so that it can end before the other files begin."""
SHARED = ("test_session", "test_jobs")


# Before xdist's own, which reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the tests of a group in one process, and begins with the groups that take longest.

    A group is what a test says by a mark of its own, all heavy files, or its file. The tests of one
    method in `test_conformance` share trainings, those of two methods do not.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=_turn)


def _group(item: pytest.Item) -> str:
    file = item.path.stem
    if file in HEAVY:
        return "heavy"
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    return f"{file} {case.label}" if file == "test_conformance" and case else file


def _turn(item: pytest.Item) -> tuple[int, int, str]:
    """Heavy files come first, then the many groups of `test_conformance`, small ones at the end."""
    file, mark = item.path.stem, item.get_closest_marker("xdist_group")
    assert mark is not None
    group = str(mark.args[0])
    if group == "heavy":
        return 0, HEAVY.index(file) if file in HEAVY else -1, ""
    return (1, 0, group) if file == "test_conformance" else (2, 0, "")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ends the cluster of two nodes after the last test that uses it: idle, it costs a tenth of a
    CPU."""
    if item.path.stem in SHARED and (nextitem is None or nextitem.path.stem not in SHARED):
        ray_cluster.stop()
