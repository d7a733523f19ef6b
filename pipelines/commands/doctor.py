"""The command that describes the data of a spec, and says what is suspicious about it."""

import json

from rich.console import Console

from graftwork.operators.errors import BadDataError
from graftwork.operators.store import Store
from graftwork.pipelines.describing.rendering import render
from graftwork.pipelines.describing.report import Report, describe
from graftwork.pipelines.planning import sources as datasets
from graftwork.pipelines.running.progress import Display
from graftwork.pipelines.spec.loading import Loaded
from graftwork.pipelines.spec.model import PipelineSpec


def doctor(loaded: Loaded, store: Store, display: Display, as_json: bool) -> None:
    """Describes the data of a spec: every image is decoded once, but for sealed tasks.

    Raises:
        BadDataError: the data cannot be used.
        ConfigError: a sealed task was never recorded.
    """
    with loaded.locating(), display.indexing():
        found, skip = _find(loaded.spec, store)
    reports: dict[str, Report] = {}
    for source in found:
        with display.counting(f"images decoded {source.task}".rstrip()) as on_progress:
            reports[source.task] = describe(
                source.dataset, look=not source.sealed, skip=skip, on_progress=on_progress
            )
        if not as_json:
            if source.task:
                recorded = ", sealed: as it was recorded" if source.sealed else ""
                Console().print(f'task "{source.task}"{recorded}')
            Console().print(render(reports[source.task]))
    if as_json:
        written = {name: report.to_json() for name, report in reports.items()}
        print(json.dumps({"tasks": written} if loaded.spec.stream else written[""], indent=1))
    if bad := sum(len(report.problems) for report in reports.values()):
        raise BadDataError(
            f"{bad} unusable images; mend them, or leave them out with "
            + ("on_bad_image: skip" if loaded.spec.stream else "dataset.on_bad_image: skip"),
            key="stream" if loaded.spec.stream else "dataset",
        )


def _find(spec: PipelineSpec, store: Store) -> tuple[tuple[datasets.Source, ...], bool]:
    """The data sets, and whether images that they leave out are to be left out.

    Images that end a run are no reason to say nothing of all others.
    """
    try:
        return datasets.find(spec, store.memo), True
    except BadDataError:
        try:
            return datasets.find(_skipping(spec), store.memo), False
        except BadDataError:
            pass  # something else is wrong, and the first error says what
        raise


def _skipping(spec: PipelineSpec) -> PipelineSpec:
    """The spec, with `on_bad_image: skip` wherever it can stand."""
    change = {"on_bad_image": "skip"}
    if spec.dataset is not None:
        fits = hasattr(spec.dataset, "on_bad_image")
        return spec.model_copy(
            update={"dataset": spec.dataset.model_copy(update=change)} if fits else {}
        )
    tasks = tuple(task.model_copy(update=change) for task in spec.stream or ())
    return spec.model_copy(update={"stream": tasks})
