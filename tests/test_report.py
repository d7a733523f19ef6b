"""The report: complete, self-contained, safe with any text, quick."""

import html.parser
import itertools
import re
import subprocess
import sys
import time
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from graftwork.operators.evaluation.definitions import DEFINITIONS
from graftwork.operators.evaluation.metrics import summarise
from graftwork.pipelines.reporting import plots
from graftwork.pipelines.reporting.content import Cost, MethodResult, ReportData, StageResult
from graftwork.pipelines.reporting.report import render


def result(method: str, order: int | str, level: float, **changes: Any) -> MethodResult:
    curve = [level - i for i in range(5)]
    fields: dict[str, Any] = {
        "method": method,
        "hyperparameters": {},
        "order": str(order),
        "seed": 0,
        "matrix": [[level - i] * (i + 1) for i in range(5)],
        "curve": curve,
        "task_curve": [value + 5 for value in curve],
        "metrics": {
            "a_avg": level - 2,
            "a_last": level - 4,
            "forgetting": 4.0,
            "bwt": -4.0,
            "task_a_avg": level + 3,
        },
        "trainable_parameters": 46080,
        "seconds": 0.5,
        "cached": False,
    }
    return MethodResult(**(fields | changes))


def data(results: list[MethodResult], **changes: Any) -> ReportData:
    stages = [
        StageResult(
            name="features train 1/1",
            operator="features",
            state="computed",
            now=Cost(seconds=3.0, images=5000),
            ever=Cost(seconds=3.0, images=5000),
            results=range(len(results)),
        ),
        StageResult(
            name="fit x",
            operator="fit",
            state="cached",
            now=Cost(),
            ever=Cost(seconds=2.0),
            results=range(len(results))[:1],
        ),
    ]
    fields: dict[str, Any] = {
        "pipeline": "small",
        "status": "succeeded",
        "created": "2026-01-02 03:04",
        "seconds": 3700.0,
        "images_forwarded": 5000,
        "facts": {"Backbone": "vit_tiny"},
        "spec": "pipeline: small",
        "results": results,
        "stages": stages,
        "environment": {"torch": "2.15.0"},
    }
    return ReportData(**(fields | changes))


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and gathers tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_everything_is_there() -> None:
    results = [result("slow", o, 80.0 + o) for o in range(4)] + [result("fast", 0, 90.0)]
    page = Page(render(data(results)))
    for text in ("small", "succeeded", "vit_tiny", "torch", "2.15.0", "1 h 1 min", "5,000"):
        assert text in page.text
    assert "88.00" in page.text  # fast: A_avg
    assert re.search(r"79\.50 ± 1\.29", page.text)  # slow: 78, 79, 80, 81
    assert "81.00" in page.text and "78.00" in page.text  # its best and worst order
    for title, formula, source in DEFINITIONS.values():
        assert title in page.text and formula in page.text and source in page.text
    assert "+State" not in page.text and "=Time" not in page.text
    assert page.tags.count("svg") == 4  # curves, spread, two matrices


def cost_table(text: str) -> dict[str, list[str]]:
    """Rows of the table of costs: name -> time now, time in all, images now, images in all."""
    rows = text.partition("<h2>Cost</h2>")[2].partition("<tbody>")[2].partition("</tbody>")[0]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows.split("</tr>")[:-1]]
    return {name: values for name, *values in ([Page(cell).text for cell in c] for c in cells)}


def test_a_stage_counts_for_the_one_method_that_needs_it() -> None:
    def stage(operator: str, images: int, ever: int | None, *results: int) -> StageResult:
        return StageResult(
            name=operator,
            operator=operator,
            state="computed" if images else "cached",
            now=Cost(seconds=images / 10, images=images),
            ever=None if ever is None else Cost(seconds=ever / 10, images=ever),
            results=results,
        )

    # Two orders of a method, and another method.
    results = [result("a", 0, 80.0), result("b", 0, 90.0), result("a", 1, 81.0)]
    stages = [
        stage("features", 100, 100, 0, 1, 2),
        stage("fit", 0, 20, 0, 2),  # both orders of one method: not shared
        stage("train", 30, 30, 0),
        stage("train", 0, 40, 1),
        stage("text", 0, None, 0, 1),
    ]
    text = render(data(results, stages=stages))
    assert cost_table(text) == {
        "b": ["0.0 s", "4.0 s", "0", "40"],
        "a": ["3.0 s", "5.0 s", "30", "50"],
        "Sharedfeatures, text": ["10.0 s", "10.0 s", "100", "100"],
        "All": ["13.0 s", "19.0 s", "130", "190"],
    }
    assert "no longer knows what 1 stage took" in text
    alone = render(data(results[::2], stages=[stage("features", 100, 100, 0, 1)]))
    assert list(cost_table(alone)) == ["a", "All"] and "no longer" not in alone


def test_nothing_is_fetched_from_anywhere() -> None:
    text = render(data([result("a", 0, 80.0, matrix=[[80.0] * (i + 1) for i in range(30)])]))
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("href", "src", "xlink:href", "action"):
            assert value.startswith("data:image/png;base64,")
    assert "@import" not in text and "url(" not in text


def test_texts_are_escaped() -> None:
    evil = "<script>alert('x')</script>\"&"
    results = [
        result(evil, evil, 80.0, hyperparameters={evil: evil}),
        result(evil, evil, 70.0, hyperparameters={evil: 1}),
    ]
    cost = Cost(seconds=1.0)
    stage = StageResult(
        name=evil, operator=evil, state=evil, now=cost, ever=cost, results=range(len(results))
    )
    texts = {"pipeline": evil, "status": evil, "created": evil, "spec": evil}
    page = Page(render(data(results, stages=[stage], facts={evil: evil}, **texts)))
    assert "script" not in page.tags
    assert page.text.count("alert('x')") > 10


@pytest.mark.parametrize("results", [[], [result("a", 0, 80.0, curve=[80.0], matrix=[[80.0]])]])
def test_small_runs_have_a_report_too(results: list[MethodResult]) -> None:
    page = Page(render(data(results, stages=[])))
    assert "nan" not in page.text.lower().replace("nano", "")


def test_two_hundred_runs_take_less_than_two_seconds() -> None:
    methods = [(f"m{i}", 60.0 + i) for i in range(20)]
    results = [result(m, o, level + o % 3) for m, level in methods for o in range(10)]
    start = time.perf_counter()
    text = render(data(results))
    assert time.perf_counter() - start < 2
    assert len(text) < 1_000_000


def test_files_of_a_result_are_well_formed() -> None:
    rng = np.random.default_rng(0)
    trained, true_task = np.repeat([0, 1, 1], 50), np.repeat([0, 0, 1], 50)
    label = true_task * 5 + np.tile(np.arange(50) % 5, 3)
    predicted = rng.integers(0, 10, 150)
    columns = {"task_trained": trained, "sample": np.arange(150), "label": label}
    columns |= {"predicted": predicted, "predicted_in_task": label, "true_task": true_task}
    summary = summarise(columns, 2, 10)
    files = plots.method_artifacts(summary, list(range(10))[::-1])
    table = [line.split(",") for line in files["accuracy_matrix.csv"].splitlines()]
    assert table[0] == ["after_task", "task_0", "task_1"]
    assert [[float(v) for v in row[1:] if v] for row in table[1:]] == summary.matrix
    for name in ("accuracy_matrix.svg", "accuracy_curve.svg", "confusion.svg"):
        ElementTree.fromstring(files[name])


def test_labels_that_collide_move_apart() -> None:
    places = plots._apart([50.0, 51.0, 52.0, 10.0], 15, 0, 100)
    ordered = sorted(places)
    assert all(b - a >= 15 for a, b in itertools.pairwise(ordered))
    assert places[3] == 10.0 and places[0] < places[1] < places[2]


def test_neither_torch_nor_ray_is_imported() -> None:
    code = (
        "import sys; from graftwork.pipelines.reporting import leaderboard, report\n"
        "from graftwork.operators.evaluation import metrics\n"
        "from graftwork.operators.tracking import tracker\n"
        "bad = {'torch', 'ray', 'mlflow', 'matplotlib'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
