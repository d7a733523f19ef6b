"""The page on adding things works as written: its files and its lines, put where it says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
LINES = re.M | re.S
FILES = dict(re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```$", PAGE, LINES))
CHANGES = re.findall(r"^In `(\S+)`,[^\n]*(?:\n[^\n]+)?:\n\n```diff\n(.*?)^```$", PAGE, LINES)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout after everything on the page was done."""
    root = tmp_path_factory.mktemp("adding")
    for folder in ("methods", "operators", "pipelines", "cluster", "tests", "docs"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    for name, text in FILES.items():
        (root / name).write_text(text, encoding="utf-8")
    for name, hunk in CHANGES:
        lines = hunk.splitlines()
        before, after = (
            "\n".join(line[1:] for line in lines if not line.startswith(left_out))
            for left_out in "+-"
        )
        old = (root / name).read_text(encoding="utf-8")
        assert old.count(before) == 1, (name, before)
        (root / name).write_text(old.replace(before, after), encoding="utf-8")
    reference = call(root, "-m", "pipelines.spec_reference")
    page = (root / "docs/spec.md").read_text(encoding="utf-8")
    start, end = page.index("| key |"), page.index("\nThe table is printed by")
    (root / "docs/spec.md").write_text(page[:start] + reference + page[end:], encoding="utf-8")
    return root


def call(root: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_what_it_speaks_of() -> None:
    assert {"methods/ncm.py", "tests/test_ncm.py", "flowers.yaml"} < FILES.keys()
    assert len(CHANGES) == PAGE.count("```diff")


def test_the_method_keeps_the_contract(tree: Path) -> None:
    tests = ("tests/test_methods.py", "tests/test_ncm.py", "tests/test_layers.py")
    wanted = "ncm or cover_every_method or only_what_it_may"
    call(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", wanted)
    assert "NCM" in call(tree, "-m", "pipelines", "methods", "ncm")


def test_the_preset_and_the_spec_are_accepted(tree: Path) -> None:
    wanted = "cifar_32 or reference_page or preprocessing_names"
    tests = ("tests/test_spec.py", "tests/test_preprocessing.py")
    call(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", wanted)
    call(tree, "write_parquet.py")
    code = (
        "from operators.dataset import index; from operators.store import Store\n"
        "from pipelines.spec import load\n"
        "files = ['dataset.train=train.parquet', 'dataset.test=test.parquet']\n"
        "spec = load('flowers.yaml', files)\n"
        "found = index(spec.dataset.model_dump(mode='json'), Store('store').memo)\n"
        "print(found.classes, len(found.train), len(found.test))"
    )
    assert call(tree, "-c", code) == "('daisy', 'rose') 40 10\n"


def test_the_built_in_data_set_is_images_with_labels(tree: Path) -> None:
    code = (
        "from operators import images, stripes\n"
        "for split, count in (('train', 60), ('test', 15)):\n"
        "    found = stripes.images(split)\n"
        "    assert len(found) == len(set(found)) == len(stripes.labels(split)) == count\n"
        "    assert {images.check(image) for image in found} == {(16, 16)}\n"
    )
    call(tree, "-c", code)
    call(tree, "-c", "from pipelines.spec import load; load('quickstart', ['dataset=stripes'])")
