"""From a spec to a graph of stages.

Planning reads the data set's index and the backbone's fingerprint (both remembered in the store)
and is pure from there on: the same bytes give the same keys on any machine.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from graftwork.cluster.execution.graph import needed, walk
from graftwork.operators.backbones import resolve as backbones
from graftwork.operators.backbones.resolve import Backbone
from graftwork.operators.data import dataset as datasets
from graftwork.operators.data import description as descriptions
from graftwork.operators.data.parts import Examine, here
from graftwork.operators.errors import BadDataError, ConfigError, IncompatibleError, together
from graftwork.operators.images import preprocessing as preprocessings
from graftwork.operators.images.preprocessing import Preprocessing
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store
from graftwork.operators.store.memo import Memo
from graftwork.operators.streams.scenario import LISTED, OrderName
from graftwork.operators.streams.stream import Data, Piece
from graftwork.pipelines.planning import combine, sources
from graftwork.pipelines.planning.checks import check_networks, check_trainable
from graftwork.pipelines.planning.combinations import Combined, resolve
from graftwork.pipelines.planning.expand import make_runs, tasks_of
from graftwork.pipelines.planning.methods import Method, resolve_methods
from graftwork.pipelines.planning.runs import Run
from graftwork.pipelines.planning.shared import Reference, Shared
from graftwork.pipelines.planning.sources import Source
from graftwork.pipelines.spec.loading import Loaded
from graftwork.pipelines.spec.model import PipelineSpec
from graftwork.pipelines.spec.model import Preprocessing as PreprocessingSpec


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The graph of a spec, with what the stages were made of.

    Args:
        sources: its data sets.
        data: their images.
    """

    spec: PipelineSpec
    sources: tuple[Source, ...]
    data: Data
    backbone: Backbone
    preprocessing: Preprocessing
    runs: tuple[Run, ...]

    @property
    def targets(self) -> list[Stage]:
        """Stages that the run is for: the evaluations."""
        return [run.evaluate for run in self.runs]

    @property
    def left_out(self) -> str:
        """Line about test images that nothing is asked for; empty if there are none."""
        untested = next((run.stream.untested for run in self.runs if run.stream.untested), {})
        if not untested:
            return ""
        count, names = sum(untested.values()), ", ".join(untested)
        return f"{count} test images of classes that no task learns are left out: {names}"

    def images(self, stage: Stage) -> int:
        """Images that a stage sends through a network, as far as planning knows."""
        return stage.hints.get("images", 0)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Every stage once, inputs before what reads them."""
        return walk(self.targets)

    def stored(self, store: Store) -> dict[str, set[str]]:
        """Keys of what a store holds, by operator, for the operators of these stages."""
        return {name: store.keys(name) for name in {stage.operator for stage in self.stages}}

    def missing(self, stored: Mapping[str, Collection[str]]) -> tuple[Stage, ...]:
        """Stages that a run has to compute, inputs before what reads them.

        Args:
            stored: keys of what there is, by operator.
        """
        return needed(self.targets, lambda stage: stage.key in stored[stage.operator]).compute


def make_plan(loaded: Loaded, memo: Memo, examine: Examine = here) -> Plan:
    """The graph of a spec.

    Args:
        examine: where images are examined that the memo does not know.

    Raises:
        ConfigError: the spec asks for what does not exist; all problems at once.
        BadDataError: the data cannot be used.
        IncompatibleError: the weights do not fit the backbone.
    """
    with loaded.locating():
        return _make_plan(loaded, memo, examine)


def _make_plan(loaded: Loaded, memo: Memo, examine: Examine) -> Plan:
    spec = loaded.spec
    methods, combinations, backbone = _resolve(loaded, memo)
    found = sources.find(spec, memo, examine)
    data = sources.data(spec, found)
    preprocessing = _preprocessing(spec.backbone.preprocessing, backbone)
    check_networks(spec, backbone, data.classes, methods)
    shared = Shared(
        spec=spec,
        data=data,
        backbone=backbone,
        preprocessing=preprocessing,
        reference=(
            _reference(spec, memo, examine) if any(m.facts.reference for m in methods) else None
        ),
    )
    check_trainable(shared, methods)
    beside = _beside(shared, memo, [m for m in methods if m.facts.contract == "fused"])
    runs = tuple(make_runs(shared, methods, beside))
    return Plan(
        spec=spec,
        sources=found,
        data=data,
        backbone=backbone,
        preprocessing=preprocessing,
        runs=(*runs, *combine.combine(shared, combinations, runs, memo)),
    )


def pieces_of(loaded: Loaded, memo: Memo) -> tuple[OrderName, list[Piece]]:
    """The tasks of a spec with one class order, before anything is numbered, and its name.

    Raises:
        ConfigError: several orders, or sizes that do not fit the data.
        BadDataError: the data cannot be used.
    """
    spec = loaded.spec
    with loaded.locating():
        found = sources.find(spec, memo)
        if spec.scenario is None:
            return LISTED, [task.piece() for task in sources.listed(spec, found)]
        if len(spec.scenario.orders) > 1:
            raise ConfigError(
                f"a split is of one order, the spec has {len(spec.scenario.orders)}; choose with "
                "--set scenario.orders=[1993]",
                key="scenario.orders",
            )
        order = next(iter(spec.scenario.orders))
        return order, tasks_of(spec.scenario, found[0].dataset, order)


def _beside(shared: Shared, memo: Memo, methods: Sequence[Method]) -> Shared | None:
    """The second network, if a method has a branch on it.

    Raises:
        ConfigError: precision, pooling or preprocessing do not suit.
        IncompatibleError: methods cannot be attached to it, or the weights do not fit.
    """
    given = shared.spec.vit
    if given is None or not methods:
        return None
    try:
        backbone = backbones.resolve(
            given.model, given.weights, shared.spec.features.pooling, memo, given.image_size
        )
        wanted = given.preprocessing
        preprocessing = _preprocessing(wanted, backbone)
        if backbone.network != "vit":
            raise ConfigError(
                f"{methods[0].name} trains a timm ViT, got {given.model}", key="backbone.model"
            )
        beside = Shared(
            spec=shared.spec.model_copy(update={"backbone": given}),
            data=shared.data,
            backbone=backbone,
            preprocessing=preprocessing,
            main=shared,
        )
        check_trainable(beside, methods)
    except (ConfigError, IncompatibleError) as error:
        raise error.moved("backbone", "vit") from error
    return beside


def _reference(spec: PipelineSpec, memo: Memo, examine: Examine = here) -> Reference:
    """Images and texts of no task.

    Raises:
        ConfigError: they cannot be used.
        BadDataError: an image cannot be used.
    """
    given = spec.reference
    assert given is not None, "check_networks asks for it"
    texts = descriptions.texts(given.texts)
    limits = {"train": given.limit_per_class, "test": given.limit_per_class}
    description = {
        **given.model_dump(mode="json", exclude={"images", "texts"}),
        "train": given.images,
        "test": given.images,
        "limit_per_class": limits,
    }
    try:
        images = datasets.index(description, memo, examine=examine).train
    except (BadDataError, ConfigError) as error:
        # Both splits are the reference's images; the other keys have the same names there.
        own = error.moved("dataset.train", "reference.images")
        own = own.moved("dataset.test", "reference.images").moved("dataset", "reference")
        raise own from error
    return Reference(images=images, texts=tuple(texts))


def _resolve(
    loaded: Loaded, memo: Memo
) -> tuple[tuple[Method, ...], tuple[Combined, ...], Backbone]:
    """Methods, what combines them, and backbone, before a look at the data, which may take long."""
    problems: list[ConfigError | IncompatibleError] = []
    methods, combinations, backbone, spec = None, (), None, loaded.spec
    try:
        methods = resolve_methods(loaded, memo)
        combinations = resolve(loaded, methods, memo)
    except ConfigError as error:
        problems.append(error)
    try:
        backbone = backbones.resolve(
            spec.backbone.model,
            spec.backbone.weights,
            spec.features.pooling,
            memo,
            spec.backbone.image_size,
        )
    except (ConfigError, IncompatibleError) as error:
        problems.append(error)
    if methods is None or backbone is None or problems:
        raise together(problems) from problems[0]
    return methods, combinations, backbone


def _preprocessing(given: str | PreprocessingSpec, backbone: Backbone) -> Preprocessing:
    """Preprocessing that a spec asks for.

    Raises:
        ConfigError: it cannot be resolved, or the images do not fit a ViT's position embeddings.
    """
    try:
        preprocessing = preprocessings.resolve(
            given if isinstance(given, str) else given.model_dump(), backbone.data_config
        )
    except ConfigError as error:
        raise error.moved("preprocessing", "backbone.preprocessing") from error
    # The embeddings fit one size of image, unless timm says otherwise.
    height = backbone.data_config["input_size"][1]
    fixed = backbone.data_config.get("fixed_input_size", False)
    if fixed and preprocessing.crop not in (None, height):
        raise ConfigError(
            f"gives images of {preprocessing.crop} pixels, but "
            f"{backbone.model} takes {height}; choose another preprocessing",
            key="backbone.preprocessing",
        )
    return preprocessing
