"""Parts that all runs of a spec share: data, backbone, preprocessing, and stages made of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from graftwork.operators.backbones.resolve import Backbone
from graftwork.operators.data.dataset import Split
from graftwork.operators.data.digests import digest_of
from graftwork.operators.images.preprocessing import Preprocessing
from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.parameters.features import (
    FeatureKind,
    Graft,
    Ranking,
    RankParameters,
    ShardParameters,
    TextKind,
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
from graftwork.operators.stage import Resources, Stage
from graftwork.operators.streams.stream import Data, Rows, whole
from graftwork.operators.versions import library_versions
from graftwork.pipelines.planning.reads import Hints, Reads
from graftwork.pipelines.spec.model import PipelineSpec


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

    @cached_property
    def rows(self) -> Rows:
        """All images."""
        return whole(self.images)[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """Data, backbone and preprocessing of a spec.

    Args:
        spec: the spec.
        data: its images.
        backbone: the network.
        preprocessing: the test transform.
        reference: images and texts of no task, if a method asks for them.
        main: whose features choose exemplars, of a second network; None for its own.
        paired: a second network that learners are given beside this one; None for none.
    """

    spec: PipelineSpec
    data: Data
    backbone: Backbone
    preprocessing: Preprocessing
    reference: Reference | None = None
    main: "Shared | None" = None
    paired: "Shared | None" = None
    _made: dict[int, tuple[Stage, ...]] = field(default_factory=dict)
    _ranks: dict[tuple[Ranking, str], tuple[Stage, ...]] = field(default_factory=dict)

    @cached_property
    def everything(self) -> tuple[Rows, tuple[int, ...]]:
        """All training rows of a data set that is cut, as `whole` has them."""
        return whole(self.data.sources[0].train)

    def features(self, split: Split) -> tuple[Stage, ...]:
        """The shards of the frozen backbone's features of a split."""
        if id(split) not in self._made:
            self._made[id(split)] = self.shards(split)
        return self._made[id(split)]

    def kind(self, graft: Graft | None = None) -> FeatureKind:
        """Everything besides the image that cached features depend on.

        Args:
            graft: what adapted the backbone; None for the frozen one.
        """
        spec = self.spec
        return FeatureKind(
            # What another text tower changes is not the image's feature.
            network=self.network(self.backbone.image_fingerprint),
            preprocessing=self.preprocessing,
            pooling=spec.features.pooling,
            dtype=spec.features.dtype,
            numerics=self.numerics(spec.resources.extract.gpus),
            graft=graft,
        )

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
        spec, kind = self.spec, self.kind(graft)
        resources, size, count = spec.resources.extract, spec.features.shard_size, len(split)
        starts = range(0, count, size)
        group = ("" if graft is None else "adapted ") + f"features {split.name}"
        return tuple(
            Stage(
                operator="features",
                parameters=to_json(
                    ShardParameters(kind=kind, digest=split.images_digest(start, stop))
                ),
                inputs={} if model is None else {"graft": (model,)},
                hints=Hints(
                    ShardHints(
                        reading=self.reading(stop - start, resources.cpus),
                        batch_size=resources.batch_size,
                    ),
                    places=partial(split.places, start, stop),
                ),
                resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
                label=f"{group} {number + 1}/{len(starts)}",
                group=group,
            )
            for number, start in enumerate(starts)
            for stop in [min(start + size, count)]
        )

    def reads(self, tasks: Sequence[Rows], frozen: bool = False) -> Reads:
        """Rows that a stage reads.

        Args:
            tasks: of each task.
            frozen: whether it reads the frozen backbone's features of them.
        """
        return Reads(
            tasks=tasks,
            shards={"features": self.features} if frozen else {},
            shard_size=self.spec.features.shard_size,
        )

    def ranking(self, selection: str, seed: int) -> Ranking:
        """A way to choose exemplars, the same on both networks of a spec."""
        if self.main is not None:
            return self.main.ranking(selection, seed)
        if selection == "random":
            return Ranking(selection=selection, seed=seed)
        return Ranking(selection=selection, features=self.kind())

    def ranks(self, ranking: Ranking, task: Rows) -> tuple[Stage, ...]:
        """Ranks of a task's images as exemplars: a stage for each class in each domain."""
        if self.main is not None:
            return self.main.ranks(ranking, task)
        if (ranking, task.digest) not in self._ranks:
            ranked = (self._rank(ranking, task.of(block)) for block in task.blocks)
            self._ranks[ranking, task.digest] = tuple(ranked)
        return self._ranks[ranking, task.digest]

    def _rank(self, ranking: Ranking, block: Rows) -> Stage:
        digest, cpus = digest_of(block.index.digests), self.spec.resources.fit.cpus
        reads = self.reads([block], frozen=ranking.features is not None)
        seed = "" if ranking.seed is None else f" seed {ranking.seed}"
        group = f"exemplars {ranking.selection}{seed}"
        return Stage(
            operator="exemplars",
            parameters=to_json(RankParameters(ranking=ranking, digest=digest)),
            reads=reads.stages(),
            hints=Hints(CpuHints(cpus=cpus), selection=reads.selection),
            resources=Resources(cpus=cpus),
            label=f"{group} {digest[:8]}",
            group=group,
        )

    def text_kind(self) -> TextKind:
        """Everything besides the name that the features of a class's texts depend on."""
        return TextKind(
            network=self.network(self.backbone.text_fingerprint),
            templates=self.templates,
            # Its tokeniser is part of the function.
            open_clip=library_versions()["open_clip"],
            numerics=replace(self.numerics(self.spec.resources.extract.gpus), precision="fp32"),
        )

    def texts(self) -> Stage:
        """The features of the class names on a CLIP's text tower."""
        resources = self.spec.resources.extract
        return Stage(
            operator="text",
            parameters=to_json(TextParameters(kind=self.text_kind(), names=self.data.classes)),
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
            beside=self.paired.network() if self.paired else None,
        )

    def numerics(self, gpus: float, compile: bool | None = None) -> Numerics:
        """Circumstances that the last bits of a forward pass depend on.

        Args:
            compile: of a stage with a learner, whether its network is compiled.
        """
        precision = self.spec.backbone.precision
        return Numerics(
            device="cuda" if gpus else "cpu",
            precision=precision,
            torch=".".join(library_versions()["torch"].split(".")[:2]),
            compile=compile,
            heads=None if compile is None or precision == "fp32" else "fp32",
        )

    def reading(self, images: int, cpus: float) -> ImageHints:
        """Hints of a stage that sends so many images through the backbone, without places."""
        return ImageHints(
            network=self.where(),
            cpus=cpus,
            max_pixels=self.spec.max_pixels,
            images=images,
            places={},
        )

    def where(self) -> NetworkPlace:
        """Place of the backbone, as hints."""
        return NetworkPlace(
            model=self.backbone.model,
            weights=self.backbone.weights,
            pooling=self.spec.features.pooling,
            image_size=self.backbone.image_size,
            beside=self.paired.where() if self.paired else None,
        )
