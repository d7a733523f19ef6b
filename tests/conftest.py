"""Two test processes at once: one works through the files that start Ray or servers, in turn."""

import pytest

HEAVY = {
    "test_cli",
    "test_executor",
    "test_jobs",
    "test_pipeline",
    "test_results",
    "test_serving",
    "test_session",
    "test_tracking",
    "test_training",
}
"""Two of them at once would wait for each other's clusters on a small machine."""


# Before xdist's own, which reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the tests of a file, and all heavy files, in one process."""
    for item in items:
        file = item.path.stem
        item.add_marker(pytest.mark.xdist_group("heavy" if file in HEAVY else file))
