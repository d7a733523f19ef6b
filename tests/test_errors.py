"""Errors carry facts: what layers above add and decide by, and the one text made of them."""

import ast
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from graftwork.operators.backbones import loading, weights
from graftwork.operators.errors import (
    BadDataError,
    ChangedWeights,
    ConfigError,
    DamagedStage,
    GraftworkError,
    IncompatibleError,
    Interrupted,
    together,
)
from graftwork.operators.serving import inputs, model_files, predictor
from graftwork.operators.store import Store
from graftwork.operators.tracking import uri
from graftwork.pipelines.planning.plan import _reference, make_plan
from graftwork.pipelines.spec.loading import load_resolved
from graftwork.pipelines.spec.model import PipelineSpec
from tests.test_cli import folder, write_spec

ROOT = Path(__file__).parent.parent
PACKAGES = ("methods", "operators", "pipelines", "cluster")
SOURCES = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]

ERRORS: list[GraftworkError] = [
    ConfigError("not found", key="backbone.weights", value="/x.st", advice="give a file"),
    BadDataError("no class folders", key="dataset.train", value="/x", place="spec.yaml:3"),
    together([ConfigError("a", key="seeds"), ConfigError("b", value="c")]),
    ChangedWeights("vit", "a" * 64, "b" * 64),
    DamagedStage("fit", "c" * 64, "state is missing"),
    Interrupted(15),
]


def facts(error: GraftworkError) -> dict[str, Any]:
    found = {name: value for name, value in vars(error).items() if name != "parts"}
    return found | {"type": type(error), "parts": [facts(part) for part in error.parts]}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_facts_cross_process_borders(error: GraftworkError) -> None:
    by_ray: Any = RayTaskError.from_bytes(RayTaskError("work", "traceback", error).to_bytes())
    crossed = by_ray.cause
    for found in (pickle.loads(pickle.dumps(error)), copy.copy(error), crossed):
        assert facts(found) == facts(error)
        assert str(found) == str(error)
        assert found.exit_code == error.exit_code


def test_a_line_is_made_of_the_facts_that_are_known() -> None:
    assert str(ConfigError("wrong")) == "wrong"
    assert str(ERRORS[0]) == "backbone.weights: /x.st: not found; give a file"
    assert str(ERRORS[1]) == "spec.yaml:3: dataset.train: /x: no class folders"
    assert ERRORS[2].lines() == ["seeds: a", "c: b"]


def test_layers_add_what_they_know() -> None:
    error = together([ConfigError("a"), ConfigError("b", key="backbone.model"), ConfigError("b")])
    found = error.about("seeds").moved("backbone", "vit").placed(lambda key: f"at {key}")
    seeds = ["at seeds: seeds: a", "at seeds: seeds: b"]
    assert found.lines() == [seeds[0], "at vit.model: vit.model: b", seeds[1]]
    assert found.about("x").placed(lambda key: "elsewhere").lines() == found.lines()
    assert error.lines() == ["a", "backbone.model: b", "b"]
    # A key is a path, not a text: what only begins alike stays.
    assert str(ConfigError("a", key="backbones").moved("backbone", "vit")) == "backbones: a"
    assert together([error]) is error
    assert [str(part) for part in together([error, ConfigError("z")]).parts][-2:] == ["b", "z"]


# --- texts that looked like something else --------------------------------------------------------


def test_a_spec_may_be_called_like_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_resolved(str(write_spec(Path("dataset.yaml"), methods=["ranpacc"])))
    with pytest.raises(ConfigError) as caught:
        make_plan(loaded, Store("store").memo)
    [line] = caught.value.lines()
    assert line.startswith('dataset.yaml:13: methods.0: unknown method "ranpacc"')


def test_reference_images_may_lie_in_a_folder_called_like_a_key(tmp_path: Path) -> None:
    place = tmp_path / "dataset.train"
    given = {"images": str(place), "texts": ["a text"]}
    loaded = load_resolved(str(write_spec(tmp_path / "spec.yaml", reference=given)))
    with pytest.raises(BadDataError) as caught:
        _reference(loaded.spec, Store(str(tmp_path / "store")).memo)
    assert str(caught.value) == f"reference.images: {place}: not found"


def test_preprocessing_that_cannot_be_has_the_key_and_place_of_its_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {"input_size": [3, 32, 48], "mean": [0.5] * 3, "std": [0.5] * 3}
    monkeypatch.setattr(loading, "data_config", lambda *_: wide)
    path = tmp_path / "spec.yaml"
    network = {"model": "vit_micro_patch4_32", "weights": "builtin"}
    write_spec(path, backbone={**network, "preprocessing": "timm_default"})
    with pytest.raises(ConfigError) as caught:
        make_plan(load_resolved(str(path)), Store(str(tmp_path / "store")).memo)
    place = f"{path}:{path.read_text().splitlines().index('  preprocessing: timm_default') + 1}"
    assert str(caught.value).startswith(f"{place}: backbone.preprocessing: timm_default would need")


def test_weights_of_a_served_model_may_lie_anywhere(tmp_path: Path) -> None:
    place = tmp_path / "changed since the plan; set backbone.weights" / "a.safetensors"
    place.parent.mkdir()
    place.write_bytes(b"nonsense")
    with pytest.raises(IncompatibleError) as caught:
        weights.read_weights(str(place))
    about = {"model": "vit", "fingerprint": "f" * 64, "weights": str(place)}
    found = predictor._about_weights(about, None, caught.value, model_files.MAIN)
    assert str(found) == (
        f"backbone vit: {place}: not a safetensors file (8 bytes); copy the file again; "
        f"name the file of its weights (state {'f' * 12}) in GRAFTWORK_WEIGHTS"
    )


def test_only_a_missing_column_is_answered_with_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    Path("no column.parquet").write_bytes(b"nonsense")
    with pytest.raises(BadDataError, match="not a readable Parquet file") as caught:
        inputs.find(["no column.parquet"])
    assert "--image-column" not in str(caught.value)
    pq.write_table(pa.table({"picture": pa.array([b"x"]), "label": [1]}), "t.parquet")
    for column, what in (("image", "no column"), ("label", "images are binary")):
        with pytest.raises(BadDataError, match=what) as caught:
            inputs.find(["t.parquet"], column)
        assert str(caught.value).endswith("; name another with --image-column")
        assert str(caught.value).startswith(f"{tmp_path}/t.parquet: ")


def test_a_problem_of_tracking_is_named_once() -> None:
    with pytest.raises(ConfigError) as caught:
        uri.check("sqlite:///")
    assert str(caught.value).count("tracking: ") == 1
    assert caught.value.key == "tracking"


@pytest.mark.parametrize("section", ["dataset", "reference"])
def test_problems_of_images_have_the_key_of_their_section(tmp_path: Path, section: str) -> None:
    images = folder(tmp_path / "images")
    (images / "c0/0.png").unlink()
    (images / "c0/0.png").symlink_to("0.png")
    given = {"images": str(images), "texts": ["a text"]}
    data = {"train": str(images), "test": str(images)}
    more = {"reference": given} if section == "reference" else {"dataset": data}
    loaded = load_resolved(str(write_spec(tmp_path / "spec.yaml", **more)))
    memo = Store(str(tmp_path / "store")).memo
    with pytest.raises(BadDataError) as caught:
        _reference(loaded.spec, memo) if section == "reference" else make_plan(loaded, memo)
    found = {part.key for part in caught.value.parts or (caught.value,)}
    assert found == {"reference.images" if section == "reference" else "dataset.train"}


# --- the rule -------------------------------------------------------------------------------------

FOREIGN = {
    "_local": "Ray raises a plain Exception when it does not start in time",
    "_refusal": "Ray raises RuntimeError for another version and for a token",
    "_errors": "Ray's client of jobs raises RuntimeError whatever is wrong",
    "_peer_lost": "gloo raises RuntimeError when a rank dies",
    "of_the_system": "tempfile says in words alone that no folder of its can be written",
    "_read_pickle": "torch names the code in a pickle in its text alone",
}
"""Function -> whose errors say in words alone what happened. Never errors of our own."""

CUTS = {
    *("startswith", "endswith", "removeprefix", "removesuffix", "replace", "partition"),
    *("rpartition", "find", "index", "count", "search", "match", "fullmatch", "sub", "findall"),
}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    yield from (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))


def caught_in(function: ast.FunctionDef) -> set[str]:
    """Names of exceptions in a function: caught ones, and parameters annotated as such."""
    every = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    given = {a.arg for a in every if a.annotation and "Err" in ast.unparse(a.annotation)}
    given |= {a.arg for a in every if a.annotation and "Exception" in ast.unparse(a.annotation)}
    return given | {
        n.name for n in ast.walk(function) if isinstance(n, ast.ExceptHandler) and n.name
    }


def texts_in(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Expressions in which the text of an exception decides something, or is edited."""
    errors = caught_in(function)
    # A link of a chain of exceptions is one, too.
    errors |= {"link", "cause"} if errors else set()
    held: set[str] = set()

    def names(node: ast.AST) -> set[str]:
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}

    def is_text(node: ast.AST) -> bool:
        turned = [
            n.args[0] if isinstance(n, ast.Call) else n.value
            for n in ast.walk(node)
            if (isinstance(n, ast.Call) and ast.unparse(n.func) in ("str", "repr") and n.args)
            or (isinstance(n, ast.Attribute) and n.attr in ("args", "what"))
        ]
        return bool(names(node) & held) or any(names(part) & errors for part in turned)

    for _ in range(3):  # text = str(error); line = text.strip()
        for n in ast.walk(function):
            if isinstance(n, ast.Assign) and is_text(n.value):
                held |= {t.id for t in n.targets if isinstance(t, ast.Name)}
    for n in ast.walk(function):
        if isinstance(n, ast.Compare):
            by_text = (ast.In, ast.NotIn, ast.Eq, ast.NotEq)
            if any(isinstance(op, by_text) for op in n.ops):
                yield from (side for side in (n.left, *n.comparators) if is_text(side))
        elif isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in CUTS:
            yield from (part for part in (n.func.value, *n.args) if is_text(part))
        elif isinstance(n, ast.Call) and ast.unparse(n.func).startswith("type("):
            yield from (part for part in n.args if names(part) & (errors | held))


def test_nothing_is_decided_by_the_text_of_an_error() -> None:
    found: dict[str, list[str]] = {}
    for path in SOURCES:
        for function in functions(ast.parse(path.read_text())):
            for node in texts_in(function):
                line = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)}"
                found.setdefault(function.name, []).append(line)
    assert {name: lines for name, lines in found.items() if name not in FOREIGN} == {}
    assert set(FOREIGN) == set(found)  # no exception of the rule outlives its reason


def test_the_rule_sees_what_it_forbids() -> None:
    program = """
def f():
    try: pass
    except ValueError as error:
        if "x" in str(error): pass
        text = str(error)
        line = text.strip()
        line.removeprefix("x: ")
        raise type(error)(f"y: {error}")
def g(error: Exception): return error.args[0] == "x"
def h(error: Exception): return f"failed: {error}"
"""
    counts = {f.name: len(list(texts_in(f))) for f in functions(ast.parse(program))}
    assert counts == {"f": 3, "g": 1, "h": 0}


def test_keys_are_facts_and_not_the_beginning_of_a_text() -> None:
    kinds = {kind.__name__ for kind in (ConfigError, IncompatibleError, BadDataError)}
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) in kinds and node.args):
                continue
            text = ast.unparse(node.args[0]).lstrip("f'\"")
            key, separator, _ = text.partition(": ")
            if separator and key.split(".")[0] in PipelineSpec.model_fields:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text[:60]}")
    assert found == []
