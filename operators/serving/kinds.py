"""Kinds of predictors: how the parts of a stored model score images.

A model is a folder: `model.json` describes it, `*.safetensors` hold its tensors. The description
names a predictor, which is a kind (a key of `KINDS`) and what this kind needs; file names in it
stand for states. A predictor may hold others: the branches of a fused method, the models of an
ensemble.

Shapes: B batch, D width, C columns.
"""

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from graftwork.methods.contracts.batches import neighbours
from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.trained import Learner
from graftwork.methods.networks import network as networks
from graftwork.methods.networks.network import Network
from graftwork.operators import building, ensembling
from graftwork.operators.backbones import loading, names
from graftwork.operators.ensembling.rules import RuleOf
from graftwork.operators.ensembling.scores import align
from graftwork.operators.errors import IncompatibleError
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.predictors import (
    EnsemblePart,
    FittedPart,
    FusedPart,
    GraftPart,
    TrainedPart,
)
from graftwork.operators.serving.model_files import BESIDE, MAIN
from graftwork.operators.training import loop, opening, settings

Images = Mapping[str, Tensor]
"""A batch of normalised images [B, 3, h, w], as each network takes them: `MAIN`, `BESIDE`."""

Scores = Callable[[Images], Tensor]
"""Scores [B, C] float32 of images, of ensembles float64; each row decided on its own."""

KINDS: dict[str, str] = {
    "fitted": "graftwork.operators.serving.kinds:fitted",
    "trained": "graftwork.operators.serving.kinds:trained",
    "fused": "graftwork.operators.serving.kinds:fused",
    "ensemble": "graftwork.operators.serving.kinds:ensemble",
}
"""Kind -> `module:function` of `(predictor, Model) -> Scores`, columns as in its `learned`."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model's folder, as a kind of predictor sees it.

    Args:
        folder: with `model.json` and the states.
        about: the content of `model.json`.
        device: "cpu" or "cuda".
        weights: where the weights of a network are, if not where the description says.
        network: the one of the model's networks that is meant, `MAIN` or `BESIDE`.
    """

    folder: Path
    about: Mapping[str, Any]
    device: str = "cpu"
    weights: Mapping[str, str] = field(default_factory=dict)
    network: str = MAIN
    _seen: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The last batch, and its frozen features: members of an ensemble ask for the same ones."""

    def beside(self) -> "Model":
        """The same model, as a branch on the second network sees it."""
        return replace(self, network=BESIDE)

    @property
    def _network(self) -> Mapping[str, Any]:
        """Backbone and precision of the network."""
        return self.about if self.network == MAIN else self.about[self.network]

    def backbone(self) -> nn.Module:
        """The frozen backbone, shared by all that only read its features.

        Raises:
            ConfigError: its weights are not found.
            IncompatibleError: they are not those that the model was made with.
        """
        about = self._network["backbone"]
        given = self.weights.get(self.network)
        place = given or names.place(about["model"], about["weights"])
        return loading.load_on_device(
            about["model"],
            place,
            about["pooling"],
            about["fingerprint"],
            self.device,
            about["image_size"],
        )

    def own_backbone(self) -> Network:
        """A copy of the backbone, for a learner that attaches to it or changes it."""
        return networks.check(copy.deepcopy(self.backbone()))

    def state(self, name: str) -> State:
        """The tensors of a file, in memory of their own.

        A mapped file puts them at any address, and BLAS sums in another order where one is not
        aligned: scores would differ in their last bits from those of the pipeline.
        """
        return {key: tensor.clone() for key, tensor in load_file(self.folder / name).items()}

    def features(self, embed: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Features [B, D] float32 as the pipeline's cache has them: rounded to its type.

        Args:
            embed: features [B, D] of normalised images [B, 3, h, w].
        """
        with self.autocast():
            found = embed(images)
        return found.float().to(getattr(torch, self.about["dtype"])).float()

    def frozen(self, images: Tensor) -> Tensor:
        """Features [B, D] of the frozen backbone."""
        seen = self._seen.get("batch")
        if seen is None or seen[0] is not images:
            embed = loading.embedder(self.backbone(), self._network["backbone"]["pooling"])
            # One value, not two: a server asks from several threads.
            seen = self._seen["batch"] = (images, self.features(embed, images))
        return seen[1]

    def autocast(self) -> torch.autocast:
        """The precision of the pipeline's forward passes."""
        return loading.autocast(self.device, self._network["precision"])

    def learner(self, part: TrainedPart | GraftPart) -> Learner:
        """The learner of a part, in eval mode."""
        network = self.own_backbone()
        if isinstance(part, TrainedPart) and part.paired:
            network = networks.paired(network, self.beside().own_backbone())
        learner, _ = loop.open_learner(
            building.trained(part.method),
            network,
            opening.task_of(part.task),
            self.state(part.state),
            settings.Settings(seed=part.seed, device=self.device),
        )
        return learner.eval()


def open_predictor(model: Model) -> Scores:
    """The predictor of a model; columns as in its `columns`, class ids in ascending order."""
    return open_part(model.about["predictor"], model)


def open_part(described: Mapping[str, Any], model: Model) -> Scores:
    """A predictor of a description, or one within it; columns as in the model's `columns`.

    Raises:
        IncompatibleError: the kind is not known to this version of the program.
    """
    if described["kind"] not in KINDS:
        raise IncompatibleError(
            f"model: unknown kind of predictor {described['kind']!r} (known: {', '.join(KINDS)}); "
            "update graftwork"
        )
    module, _, name = KINDS[described["kind"]].partition(":")
    score = getattr(importlib.import_module(module), name)(described, model)
    place = {label: column for column, label in enumerate(described["learned"])}
    columns = [place[label] for label in model.about["columns"]]
    return lambda images: score(images)[:, columns]


def fitted(described: Mapping[str, Any], model: Model) -> Scores:
    """A closed-form classifier on features of the frozen backbone, an adapted one, or both.

    Args:
        described: a `FittedPart`.
    """
    part = from_json(FittedPart, described)
    method, state = building.fitted(part.method), model.state(part.state)
    embeds: list[Callable[[Tensor], Tensor]] = []
    if part.graft is None or part.keeps_frozen:
        embeds.append(model.frozen)
    if part.graft is not None:
        adapted = model.learner(part.graft).features
        embeds.append(lambda images: model.features(adapted, images))

    def score(images: Images) -> Tensor:
        features = torch.cat([embed(images[model.network]) for embed in embeds], dim=1)
        return method.logits(state, features.cpu(), part.seed).float()

    return score


def trained(described: Mapping[str, Any], model: Model) -> Scores:
    """A trained method after its last task; also joined or merged.

    Args:
        described: a `TrainedPart`.

    Raises:
        IncompatibleError: the method decides by an image's neighbours.
    """
    return _learned(from_json(TrainedPart, described), model)


def _learned(part: TrainedPart, model: Model) -> Scores:
    if neighbours(building.trained(part.method)) is not None:
        raise IncompatibleError(
            f"{part.method.name} with these hyper-parameters decides an image by those beside it, "
            "which nobody but its tests can reproduce; run it with decisions by each image alone"
        )
    learner, reads_images = model.learner(part), building.trained(part.method).card.images

    def score(images: Images) -> Tensor:
        own = images[model.network]
        query = model.frozen(own) if learner.needs_query else None
        given = own if reads_images else own.new_empty(len(own), 0)
        with model.autocast():
            return learner.logits(given, query).float().cpu()

    return score


def fused(described: Mapping[str, Any], model: Model) -> Scores:
    """The blend of two branches: one on the backbone, one on the network next to it.

    Args:
        described: a `FusedPart`.
    """
    part = from_json(FusedPart, described)
    method, state = building.fused(part.method), model.state(part.state)
    clip, vit = _learned(part.clip, model), _learned(part.vit, model.beside())
    return lambda images: method.blend(state, clip(images), vit(images))


def ensemble(described: Mapping[str, Any], model: Model) -> Scores:
    """A rule over the scores of several models, each over the classes of `columns`.

    Args:
        described: an `EnsemblePart`.
    """
    part, columns = from_json(EnsemblePart, described), model.about["columns"]
    rule: RuleOf = ensembling.build(part.rule.name, part.rule.hyperparameters)
    members = [open_part(member, model) for member in part.members]

    def score(images: Images) -> Tensor:
        stack, _ = align([member(images) for member in members], [columns] * len(members))
        return rule.combine(stack)

    return score
