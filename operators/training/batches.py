"""Which rows stand in which batch, for every worker."""

import torch

from graftwork.methods.contracts.trained import Recipe
from graftwork.operators.seeds import derive


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


def chunks(rows: list[int], size: int) -> list[list[int]]:
    """Rows in parts of `size`, the last one shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
