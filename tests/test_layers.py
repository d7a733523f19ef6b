"""The house: who may import whom, as the table of floors, read from the imports themselves.

A room is a folder, or a file that stands in no folder of its package. It imports its own files and
rooms of lower floors, so that no import leads back up; and no file imports itself through others.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("methods", "operators", "cluster", "pipelines")
"""From the lowest to the highest: none imports one after it, but for what `ABROAD` forbids more."""

FLOORS: Mapping[str, tuple[str, ...]] = {
    "methods": (
        "networks",
        "contracts",
        ". parts",
        "baselines mixtures prompts representations",
    ),
    "operators": (
        ".",
        "assignment errors keys live names seeds versions backbones.shipped",
        "files",
        "images store",
        "parameters parquet",
        "backbones building ensembling stage tracking",
        "data merging",
        "catalogue formats housekeeping streams backbones.recipes",
        "evaluation training",
        "serving stages",
    ),
    "cluster": (". sessions", "jobs", "execution", "indexing inference"),
    "pipelines": (
        ".",
        "spec",
        "planning",
        "describing explaining",
        "reporting",
        "running",
        "commands",
        "api cli",
        "__main__",
    ),
}
"""Rooms of a package from the ground up; "." is the package's own `__init__`."""

ABROAD = {
    "methods": {"ray", "mlflow", "fsspec", "pyarrow"},
    "operators": {"ray"},
    "cluster": {"mlflow", "graftwork.methods"},
    "pipelines": {"ray"},
}
"""What no file of a package imports."""

MOST_FILES, MOST_LINES = 15, 400


def modules() -> dict[str, Path]:
    """Full name -> file of everything below `graftwork`, by the folders that it links to."""
    found = {"graftwork": ROOT / "src" / "graftwork" / "__init__.py"}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(["graftwork", *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Full names that a file imports, at its top or within; a module's own name where it is one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                within = f"{node.module}.{alias.name}"
                yield within if within in MODULES else node.module


def room(name: str) -> tuple[str, str]:
    """Package and room of a module."""
    path = MODULES[name].relative_to(ROOT)
    package, *folders = path.parent.parts
    if folders:
        return package, ".".join(folders)
    return package, "." if path.stem == "__init__" else path.stem


def floor(package: str, name: str) -> int:
    floors = [number for number, rooms in enumerate(FLOORS[package]) if name in rooms.split()]
    assert len(floors) == 1, f"{package}: room {name} stands on floors {floors}, wanted one"
    return floors[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_leads_back_up(package: str) -> None:
    wrong = []
    for name, path in MODULES.items():
        if name == "graftwork" or room(name)[0] != package:
            continue
        for used in sorted(set(imports(path)) & MODULES.keys() - {"graftwork"}):
            (_, here), (there, other) = room(name), room(used)
            up = PACKAGES.index(there) > PACKAGES.index(package)
            if there == package and here != other:
                up = floor(package, other) >= floor(package, here)
            if up:
                wrong.append(f"{name} imports {used}")
    assert not wrong


def test_every_room_of_the_table_is_there() -> None:
    there = {room(name) for name in MODULES if name != "graftwork"}
    table = {(p, r) for p, floors in FLOORS.items() for rooms in floors for r in rooms.split()}
    assert table == there


def test_no_file_imports_itself_through_others() -> None:
    # Without the face, which imports its names when they are used.
    inside = MODULES.keys() - {"graftwork"}
    graph = {
        name: {used for used in imports(MODULES[name]) if used in inside and used != name}
        for name in inside
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in sorted(set(imports(path)))
        if any(name == banned or name.startswith(f"{banned}.") for banned in ABROAD[package])
    ]
    assert not wrong


def test_everything_is_imported_below_one_name() -> None:
    """`methods.x` and `graftwork.methods.x` would be two modules with classes that differ."""
    folders = (*PACKAGES, "tests", "benchmarks")
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in imports(path)
        if name.split(".")[0] in PACKAGES
    ]
    assert not wrong


def test_no_room_is_crowded_and_no_file_long() -> None:
    folders: dict[Path, int] = {}
    for path in MODULES.values():
        if path.stem != "__init__":
            folders[path.parent] = folders.get(path.parent, 0) + 1
    assert {str(f.relative_to(ROOT)): n for f, n in folders.items() if n > MOST_FILES} == {}
    lines = {name: path.read_text("utf-8").count("\n") for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_planning_and_the_command_import_neither_torch_nor_ray_nor_mlflow() -> None:
    code = (
        "import sys\n"
        "from graftwork.cluster.execution import executor\n"
        "from graftwork.pipelines import cli\n"
        "from graftwork.pipelines.explaining import explain\n"
        "from graftwork.pipelines.planning import plan\n"
        "from graftwork.pipelines.reporting import terminal\n"
        "from graftwork.pipelines.running import run\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 'timm') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
