"""Modules of the working directory are not what workers import, whatever their names."""

import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.test_cli import write_spec

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {
    # An empty entry is the working directory for Python.
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    "OMP_NUM_THREADS": "1",
}


def shadows(folder: Path) -> int:
    """Puts packages and modules into a folder that tell of their import and end it."""
    # Whatever a worker could import: all that Python brings, and all that is installed.
    names = {name for name in packages_distributions() if name.isidentifier()}
    names |= sys.stdlib_module_names
    names |= {"graftwork", "methods", "operators", "pipelines", "cluster"}
    for number, name in enumerate(sorted(names)):
        told = f"open({str(folder / 'told.txt')!r}, 'a').write({name!r} + '\\n')\n"
        (folder / name).mkdir() if number % 2 else None
        path = folder / (f"{name}/__init__.py" if number % 2 else f"{name}.py")
        path.write_text(f"{told}raise RuntimeError('the {name} of a user')\n")
    return len(names)


def test_no_module_of_the_working_directory_is_imported(tmp_path: Path) -> None:
    assert shadows(tmp_path) > 300
    bitfit = {"bitfit": {"epochs": 1}}
    write_spec(tmp_path / "spec.yaml", methods=["simplecil", bitfit], pipeline="数" * 80)
    # As the installed script starts: its own folder is first on the path, not the working one.
    start = "from graftwork.pipelines.cli import main; main()"
    command = [sys.executable, "-P", "-c", start, "run", "spec.yaml", "--store", "a %20 store"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert not (tmp_path / "told.txt").exists(), (tmp_path / "told.txt").read_text()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a %20 store/reports" / f"{'数' * 80}.html").exists()
