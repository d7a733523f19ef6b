"""The public face: its names, their examples, and that importing it costs nothing."""

import doctest
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import graftwork
from graftwork import methods

ROOT = Path(__file__).parent.parent
FUNCTIONS = ("load_spec", "plan", "run", "results", "predict")


def test_importing_it_imports_none_of_its_parts() -> None:
    code = (
        "import sys, graftwork\n"
        "assert set(graftwork.__all__) == set(dir(graftwork))\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'ray', 'mlflow')])\n"
        "print([m for m in sys.modules if m.startswith('graftwork.')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"


def test_every_public_name_is_there_and_documented() -> None:
    for name in graftwork.__all__:
        found = getattr(graftwork, name)
        if name not in ("METHODS", "__version__"):
            assert inspect.getdoc(found), name
    assert "simplecil" in graftwork.METHODS
    missing = "nothing"
    with pytest.raises(AttributeError, match="'graftwork' has no attribute 'nothing'"):
        getattr(graftwork, missing)
    # A type checker sees the same names: those below TYPE_CHECKING.
    source = Path(graftwork.__file__).read_text(encoding="utf-8")
    places = [name for names in graftwork._PLACES.values() for name in names]
    assert sorted([*places, "__version__"]) == sorted(graftwork.__all__)
    assert all(source.count(f" {name}") >= 1 for name in places)


CONTRACTS = (
    *("Card", "HyperparameterError", "require", "Rows", "Fitted", "Task", "Recipe", "Learner"),
    *("Trained", "Parts", "Adapted", "Branches", "Fused"),
)


def test_the_examples_of_the_contracts_work_in_their_order() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    given = {"graftwork": graftwork, "build": methods.build, "torch": torch, "vit": vit}
    assert {*CONTRACTS, *FUNCTIONS, "GraftworkError", "METHODS", "__version__"} == set(
        graftwork.__all__
    )
    flags = doctest.IGNORE_EXCEPTION_DETAIL | doctest.ELLIPSIS
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(optionflags=flags)
    for name in CONTRACTS:
        [example] = finder.find(getattr(graftwork, name), name, globs={})
        assert example.examples, name
        example.globs, said = given, list[str]()
        assert runner.run(example, out=said.append, clear_globs=False).failed == 0, "".join(said)


EXAMPLES = """
import doctest, pathlib, sys
import graftwork
from graftwork.operators.data import digits

labels = digits.labels("test").tolist()
pathlib.Path("five.png").write_bytes(digits.images("test")[labels.index(5)])
given = {"graftwork": graftwork, "store": "store"}
runner, finder = doctest.DocTestRunner(), doctest.DocTestFinder()
for name in sys.argv[1:]:
    [example] = finder.find(getattr(graftwork, name), name, globs={})
    example.globs = given
    assert runner.run(example, clear_globs=False).failed == 0
print(runner.tries, "examples")
"""


def test_the_examples_of_the_functions_work_in_their_order(tmp_path: Path) -> None:
    """A run on a Ray of its own, and a prediction with the model that it recorded."""
    # In a process of its own, as users have it: there warnings of MLflow's libraries are none of
    # ours.
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLES, *FUNCTIONS],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "9 examples"
