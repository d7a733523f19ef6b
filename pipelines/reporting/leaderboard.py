"""The leaderboard: results grouped by method and hyper-parameters, over class orders and seeds."""

import csv
import difflib
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from graftwork.operators.errors import ConfigError
from graftwork.operators.evaluation.definitions import GROUPS
from graftwork.operators.serving.lookup import connected, pages
from graftwork.operators.tracking.records import TASKS

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

METRICS = ("a_avg", "a_last", "forgetting", "bwt", "task_a_avg", "seconds", *GROUPS)
"""Metrics of a row, each with mean and standard deviation; percent, `seconds` in seconds."""

RUN_PARAMETERS = ("order", "seed")
"""Parameters in which the runs of one row differ; every other one separates rows."""

Format = Literal["table", "json", "csv", "md"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One result: a method with its hyper-parameters, a class order and a seed.

    Args:
        parameters: `method`, `order`, `seed`, hyper-parameters, and `tasks`, how many there were,
            as text: a stream that grew has a row for each length.
        metrics: at least `a_avg`.
    """

    pipeline: str
    parameters: Mapping[str, str]
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the leaderboard.

    Args:
        name: the method, with the hyper-parameters that tell it from its namesakes.
        mean: metric -> mean over runs.
        std: metric -> sample standard deviation over runs (n - 1); None for one run.
        best_order: class order with the highest `a_avg` (mean over seeds), and that number.
        worst_order: the same with the lowest.
    """

    pipeline: str
    method: str
    name: str
    hyperparameters: Mapping[str, str]
    runs: int
    orders: int
    seeds: int
    mean: Mapping[str, float]
    std: Mapping[str, float | None]
    best_order: tuple[str, float]
    worst_order: tuple[str, float]


def aggregate(records: Iterable[Record]) -> list[Row]:
    """Groups results into rows; pipelines by name, within one the best `a_avg` first."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.pipeline, json.dumps(hyperparameters(record), sort_keys=True)].append(record)
    names = labels([(group[0].pipeline, hyperparameters(group[0])) for group in groups.values()])
    rows = [_row(name, group) for name, group in zip(names, groups.values(), strict=True)]
    return sorted(rows, key=lambda row: (row.pipeline, -row.mean["a_avg"], row.name))


def hyperparameters(record: Record) -> dict[str, str]:
    """The method and its hyper-parameters: what the runs of one row have in common."""
    return {k: v for k, v in record.parameters.items() if k not in RUN_PARAMETERS}


def labels(groups: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    """Short names of (pipeline, parameters): the method, and what differs between namesakes."""
    namesakes: dict[tuple[str, str], list[Mapping[str, str]]] = defaultdict(list)
    for pipeline, parameters in groups:
        namesakes[pipeline, parameters.get("method", "?")].append(parameters)
    names: list[str] = []
    for pipeline, parameters in groups:
        method = parameters.get("method", "?")
        others = namesakes[pipeline, method]
        keys = sorted({key for other in others for key in other})
        differing = [k for k in keys if len({other.get(k) for other in others}) > 1]
        values = ", ".join(f"{k}={parameters[k]}" for k in differing if k in parameters)
        names.append(f"{method} ({values})" if values else method)
    return names


def _row(name: str, group: Sequence[Record]) -> Row:
    values = {
        metric: [r.metrics[metric] for r in group if math.isfinite(r.metrics.get(metric, math.nan))]
        for metric in METRICS
    }
    by_order: dict[str, list[float]] = defaultdict(list)
    for record in group:
        by_order[record.parameters.get("order", "-")].append(record.metrics["a_avg"])
    orders = [(order, statistics.fmean(v)) for order, v in by_order.items()]
    orders.sort(key=lambda pair: (pair[1], pair[0]))
    shared = hyperparameters(group[0])
    return Row(
        pipeline=group[0].pipeline,
        method=shared.pop("method", "?"),
        name=name,
        hyperparameters=shared,
        runs=len(group),
        orders=len(by_order),
        seeds=len({r.parameters.get("seed") for r in group}),
        mean={k: statistics.fmean(v) for k, v in values.items() if v},
        std={k: statistics.stdev(v) if len(v) > 1 else None for k, v in values.items() if v},
        best_order=orders[-1],
        worst_order=orders[0],
    )


def leaderboard(uri: str, pipeline: str | None = None) -> list[Row]:
    """Rows from MLflow: finished method runs, the newest of each key.

    A result that was served from the store again and again is one result.

    Args:
        uri: MLflow's tracking URI.
        pipeline: name of the experiment; None for all that hold runs of this project.

    Raises:
        ConfigError: MLflow cannot be reached, or has no such pipeline.
    """
    with connected(uri) as client:
        return aggregate(_records(client, pipeline))


def _records(client: "MlflowClient", pipeline: str | None) -> Iterable[Record]:
    """Finished results that MLflow knows, the newest of each key."""
    experiments = {e.name: e.experiment_id for e in pages(client.search_experiments)}
    if pipeline is not None:
        if pipeline not in experiments:
            raise ConfigError(_unknown(pipeline, sorted(experiments)))
        experiments = {pipeline: experiments[pipeline]}
    names = {identifier: name for name, identifier in experiments.items()}
    newest: dict[str, Record] = {}
    if names:
        wanted = "tags.`graftwork.kind` = 'method' AND attributes.status = 'FINISHED'"
        order = ["attributes.start_time DESC"]
        for run in pages(client.search_runs, list(names), wanted, order_by=order):
            key = run.data.tags.get("graftwork.key", run.info.run_id)
            if "a_avg" in run.data.metrics:
                record = Record(
                    pipeline=names[run.info.experiment_id],
                    parameters=run.data.params | _tasks(run.data.tags),
                    metrics=run.data.metrics,
                )
                newest.setdefault(f"{run.info.experiment_id}/{key}", record)
    return newest.values()


def _tasks(tags: Mapping[str, str]) -> dict[str, str]:
    """Number of tasks of a result; runs of older programs do not tell."""
    return {"tasks": tags[TASKS]} if TASKS in tags else {}


def _unknown(pipeline: str, known: list[str]) -> str:
    known = [name for name in known if name != "Default"]
    close = difflib.get_close_matches(pipeline, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    listed = ", ".join(known[:20]) + (" ..." if len(known) > 20 else "")
    return f"results: unknown pipeline {pipeline!r}{hint} have: {listed or 'none'}"


def render(rows: Sequence[Row], format: Format) -> str:
    """The rows as text; `json` and `csv` carry every digit.

    Raises:
        ConfigError: unknown format.
    """
    if format == "json":
        return json.dumps([asdict(row) for row in rows], indent=2)
    if format == "csv":
        return _csv(rows)
    if format == "md":
        header, *body = _cells(rows)
        lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2), *body]
        return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in x) + " |" for x in lines)
    if format == "table":
        return _table(rows)
    raise ConfigError(f"results: unknown format {format!r}; have: table, json, csv, md")


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    usual = {"a_avg": "A_avg", "a_last": "A_last", "forgetting": "forgetting", "bwt": "BWT"}
    columns = usual | {name: name for name in GROUPS if any(name in row.mean for row in rows)}
    header = ["pipeline", "method", "runs", *columns.values()]
    cells = [[*header, "best order", "worst order", "seconds"]]
    for row in rows:
        spread = [_spread(row, name) for name in columns]
        orders = [f"{value:.2f} ({order})" for order, value in (row.best_order, row.worst_order)]
        seconds = f"{row.mean['seconds']:.1f}" if "seconds" in row.mean else "-"
        cells.append([row.pipeline, row.name, str(row.runs), *spread, *orders, seconds])
    return cells


def _spread(row: Row, name: str) -> str:
    if name not in row.mean:
        return "-"
    std = row.std[name]
    return f"{row.mean[name]:.2f}" + ("" if std is None else f" ± {std:.2f}")


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    spread = [f"{name}_{part}" for name in METRICS for part in ("mean", "std")]
    orders = ["best_order", "best_order_a_avg", "worst_order", "worst_order_a_avg"]
    writer.writerow(
        ["pipeline", "method", "hyperparameters", "runs", "orders", "seeds", *spread, *orders]
    )
    for row in rows:
        numbers = [part.get(name) for name in METRICS for part in (row.mean, row.std)]
        shared = json.dumps(dict(row.hyperparameters), sort_keys=True)
        first = [row.pipeline, row.method, shared, row.runs, row.orders, row.seeds]
        writer.writerow([*first, *numbers, *row.best_order, *row.worst_order])
    return text.getvalue()


def _table(rows: Sequence[Row]) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    header, *body = _cells(rows)
    table = Table(box=None, pad_edge=False)
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index < 2 else "right", no_wrap=index >= 2)
    for cells in body:
        table.add_row(*map(Text, cells))
    text = io.StringIO()
    # As wide as it needs to be: a table cut to a pipe's 80 columns is of no use to anyone.
    width = sum(max(map(len, column)) + 2 for column in zip(header, *body, strict=True))
    Console(file=text, width=width).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
