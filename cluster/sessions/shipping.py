"""Shipping of the checkout to a cluster: the program, not the data that lies next to it."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import graftwork

PACKAGE = Path(graftwork.__file__).parent
"""The package: below `src` of a checkout, where its folders are links, or in site-packages."""

ROOT = PACKAGE.parent
"""Folder that workers have on their path, to import the package."""

IGNORED = shutil.ignore_patterns("__pycache__", ".*", "*.pyc", "*.db", "*.egg-info")


@contextmanager
def working_dir(files: Mapping[str, str] | None = None) -> Iterator[Path]:
    """A folder with our package and a few more files, to be sent as Ray's `working_dir`.

    A copy and not the checkout itself: stores, data sets and credentials that lie in a checkout
    never travel, and the same program gives the same package, which Ray then uploads only once.

    Args:
        files: relative path -> text.
    """
    with tempfile.TemporaryDirectory(prefix="graftwork-") as folder:
        root = Path(folder, "graftwork")
        # Links of a checkout become folders; an import from here wins over an installation.
        shutil.copytree(PACKAGE, root / "graftwork", ignore=IGNORED)
        for name, text in (files or {}).items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        yield root
