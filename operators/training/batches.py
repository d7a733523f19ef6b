"""Batches of rows, the same for every number of workers, and their pixels prepared ahead."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor

from graftwork.methods.contracts.trained import Recipe
from graftwork.operators.images.prefetch import prefetch
from graftwork.operators.parameters.training import SinglePass
from graftwork.operators.seeds import derive
from graftwork.operators.training.settings import Images, Settings


def row_batches(count: int, recipe: Recipe, seed: int, task: int, epoch: int) -> list[list[int]]:
    """Rows of every step of an epoch, for all workers together."""
    if recipe.shuffle:
        generator = torch.Generator().manual_seed(derive(seed, "shuffle", task, epoch))
        rows = torch.randperm(count, generator=generator).tolist()
    else:
        rows = list(range(count))
    batches = chunks(rows, recipe.batch_size)
    # A task smaller than one batch is trained on all the same.
    if recipe.drop_last and len(batches) > 1 and len(batches[-1]) < recipe.batch_size:
        batches.pop()
    return batches


def once(recipe: Recipe, single: SinglePass) -> Recipe:
    """The recipe with a single pass over all images."""
    return replace(
        recipe, epochs=1, batch_size=single.batch_size, times=single.times, drop_last=False
    )


def chunks(rows: list[int], size: int) -> list[list[int]]:
    """Rows in parts of `size`, the last one shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def prepared(
    images: Images,
    batches: Iterable[list[int]],
    settings: Settings,
    epochs: Iterable[int] = repeat(0),
    augmentation: str = "none",
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of rows with their pixels, prepared ahead by threads, in order.

    Args:
        epochs: number of the augmentation that each batch is given.
    """

    def prepare(batch: tuple[list[int], int]) -> tuple[list[int], Tensor]:
        rows, epoch = batch
        return rows, images.batch(rows, epoch, augmentation)

    return prefetch(prepare, zip(batches, epochs, strict=False), workers=settings.decoders)
