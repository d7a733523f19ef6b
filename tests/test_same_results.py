"""The comparison of two commits' results: what it calls the same, and what it must not touch."""

import json
import string
from pathlib import Path
from typing import Any

import pytest

from benchmarks import baseline, same_results
from benchmarks.baseline import Code
from benchmarks.same_results import Compared, bits, descends, differences
from graftwork.pipelines.spec.loading import load_resolved


def result(**changes: Any) -> dict[str, Any]:
    return {
        "label": "slda",
        "matrix": [[90.0], [80.0, 70.0]],
        "bwt": float("nan"),
        "forwards": 1,
        "seconds": 2.0,
        "cached": False,
        "parents": [{"label": "a", "mlflow_run_id": "x"}],
    } | changes


def test_equal_results_differ_in_nothing() -> None:
    after = result(seconds=9.0, cached=True, parents=[{"label": "a", "mlflow_run_id": "y"}])
    assert differences(result(), after | {"images": 3}) == []


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"matrix": [[90.0], [80.0, 70.00000000000001]]}, ".matrix.1.1"),
        ({"matrix": [[90.0]]}, ".matrix"),
        ({"bwt": 0.0}, ".bwt"),
        ({"forwards": 1.0}, ".forwards"),
        ({"forwards": True}, ".forwards"),
        ({"parents": [{"label": "b", "mlflow_run_id": "x"}]}, ".parents.0.label"),
    ],
)
def test_any_other_value_is_a_difference(changes: dict[str, Any], where: str) -> None:
    (found,) = differences(result(), result(**changes))
    assert found.startswith(f"{where}: ")


def test_a_value_that_is_gone_is_a_difference() -> None:
    after = result()
    del after["forwards"]
    assert differences(result(), after) == [".forwards: gone"]


def stage(operator: str, **inputs: Any) -> dict[str, Any]:
    return {"label": operator, "preimage": {"operator": operator, "inputs": inputs}, "files": {}}


def test_what_reads_a_changed_stage_may_be_computed_at_any_distance() -> None:
    stages = {
        "t": stage("train"),
        "s": stage("statistics", model="t"),
        "m": stage("merge", models=["t"], statistics=["s"]),
        "p": stage("predict", model="m"),
        "q": stage("predict", model="t"),
    }
    found = {key for key in stages if descends(key, stages, {"statistics"})}
    assert found == {"s", "m", "p"}
    assert not descends("unknown", stages, {"statistics"})


def test_files_of_stages_that_both_stores_have_are_compared() -> None:
    before = {
        key: stage("fit") | {"files": {"a": {"sha256": "1", "stored": "a.x"}}} for key in "klm"
    }
    after = {
        "k": stage("fit") | {"files": {"a": {"sha256": "1", "stored": "a.y"}}},
        "l": stage("fit") | {"files": {"a": {"sha256": "2", "stored": "a.z"}}},
    }
    same, different = bits(before, after)
    assert same == {"fit": 1}
    assert different == ["fit (fit): a"]


def test_a_run_on_the_copy_of_a_store_leaves_the_store_as_it_is(tmp_path: Path) -> None:
    store, copy, key = tmp_path / "store", tmp_path / "copy", "0" * 64
    for name in (f"fit/{key}/manifest.json", "memo/abc", "mlflow.db"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_text("{}")
    same_results.linked_copy(store, copy)
    assert same_results.manifests(copy) == {key: {}}
    assert (copy / "fit" / key / "manifest.json").samefile(store / "fit" / key / "manifest.json")
    for name in ("memo/abc", "mlflow.db"):
        with (copy / name).open("a") as file:
            file.write("more")
        assert (store / name).read_text() == "{}"


def test_code_of_both_layouts_is_found(tmp_path: Path) -> None:
    assert (Code(tmp_path).module("pipelines"), Code(tmp_path).python_path) == (
        "pipelines",
        tmp_path,
    )
    (tmp_path / "src" / "graftwork").mkdir(parents=True)
    assert Code(tmp_path).module("pipelines") == "graftwork.pipelines"
    assert Code(tmp_path).python_path == tmp_path / "src"


def test_code_that_is_not_imported_is_no_proof(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="pipelines"):
        Code(tmp_path).check(tmp_path / "log")


def test_a_failing_command_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exit status 1\n(.*\n)*.*ZeroDivisionError"):
        Code(tmp_path).python(["-c", "1 / 0"], tmp_path / "log")


def test_specs_without_their_places_are_named() -> None:
    known, skipped = baseline.available(Code(baseline.ROOT), set())
    assert set(known) == {"quickstart", "digits"}
    assert skipped["photographs"] == "no DATA, WEIGHTS"
    assert skipped["clip"] == "no CLIP, DATA, WEIGHTS"
    everything = {"DATA", "WEIGHTS", "CLIP", "DOMAINS"}
    known, skipped = baseline.available(Code(baseline.ROOT), everything)
    assert not skipped and len(known) == 5


@pytest.mark.parametrize("path", sorted(baseline.SPECS.glob("*.yaml")), ids=lambda p: p.stem)
def test_specs_are_specs(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    filled = string.Template(text).substitute(dict.fromkeys(baseline.needs(text), "/data"))
    (tmp_path / "spec.yaml").write_text(filled)
    assert load_resolved(str(tmp_path / "spec.yaml")).spec.pipeline == f"same-{path.stem}"


def compared(**changes: Any) -> Compared:
    return Compared(**{"spec": "s", "stages": 9, "computed": {}, "why": (), "results": 3,
                       "different": (), "seconds": 1.2} | changes)  # fmt: skip


def test_the_table_says_what_was_not_found() -> None:
    bad = compared(computed={"fit": 2, "evaluate": 1}, why=["fit slda (fit): version: 1 -> 2"] * 20)
    assert compared().good and not bad.good and not compared(different=["x"]).good
    head, _, first, second, *reasons = same_results.table([compared(), bad]).splitlines()
    assert head.count("|") == first.count("|") == second.count("|")
    assert first == "| s | 9 | 9 | 0 | 3 | 0 | 1 |"
    assert second == "| s | 9 | 6 | 1 evaluate, 2 fit | 3 | 0 | 1 |"
    assert reasons[0] == "s: not found: fit slda (fit): version: 1 -> 2"
    assert reasons[-1] == "s: not found: and 8 more"


def test_documents_are_read_as_they_are_written() -> None:
    assert differences(result(), json.loads(json.dumps(result()))) == []
