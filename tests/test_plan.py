"""Planning: pure, fast, and keys that hold what they should and nothing else."""

import io
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from graftwork.methods.contracts import hyperparameters, registry
from graftwork.operators import catalogue
from graftwork.operators.assignment import Result
from graftwork.operators.backbones import loading
from graftwork.operators.ensembling import rules
from graftwork.operators.errors import BadDataError
from graftwork.operators.merging import contract
from graftwork.operators.parameters.tasks import TaskData
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store
from graftwork.pipelines.explaining import explain
from graftwork.pipelines.explaining.differences import ABSENT, differences
from graftwork.pipelines.planning.plan import Plan, make_plan
from graftwork.pipelines.reporting import terminal
from graftwork.pipelines.spec.loading import load_resolved


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("store")))


FITTED = "methods=[simplecil, slda, fecam, acil, {ranpac: {projection_dim: 2000}}, joint_linear]"
"""Trained methods have tests of their own, in test_runs.py."""


def plan(store: Store, *overrides: str) -> Plan:
    return make_plan(load_resolved("quickstart", [FITTED, *overrides]), store.memo)


def keys(made: Plan, operator: str) -> set[str]:
    return {stage.key for stage in made.stages if stage.operator == operator}


def test_the_same_spec_has_the_same_keys(store: Store) -> None:
    first, second = plan(store), plan(store)
    assert [s.key for s in first.stages] == [s.key for s in second.stages]


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("resources.extract={cpus: 2, batch_size: 7}", set()),
        ("pipeline=other", set()),
        ("features.shard_size=100", {"features"}),
        ("scenario.orders=[7]", {"fit", "evaluate"}),
        ("scenario.increment=5", {"fit", "evaluate"}),
        ("seeds=[1]", {"fit", "evaluate"}),
        ("features.dtype=float32", {"features", "fit", "evaluate"}),
        ("features.pooling=avg", {"features", "fit", "evaluate"}),
        ("backbone.precision=bf16", {"features", "fit", "evaluate"}),
        ("backbone.weights=random", {"features", "fit", "evaluate"}),
        (
            "backbone.preprocessing={resize: 40, crop: 32, mean: [0, 0, 0], std: [1, 1, 1]}",
            {"features", "fit", "evaluate"},
        ),
        ("dataset.limit_per_class=9", {"dataset", "features", "fit", "evaluate"}),
    ],
)
def test_a_key_changes_with_what_changes_the_result(
    store: Store, override: str, changed: set[str]
) -> None:
    before, after = plan(store), plan(store, override)
    for operator in ("dataset", "features", "fit", "evaluate"):
        assert (keys(before, operator) != keys(after, operator)) == (operator in changed), operator


def test_only_methods_that_draw_numbers_have_a_fit_per_seed(store: Store) -> None:
    made = plan(store, "seeds=[0,1,2]")
    fits = {
        name: {r.model.key for r in made.runs if r.method.name == name}
        for name in ("slda", "ranpac")
    }
    assert len(fits["slda"]) == 1
    assert len(fits["ranpac"]) == 3


def test_a_separable_method_has_one_fit_for_all_orders(store: Store) -> None:
    made = plan(store, "scenario.orders={count: 9, first: 0}")

    def fits(name: str) -> int:
        return len({run.model.key for run in made.runs if run.method.name == name})

    assert [fits(name) for name in ("simplecil", "fecam", "slda", "acil")] == [1, 1, 9, 9]


def test_every_shard_is_a_range_of_the_data_set(store: Store) -> None:
    made = plan(store, "features.shard_size=100")
    images = {
        split: [made.images(stage) for stage in made.stages if stage.group == f"features {split}"]
        for split in ("train", "test")
    }
    assert images == {"train": [100] * 14 + [37], "test": [100] * 3 + [60]}


def test_ten_thousand_stages_are_planned_in_seconds(store: Store) -> None:
    loaded = load_resolved("quickstart", ["scenario.orders={count: 320, first: 0}"])
    started = time.process_time()
    made = make_plan(loaded, store.memo)
    assert len(made.stages) > 10_000
    explain.explain(made, store)
    # Processor time of this process, so that a busy machine does not fail the test.
    # Twice what it takes beside other work: the difference to minutes, not to seconds.
    assert time.process_time() - started < 25


def test_a_stream_may_stop_early(store: Store) -> None:
    whole, short = plan(store), plan(store, "scenario.tasks=2")

    def tasks(made: Plan) -> list[tuple[str, TaskData, TaskData]]:
        return [(task.name, task.learned, task.tested) for task in made.runs[0].stream.tasks]

    assert tasks(short) == tasks(whole)[:2]
    assert len(tasks(whole)) == 5
    assert [len(run.stream.tasks) for run in short.runs] == [2] * 6
    assert [run.stream.classes for run in short.runs] == [whole.runs[0].stream.classes[:4]] * 6
    assert keys(short, "features") == keys(whole, "features")


def test_a_stream_that_stops_early_reads_shards_of_its_rows_alone(store: Store) -> None:
    """The data set holds its classes mixed; of a file for each class less would be read."""
    one = "dataset.limit_per_class=1"
    made = plan(store, "methods=[slda]", "scenario.tasks=2", "features.shard_size=1", one)
    [run] = made.runs
    labels = made.data.sources[0].train.labels
    rows = [row for row, label in enumerate(labels.tolist()) if label in run.stream.ids]
    assert len(rows) == 4
    shards = [stage.label for stage in run.model.reads["features"]]
    assert shards == [f"features train {row + 1}/10" for row in rows]
    assert sum(stage.operator == "features" for stage in made.stages) == 8


def test_a_long_chain_has_keys() -> None:
    stage = Stage(operator="fit", parameters={"task": 0})
    for task in range(1, 5000):
        stage = Stage(operator="fit", parameters={"task": task}, inputs={"before": (stage,)})
    assert len(stage.key) == 64


COMBINED = (
    "methods=[simplecil, finetune, lora]",
    "merge=[{ties: {of: finetune}}]",
    "ensemble=[{vote: {of: [simplecil, lora]}}]",
)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What planning looked at because the memo had no answer."""
    found: list[str] = []

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def look(*given: Any) -> Any:
            found.append(name)
            return real(*given)

        return look

    for module, name in ((catalogue, "method"), (catalogue, "combination"), (loading, "load")):
        monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    return found


@pytest.mark.parametrize(
    "module",
    [catalogue, hyperparameters, registry, contract, rules, loading],
    ids=lambda module: module.__name__,
)
def test_an_edited_source_file_is_no_hit_in_the_memo(
    store: Store, monkeypatch: pytest.MonkeyPatch, looks: list[str], module: ModuleType
) -> None:
    before = plan(store, *COMBINED)
    looks.clear()
    plan(store, *COMBINED)
    assert looks == []
    edited, read = Path(module.__file__ or ""), Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: read(path) + (b"# edited" if path == edited else b"")
    )
    after = plan(store, *COMBINED)
    assert sorted(looks) == ["combination"] * 2 + ["load"] + ["method"] * 3
    assert [s.key for s in after.stages] == [s.key for s in before.stages]


def test_all_wrong_methods_are_reported_at_once_with_their_lines(
    store: Store, tmp_path: Path
) -> None:
    text = (Path(__file__).parent.parent / "pipelines/spec/presets/quickstart.yaml").read_text()
    wrong = text.replace("- slda", "- slda: {shrinkage: 2}").replace("- acil", "- acyl")
    path = tmp_path / "wrong.yaml"
    path.write_text(wrong)
    with pytest.raises(Exception) as caught:
        make_plan(load_resolved(str(path)), store.memo)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "methods.1.slda.shrinkage" in lines[0]
    assert "did you mean" in lines[1]
    assert all(line.startswith(f"{path}:") for line in lines)


def test_a_task_without_images_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftwork.operators.data import dataset

    whole: Any = dataset.index

    def without_zeros(*arguments: Any, **named: Any) -> Any:
        found = whole(*arguments, **named)
        test = replace(found.test, labels=np.full_like(found.test.labels, 3))
        return replace(found, test=test)

    monkeypatch.setattr(dataset, "index", without_zeros)
    with pytest.raises(BadDataError, match="has no test images"):
        plan(store)


def test_mermaid_draws_each_split_once(store: Store) -> None:
    text = explain.mermaid(plan(store, "features.shard_size=100"), store)
    assert text.startswith("flowchart LR")
    assert "features train<br/>0/15 stored" in text
    assert text.count(":::miss") == 16


def test_mermaid_draws_what_stages_read(store: Store) -> None:
    text = explain.mermaid(plan(store, "methods=[slda]"), store)
    nodes = {name: node for node, name in re.findall(r'(n\d+)\["([^"<]+)', text)}
    edges = set(re.findall(r"(n\d+) --> (n\d+)", text))
    fit, evaluate = (f"{kind} slda order 1993 seed 0" for kind in ("fit", "evaluate"))
    expected = {
        ("dataset train", fit), ("features train", fit), ("dataset test", evaluate),
        ("features test", evaluate), (fit, evaluate),
    }  # fmt: skip
    assert edges == {(nodes[one], nodes[other]) for one, other in expected}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Fits and features of the quickstart's first two methods, as if they had been computed."""
    opened = Store(str(tmp_path_factory.mktemp("stored")))
    for stage in plan(opened, "methods=[slda, acil]").stages:
        opened.commit(stage.assignment(), Result(files={}), 0.0)
    return opened


def reasons(store: Store, *overrides: str) -> dict[str, str]:
    made = plan(store, "methods=[slda, acil]", *overrides)
    rows = explain.explain(made, store).stages
    return {row.stage.partition(" order")[0]: row.why for row in rows}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("scenario.tasks=4", "class order or task sizes: tasks 5 -> 4"),
        # Of each of the four tasks its classes and its rows.
        (
            "scenario.initial=4",
            "class order or task sizes: tasks 5 -> 4, task 1 classes [0, 1] -> [0, 1, 2, 3], "
            "and 7 more",
        ),
        (
            "scenario.orders=[[4, 2, 7, 6, 3, 0, 5, 8, 9, 1]]",
            "task 3: rows {before} -> {after}",
        ),
    ],
)
def test_a_plan_says_what_differs_in_a_list_of_tasks(
    stored: Store, override: str, says: str
) -> None:
    why, made = reasons(stored, override), plan(stored, "methods=[slda, acil]", override)
    before, after = (
        of_plan.runs[0].stream.tasks[2].learned.rows[:8]
        for of_plan in (plan(stored, "methods=[slda, acil]"), made)
    )
    says = says.format(before=before, after=after)
    assert why["fit slda"] == says
    out = io.StringIO()
    terminal.plan(explain.explain(made, stored), Console(file=out, width=200))
    assert why["fit slda"] in out.getvalue()


WORDS = st.one_of(
    st.text('a0"\\…\u200b\r[]', max_size=4),
    # Long ones with a common beginning, digests among them.
    st.builds(lambda n, end: "a" * n + end, st.integers(0, 70), st.text("ab0…", max_size=2)),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.floats(0, 1), WORDS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(st.sampled_from(["tasks", "classes", "names", "a b"]), inner),
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(before=VALUES, after=VALUES)
def test_two_differing_values_are_never_shown_as_two_equal_texts(before: Any, after: Any) -> None:
    found = list(differences(before, after, "tasks"))
    assert bool(found) == (json.dumps(before, sort_keys=True) != json.dumps(after, sort_keys=True))
    # As a terminal gets them: `Text` drops control characters.
    assert all(Text(each.before).plain != Text(each.after).plain for each in found)
    for value in (before, after):
        [gone] = differences(value, ABSENT)
        assert gone.before != gone.after
