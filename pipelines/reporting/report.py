"""The report of a run: one HTML file that needs nothing else, for screens, phones and paper."""

import html
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from graftwork.operators.evaluation.definitions import DEFINITIONS, GROUPS
from graftwork.pipelines.reporting import plots
from graftwork.pipelines.reporting.content import Cost, MethodResult, ReportData, StageResult
from graftwork.pipelines.reporting.leaderboard import Record, Row, aggregate, hyperparameters
from graftwork.pipelines.reporting.markup import bar, details, safe, section, table, wide

TEMPLATE = Path(__file__).with_name("report_template.html")
MAX_STAGES = 400  # rows of the stage table; the rest is counted


@dataclass(frozen=True, kw_only=True)
class _Group:
    """A row of the leaderboard with its results, their positions, and its colour."""

    row: Row
    results: Sequence[MethodResult]
    positions: Sequence[int]
    colour: int


SHOWN_TASKS = 20
"""Of more tasks the table is folded."""


def render(data: ReportData) -> str:
    """The report as HTML text."""
    groups = _groups(data)
    sections = [_header(data)]
    if groups:
        sections += [
            _leaderboard(groups),
            _curves(groups, _names(data)),
            _tasks(data),
            _spread(groups),
            _matrices(groups, _names(data)),
            _task_incremental(groups),
        ]
    sections += [
        _cost(groups, data),
        _stages(data),
        _runs(groups),
        _definitions(groups),
        _setup(data),
    ]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{data.pipeline}: report"),
        light=plots.style(plots.LIGHT),
        dark=plots.style(plots.DARK),
        body="\n".join(section for section in sections if section),
    )


def _groups(data: ReportData) -> list[_Group]:
    found: dict[str, list[int]] = {}
    records: list[Record] = []
    for position, result in enumerate(data.results):
        shared = {k: str(v) for k, v in result.hyperparameters.items()}
        parameters = {"method": result.method, "order": result.order, "seed": str(result.seed)}
        metrics = {**result.metrics, "seconds": result.seconds}
        record = Record(pipeline=data.pipeline, parameters=shared | parameters, metrics=metrics)
        records.append(record)
        found.setdefault(_identity(hyperparameters(record)), []).append(position)
    groups: list[_Group] = []
    for colour, row in enumerate(aggregate(records)):
        positions = found[_identity({"method": row.method, **row.hyperparameters})]
        results = [data.results[position] for position in positions]
        groups.append(_Group(row=row, results=results, positions=positions, colour=colour))
    return groups


def _identity(parameters: Mapping[str, str]) -> str:
    return repr(sorted(parameters.items()))


def _header(data: ReportData) -> str:
    cached = sum(stage.state == "cached" for stage in data.stages)
    facts = {
        **data.facts,
        "Stages": f"{len(data.stages)}, of which {cached} from the store",
        "Images through a network": f"{data.images_forwarded:,}",
        "Time": _duration(data.seconds),
    }
    cells = "".join(f"<div><b>{safe(k)}</b><span>{safe(v)}</span></div>" for k, v in facts.items())
    return (
        f"<h1>{safe(data.pipeline)}</h1>"
        f'<p class="dim"><span class="state">{safe(data.status)}</span> {safe(data.created)}</p>'
        f'<div class="facts">{cells}</div>'
    )


def _leaderboard(groups: Sequence[_Group]) -> str:
    columns = [("a_avg", max), ("a_last", max), ("forgetting", min), ("bwt", max)]
    more = [name for name in GROUPS if all(name in group.row.mean for group in groups)]
    columns += [(name, max) for name in more]
    best = {name: pick(g.row.mean[name] for g in groups) for name, pick in columns}
    several = any(group.row.orders > 1 for group in groups)
    rows: list[list[str]] = []
    for group in groups:
        row = group.row
        shared = ", ".join(f"{k}={v}" for k, v in row.hyperparameters.items())
        cells = [f"<td>{_named(group)}<small>{safe(shared)}</small></td>"]
        for name, _ in columns:
            mark = " best" if len(groups) > 1 and row.mean[name] == best[name] else ""
            cells.append(f'<td class="n{mark}">{_mean(row, name)}</td>')
        if several:
            for order, value in (row.best_order, row.worst_order):
                cells.append(f'<td class="n">{value:.2f}<small>{safe(order)}</small></td>')
        parameters = max(result.trainable_parameters for result in group.results)
        cells.append(f'<td class="n">{_count(parameters)}</td><td class="n">{row.runs}</td>')
        rows.append(cells)
    header = ["Method", "A<sub>avg</sub>", "A<sub>last</sub>", "Forgetting ↓", "BWT"]
    header += [GROUPS[name][0] for name in more]
    header += ["Best order", "Worst order"] if several else []
    text = "Percent. "
    if any(group.row.runs > 1 for group in groups):
        text += "Mean ± sample standard deviation over class orders and seeds. "
    text += "The best of a column is set in bold."
    return section("Leaderboard", text, table([*header, "Trained parameters", "Runs"], rows))


def _names(data: ReportData) -> list[str]:
    """Names of the tasks, where somebody gave them any."""
    names = [task.name for task in data.tasks]
    plain = [f"task {number}" for number in range(1, len(names) + 1)]
    return [] if names == plain else names


def _tasks(data: ReportData) -> str:
    rows: list[list[str]] = []
    for number, task in enumerate(data.tasks, 1):
        listed = ", ".join(task.classes)
        shown = listed if len(listed) <= 120 else listed[:119] + "…"
        counts = (len(task.classes), task.new, task.training, task.test)
        rows.append(
            [
                f"<td>{number}</td><td>{safe(task.name)}</td>",
                *(f'<td class="n">{count:,}</td>' for count in counts),
                f"<td><small>{safe(shown)}</small></td>",
            ]
        )
    header = ["#", "+Task", "Classes", "New", "Training images", "Test images", "+Names"]
    body = table(header, rows)
    if len(rows) > SHOWN_TASKS:
        body = details(f"Every task ({len(rows)})", body)
    text = "A test image belongs to the task that brings it, or after which its class is known. "
    orders = {result.order for result in data.results}
    text += "Of the first class order." if len(orders) > 1 else ""
    return section("Tasks", text, body) if rows else ""


def _curves(groups: Sequence[_Group], names: Sequence[str]) -> str:
    lines: list[plots.Line] = []
    for group in groups:
        values = list(zip(*(result.curve for result in group.results), strict=True))
        several = len(group.results) > 1
        line = plots.Line(
            name=group.row.name,
            values=[statistics.fmean(v) for v in values],
            low=[min(v) for v in values] if several else None,
            high=[max(v) for v in values] if several else None,
            colour=group.colour,
        )
        lines.append(line)
    text = "Over all test images of the classes seen so far, without knowing the task."
    if any(line.low for line in lines):
        text += " Line: mean; band: lowest to highest of all class orders and seeds."
    # The names at the lines' ends are out of sight on a phone.
    legend = "".join(f"<span>{_named(group)}</span>" for group in groups)
    body = f'<p class="legend">{legend}</p>{wide(plots.curves(lines, names))}'
    return section("Accuracy as tasks are learned", text, body)


def _spread(groups: Sequence[_Group]) -> str:
    if all(group.row.runs < 2 for group in groups):
        return ""
    values = [(g.row.name, g.colour, [r.metrics["a_avg"] for r in g.results]) for g in groups]
    text = "One dot per class order and seed; box: middle half, bar: median."
    chart = plots.strips(values, "average incremental accuracy, %")
    return section("Spread over class orders", text, wide(chart))


def _matrices(groups: Sequence[_Group], names: Sequence[str]) -> str:
    rows = (row for g in groups for row in g.results[0].matrix)
    lowest = min(v for row in rows for v in row if v is not None)
    low = max(0.0, lowest // 10 * 10 - 10)
    cards = [
        f'<div class="card"><h3>{_named(g)}</h3>'
        f"{plots.heat_map(g.results[0].matrix, low, names)}</div>"
        for g in groups
    ]
    first = groups[0].results[0]
    text = (
        f"Accuracy in percent on each task's test images after each task, predicting among all "
        f"classes seen; class order {safe(first.order)}, seed {first.seed}. "
        f"Palest: {low:.0f}, deepest: 100."
    )
    return section("Accuracy matrices", text, f'<div class="grid2">{"".join(cards)}</div>')


def _task_incremental(groups: Sequence[_Group]) -> str:
    rows: list[list[str]] = []
    for group in groups:
        row = group.row
        if "task_a_avg" not in row.mean:
            continue
        gap = row.mean["task_a_avg"] - row.mean["a_avg"]
        rows.append(
            [
                f"<td>{_named(group)}</td>",
                f'<td class="n">{_mean(row, "a_avg")}</td>',
                f'<td class="n">{_mean(row, "task_a_avg")}</td>',
                bar(gap, max(100 - row.mean["a_avg"], 1.0), f"{gap:.2f}"),
            ]
        )
    if not rows:
        return ""
    text = (
        "What each method would reach if the task of every image were known. The bar shows which "
        "part of the errors that would mend: those are confusions between tasks."
    )
    header = ["Method", "Class-incremental A<sub>avg</sub>", "Task-incremental A<sub>avg</sub>"]
    return section("If the task were known", text, table([*header, "=Gain"], rows))


def _cost(groups: Sequence[_Group], data: ReportData) -> str:
    """Cost of each method alone, and of what several of them share."""
    if not data.stages:
        return ""
    row_of = {position: row for row, group in enumerate(groups) for position in group.positions}
    own: list[list[StageResult]] = [[] for _ in groups]
    shared: list[StageResult] = []
    for stage in data.stages:
        needed_by = {row_of[position] for position in stage.results}
        (own[needed_by.pop()] if len(needed_by) == 1 else shared).append(stage)
    lines = [(_named(group), stages) for group, stages in zip(groups, own, strict=True)]
    if shared:
        operators = ", ".join(dict.fromkeys(stage.operator for stage in shared))
        lines.append((f"Shared<small>{safe(operators)}</small>", shared))
    lines.append(("All", list(data.stages)))
    whole = _total(stage.ever for stage in data.stages)
    rows: list[list[str]] = []
    for name, stages in lines:
        costs = _total(stage.now for stage in stages), _total(stage.ever for stage in stages)
        times = (bar(c.seconds, whole.seconds or 1.0, _duration(c.seconds)) for c in costs)
        images = (bar(c.images, whole.images or 1, f"{c.images:,}") for c in costs)
        rows.append([f"<td>{name}</td>", *times, *images])
    text = (
        "Stages that one method alone needs count for it, summed over class orders and seeds; what "
        "several methods need is shared. A merge or an ensemble counts for what it needs beyond "
        "its parents. Images are those that went through a network. Now: in this run, in which "
        "stages from the store took nothing. In all: what every stage took when it was computed."
    )
    if unknown := sum(stage.ever is None for stage in data.stages):
        gone = "1 stage" if unknown == 1 else f"{unknown} stages"
        text += f" The store no longer knows what {gone} took; that is left out."
    header = ["What", "=Time, now", "=Time, in all", "=Images, now", "=Images, in all"]
    return section("Cost", text, table(header, rows))


def _total(costs: Iterable[Cost | None]) -> Cost:
    """The sum of those that are known."""
    return sum((cost for cost in costs if cost is not None), Cost())


def _stages(data: ReportData) -> str:
    by_operator: dict[str, list[StageResult]] = {}
    for stage in data.stages:
        by_operator.setdefault(stage.operator, []).append(stage)
    rows: list[list[str]] = []
    for operator, stages in by_operator.items():
        counts = [str(sum(s.state == state for s in stages)) for state in _STATES]
        seconds = _duration(sum(s.now.seconds for s in stages))
        cells = [str(len(stages)), *counts, seconds]
        rows.append([f"<td>{safe(operator)}</td>", *(f'<td class="n">{c}</td>' for c in cells)])
    every = [
        [
            f"<td>{safe(s.name)}</td><td>{safe(s.operator)}</td>",
            f'<td><span class="state">{safe(s.state)}</span></td>',
            f'<td class="n">{s.now.seconds:.2f}</td>',
        ]
        for s in data.stages[:MAX_STAGES]
    ]
    left_out = len(data.stages) - len(every)
    more = f'<p class="dim">and {left_out} more</p>' if left_out > 0 else ""
    listed = table(["Stage", "Operator", "+State", "Seconds"], every) + more
    body = table(["Operator", "Stages", "Computed", "From the store", "Failed", "Time"], rows)
    return section("Stages", "", body + details("Every stage", listed))


_STATES = ("computed", "cached", "failed")


def _runs(groups: Sequence[_Group]) -> str:
    columns = ("a_avg", "a_last", "forgetting", "bwt")
    rows: list[list[str]] = []
    for group in groups:
        for r in group.results:
            numbers = [f"{r.metrics[name]:.2f}" for name in columns]
            cells = [safe(r.order), str(r.seed), *numbers, f"{r.seconds:.2f}"]
            state = "cached" if r.cached else "computed"
            rows.append(
                [
                    f"<td>{_named(group)}</td>",
                    *(f'<td class="n">{c}</td>' for c in cells),
                    f'<td><span class="state">{state}</span></td>',
                ]
            )
    header = ["Method", "Assignment", "Seed", "A<sub>avg</sub>", "A<sub>last</sub>", "Forgetting"]
    body = table([*header, "BWT", "Seconds", "+State"], rows)
    return details(f"Every result ({len(rows)})", body) if rows else ""


def _definitions(groups: Sequence[_Group]) -> str:
    measured = {name for group in groups for name in group.row.mean}
    used = DEFINITIONS | {name: said for name, said in GROUPS.items() if name in measured}
    terms = "".join(
        f"<dt>{safe(title)}</dt><dd>{safe(formula)}<br><small>{safe(source)}</small></dd>"
        for title, formula, source in used.values()
    )
    text = (
        "R[i,j] is the accuracy in percent on task j's test images after task i, among all classes "
        "seen; c[i,j] counts the correct ones of q[j]; tasks count from 0 to T-1."
    )
    return section("Definitions", text, f"<dl>{terms}</dl>")


def _setup(data: ReportData) -> str:
    rows = [[f"<td>{safe(k)}</td>", f"<td>{safe(v)}</td>"] for k, v in data.environment.items()]
    body = table(["What", "+Version"], rows) if rows else ""
    return section("Environment", "", body + details("Spec", f"<pre>{safe(data.spec)}</pre>"))


def _named(group: _Group) -> str:
    return f'<span class="dot c{group.colour % 8}"></span>{safe(group.row.name)}'


def _mean(row: Row, name: str) -> str:
    std = row.std[name]
    spread = "" if std is None else f' <span class="std">± {std:.2f}</span>'
    return f"{row.mean[name]:.2f}{spread}"


def _count(value: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
