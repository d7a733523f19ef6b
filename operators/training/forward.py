"""Passes over a task's images without augmentation."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from graftwork.methods.contracts.trained import Learner, Recipe
from graftwork.methods.networks import network as networks
from graftwork.methods.networks.network import Network
from graftwork.operators.backbones.loading import autocast
from graftwork.operators.training.batches import chunks, prepared, row_batches
from graftwork.operators.training.settings import Images, Log, Settings

PLAIN_BATCH = {"cpu": 8, "cuda": 128}
"""Images per forward pass without gradients."""


@torch.no_grad()
def frozen_features(network: Network, inputs: Tensor) -> Tensor:
    """Query [B, D] float32: the feature of the backbone without anything added."""
    return networks.feature(network, inputs).float()


def query_of(
    learner: Learner[Any], known: Tensor | None, rows: Sequence[int], inputs: Tensor
) -> Tensor | None:
    """Query [B, D] of a batch on its device; None for a learner that needs none.

    Args:
        known: frozen features [N, D] of all images, as they are; None computes those of the batch.
        rows: B rows of the batch.
        inputs: normalised images [B, 3, h, w].
    """
    if not learner.needs_query:
        return None
    if known is None:
        return frozen_features(learner.network, inputs)
    return known[rows].to(inputs.device)


class PlainImages:
    """A task's images as `Learner.finish` sees them; see `methods.contracts.trained.TaskImages`."""

    def __init__(
        self, learner: Learner, images: Images, settings: Settings, log: Log, recipe: Recipe
    ) -> None:
        self.targets, self.exemplars = images.targets, images.exemplars
        self._learner, self._recipe, self._images = learner, recipe, images
        self._settings, self._log = settings, log

    def map(
        self,
        function: Callable[[Tensor, Tensor | None], Tensor],
        batches: list[list[int]] | None = None,
    ) -> Tensor:
        """Rows [N, ...] of `function(images, query)`, on the CPU."""
        return forward_plain(
            function, self._learner, self._images, self._settings, self._log, batches
        )

    @torch.enable_grad()
    def each(
        self,
        function: Callable[[Tensor, Tensor, Tensor | None], None],
        *,
        batch_size: int,
        augmented: bool = False,
    ) -> None:
        """Calls `function(images, targets, query)` on batches, with gradients."""
        settings, images, learner = self._settings, self._images, self._learner
        device = settings.device
        recipe = replace(self._recipe, batch_size=batch_size, shuffle=True, drop_last=False)
        augmentation = recipe.augmentation if augmented else "none"
        # The epoch after the last: an order and an augmentation that no step has seen.
        epoch = recipe.epochs * recipe.times
        batches = row_batches(len(images.targets), recipe, settings.seed, learner.task.index, epoch)
        known = images.query if augmentation == "none" else None
        for rows, pixels in prepared(images, batches, settings, repeat(epoch), augmentation):
            inputs = images.normalise(pixels.to(device, non_blocking=True))
            with autocast(device, settings.precision):
                query = query_of(learner, known, rows, inputs)
                function(inputs, images.targets[rows].to(device), query)
        passes = 1 + (learner.needs_query and known is None)
        self._log.images_forwarded += passes * len(images.targets)


@torch.no_grad()
def forward_plain(
    function: Callable[[Tensor, Tensor | None], Tensor],
    learner: Learner,
    images: Images,
    settings: Settings,
    log: Log,
    batches: list[list[int]] | None = None,
) -> Tensor:
    """Rows [N, ...] float32 of `function(images, query)` on images as they are, on the CPU.

    Args:
        function: for example `learner.logits`.
        log: counts the images.
        batches: rows of every batch, each row in one, for what depends on the batch; None takes
            batches of one size, the last one filled up, so that no row depends on its neighbours.
    """
    device = settings.device
    size = 0
    if batches is None:
        size = PLAIN_BATCH[device]
        batches = chunks(list(range(len(images.targets))), size)
    known, outputs = images.query, []
    for rows, pixels in prepared(images, batches, settings):
        filled = [*rows, *[rows[0]] * (size - len(rows))]
        pixels = torch.cat([pixels, pixels[:1].expand(len(filled) - len(rows), *pixels.shape[1:])])
        inputs = images.normalise(pixels.to(device, non_blocking=True))
        with autocast(device, settings.precision):
            query = query_of(learner, known, filled, inputs)
            outputs.append(function(inputs, query)[: len(rows)].float().cpu())
    log.images_forwarded += len(images.targets) * (1 + (learner.needs_query and known is None))
    found = torch.cat(outputs)
    walk = torch.tensor([row for rows in batches for row in rows], dtype=torch.int64)
    return torch.empty_like(found).index_copy_(0, walk, found)
