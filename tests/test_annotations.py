"""Annotations that every supported Python can read (3.14 evaluates them late), and docstrings."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("methods", "operators", "pipelines", "cluster")


def trees() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def annotations(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns:
            yield node.returns


def fields(body: list[ast.stmt]) -> dict[str, ast.expr]:
    """Names that a class's body gives a value, with their annotations."""
    return {
        node.target.id: node.annotation
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value
    }


def test_no_annotation_formats_text() -> None:
    """`annotationlib` refuses f-strings, and with it pydantic the whole class."""
    found = [
        f"{name}:{annotation.lineno}"
        for name, tree in trees()
        for annotation in annotations(tree)
        if any(isinstance(node, ast.JoinedStr) for node in ast.walk(annotation))
    ]
    assert not found


def test_no_annotation_names_what_a_field_hides() -> None:
    """A function called in an annotation is, late, the field of its name."""
    found = [
        f"{name}:{annotation.lineno}: {node.id}"
        for name, tree in trees()
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef)
        for annotation in fields(owner.body).values()
        for node in ast.walk(annotation)
        if isinstance(node, ast.Name) and node.id in fields(owner.body)
    ]
    assert not found


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    question = re.compile(r"(What|Which|Where|Whether|Who|How|When|Why)\b")
    found = [
        f"{name}: {text.splitlines()[0]}"
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and question.match(text := ast.get_docstring(node) or "")
    ]
    assert not found


def test_all_annotations_are_looked_at() -> None:
    source = "def f(a: A, *b: B, c: C = 1, **d: D) -> E:\n x: F = 1\nclass K:\n y: G\n z: H = 2"
    tree = ast.parse(source)
    found = [annotation.id for annotation in annotations(tree) if isinstance(annotation, ast.Name)]
    assert sorted(found) == list("ABCDEFGH")
    assert isinstance(tree.body[1], ast.ClassDef) and list(fields(tree.body[1].body)) == ["z"]
    assert sum(1 for _ in trees()) > 100
