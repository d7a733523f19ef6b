"""Command `graftwork predict`: a run's model, images, and its predictions for them."""

import csv
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graftwork.operators.errors import BadDataError, ConfigError, StorageError, together
from graftwork.operators.files import kinds
from graftwork.operators.serving import inputs, lookup
from graftwork.operators.serving.inputs import Inputs
from graftwork.pipelines.running.progress import Display
from graftwork.pipelines.running.where import Where

if TYPE_CHECKING:
    from graftwork.operators.serving.inference import Prediction

RAY_FROM = 512
"""Number of images from which on Ray is used; fewer are done before it has started."""
LISTED = 20

Device = Literal["auto", "cpu", "cuda"]
BadImage = Literal["error", "skip"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for predictions.

    Args:
        run: MLflow's id of a method's run, or `PIPELINE/LABEL`.
        words: image files, folders, globs, Parquet files, URLs.
        column: of the images in Parquet files.
        top: classes named per image.
        on_bad_image: what to do about an image that cannot be used.
        device: where the model runs.
        weights: place of the backbone's weights, if not where the model says.
    """

    run: str
    words: Sequence[str]
    column: str = "image"
    top: int = 1
    on_bad_image: BadImage = "error"
    device: Device = "auto"
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Outcome of a request.

    Args:
        run_id: MLflow's id of the run.
        name: its name.
        pipeline: its pipeline.
        task: name of the last task that its model learned; empty if nobody recorded it.
        images: that were predicted.
        skipped: place and reason of those that could not be used.
    """

    run_id: str
    name: str
    pipeline: str
    task: str
    images: int
    skipped: tuple[tuple[str, str], ...]


def predict(
    request: Request, where: Where, display: Display, take: Callable[["Prediction"], None]
) -> Answer:
    """Predicts images, in the order of the words.

    Args:
        take: gets the prediction of every usable image, one after the other; a few hundred of
            them are in memory.

    Raises:
        BadDataError: no images, or one that cannot be used.
        ConfigError: no such run, or it has no model.
        GraftworkError: the model cannot be opened, or Ray went away.
    """
    wanted = inputs.find(request.words, request.column)
    if not len(wanted):
        raise BadDataError(f"{request.words[0]}: no images found (the table has no rows)")
    uri = where.tracking_uri()
    found = lookup.find(uri, request.run)
    skipped: list[tuple[str, str]] = []
    done = 0
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="graftwork-model-"))
        model = lookup.fetch(uri, found, Path(folder))
        task = f' · up to task "{found.task}"' if found.task else ""
        display.say(f"{found.pipeline}: {found.name}{task}: {len(wanted)} images")
        if left_out := kinds.said(wanted.left_out):
            display.say(f"warning{left_out}")
        counted = stack.enter_context(display.counting("images"))
        for predictions in _predictions(request, where, wanted, model):
            bad = [(p.name, p.problem) for p in predictions if p.problem]
            if bad and request.on_bad_image == "error":
                raise together(_explain(bad))
            skipped += bad
            for prediction in predictions:
                if not prediction.problem:
                    take(prediction)
            done += len(predictions)
            counted(done, len(wanted))
    for place, problem in skipped:
        display.say(f"skipped: {place}: {problem}")
    return Answer(
        run_id=found.run_id,
        name=found.name,
        pipeline=found.pipeline,
        task=found.task,
        images=done - len(skipped),
        skipped=tuple(skipped),
    )


def _predictions(
    request: Request, where: Where, wanted: Inputs, model: Path
) -> "Iterator[list[Prediction]]":
    """Predictions of each shard: in this process, or on Ray."""
    device = _device(request.device, where.address)
    if where.address is None and len(wanted) < RAY_FROM:
        from graftwork.operators.serving import inference

        predictor = inference.opened(model, device, request.weights)
        for shard in wanted.shards():
            yield inference.predict(predictor, shard, request.top, decoders=2)
        return
    from graftwork.cluster import inference as remote

    yield from remote.predict(
        model,
        wanted.shards(),
        request.top,
        address=where.address,
        insecure=where.insecure,
        device=device,
        weights=request.weights,
    )


def _device(wanted: Device, address: str | None) -> str:
    """Device to use, with `auto` resolved; the devices of a cluster are not known."""
    if address is not None:
        return "cpu" if wanted == "auto" else wanted
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has none; use cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def _explain(bad: Sequence[tuple[str, str]]) -> list[BadDataError]:
    found = [BadDataError(problem, value=place) for place, problem in bad[:LISTED]]
    if len(bad) > LISTED:
        found.append(BadDataError(f"... and {len(bad) - LISTED} more images"))
    return [*found, BadDataError("unusable images; --on-bad-image skip leaves them out")]


@contextmanager
def writing(path: str) -> "Iterator[Callable[[Prediction], None]]":
    """A file of predictions, which appears whole or not at all: a row per image and class.

    Columns: file, row (of a Parquet file, else empty), rank (from 1), class, score.

    Raises:
        ConfigError: neither Parquet nor CSV, by its name.
        StorageError: it cannot be written.
    """
    target = Path(path)
    kinds = {".parquet": _parquet, ".csv": _csv}
    if target.suffix.lower() not in kinds:
        raise ConfigError(f"--output {path}: must end in .parquet or .csv")
    hidden = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with kinds[target.suffix.lower()](hidden) as take:
            yield take
        os.replace(hidden, target)
    except OSError as error:
        raise StorageError(f"--output {path}: {error.strerror or error}") from error
    finally:
        hidden.unlink(missing_ok=True)


def rows(prediction: "Prediction") -> Iterator[tuple[str, int | None, int, str, float]]:
    """file, row, rank, class and score of the classes named for an image."""
    file, row = prediction.place
    for rank, (label, score) in enumerate(prediction.best, start=1):
        yield file, row, rank, label, score


@contextmanager
def _csv(path: Path) -> "Iterator[Callable[[Prediction], None]]":
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "row", "rank", "class", "score"])
        yield lambda prediction: writer.writerows(rows(prediction))


@contextmanager
def _parquet(path: Path) -> "Iterator[Callable[[Prediction], None]]":
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("file", pa.string()),
            ("row", pa.int64()),
            ("rank", pa.int32()),
            ("class", pa.string()),
            ("score", pa.float32()),
        ]
    )
    waiting: list[tuple[Any, ...]] = []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:

        def flush() -> None:
            columns = zip(*waiting, strict=True) if waiting else [[] for _ in schema]
            arrays = [pa.array(list(c), f.type) for c, f in zip(columns, schema, strict=True)]
            writer.write_table(pa.table(arrays, schema=schema))
            waiting.clear()

        def take(prediction: "Prediction") -> None:
            waiting.extend(rows(prediction))
            if len(waiting) >= 65_536:
                flush()

        yield take
        if waiting:
            flush()


SHOWN = 200
"""Images of a table of predictions."""


def predictions(
    request: Request,
    where: Where,
    display: Display,
    console: Console,
    output: str | None,
    as_json: bool,
) -> None:
    """Predicts images; prints a table, a JSON document, or a line about a file with them."""
    kept: list[Prediction] = []

    def keep(prediction: "Prediction") -> None:
        # A table for people has an end; the other forms hold everything.
        if as_json or len(kept) <= SHOWN:
            kept.append(prediction)

    if output is None:
        answer = predict(request, where, display, keep)
    else:
        with writing(output) as write:
            answer = predict(request, where, display, write)
    if as_json:
        print(json.dumps(_predicted(answer, kept, output), indent=1))
    elif output is not None:
        console.print(f"{answer.images} images: {output}", highlight=False, soft_wrap=True)
    else:
        _print_predictions(answer, kept, console)


def _predicted(answer: Answer, kept: "list[Prediction]", output: str | None) -> dict[str, Any]:
    """The document that `graftwork predict --json` prints."""
    return {
        "run_id": answer.run_id,
        "run": answer.name,
        "pipeline": answer.pipeline,
        "task": answer.task,
        "images": answer.images,
        "score": "logit",
        "output": output,
        "predictions": [
            {
                "file": prediction.place[0],
                "row": prediction.place[1],
                "top": [{"class": label, "score": score} for label, score in prediction.best],
            }
            for prediction in kept
        ],
        "skipped": [{"image": place, "reason": why} for place, why in answer.skipped],
    }


def _print_predictions(answer: Answer, kept: "list[Prediction]", console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("logit", justify="right", no_wrap=True)
    for prediction in kept[:SHOWN]:
        for rank, (label, score) in enumerate(prediction.best):
            name = Text("" if rank else prediction.name)
            table.add_row(name, Text(label), f"{score:.4g}")
    console.print(table)
    if answer.images > SHOWN:
        console.print(
            f"... and {answer.images - SHOWN} more images; --output FILE.csv or --json has them all"
        )
    console.print(
        f"{answer.images} images; a logit is the method's own score: larger is likelier, "
        "no probability",
        highlight=False,
    )
