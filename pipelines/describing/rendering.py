"""A report about a data set for a terminal of 80 columns or more."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graftwork.pipelines.describing.looking import Found
from graftwork.pipelines.describing.report import Report

_ALL_CLASSES = 16
"""Largest number of classes that are listed in full."""
_ENDS = 5
_STYLES = {"left out": "yellow", "unusable": "red"}


def render(report: Report) -> RenderableType:
    """The report: counts, what the files hold, classes, and what is wrong."""
    overview = _table("", "train", "test")
    both = (report.train, report.test)
    overview.add_row("images used", *(f"{s.images:,}" for s in both))
    for kind in ("left out", "unusable"):
        counts = [sum(f.count for f in s.found if f.kind == kind and f.lost) for s in both]
        if any(counts):
            overview.add_row(kind, *map(str, counts), style=_STYLES[kind])
    overview.add_row("classes", *(str(sum(n > 0 for n in s.classes.values())) for s in both))
    overview.add_row("images per class", *(_span(list(s.classes.values())) for s in both))
    if any(s.sizes for s in both):
        overview.add_row("bytes", *(_bytes(s.bytes) for s in both))
        overview.add_row("width x height", *(_typical(s.sizes) for s in both))
        overview.add_row("width", *(_span([w for w, _, _ in s.sizes]) for s in both))
        overview.add_row("height", *(_span([h for _, h, _ in s.sizes]) for s in both))
        overview.add_row("width / height", *(_ratios(s.sizes) for s in both))
    parts: list[RenderableType] = [overview]
    if report.train.found or report.test.found:
        parts += [Text(), _found_table(report)]
    parts += [Text(), _count_table("class", report, "classes")]
    if report.train.domains:
        parts += [Text(), _count_table("domain", report, "domains")]
    if report.skipped:
        parts.append(Text(f"\n{len(report.skipped)} unusable images are skipped", style="yellow"))
    if report.warnings:
        parts.append(Text(f"\n{_number(report.warnings, 'warning')}", style="bold yellow"))
        parts += [Text(f"  {warning}") for warning in report.warnings]
    if report.problems:
        count = _number(report.problems, "unreadable image")
        parts.append(Text(f"\n{count}", style="bold red"))
        parts += [Text(f"  {_called(p['file'], p['row'])}: {p['reason']}") for p in report.problems]
    elif report.gone:
        more = f" and {len(report.gone) - _ENDS} more" if len(report.gone) > _ENDS else ""
        parts.append(Text(f"\n{_number(report.gone, 'file')} gone"))
        parts.append(Text(f"  {', '.join(report.gone[:_ENDS])}{more}"))
    elif not report.warnings and not any(found.lost for s in both for found in s.found):
        parts.append(Text("\nno problems found", style="green"))
    return Group(*parts)


def _found_table(report: Report) -> Table:
    """Table of what the files hold, kind by kind, and what is done about it."""
    table = _table("what the files hold", "train", "test")
    table.add_column("what is done about it")
    rows: dict[tuple[str, str], dict[str, Found]] = {}
    for kind in ("format", "pixels", "stored", "left out", "unusable"):
        for split in ("train", "test"):
            for found in getattr(report, split).found:
                if found.kind == kind:
                    rows.setdefault((kind, found.what), {})[split] = found
    before = ""
    kinds = [kind for kind, _ in rows]
    for (kind, what), by_split in sorted(rows.items(), key=lambda row: _rank(kinds, row)):
        any_of = next(iter(by_split.values()))
        counts = [f"{by_split[s].count:,}" if s in by_split else "-" for s in ("train", "test")]
        example = f" ({any_of.first})" if kind == "left out" and any_of.lost else ""
        title = Text(f"{kind if kind != before else '':9}", style="bold").append(
            what, style="not bold"
        )
        table.add_row(
            title,
            *counts,
            Text(any_of.done + example),
            style=_STYLES.get(kind, "") if any_of.lost else "",
        )
        before = kind
    return table


def _rank(kinds: list[str], row: tuple[tuple[str, str], dict[str, Found]]) -> tuple[int, bool]:
    """Key to sort rows by: within a kind first what is lost."""
    (kind, _), by_split = row
    return kinds.index(kind), not any(found.lost for found in by_split.values())


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


def _called(file: str, row: int | None) -> str:
    return file if row is None else f"{file} row {row}"


def _count_table(what: str, report: Report, field: str) -> Table:
    """Images per class or domain; of many the largest and smallest in training."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(what, max_width=48, no_wrap=True, overflow="ellipsis")
    table.add_column("train", justify="right")
    table.add_column("test", justify="right")
    train: Mapping[str, int] = getattr(report.train, field)
    test: Mapping[str, int] = getattr(report.test, field)
    names = list(train)
    if len(names) > _ALL_CLASSES:
        names.sort(key=lambda name: -train[name])  # stable: class order among equals
        names = [*names[:_ENDS], "", *names[-_ENDS:]]
    for name in names:
        if name:
            table.add_row(Text(name), f"{train[name]:,}", f"{test[name]:,}")
        else:
            table.add_row(f"... {len(train) - 2 * _ENDS} more", "", "", style="dim")
    return table


def _number(things: Sequence[Any], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _span(values: Sequence[int]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _ratios(sizes: Sequence[tuple[int, int, int]]) -> str:
    if not sizes:
        return "-"
    low, high = (f"{limit(w / h for w, h, _ in sizes):.2f}" for limit in (min, max))
    return low if low == high else f"{low} to {high}"


def _typical(sizes: Sequence[tuple[int, int, int]]) -> str:
    if not sizes:
        return "-"
    width, height, count = sizes[0]
    share = 100 * count / sum(n for _, _, n in sizes)
    return f"{width}x{height}" + ("" if len(sizes) == 1 else f" ({share:.0f} %)")


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
