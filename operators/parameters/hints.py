"""Hints of stages: what is needed to compute a result and does not change it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graftwork.operators.parameters.as_json import INLINE, OPTIONAL

Places = Mapping[str, Any]
"""Where images are, as `operators.data.sources.read` takes it."""


@dataclass(frozen=True, kw_only=True)
class Numbering:
    """Numbers by arrival of what an index numbers in its own way; -1 for what has none.

    Args:
        classes: by class number of the index.
        domains: by domain number of the index.
    """

    classes: tuple[int, ...]
    domains: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PartHints:
    """Some rows of an index.

    Args:
        source: which of the `dataset` stages that are read.
        rows: as `operators.formats.packed.pack` writes them.
    """

    source: int
    rows: str


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Rows that a stage reads; its key holds the digests of what they must be.

    Args:
        sources: of each `dataset` stage that is read.
        tasks: parts of each task.
        shards: of each stage of features that is read, the source and the first row.
    """

    sources: tuple[Numbering, ...] = ()
    tasks: tuple[tuple[PartHints, ...], ...] = ()
    shards: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class CpuHints:
    """Hints of a stage that reads what other stages stored.

    Args:
        cpus: threads of the arithmetic.
        selection: rows that it reads.
    """

    cpus: float
    selection: Selection = Selection()


@dataclass(frozen=True, kw_only=True)
class EvaluateHints:
    """Hints of `evaluate`.

    Args:
        cpus: threads of the arithmetic.
        beginnings: of a fitted method, keys of the evaluations after fewer tasks, the longest
            first: what one of them predicted is not predicted again.
        selection: rows that it reads.
    """

    cpus: float
    beginnings: tuple[str, ...] = ()
    selection: Selection = Selection()


@dataclass(frozen=True, kw_only=True)
class FitHints:
    """Hints of `fit`.

    Args:
        cpus: threads of the arithmetic.
        num_classes: K, of the data set.
        ids: the data set's own numbers of the classes by arrival; sums are kept under these.
        beginnings: keys of the fits of fewer tasks, the longest first: what one of them found is
            not computed again.
        grows: whether the sums are kept for a longer stream.
        selection: rows that it reads.
    """

    cpus: float
    num_classes: int
    ids: tuple[int, ...]
    beginnings: tuple[str, ...] = ()
    grows: bool = False
    selection: Selection = Selection()


@dataclass(frozen=True, kw_only=True)
class NetworkPlace:
    """Place of a backbone, and how it is built.

    Args:
        model: its full name.
        weights: place of its weights, `builtin` or `random`.
        pooling: what becomes its feature.
        image_size: pixels that position embeddings are resampled for; None for the model's own.
        beside: of a second network that is given the same images; None for none.
    """

    model: str
    weights: str
    pooling: str
    image_size: int | None
    beside: "NetworkPlace | None" = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class NetworkHints:
    """Hints of a stage with a backbone that sees no image.

    Args:
        network: where the backbone is.
        cpus: threads of the arithmetic.
    """

    network: NetworkPlace = field(metadata=INLINE)
    cpus: float


@dataclass(frozen=True, kw_only=True)
class ImageHints:
    """Hints of a stage that sends images through a backbone.

    Args:
        network: where the backbone is.
        cpus: threads of the arithmetic and of decoding.
        max_pixels: largest width times height of an image; None for no limit.
        images: how many go through the network, for people.
        places: where the images are.
        selection: rows that it reads.
    """

    network: NetworkPlace = field(metadata=INLINE)
    cpus: float
    max_pixels: int | None
    images: int
    places: Places
    selection: Selection = Selection()


@dataclass(frozen=True, kw_only=True)
class TrainHints:
    """Hints of a training, and of `score`, which sees the same images.

    Args:
        reading: network and images.
        tasks: how many there are, for people.
        checkpoint_minutes: between two snapshots; 0 for one after every step.
        reference: where the images are that belong to no task, for a method that asks for them.
    """

    reading: ImageHints = field(metadata=INLINE)
    tasks: int
    checkpoint_minutes: float
    reference: Places | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class ShardHints:
    """Hints of `features`.

    Args:
        reading: network and images.
        batch_size: images per forward pass; None for the device's own.
    """

    reading: ImageHints = field(metadata=INLINE)
    batch_size: int | None


@dataclass(frozen=True, kw_only=True)
class SourceHints:
    """Hints of `dataset`.

    Args:
        source: the data set's description, as `operators.data.dataset.index` takes it.
        split: "train" or "test".
        record: name of the record that it is taken from, in place of the source; None for none.
    """

    source: Mapping[str, Any]
    split: str
    record: str | None = field(default=None, metadata=OPTIONAL)
