"""Plots as SVG text, written by hand: about a millisecond each, where matplotlib takes a hundred.

Colours come from classes (`c0` .. `c7`, `axis`, `grid`), so that a page can give them a light and
a dark look; `standalone` gives a plot its own style and a white ground. Lengths are in SVG units.
"""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from graftwork.operators.evaluation.metrics import Summary

LIGHT = ("#0b62c1", "#c43c52", "#1f7d4f", "#a86200", "#7446b0", "#007a87", "#8a5a44", "#5a6372")
DARK = ("#6cb0ff", "#ff8795", "#62d394", "#f0b441", "#bf9fff", "#4fd0df", "#d3a892", "#aeb7c4")
DASHES = ("", "6 4", "2 3", "9 3 2 3")
TEXT_CELLS = 12  # larger matrices have no room for numbers
RECTANGLES = 20  # larger ones are a picture: thousands of rectangles make a page slow


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a chart.

    Args:
        name: label at its right end.
        values: y per task, percent.
        low, high: band around it, same length; None for none.
        colour: number of the colour; beyond the eighth the dashes differ.
    """

    name: str
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: int = 0


def style(colours: Sequence[str]) -> str:
    """CSS of the colour classes."""
    return "".join(f".c{i}{{color:{colour}}}" for i, colour in enumerate(colours))


def standalone(svg: str) -> str:
    """The plot as a file of its own: dark on white, whatever page shows it."""
    css = (
        "text{font:12px system-ui,sans-serif;fill:#24292f}.axis{stroke:#57606a}"
        ".grid{stroke:#d8dee4}.dim{fill:#57606a}.ground{fill:#fff}"
    )
    head, _, rest = svg.partition(">")
    ground = '<rect width="100%" height="100%" class="ground"/>'
    return f"{head}><style>{css}{style(LIGHT)}</style>{ground}{rest}"


def curves(
    lines: Sequence[Line],
    names: Sequence[str] = (),
    *,
    y_label: str = "accuracy, %",
    labels: bool = True,
) -> str:
    """Lines over tasks, with bands; names stand at the right end, moved apart where they collide.

    Args:
        names: of the tasks, if they have any; else they are numbered from 1.
        labels: False leaves the names out (a single line, say).
    """
    longest = max((len(line.name) for line in lines), default=0) if labels else 0
    right = min(30 + 7 * longest, 260)
    left, top, width, height = 46, 12, 620, 320
    tasks = max((len(line.values) for line in lines), default=1)
    everything = [v for x in lines for part in (x.values, x.low, x.high) for v in part or ()]
    low, high, ticks = _scale(everything)

    def x(task: float) -> float:
        return left + (width * task / (tasks - 1) if tasks > 1 else width / 2)

    def y(value: float) -> float:
        return top + height * (high - value) / (high - low)

    body: list[str] = []
    for tick in ticks:
        body.append(
            f'<path class="grid" d="M{left} {y(tick):.1f}h{width}"/>'
            f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    step = max(1, math.ceil(tasks / 12))
    # Cut names would look alike; the number stands beside the whole name in the table of tasks.
    fitting = all(len(name) <= min(width / (7.5 * min(tasks, 12)), 12) for name in names)
    for task in range(0, tasks, step):
        name = names[task] if names and fitting else str(task + 1)
        body.append(
            f'<text x="{x(task):.1f}" y="{top + height + 18}" text-anchor="middle">'
            f"{escape(name)}</text>"
        )
    body.append(
        f'<path class="axis" d="M{left} {top + height}h{width}"/>'
        f'<text class="dim" x="{left + width / 2}" y="{top + height + 38}" '
        f'text-anchor="middle">tasks learned</text>'
        f'<text class="dim" transform="translate(12 {top + height / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    for line in lines:
        if line.low and line.high and len(line.low) > 1:
            upper = [f"{x(i):.1f} {y(v):.1f}" for i, v in enumerate(line.high)]
            lower = [f"{x(i):.1f} {y(v):.1f}" for i, v in reversed(list(enumerate(line.low)))]
            path = "M" + "L".join(upper + lower) + "Z"
            body.append(
                f'<path class="c{line.colour % 8}" fill="currentColor" opacity=".13" d="{path}"/>'
            )
    places = _apart([y(line.values[-1]) for line in lines], 15, top + 6, top + height)
    for line, place in zip(lines, places, strict=True):
        points = [f"{x(i):.1f} {y(v):.1f}" for i, v in enumerate(line.values)]
        dash = DASHES[line.colour // 8 % len(DASHES)]
        title = f"{escape(line.name)}: " + ", ".join(f"{v:.1f}" for v in line.values)
        group = [f'<g class="c{line.colour % 8}"><title>{title}</title>']
        group.append(
            f'<path fill="none" stroke="currentColor" stroke-width="2" stroke-linejoin="round" '
            f'stroke-dasharray="{dash}" d="M{"L".join(points)}"/>'
        )
        if tasks <= 25:
            for task, (point, value) in enumerate(zip(points, line.values, strict=True)):
                cx, cy = point.split()
                about = f"{line.name} after {_named(task, names)}: {value:.1f} %"
                group.append(
                    f'<circle fill="currentColor" r="2.6" cx="{cx}" cy="{cy}">'
                    f"<title>{escape(about)}</title></circle>"
                )
        if labels:
            end = y(line.values[-1])
            group.append(
                f'<path stroke="currentColor" opacity=".5" fill="none" '
                f'd="M{left + width + 5} {end:.1f}L{left + width + 16} {place:.1f}"/>'
                f'<text style="fill:currentColor" x="{left + width + 20}" y="{place + 4:.1f}">'
                f"{escape(_cut(line.name, 32))}</text>"
            )
        body.append("".join(group) + "</g>")
    return _svg(left + width + max(right, 14), top + height + 46, body, "accuracy per task")


def _named(task: int, names: Sequence[str]) -> str:
    return names[task] if names else f"task {task + 1}"


def heat_map(
    matrix: Sequence[Sequence[float | None]], low: float = 0.0, names: Sequence[str] = ()
) -> str:
    """Lower triangle of accuracies, row = after task, column = on task; `low` is the palest."""
    tasks = len(matrix)
    left, top, size = 40, 10, 340
    cell = size / tasks
    body: list[str] = []
    if tasks <= RECTANGLES:
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                if value is None:  # a task without test images of its own
                    continue
                red, green, blue, _ = _shade(np.array((value - low) / (100 - low)))
                place = f'x="{left + j * cell:.1f}" y="{top + i * cell:.1f}"'
                about = escape(f"{_named(j, names)} after {_named(i, names)}: {value:.1f} %")
                body.append(
                    f'<rect {place} width="{cell - 1:.1f}" height="{cell - 1:.1f}" rx="2" '
                    f'fill="#{red:02x}{green:02x}{blue:02x}"><title>{about}</title></rect>'
                )
                if tasks <= TEXT_CELLS:
                    ink = "#fff" if 0.3 * red + 0.59 * green + 0.11 * blue < 140 else "#10203a"
                    text = f"{value:.0f}" if tasks > 6 else f"{value:.1f}"
                    middle, base = left + (j + 0.5) * cell, top + (i + 0.5) * cell + 4
                    body.append(
                        f'<text x="{middle:.1f}" y="{base:.1f}" text-anchor="middle" '
                        f'style="fill:{ink}">{text}</text>'
                    )
    else:
        shares = np.full((tasks, tasks), np.nan)
        for i, row in enumerate(matrix):
            shares[i, : i + 1] = (np.asarray(row, dtype=float) - low) / (100 - low)
        body.append(_picture(shares, left, top, size))
    body += _matrix_axes(tasks, left, top, size, "on task", "after task", first=1)
    return _svg(left + size + 8, top + size + 42, body, "accuracy matrix")


def confusion_map(confusion: NDArray[np.int64], order: Sequence[int] | None = None) -> str:
    """Share of each true class's images (row) that got each class (column).

    Shades follow the square root, so that a confusion of one image in a hundred still shows.

    Args:
        confusion: counts [K, K].
        order: classes in the order learned, which then is the order of rows and columns.
    """
    chosen = np.asarray(order if order is not None else range(len(confusion)))
    counts = confusion[np.ix_(chosen, chosen)].astype(np.float64)
    shares = np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    left, top, size = 46, 10, 420
    body = [_picture(shares, left, top, size)]
    suffix = ", in the order learned" if order is not None else ""
    axes = _matrix_axes(
        len(chosen), left, top, size, f"predicted class{suffix}", "true class", first=0
    )
    return _svg(left + size + 10, top + size + 42, body + axes, "confusion matrix")


def strips(groups: Sequence[tuple[str, int, Sequence[float]]], x_label: str) -> str:
    """A row per group (name, colour, values) with its values, their quartiles and median."""
    left = min(24 + 7 * max((len(name) for name, _, _ in groups), default=0), 240)
    top, width, row = 8, 620, 40
    low, high, ticks = _scale([v for _, _, values in groups for v in values])
    height = row * len(groups)

    def x(value: float) -> float:
        return left + width * (value - low) / (high - low)

    body = [
        f'<path class="grid" d="M{x(t):.1f} {top}v{height}"/>'
        f'<text x="{x(t):.1f}" y="{top + height + 18}" text-anchor="middle">{t:g}</text>'
        for t in ticks
    ]
    for number, (name, colour, values) in enumerate(groups):
        middle = top + row * (number + 0.5)
        first, median, third = np.quantile(values, [0.25, 0.5, 0.75])
        body.append(
            f'<g class="c{colour % 8}"><text x="{left - 12}" y="{middle + 4:.1f}" '
            f'text-anchor="end">{escape(_cut(name, 32))}</text>'
        )
        if len(values) > 3:
            body.append(
                f'<rect x="{x(first):.1f}" y="{middle - 11:.1f}" width="{x(third) - x(first):.1f}" '
                f'height="22" rx="3" fill="currentColor" opacity=".18"/>'
                f'<path stroke="currentColor" stroke-width="2.5" '
                f'd="M{x(median):.1f} {middle - 11:.1f}v22"/>'
            )
        for index, value in enumerate(sorted(values)):
            shift = (index * 5 % 7 - 3) * 2.2 if len(values) > 3 else 0  # neighbours lie apart
            body.append(
                f'<circle fill="currentColor" opacity=".7" r="3.2" cx="{x(value):.1f}" '
                f'cy="{middle + shift:.1f}"><title>{value:.2f}</title></circle>'
            )
        body.append("</g>")
    body.append(
        f'<text class="dim" x="{left + width / 2}" y="{top + height + 38}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    return _svg(left + width + 24, top + height + 46, body, x_label)


def method_artifacts(summary: Summary, class_order: Sequence[int]) -> dict[str, str]:
    """Files of one result for MLflow: accuracy matrix (CSV, SVG), curve and confusion (SVG)."""
    tasks = range(len(summary.matrix))
    table = [",".join(["after_task", *(f"task_{j}" for j in tasks)])]
    for i, row in enumerate(summary.matrix):
        values = ["" if value is None else repr(value) for value in row]
        table.append(",".join([str(i), *values, *[""] * (len(tasks) - i - 1)]))
    both = [
        Line(name="class-incremental", values=summary.curve),
        Line(name="task-incremental", values=summary.task_curve, colour=1),
    ]
    return {
        "accuracy_matrix.csv": "\n".join(table) + "\n",
        "accuracy_matrix.svg": standalone(heat_map(summary.matrix)),
        "accuracy_curve.svg": standalone(curves(both)),
        "confusion.svg": standalone(confusion_map(summary.confusion, class_order)),
    }


def _svg(width: float, height: float, body: Sequence[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" aria-label="{escape(title)}">'
        + "".join(body)
        + "</svg>"
    )


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _scale(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Range around the values with round ends, and round ticks in it."""
    low, high = (min(values), max(values)) if values else (0.0, 100.0)
    span = max(high - low, 1.0)
    step = next(s for s in (0.2, 0.5, 1, 2, 5, 10, 20, 1e3, 1e6) if span / s <= 7)
    first = math.floor((low - 0.04 * span) / step)
    last = math.ceil((high + 0.04 * span) / step)
    if last * step > 100 >= high:  # percent end at 100
        last = max(math.floor(100 / step), first + 1)
    ticks = [round(n * step, 6) for n in range(first, last + 1)]
    return ticks[0], max(ticks[-1], high), ticks


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near to the wanted ones as they can be at least `gap` apart."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [0.0] * len(wanted)
    lowest = low
    for i in order:
        places[i] = max(wanted[i], lowest)
        lowest = places[i] + gap
    highest = max(high, low + gap * (len(wanted) - 1))
    for i in reversed(order):
        places[i] = min(places[i], highest)
        highest = places[i] - gap
    return places


def _shade(share: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Colour [..., 4] of shares 0 .. 1, pale to deep blue; NaN is transparent."""
    stops = np.array([[244, 247, 252], [158, 197, 236], [52, 122, 196], [9, 43, 97]])
    place = np.clip(np.nan_to_num(share), 0, 1) * 3
    channels = [np.interp(place, range(4), stops[:, channel]) for channel in range(3)]
    opacity = np.where(np.isnan(share), 0.0, 255.0)
    return np.stack([*channels, opacity], axis=-1).astype(np.uint8)


def _picture(shares: NDArray[np.float64], left: float, top: float, size: float) -> str:
    """A matrix of shares as an embedded PNG of one pixel per cell."""
    pixels = _shade(shares)
    height, width = shares.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes(), 6)),
        (b"IEND", b""),
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return (
        f'<image x="{left}" y="{top}" width="{size}" height="{size}" '
        f'style="image-rendering:pixelated" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{base64.b64encode(png).decode()}"/>'
    )


def _matrix_axes(
    count: int, left: float, top: float, size: float, x_label: str, y_label: str, *, first: int
) -> list[str]:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**6) if count / s <= 12)
    body: list[str] = []
    for index in range(0, count, step):
        place = (index + 0.5) * size / count
        body.append(
            f'<text x="{left + place:.1f}" y="{top + size + 16}" text-anchor="middle">'
            f"{index + first}</text>"
            f'<text x="{left - 6}" y="{top + place + 4:.1f}" text-anchor="end">'
            f"{index + first}</text>"
        )
    body.append(
        f'<text class="dim" x="{left + size / 2}" y="{top + size + 34}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="dim" transform="translate(11 {top + size / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    return body
