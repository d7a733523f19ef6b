"""Tables on the terminal."""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean, pstdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graftwork.cluster.jobs import Job
from graftwork.operators.evaluation.definitions import GROUPS
from graftwork.operators.streams.stream import Piece
from graftwork.pipelines.explaining.explain import Explanation
from graftwork.pipelines.reporting.document import Document, Result


def _table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose other columns are numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    return table


def document(value: Document, console: Console) -> None:
    """The results of a run, best method first."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in value.results:
        groups[result.label].append(result)
    columns = {"a_last": "A_last", "a_avg": "A_avg", "forgetting": "forgetting"}
    measured = {name for result in value.results for name in result.metrics}
    columns |= {name: name for name in GROUPS if name in measured}
    table = _table(f"{value.pipeline}: accuracy in %", "method", *columns.values(), "runs", "s")
    ranked = sorted(groups.items(), key=lambda g: -mean(r.metrics["a_last"] for r in g[1]))
    for label, results in ranked:
        table.add_row(
            label,
            *(_spread([r.metrics[n] for r in results if n in r.metrics]) for n in columns),
            str(len(results)),
            f"{mean(r.seconds for r in results):.2f}",
        )
    console.print(table)
    console.print(
        f"{value.stages.computed} stages computed, {value.stages.cached} from the store; "
        f"{value.images_forwarded} images forwarded; {value.seconds:.1f} s",
        highlight=False,
    )


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{mean(values):.2f}" + (f" ± {pstdev(values):.2f}" if len(values) > 1 else "")


def pieces(value: Sequence[Piece], file: str, console: Console) -> None:
    """The tasks of a stream that was written to a file."""
    table = _table("", "task", "classes", "training images", "test images")
    for piece in value:
        classes = len(set(piece.train.labels[piece.rows].tolist()))
        table.add_row(Text(piece.name), str(classes), str(len(piece.rows)), str(len(piece.tested)))
    console.print(table)
    console.print(f"written to {file}; follow it with scenario: {{manifest: {file}}}", markup=False)


def plan(value: Explanation, console: Console) -> None:
    """Hit or miss per stage; shards and tasks with the same fate share a line."""
    lines: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in value.stages:
        # The digest of the images differs from shard to shard: one example speaks for all. Of a
        # chain of tasks the first says why, the others follow from it.
        chain = row.operator in ("train", "join", "predict", "merge", "statistics")
        why = "" if chain else row.why.split(":")[0]
        lines[row.group, row.status, why].append(row.why)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage", overflow="fold")
    table.add_column("", overflow="fold")
    table.add_column("why", overflow="fold")
    colours = {"hit": "green", "miss": "yellow", "not needed": "dim"}
    for (group, status, _), reasons in lines.items():
        count = f" x {len(reasons)}" if len(reasons) > 1 else ""
        # Texts, as a list in a label or a reason is no markup.
        table.add_row(Text(group + count), Text(status, colours[status]), Text(reasons[0]))
    console.print(table)
    counts = ", ".join(f"{number} {status}" for status, number in value.counts.items())
    console.print(f"{counts}; {value.images_to_forward} images to forward", highlight=False)
    if line := str(value.time):
        console.print(line, highlight=False, markup=False)


def methods(name: str | None, console: Console, as_json: bool) -> None:
    """All methods, merges and rules, or the hyper-parameters and the card of one.

    Raises:
        ConfigError: no method of this name.
    """
    from graftwork.operators import catalogue

    if name is None:
        cards = catalogue.cards()
        if as_json:
            print(json.dumps(cards, indent=1))
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("method", "kind", "grows by", "what it does", "paper"):
            table.add_column(column, overflow="fold", no_wrap=column != "what it does")
        for method, card in cards.items():
            place = card["paper"].removeprefix("https://")
            arxiv = place.startswith("arxiv.org/abs/")
            paper = place.replace("arxiv.org/abs/", "arXiv:") if arxiv else place.partition("/")[0]
            growth = card.get("growth", "constant")  # merges and rules keep nothing
            kind = card["contract"] + ("\non CLIP" if card.get("network") == "clip" else "")
            kind += ",\na ViT" if card["contract"] == "fused" else ""
            grows = "" if growth == "constant" else growth
            table.add_row(method, kind, grows, card["summary"], paper)
        console.print(table)
        console.print(
            "grows by: what the memory grows with, beside the rows of a classifier",
            highlight=False,
        )
        return
    card, fields = catalogue.card(name)
    if as_json:
        print(json.dumps({"card": card, "hyperparameters": fields}, indent=1))
        return
    console.print(f"[bold]{card['title']}[/bold]  {card['paper']}\n{card['summary']}")
    facts = Table(box=None, show_header=False, pad_edge=False)
    if card["contract"] == "fused":
        card = {**card, "network": ("clip", "vit")}
    for fact, value in card.items():
        if fact not in ("title", "paper", "summary"):
            facts.add_row(fact.replace("_", " "), _in_words(value))
    console.print(facts)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("hyper-parameter", "type", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for field in fields:
        table.add_row(field["name"], field["type"], json.dumps(field["default"]), field["doc"])
    console.print(table)


def _in_words(value: Any) -> str:
    """A fact of a card, for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value) or "none"


def job(found: Job, console: Console, as_json: bool) -> None:
    """State, times and message of a submitted job."""
    if as_json:
        print(json.dumps(asdict(found), indent=1))
        return
    console.print(f"{found.id}: {found.state}", highlight=False)
    for name, moment in (("started", found.started), ("ended", found.ended)):
        if moment:
            console.print(f"{name} {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(moment))}")
    if found.message:
        console.print(found.message, markup=False, highlight=False)


def inventory(rows: list[dict[str, Any]], console: Console) -> None:
    """Stages and bytes per operator."""
    table = _table("", "operator", "stages", "size", "newest")
    for row in rows:
        age = row["newest_seconds"]
        table.add_row(
            row["operator"],
            str(row["stages"]),
            size(row["bytes"]),
            "" if age is None else f"{age / 3600:.1f} h ago",
        )
    console.print(table)


def verified(found: dict[str, Any], console: Console) -> None:
    """Findings of `cache verify`."""
    for stage in found["damaged"]:
        console.print(
            f"damaged: {stage['operator']}/{stage['key'][:12]}: {stage['reason']}", highlight=False
        )
    note = "; set aside" if found["set_aside"] else "; --repair sets them aside"
    console.print(
        f"{found['stages']} stages read, {len(found['damaged'])} damaged"
        + (note if found["damaged"] else ""),
        highlight=False,
    )


def collected(found: dict[str, Any], console: Console) -> None:
    """Findings of `cache gc`."""
    for reason, count in found["reasons"].items():
        console.print(f"{count} files {reason}", highlight=False)
    if not found["files"]:
        console.print(f"nothing to delete that is older than {found['days']:g} days")
        return
    verb = "deleted" if found["deleted"] else "would be deleted; add --delete"
    console.print(
        f"{len(found['files'])} files, {size(found['bytes'])}, older than {found['days']:g} days: "
        f"{verb}",
        highlight=False,
    )


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
