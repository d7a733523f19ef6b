"""The page on adding things works as written: its files and its lines, put where it says."""

import os
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
TABLES = re.findall(r"^\| test \|[^\n]*\n\|---[^\n]*\n(.*?)\n\n", PAGE, LINES)
KEPT = ("methods/baselines/bitfit.py", "tests/test_bitfit.py")
"""Files of the page that the checkout has; the copy begins without them."""
KEPT_LINE = '    "bitfit": "graftwork.methods.baselines.bitfit:BitFit",\n'


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout after everything on the page was done."""
    root = tmp_path_factory.mktemp("adding")
    for folder in ("src", "methods", "operators", "pipelines", "cluster", "tests", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", root)
    for name in KEPT:
        (root / name).unlink()
    registry = root / "methods" / "__init__.py"
    registered = registry.read_text(encoding="utf-8")
    assert registered.count(KEPT_LINE) == 1
    registry.write_text(registered.replace(KEPT_LINE, ""), encoding="utf-8")
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
    reference = call(root, "-m", "graftwork.pipelines.spec.reference")
    page = (root / "docs/spec.md").read_text(encoding="utf-8")
    start, end = page.index("| key |"), page.index("\nThe table is printed by")
    (root / "docs/spec.md").write_text(page[:start] + reference + page[end:], encoding="utf-8")
    return root


def call(root: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    done = subprocess.run(
        [sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_what_it_speaks_of() -> None:
    assert {
        "methods/representations/ncm.py",
        "tests/test_ncm.py",
        "flowers.yaml",
        *KEPT,
    } < FILES.keys()
    assert len(CHANGES) == PAGE.count("```diff")


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_file_is_the_one_on_the_page(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == FILES[name]
    assert FILES[name].count("\n") <= 150


def test_the_tables_of_tests_name_all_that_take_a_method() -> None:
    named = [set(re.findall(r"`(\w+)`", re.sub(r"(?m)\|[^|]*\|$", "", rows))) for rows in TABLES]
    named[0] |= set(re.findall(r"`(\w+)` fails until", PAGE))
    for names, file, shown in zip(
        named,
        ("test_methods.py", "test_conformance.py"),
        (r"@each_(?:name|variant)\n.*?", r"@every\n.*?"),
        strict=True,
    ):
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert names <= set(re.findall(r"^def test_(\w+)", text, re.M))
        taking = set(re.findall(rf"^{shown}^def test_(\w+)", text, LINES))
        assert taking - names <= {"hyperparameters_survive_json"}


def test_the_methods_and_the_preset_pass_their_tests(tree: Path) -> None:
    files = ("methods", "conformance", "ncm", "bitfit", "layers", "spec", "preprocessing")
    # The kept file, which is the same, goes through all conformance tests elsewhere.
    wanted = (
        "ncm or test_bitfit or bitfit and (card or declared or column)"
        " or cover_every_method or only_what_it_may"
        " or cifar_32 or reference_page or preprocessing_names"
    )
    # One process, since importing torch is what takes the time.
    code = (
        "import sys, pytest\n"
        "from graftwork.pipelines.cli import main\n"
        "if not pytest.main(sys.argv[1:]):\n"
        "    sys.argv[1:] = ['methods', 'ncm']\n"
        "    main()\n"
        "sys.exit(1)\n"
    )
    tests = [f"tests/test_{name}.py" for name in files]
    said = call(tree, "-c", code, "-q", "-p", "no:cacheprovider", *tests, "-k", wanted)
    assert int(re.findall(r"(\d+) passed", said)[0]) >= 40, said
    assert "NCM  https://arxiv.org/abs/2210.04428" in said


def test_the_spec_and_the_table_are_accepted(tree: Path) -> None:
    call(tree, "write_parquet.py")
    code = (
        "from graftwork.operators.data.dataset import index\n"
        "from graftwork.operators.store import Store\n"
        "from graftwork.pipelines.spec.loading import load_resolved\n"
        "files = ['dataset.train=train.parquet', 'dataset.test=test.parquet']\n"
        "spec = load_resolved('flowers.yaml', files).spec\n"
        "found = index(spec.dataset.model_dump(mode='json'), Store('store').memo)\n"
        "print(found.classes, len(found.train), len(found.test))"
    )
    assert call(tree, "-c", code) == "('daisy', 'rose') 40 10\n"


def test_the_built_in_data_set_is_images_with_labels(tree: Path) -> None:
    code = (
        "from graftwork.operators.data import stripes\n"
        "from graftwork.operators.images import codec\n"
        "for split, count in (('train', 60), ('test', 15)):\n"
        "    found = stripes.images(split)\n"
        "    assert len(found) == len(set(found)) == len(stripes.labels(split)) == count\n"
        "    assert {codec.check(image) for image in found} == {(16, 16)}\n"
    )
    call(tree, "-c", code)
    code = (
        "from graftwork.pipelines.spec.loading import load_resolved\n"
        "load_resolved('quickstart', ['dataset=stripes'])\n"
    )
    call(tree, "-c", code)
