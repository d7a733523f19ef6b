"""Features of a shard of images on a frozen backbone.

Decoding threads run ahead of the network. Every forward pass has the same batch size: the last
batch is padded, so that a feature depends on its image alone and never on its neighbours.

Shapes: B batch, D width.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.backbones import loading
from graftwork.operators.data import sources
from graftwork.operators.errors import BadDataError, Diverged
from graftwork.operators.formats.features import encode_shard
from graftwork.operators.formats.states import load_state
from graftwork.operators.images import codec
from graftwork.operators.images.pixels import normalise, prepare
from graftwork.operators.images.prefetch import batched, prefetch
from graftwork.operators.images.preprocessing import Preprocessing
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.features import FeatureKind, ShardParameters
from graftwork.operators.parameters.hints import ImageHints, NetworkPlace, ShardHints
from graftwork.operators.store import Store

BATCH_SIZES = {"cpu": 8, "cuda": 256}
"""Micro-batches: on CPUs small ones stay in the cache, GPUs want large ones."""


@torch.inference_mode()
def extract(
    images: Iterable[bytes],
    embed: Callable[[Tensor], Tensor],
    preprocessing: Preprocessing,
    *,
    device: str = "cpu",
    precision: str = "fp32",
    batch_size: int = 16,
    workers: int = 1,
    max_pixels: int | None = None,
) -> Tensor:
    """Features [N, D] float32 of encoded images, in their order.

    Args:
        images: encoded images (JPEG, PNG, WEBP).
        embed: features [B, D] of normalised images [B, 3, h, w], for example `models.embedder`.
        device: that of `embed`'s network.
        precision: fp32, or bf16 / fp16 by autocast.
        batch_size: images per forward pass.
        workers: decoding threads; two batches per thread, and one in use, are in memory.

    Raises:
        BadDataError: an image cannot be decoded.
        Diverged: a feature is not finite.
    """
    outputs = []
    decode = partial(prepare, preprocessing=preprocessing, max_pixels=max_pixels)
    for pixels in prefetch(decode, batched(images, batch_size), workers=workers):
        batch = pixels.to(device, non_blocking=True)
        count = len(batch)
        if count < batch_size:
            batch = torch.cat([batch, batch.new_zeros(batch_size - count, *batch.shape[1:])])
        inputs = normalise(batch, preprocessing)
        with loading.autocast(device, precision):
            features = embed(inputs)
        outputs.append(features[:count].float())
    result = torch.cat(outputs).cpu()
    if not bool(torch.isfinite(result).all()):
        row = int((~torch.isfinite(result)).any(dim=1).nonzero()[0])
        raise Diverged(f"feature of image {row} of the shard is NaN or infinite")
    return result


def run(work: Assignment, store: Store) -> Result:
    """The operator `features`: one shard, read, extracted and encoded.

    Raises:
        BadDataError: the images are not those that were indexed, or cannot be decoded.
        IncompatibleError: the backbone's weights changed since the plan.
        Diverged: a feature is not finite.
    """
    parameters = from_json(ShardParameters, work.parameters)
    hints = from_json(ShardHints, work.hints)
    reading, device = hints.reading, parameters.kind.numerics.device.split(":")[0]
    torch.set_num_threads(max(1, int(reading.cpus)))
    kind = parameters.kind
    embed = _embed(work, store, kind, reading.network, device)
    started = time.perf_counter()
    digests = hashlib.sha256()
    try:
        features = extract(
            _hashed(sources.read(reading.places), digests),
            embed,
            kind.preprocessing,
            device=device,
            precision=kind.numerics.precision,
            batch_size=hints.batch_size or BATCH_SIZES[device],
            workers=max(1, int(reading.cpus)),
            max_pixels=reading.max_pixels,
        )
    except BadDataError as error:
        raise _named(error, reading) from error
    if digests.hexdigest() != parameters.digest:
        raise BadDataError(f"{work.label}: images changed since they were indexed; run again")
    seconds = time.perf_counter() - started
    return Result(
        files={"features.parquet": encode_shard(_cast(features, kind.dtype))},
        facts={"images_forwarded": len(features), "seconds_extracting": round(seconds, 4)}
        | _norms(features),
    )


def _embed(
    work: Assignment, store: Store, kind: FeatureKind, place: NetworkPlace, device: str
) -> Callable[[Tensor], Tensor]:
    """The frozen backbone, or one that a first session adapted."""
    if grafts := work.inputs("graft"):
        from graftwork.operators.training import opening  # the frozen half does without

        return opening.adapted(kind, place, load_state(store, *grafts[0]))
    pooling, fingerprint = kind.pooling, kind.network.fingerprint
    return loading.embedder(
        loading.load_on_device(
            place.model, place.weights, pooling, fingerprint, device, place.image_size
        ),
        pooling,
    )


def _named(error: BadDataError, reading: ImageHints) -> BadDataError:
    """The error with the place of the image, which is looked for only now."""
    for number, data in enumerate(sources.read(reading.places)):
        try:
            codec.rgb(data, reading.max_pixels)
        except BadDataError as reason:
            place = sources.place_name(reading.places, number)
            return BadDataError(
                f"{place}: {reason}; mend it, or leave it out with dataset.on_bad_image: skip"
            )
    return error


def _hashed(images: Iterable[bytes], digests: "hashlib._Hash") -> Iterator[bytes]:
    """Passes images on, and their digests into the digest of the whole shard."""
    for image in images:
        digests.update(codec.digest(image))
        yield image


def _cast(features: Tensor, dtype: str) -> np.ndarray[Any, Any]:
    array = features.numpy().astype(dtype)
    if not np.isfinite(array).all():
        raise Diverged(f"a feature exceeds the range of {dtype}; set features.dtype: float32")
    return array


def _norms(features: Tensor) -> dict[str, float]:
    norms = features.norm(dim=1)
    return {"norm_min": round(float(norms.min()), 6), "norm_max": round(float(norms.max()), 6)}
