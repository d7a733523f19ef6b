"""Pieces of HTML that a report is made of."""

import html
from collections.abc import Iterable, Sequence


def safe(value: object) -> str:
    """Text as HTML shows it, whatever it holds."""
    return html.escape(str(value))


def section(title: str, text: str, body: str) -> str:
    intro = f'<p class="dim">{text}</p>' if text else ""
    return f"<section><h2>{title}</h2>{intro}{body}</section>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Table; header cells stand to the right, but the first and those marked with + or =."""
    cells = "".join(
        f'<th class="{"" if i == 0 or h[0] in "+=" else "n"}">{h.lstrip("+=")}</th>'
        for i, h in enumerate(header)
    )
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def details(title: str, body: str) -> str:
    return f"<details><summary>{safe(title)}</summary>{body}</details>"


def wide(svg: str) -> str:
    return f'<div class="scroll wide">{svg}</div>'


def bar(value: float, longest: float, text: str) -> str:
    share = max(0.0, min(1.0, value / longest))
    bar = f'<i style="width:{85 * share:.1f}%"></i>' if share else ""
    return f'<td class="bar">{bar}<span>{safe(text)}</span></td>'
