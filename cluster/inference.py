"""Predictions of many images as Ray tasks, a shard each, in order and with bounded memory."""

import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from graftwork.cluster.sessions.answers import answer
from graftwork.cluster.sessions.session import connect
from graftwork.operators.errors import GraftworkError, StageFailed
from graftwork.operators.serving import inference
from graftwork.operators.serving.inference import Prediction
from graftwork.operators.serving.inputs import Shard

AHEAD = 2
"""Shards per CPU that are handed to Ray at once."""


def predict(
    folder: Path,
    shards: Iterable[Shard],
    count: int,
    *,
    address: str | None,
    insecure: bool,
    device: str,
    weights: str | None,
) -> Iterator[list[Prediction]]:
    """Predictions of each shard, in order.

    On a cluster on other machines the model travels with the tasks, and so do images from this
    machine's disks; the backbone's weights must be where every worker finds them.

    Args:
        folder: the model's folder `data`.
        count: classes named per image.
        address: Ray cluster to join; None for a local Ray.
        insecure: join a cluster on another machine although it asks for no token.
        device: "cpu" or "cuda".
        weights: place of the backbone's weights, if not where the model says.

    Raises:
        ClusterLost: Ray went away.
        GraftworkError: what went wrong in a worker.
    """
    with connect(address, insecure=insecure) as session:
        import ray

        # In a list Ray hands on the reference: only a worker that lacks the files fetches them.
        model: Any = str(folder) if session.local else [ray.put(_packed(folder))]
        task = ray.remote(max_retries=3, retry_exceptions=False)(_work).options(
            num_cpus=1, num_gpus=1 if device == "cuda" else 0, name="predict"
        )
        slots = max(2, AHEAD * int(session.cpus))
        waiting: deque[Any] = deque()
        for shard in shards:
            here = list(shard.read()) if shard.local and not session.local else None
            waiting.append(task.remote(model, shard, count, device, weights, here))  # pyright: ignore[reportCallIssue]
            if len(waiting) >= slots:
                yield answer(waiting.popleft(), "predict")
        while waiting:
            yield answer(waiting.popleft(), "predict")


def _work(
    model: str | list[Any],
    shard: Shard,
    count: int,
    device: str,
    weights: str | None,
    encoded: list[bytes | str | None] | None,
) -> list[Prediction] | GraftworkError:
    """Predictions of a shard, or what went wrong: its class arrives in the driver as it is."""
    import torch

    torch.set_num_threads(1)
    try:
        folder = Path(model) if isinstance(model, str) else _unpacked(model[0])
        predictor = inference.opened(folder, device, weights)
        return inference.predict(predictor, shard, count, 1, encoded)
    except GraftworkError as error:
        return error
    except Exception as error:
        return StageFailed(f"predict: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _packed(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


_folders: dict[Any, tempfile.TemporaryDirectory[str]] = {}
"""Reference to the files of a model -> the folder with them, until the process ends."""


def _unpacked(files: Any) -> Path:
    """A folder with the files of a model, made once per process.

    Args:
        files: Ray's reference to them.
    """
    import ray

    if files not in _folders:
        folder = tempfile.TemporaryDirectory(prefix="graftwork-model-")
        packed: Any = ray.get(files)
        for name, content in packed.items():
            Path(folder.name, name).write_bytes(content)
        _folders.clear()  # the folder of another model goes
        _folders[files] = folder
    return Path(_folders[files].name)
