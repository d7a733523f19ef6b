"""Statistics of training images that merges weigh models with: sums, one shard per stage.

Diagonal Fisher information is a sum of squared gradients per image, Gram matrices are sums of
x x^T over the inputs of linear layers, both of all weights that training has set, those among them
that are trained no more. Sums and the number of images are stored, never means: those of several
shards are added before anything is divided.

Shapes: C classes seen, N rows of a shard.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.overrides import TorchFunctionMode

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.roles import roles
from graftwork.methods.contracts.trained import Learner
from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.backbones import loading
from graftwork.operators.data.holdout import sampled
from graftwork.operators.formats import selection, states
from graftwork.operators.merging.readers import Mean
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.combining import StatisticsParameters
from graftwork.operators.parameters.hints import ImageHints
from graftwork.operators.seeds import derive
from graftwork.operators.stages import merge
from graftwork.operators.store import Store
from graftwork.operators.training import loop, opening
from graftwork.operators.training.settings import Images, Settings


def run(work: Assignment, store: Store) -> Result:
    """The operator `statistics`: sums over a shard of a task's training images.

    Raises:
        BadDataError: images are not those that were indexed, or cannot be decoded.
        DamagedStage: an input is damaged.
    """
    parameters = from_json(StatisticsParameters, work.parameters)
    hints, model_of = from_json(ImageHints, work.hints), parameters.learner
    torch.set_num_threads(max(1, int(hints.cpus)))
    [model] = work.inputs("model")
    [task] = selection.of(work, store, hints.selection, [parameters.task])
    chosen = sampled(task.index.digests, np.arange(len(task)), parameters.limit)
    rows = task.at(chosen[slice(*parameters.shard)])
    settings = opening.settings(model_of.seed, parameters.numerics, hints.cpus)
    state = states.load_state(store, *model)
    learner = opening.learner(model_of, hints.network, state, settings)
    query = opening.query_of(work, store, hints.selection, rows, parameters.query)
    images = opening.open_rows(model_of, hints, rows, query)
    learner.eval()
    weights = learned_weights(learner, state)
    seeds = [derive(model_of.seed, "label", int(sample)) for sample in rows.index.sample_ids()]
    kind = parameters.statistics
    if kind.kind == "fisher":
        assert kind.labels is not None, "the merge says whose labels"
        sums = squared_gradients(learner, weights, images, settings, kind.labels, seeds)
    else:
        sums = gram_matrices(learner, weights, images, settings)
    sums[Mean.COUNT] = torch.tensor(len(rows))
    return Result(
        files={merge.STATISTICS: save_tensors(sums)}, facts={"images_forwarded": len(rows)}
    )


def learned_weights(learner: Learner, state: State) -> State:
    """Tensors of a learner by name that hold what training has set, parameters and buffers.

    Args:
        state: as stored, which leaves the untouched backbone out.
    """
    own, known = learner.state_dict(keep_vars=True), roles(learner)
    return {name: own[name] for name in state if known[name] == "weight"}


def squared_gradients(
    learner: Learner,
    weights: State,
    images: Images,
    settings: Settings,
    labels: str,
    seeds: list[int],
) -> State:
    """Sum over images of the squared gradient of log p of a label, by the parameter's name.

    One image at a time: the gradient of a batch's mean says nothing of the images' own.

    Args:
        weights: the learner's own tensors that are measured.
        labels: "model_sample", "model_expectation", "ground_truth".
        seeds: of the label that is drawn for each image.
    """
    parameters = [tensor.requires_grad_() for tensor in weights.values()]
    sums = [torch.zeros_like(p) for p in parameters]
    targets = images.targets.tolist()
    scores = _scores(learner, images, settings)
    for [own], target, seed in zip(scores, targets, seeds, strict=True):
        logs = F.log_softmax(own.float(), dim=0)
        for label, weight in _labels(logs, labels, target, seed):
            gradients = torch.autograd.grad(
                logs[label], parameters, retain_graph=True, allow_unused=True
            )
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient, value=weight)
    return {name: total.cpu() for name, total in zip(weights, sums, strict=True)}


def _labels(logs: Tensor, labels: str, target: int, seed: int) -> Iterator[tuple[int, float]]:
    """Labels of an image, with their weights."""
    shares = logs.detach().exp().cpu()
    if labels == "ground_truth":
        yield target, 1.0
    elif labels == "model_sample":
        generator = torch.Generator().manual_seed(seed)
        yield int(torch.multinomial(shares, 1, generator=generator)), 1.0
    else:
        yield from enumerate(shares.tolist())


@torch.no_grad()
def gram_matrices(learner: Learner, weights: State, images: Images, settings: Settings) -> State:
    """Sum over images of x x^T [in, in] over a layer's inputs x, by the name of its weight.

    Args:
        weights: the learner's own tensors that are measured, where a linear layer has them.
    """
    watch = _Watch({id(tensor): name for name, tensor in weights.items()})
    with watch:
        for _ in _scores(learner, images, settings):
            pass  # what counts goes into the layers
    return {name: total.float().cpu() for name, total in watch.sums.items()}


class _Watch(TorchFunctionMode):
    """Adds up what goes into linear layers, be they modules or not.

    Args:
        names: of the layers' weights, by identity.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names, self.sums = names, State()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.linear:  # most of what a network calls
            return func(*args, **kwargs or {})
        given = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
        if name := self._names.get(id(given["weight"])):
            rows = given["input"].detach().flatten(0, -2).float()
            # The products are no part of the forward pass: autocast would round them.
            with torch.autocast(rows.device.type, enabled=False):
                total = self.sums.get(name)
                self.sums[name] = rows.T @ rows if total is None else total.addmm_(rows.T, rows)
        return func(*args, **kwargs or {})


def _scores(learner: Learner, images: Images, settings: Settings) -> Iterator[Tensor]:
    """Scores [1, C] of one image after the other, in the precision of training and prediction."""
    single = [[row] for row in range(len(images.targets))]
    for rows, pixels in loop.prepared(images, single, settings):
        inputs = images.normalise(pixels.to(settings.device))
        with loading.autocast(settings.device, settings.precision):
            query = loop.query_of(learner, images.query, rows, inputs)
            scores = learner.logits(inputs, query)
        yield scores
