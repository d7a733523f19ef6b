"""The whole program in this process: stages are computed one after the other, without Ray."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from graftwork.cluster.execution.executor import Event, Outcome
from graftwork.cluster.execution.graph import walk
from graftwork.cluster.execution.worker import run_stage
from graftwork.operators.stage import OPERATORS, Stage
from graftwork.operators.store import Store
from graftwork.pipelines.running import run as program
from graftwork.pipelines.running.progress import Display
from graftwork.pipelines.running.run import run_pipeline
from graftwork.pipelines.running.where import Where
from graftwork.pipelines.spec.loading import load_resolved


def run(spec: Path, store: Path, *overrides: str, tracking: str | None = None) -> dict[str, Any]:
    """What `graftwork run` does and returns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "execute", _execute)
        return run_pipeline(
            load_resolved(str(spec), overrides),
            Where(store=str(store), tracking=tracking),
            Display(quiet=True),
        ).to_json()


def _execute(
    targets: Sequence[Stage], store: Store, on_event: Callable[[Event], None], **_: Any
) -> Outcome:
    stages = walk(targets)
    done = {}
    for stage in stages:
        if store.has(stage.operator, stage.key):
            on_event(Event(kind="cached", stage=stage))
            continue
        found = run_stage(OPERATORS[stage.operator], stage.assignment(), store)
        done[stage.key] = found
        on_event(Event(kind="finished", stage=stage, seconds=found.seconds, done=found))
    total, computed = len(stages), len(done)
    return Outcome(
        total=total,
        computed=computed,
        cached=total - computed,
        retries=0,
        repairs=0,
        done=done,
    )
