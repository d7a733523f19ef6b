"""Who may import whom: the table of the architecture page, read from the imports themselves."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "methods": {"ray", "mlflow", "fsspec", "pyarrow", "operators", "pipelines", "cluster"},
    "operators": {"ray", "pipelines", "cluster"},
    "cluster": {"pipelines", "methods", "mlflow"},
    "pipelines": {"ray"},
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_a_folder_imports_only_what_it_may(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in sorted(set(imports(path)) & FORBIDDEN[folder])
    ]
    assert not wrong


def test_planning_and_the_command_import_neither_torch_nor_ray_nor_mlflow() -> None:
    code = (
        "import sys, pipelines.cli, pipelines.run, pipelines.plan, pipelines.explain, "
        "pipelines.show, cluster.executor\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 'timm') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
