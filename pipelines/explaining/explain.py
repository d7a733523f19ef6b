"""Explains a plan: hit or miss for every stage, and why a stage is not stored."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from graftwork.cluster.execution.graph import inputs_of
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store
from graftwork.pipelines.explaining import sealed
from graftwork.pipelines.explaining.estimate import Estimate, estimate
from graftwork.pipelines.explaining.former import Formers
from graftwork.pipelines.explaining.sealed import Gone
from graftwork.pipelines.explaining.why import Nearest
from graftwork.pipelines.planning.plan import Plan


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """A stage of a plan, and whether it is stored.

    Args:
        stage: its label.
        group: label that shards and tasks of one kind share.
        operator: what computes it.
        key: sha256 of what it is made of.
        status: `hit` if it is stored, `miss` if a run computes it, `not needed` otherwise.
        why: of a miss, how its key differs from the nearest stored one.
    """

    stage: str
    group: str
    operator: str
    key: str
    status: Literal["hit", "miss", "not needed"]
    why: str


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Summary of what a run would do.

    Args:
        pipeline: its name.
        stages: all of them, inputs before what reads them.
        counts: stages of each status.
        images_to_forward: images that go through a network.
        time: what the missing stages take.
        gone: sealed tasks whose images are gone although a run needs them; it refuses to start.
    """

    pipeline: str
    stages: tuple[StageStatus, ...]
    counts: Mapping[str, int]
    images_to_forward: int
    time: Estimate
    gone: tuple[Gone, ...]


def explain(plan: Plan, store: Store) -> Explanation:
    """Compares a plan with what is stored."""
    stages = plan.stages
    stored = plan.stored(store)
    missing = plan.missing(stored)
    compute = {stage.key for stage in missing}
    formers = Formers(store, stored, stages)
    nearest = Nearest(formers)
    rows: list[StageStatus] = []
    for stage in stages:
        hit = stage.key in stored[stage.operator]
        status = "hit" if hit else "miss" if stage.key in compute else "not needed"
        rows.append(
            StageStatus(
                stage=stage.label,
                group=group(stage),
                operator=stage.operator,
                key=stage.key,
                status=status,
                why=nearest.why(stage) if status == "miss" else "",
            )
        )
    images = sum(map(plan.images, missing))
    return Explanation(
        pipeline=plan.spec.pipeline,
        stages=tuple(rows),
        counts=dict(Counter(row.status for row in rows)),
        images_to_forward=images,
        time=estimate(missing, formers),
        gone=sealed.gone(plan, missing),
    )


def mermaid(plan: Plan, store: Store) -> str:
    """The graph in Mermaid's language: shards and tasks are one node, stored ones are green."""
    stages = plan.stages
    stored = plan.stored(store)
    nodes: dict[str, list[Stage]] = {}
    names = {stage.key: group(stage) for stage in stages}
    for stage in stages:
        nodes.setdefault(names[stage.key], []).append(stage)
    ids = {name: f"n{number}" for number, name in enumerate(nodes)}
    lines = ["flowchart LR"]
    edges = set()
    for name, members in nodes.items():
        hits = sum(s.key in stored[s.operator] for s in members)
        count = f"<br/>{hits}/{len(members)} stored" if len(members) > 1 else ""
        style = "hit" if hits == len(members) else "miss"
        lines.append(f'  {ids[name]}["{_text(name)}{count}"]:::{style}')
        for member in members:
            edges |= {(ids[names[s.key]], ids[name]) for s in inputs_of(member)}
    lines += [f"  {a} --> {b}" for a, b in sorted(edges) if a != b]
    lines += ["  classDef hit fill:#d9f2e0,stroke:#2e7d4f", "  classDef miss fill:#fff,stroke:#888"]
    return "\n".join(lines)


def _text(name: str) -> str:
    """A name in Mermaid's quotes, where names of methods and tasks may hold what it understands."""
    return "".join(f"#{ord(c)};" if c in '#"<>&`\\' else c for c in name)


def group(stage: Stage) -> str:
    """Name of a node or a line: that of the shards or tasks of one kind, or the stage's own."""
    return stage.group or stage.label or stage.key[:8]
