"""The Python interface: what the command does, as functions of typed values.

`import graftwork` offers these functions. None of them prints, unless `progress` is asked for.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from graftwork.operators.store import Store
from graftwork.pipelines.commands import predict as predicting
from graftwork.pipelines.commands.options import DEFAULT_STORE, place, recorded
from graftwork.pipelines.explaining.explain import Explanation, explain
from graftwork.pipelines.planning import sources
from graftwork.pipelines.planning.plan import make_plan
from graftwork.pipelines.reporting import leaderboard
from graftwork.pipelines.reporting.document import Document
from graftwork.pipelines.reporting.leaderboard import Row
from graftwork.pipelines.running.progress import Display
from graftwork.pipelines.running.run import run_pipeline
from graftwork.pipelines.spec.loading import Loaded, load_resolved

if TYPE_CHECKING:
    from graftwork.operators.serving.inference import Prediction


def load_spec(source: str | os.PathLike[str], *overrides: str) -> Loaded:
    """Reads and checks a spec.

    Args:
        source: a YAML file, an fsspec URL, or the name of a preset.
        overrides: `dotted.key=value` each, as after `--set`.

    Returns:
        The checked spec (`.spec`), and YAML with all defaults written out (`.text`).

    Raises:
        ConfigError: everything that is wrong, a line each with the place where it was written.

    Example:
        >>> spec = graftwork.load_spec("quickstart", "methods=[slda]", "scenario.orders=[1993]")
        >>> spec.spec.scenario.increment
        2
    """
    return load_resolved(os.fspath(source), overrides)


def plan(
    spec: Loaded | str | os.PathLike[str], *, store: str | os.PathLike[str] = DEFAULT_STORE
) -> Explanation:
    """Says what a run would compute, and why it is not in the store.

    The data is indexed and the backbone looked at, once per store; nothing is computed.

    Args:
        spec: what `load_spec` returned, or takes.
        store: a folder or an fsspec URL.

    Raises:
        GraftworkError: the spec, its data or its backbone cannot be used.

    Example:
        >>> graftwork.plan(spec, store=store).counts["miss"] > 0
        True
    """
    opened = Store(place(os.fspath(store), None).store).for_looking()
    made = make_plan(_loaded(spec), opened.memo)
    sources.seal(made.sources, made.stages, opened.memo)
    return explain(made, opened)


def run(
    spec: Loaded | str | os.PathLike[str],
    *,
    store: str | os.PathLike[str] = DEFAULT_STORE,
    tracking: str | None = None,
    address: str | None = None,
    insecure: bool = False,
    progress: bool = False,
) -> Document:
    """Runs a pipeline to its end: computes what the store lacks, and records everything.

    A run that was interrupted continues when it is called again.

    Args:
        spec: what `load_spec` returned, or takes.
        store: a folder or an fsspec URL.
        tracking: MLflow's tracking URI; None for a database in the folder of the store.
        address: a Ray cluster to join; None starts a local one, which ends with the run.
        insecure: join a cluster on another machine although it asks for no token.
        progress: show it on stderr.

    Raises:
        GraftworkError: its class says what went wrong; what was computed is kept.

    Example:
        >>> found = graftwork.run(spec, store=store)
        >>> [result.method for result in found.results]
        ['slda']
        >>> found.results[0].metrics["a_last"] > 80
        True
    """
    where = place(os.fspath(store), tracking, address, insecure)
    return run_pipeline(_loaded(spec), where, Display(quiet=not progress))


def results(
    pipeline: str | None = None,
    *,
    store: str | os.PathLike[str] = DEFAULT_STORE,
    tracking: str | None = None,
) -> list[Row]:
    """Reads the leaderboard from MLflow: mean and deviation over class orders and seeds.

    Args:
        pipeline: only this one.
        store: of earlier runs; not looked at if `tracking` is given.
        tracking: MLflow's tracking URI; None for the database in the folder of the store.

    Raises:
        ConfigError: MLflow cannot be reached, or has no such pipeline.
        StorageError: there is no store.

    Example:
        >>> [row.name for row in graftwork.results("quickstart", store=store)]
        ['slda']
    """
    where = recorded(os.fspath(store), tracking)
    return leaderboard.leaderboard(where.tracking_uri(), pipeline)


def predict(
    run: str,
    images: Sequence[str],
    *,
    top: int = 1,
    image_column: str = "image",
    on_bad_image: Literal["error", "skip"] = "error",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    weights: str | None = None,
    store: str | os.PathLike[str] = DEFAULT_STORE,
    tracking: str | None = None,
    address: str | None = None,
    insecure: bool = False,
) -> "list[Prediction]":
    """Asks the model of a finished run what is on images.

    Args:
        run: MLflow's id of a method's run, or `PIPELINE/METHOD` for its newest one.
        images: image files, folders at any depth, globs, Parquet files, or URLs of them.
        top: classes named per image.
        image_column: of the images in Parquet files.
        on_bad_image: what to do about an image that cannot be used.
        device: where the model runs.
        weights: place of the backbone's weights, if they are not where they were.
        store, tracking: as for `results`.
        address, insecure: as for `run`; from 512 images on the work is done on Ray.

    Returns:
        One for every image that could be used, in the order given: `.name`, and in `.best` the
        (class, logit) pairs, the likeliest first. A logit is the method's own score, no
        probability.

    Raises:
        BadDataError: no images, or one that cannot be used.
        ConfigError: no such run, or it has no model.

    Example:
        >>> [prediction] = graftwork.predict("quickstart/slda", ["five.png"], store=store)
        >>> prediction.best[0][0]
        'five'
    """
    where = recorded(os.fspath(store), tracking, address, insecure)
    request = predicting.Request(
        run=run,
        words=images,
        column=image_column,
        top=top,
        on_bad_image=on_bad_image,
        device=device,
        weights=weights,
    )
    found: list[Prediction] = []
    predicting.predict(request, where, Display(quiet=True), found.append)
    return found


def _loaded(spec: Loaded | str | os.PathLike[str]) -> Loaded:
    return spec if isinstance(spec, Loaded) else load_spec(spec)
