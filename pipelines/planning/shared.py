"""Parts that all runs of a spec share: data, backbone, preprocessing, and stages made of them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from graftwork.operators.backbones.resolve import Backbone
from graftwork.operators.data.dataset import Dataset, Split
from graftwork.operators.images.preprocessing import Preprocessing
from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.parameters.features import (
    Graft,
    RankParameters,
    ShardParameters,
    TextParameters,
)
from graftwork.operators.parameters.hints import (
    CpuHints,
    ImageHints,
    NetworkHints,
    NetworkPlace,
    ShardHints,
)
from graftwork.operators.parameters.learners import Network, Numerics
from graftwork.operators.parameters.tasks import TaskData
from graftwork.operators.stage import Resources, Stage
from graftwork.operators.versions import library_versions
from graftwork.pipelines.planning.hints import H, Hints
from graftwork.pipelines.spec.model import BuiltinDataset, PipelineSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """Images and texts of no task.

    Args:
        images: as indexed; their labels mean nothing.
        texts: the texts.
    """

    images: Split
    texts: tuple[str, ...]

    def stage(self) -> Stage:
        """The stage that stores the images' index."""
        return replace(self.images.stage(), label="dataset reference")


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """Data, backbone and preprocessing of a spec.

    Args:
        spec: the spec.
        dataset: its images.
        backbone: the network.
        preprocessing: the test transform.
        reference: images and texts of no task, if a method asks for them.
        main: whose features choose exemplars, of a second network; None for its own.
    """

    spec: PipelineSpec
    dataset: Dataset
    backbone: Backbone
    preprocessing: Preprocessing
    reference: Reference | None = None
    main: "Shared | None" = None
    _made: dict[str, tuple[Stage, ...]] = field(default_factory=dict)
    _counts: dict[str, np.ndarray] = field(default_factory=dict)

    def features(self, split: Split) -> tuple[Stage, ...]:
        """The shards of the frozen backbone's features of a split."""
        if split.name not in self._made:
            self._made[split.name] = self.shards(split)
        return self._made[split.name]

    def shards(
        self, split: Split, graft: Graft | None = None, model: Stage | None = None
    ) -> tuple[Stage, ...]:
        """The feature shards of a split: consecutive samples, in the data set's order.

        Neither labels nor places are in the keys: relabelling or moving the data changes no
        feature, and appended samples leave full shards as they are.

        Args:
            graft: what adapted the backbone; None for the frozen one.
            model: the stage that trained it.
        """
        spec = self.spec
        resources, size, count = spec.resources.extract, spec.features.shard_size, len(split)
        starts = range(0, count, size)
        shared = ShardParameters(
            # What another text tower changes is not the image's feature.
            network=self.network(self.backbone.image_fingerprint),
            preprocessing=self.preprocessing,
            pooling=spec.features.pooling,
            dtype=spec.features.dtype,
            numerics=self.numerics(resources.gpus),
            graft=graft,
            digest="",
        )
        group = ("" if graft is None else "adapted ") + f"features {split.name}"
        return tuple(
            Stage(
                operator="features",
                parameters=to_json(replace(shared, digest=split.images_digest(start, stop))),
                inputs={} if model is None else {"graft": (model,)},
                hints=self.placed(
                    ShardHints(
                        reading=self.reading(stop - start, resources.cpus),
                        batch_size=resources.batch_size,
                    ),
                    split,
                    partial(np.arange, start, stop),
                ),
                resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
                label=f"{group} {number + 1}/{len(starts)}",
                group=group,
            )
            for number, start in enumerate(starts)
            for stop in [min(start + size, count)]
        )

    def exemplars(self, selection: str, seed: int) -> Stage:
        """The ranks of the training images as exemplars: of all orders, budgets and methods."""
        if self.main is not None:
            return self.main.exemplars(selection, seed)
        herding, cpus = selection == "herding", self.spec.resources.fit.cpus
        return Stage(
            operator="exemplars",
            parameters=to_json(RankParameters(selection=selection, seed=None if herding else seed)),
            inputs={
                "dataset": (self.dataset.train.stage(),),
                "features": self.features(self.dataset.train) if herding else (),
            },
            hints=to_json(CpuHints(cpus=cpus)),
            resources=Resources(cpus=cpus),
            label=f"exemplars {selection}" + ("" if herding else f" seed {seed}"),
        )

    def texts(self) -> Stage:
        """The features of the class names on a CLIP's text tower."""
        resources = self.spec.resources.extract
        return Stage(
            operator="text",
            parameters=to_json(
                TextParameters(
                    network=self.network(self.backbone.text_fingerprint),
                    names=self.dataset.classes,
                    templates=self.templates,
                    # Its tokeniser is part of the function.
                    open_clip=library_versions()["open_clip"],
                    numerics=replace(self.numerics(resources.gpus), precision="fp32"),
                )
            ),
            hints=to_json(NetworkHints(network=self.where(), cpus=resources.cpus)),
            resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
            label="text features",
        )

    @property
    def templates(self) -> tuple[str, ...]:
        """Texts with one `{}` for the name of a class."""
        return tuple(self.spec.text.templates)

    def network(self, part: str = "") -> Network:
        """The backbone, as keys know it.

        Args:
            part: fingerprint of the tower of a CLIP that matters; empty for the whole network.
        """
        model = self.backbone.model
        return Network(
            # The same tensors in another architecture (another activation, say) are another net.
            architecture=model if self.backbone.network == "clip" else model.partition(".")[0],
            fingerprint=part or self.backbone.fingerprint,
        )

    def numerics(self, gpus: float, compile: bool | None = None) -> Numerics:
        """Circumstances that the last bits of a forward pass depend on.

        Args:
            compile: of a stage with a learner, whether its network is compiled.
        """
        return Numerics(
            device="cuda" if gpus else "cpu",
            precision=self.spec.backbone.precision,
            torch=".".join(library_versions()["torch"].split(".")[:2]),
            compile=compile,
        )

    def reading(self, images: int, cpus: float) -> ImageHints:
        """Hints of a stage that sends so many images through the backbone, without places."""
        given = self.spec.dataset
        return ImageHints(
            network=self.where(),
            cpus=cpus,
            max_pixels=None if isinstance(given, BuiltinDataset) else given.max_pixels,
            images=images,
            places={},
        )

    def placed(self, value: H, split: Split, rows: Callable[[], np.ndarray]) -> "Hints[H]":
        """Hints with the places of images.

        Args:
            rows: the images' rows of the split, ascending; asked for only if a stage is sent out.
        """
        return Hints(value, lambda: _places(split, rows()))

    def where(self) -> NetworkPlace:
        """Place of the backbone, as hints."""
        return NetworkPlace(
            model=self.backbone.model,
            weights=self.backbone.weights,
            pooling=self.spec.features.pooling,
            image_size=self.backbone.image_size,
        )

    def counts(self, split: Split, task: TaskData) -> np.ndarray:
        """Images of each class of a task, in the order of its classes."""
        return self.table(split)[np.ix_(task.classes, task.domains)].sum(axis=1)

    def table(self, split: Split) -> np.ndarray:
        """Images of each class in each domain, int64 [K, domains]."""
        if split.name not in self._counts:
            shape = (len(self.dataset.classes), len(self.dataset.domains))
            table = np.zeros(shape, dtype=np.int64)
            np.add.at(table, (split.labels, split.domains), 1)
            self._counts[split.name] = table
        return self._counts[split.name]


def _places(split: Split, rows: np.ndarray) -> dict[str, Any]:
    return split.where.at(rows).hints(0, len(rows))
