"""What a method is: the contracts that the operators rely on.

Shapes: N rows, D feature width, M projection width, C classes seen so far, K all classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

BLOCK = 64
"""Rows that matrix products for logits are padded to a multiple of."""

State = dict[str, Tensor]
"""Named tensors: statistics, or what a fitted method predicts with. Saved as safetensors."""


Growth = Literal["constant", "classes", "tasks", "rows"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a reader must know before comparing a method with another; data, not prose.

    Args:
        title: name as the paper writes it.
        paper: link to the paper.
        summary: one sentence.
        version: raised when results change; part of every key.
        exemplars: stored images of earlier tasks, by the method's defaults.
        uses_seed: draws random numbers; otherwise all seeds share one run.
        separable: a class's scores depend on that class's statistics alone, so that one fit
            on all classes serves every class order.
        upper_bound: sees all seen tasks' rows at once; not a continual learner.
        memory: what is kept between tasks and how it grows, for example `C * D floats`.
        growth: what makes the kept grow, beside the rows of a classifier (at most 2 (D + 1) numbers
            per class) and counters of fewer than D numbers: `constant` (nothing does: from the
            second task on, a stream of more tasks needs no more), `classes` (something more for
            every class, such as covariances), `tasks` (something for every task, even if it brings
            no new class) or `rows` (every training image or its feature). Of several the last one.
        query: reads the frozen backbone's feature of an image, beside the image.
        independent: tasks train side by side, each on its own, and are joined afterwards
            (`Independent`, a special case of `trained`).
        shared: of an independent method, names of stored tensors that the first task trains and
            every later one starts from; the later ones then wait for the first.
        images: reads images; otherwise their frozen features (`query`) are all that it is given.
        network: `vit` for a timm ViT, `clip` for a CLIP with both towers; what is fitted on
            features of a `vit` takes those of a CLIP's image tower as well.
        reference: reads images and texts that belong to no task, from the spec's `reference`.
        contract: `fitted` (`Fitted`: a sum over features, then a solve), `trained` (`Trained`:
            learns on images, task after task), `adapted` (`Adapted`: trains on the first task,
            then is fitted on the features of the adapted backbone) or `fused` (`Fused`: two trained
            branches on two networks, and a blend of their scores).
    """

    title: str
    paper: str
    summary: str
    memory: str
    version: int = 1
    exemplars: int = 0
    task_id_at_test: bool = False
    batch_information_at_test: bool = False
    uses_seed: bool = False
    separable: bool = False
    upper_bound: bool = False
    growth: Growth = "constant"
    query: bool = False
    independent: bool = False
    shared: tuple[str, ...] = ()
    images: bool = True
    network: Literal["vit", "clip"] = "vit"
    reference: bool = False
    contract: Literal["fitted", "trained", "adapted", "fused"] = "fitted"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Features of some samples of one task.

    Args:
        features: [N, D], any float dtype.
        labels: [N] int64, class ids in the dataset's own numbering, 0 .. K-1.
        samples: [N] uint64-like ids held as int64, derived from the images' digests: stable
            under any order, split or sharding (for hash-based validation splits).
        num_classes: K.
        texts: [T, K, E] features of every class's name in T templates, from CLIP's text tower;
            only for methods whose card asks for CLIP.
    """

    features: Tensor
    labels: Tensor
    samples: Tensor
    num_classes: int
    texts: Tensor | None = None


class Fitted(Protocol):
    """A method fitted in closed form: a commutative sum over rows, then a solve.

    `statistics` and `add` make a commutative monoid: any sharding, order or task split of the rows
    gives the same sum up to rounding. The implementing class is a frozen keyword-only dataclass
    whose fields are the hyper-parameters with the paper's defaults. All sums are float64.
    """

    card: ClassVar[Card]

    def statistics(self, rows: Rows, seed: int) -> State:
        """Sums over the rows."""
        ...

    def add(self, a: State, b: State) -> State:
        """The statistics of both sets of rows."""
        ...

    def solve(self, total: State, task: State, classes: Sequence[int], seed: int) -> State:
        """What `logits` needs, after a task.

        Args:
            total: statistics of all tasks seen so far.
            task: statistics of the newest task alone.
            classes: ids of the classes seen so far, in the order learned; the columns of `logits`.
            seed: the run's seed, the same as given to `statistics`.

        Returns:
            Tensors as they are stored and served (float32 unless the method needs more);
            a separable method gives rows per class, first axis = `classes`.
        """
        ...

    def logits(self, state: State, features: Tensor, seed: int) -> Tensor:
        """Scores [N, C] over the classes seen, in the order of `classes`; larger is likelier.

        Decides per row: no row's scores depend on another row.
        """
        ...

    def report(self, state: State) -> dict[str, Any]:
        """Facts of a solve worth a line in MLflow, such as the ridge strength that was chosen."""
        ...


def sum_states(a: State, b: State) -> State:
    """Elementwise sum of two statistics with the same names and shapes.

    Raises:
        ValueError: names or shapes differ.
    """
    if a.keys() != b.keys():
        raise ValueError(f"statistics differ in names: {sorted(a.keys() ^ b.keys())}")
    for name in a:
        if a[name].shape != b[name].shape:
            shapes = f"{list(a[name].shape)}, {list(b[name].shape)}"
            raise ValueError(f"statistics differ in shape of {name}: {shapes}")
    return {name: a[name] + b[name] for name in a}


def class_sums(rows: Rows) -> tuple[Tensor, Tensor]:
    """Counts [K] int64 and feature sums [K, D] float64 per class."""
    features = rows.features.double()
    counts = torch.bincount(rows.labels, minlength=rows.num_classes)
    sums = features.new_zeros(rows.num_classes, features.shape[1])
    return counts, sums.index_add_(0, rows.labels, features)


def columns(count: Tensor, classes: Sequence[int]) -> Tensor:
    """The classes as an index tensor [C] int64, on the device of `count` [K].

    Raises:
        ValueError: a class without a row, which would get meaningless scores.
    """
    index = torch.tensor(list(classes), dtype=torch.int64, device=count.device)
    missing = index[count[index] == 0].tolist()
    if missing:
        raise ValueError(f"classes: must have at least one row each, got none of {missing}")
    return index


def by_row(score: Callable[[Tensor], Tensor], features: Tensor, rows: int = 4096) -> Tensor:
    """Scores [N, C] of features [N, D], in chunks of bounded memory and independent of the batch.

    BLAS picks other kernels for a few rows than for many, so that a row alone differs in its last
    bits from the same row in a batch. Zero rows fill each chunk up to a multiple of `BLOCK`, which
    made all results bitwise equal wherever it was tried.

    Args:
        score: from rows [n, D] to scores [n, C], each row on its own.
        features: [N, D].
        rows: most rows of a chunk, a multiple of `BLOCK`.
    """
    assert rows % BLOCK == 0, rows
    scores = []
    for chunk in features.split(rows):
        padding = chunk.new_zeros(-len(chunk) % BLOCK, chunk.shape[1])
        scores.append(score(torch.cat([chunk, padding]))[: len(chunk)])
    return torch.cat(scores)
