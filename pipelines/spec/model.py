"""A spec as a typed, checked value.

Importing this module loads neither torch nor Ray nor MLflow: a run whose stages are all cached
reads its spec, finds everything in the store, and never needs them.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)

from graftwork.operators.images.preprocessing import PRESETS, TIMM_DEFAULT
from graftwork.operators.streams.scenario import MAX_SEED
from graftwork.pipelines.spec.combination import Entry
from graftwork.pipelines.spec.combination import rule as combination
from graftwork.pipelines.spec.data import (
    BUILTIN_DATASETS,
    MAX_COUNT,
    BuiltinDataset,
    Dataset,
    FileDataset,
    Reference,
    Text,
    full_dataset,
    seed,
)
from graftwork.pipelines.spec.fields import (
    Before,
    Place,
    Rule,
    Section,
    choice,
    flag,
    integer,
    listing,
    location,
    name_of_files,
    no_duplicates,
    optional,
    plain,
    real,
    refuse,
    text,
)
from graftwork.pipelines.spec.problems import parse_path, shown
from graftwork.pipelines.spec.scenario import Scenario
from graftwork.pipelines.spec.stream import StreamField
from graftwork.pipelines.spec.yaml_source import Path

__all__ = ["Backbone", "BuiltinDataset", "FileDataset", "PipelineSpec", "Preprocessing", "Scenario"]

PREPROCESSING = (*PRESETS, TIMM_DEFAULT)
_DATASET_SAYS = ", ".join([*map(shown, BUILTIN_DATASETS), "or mapping"])

_cpus = real(0.01, 4096, whole_above_one=True)
_gpus = real(0, 4096, whole_above_one=True)


class Preprocessing(Section):
    """Steps that prepare an image for the backbone."""

    resize: Annotated[int | None, optional(integer(1, 4096))] = Field(
        default=None, description="pixels of the shorter side; null: not resized"
    )
    stretch: Annotated[bool, flag()] = Field(
        default=False, description="both sides get so many pixels, whatever the aspect"
    )
    interpolation: Annotated[Literal["bilinear", "bicubic"], choice(("bilinear", "bicubic"))] = (
        Field(default="bicubic", description="of the resizing")
    )
    crop: Annotated[int | None, optional(integer(1, 4096))] = Field(
        default=None, description="pixels of the centre crop; null: not cropped"
    )
    mean: Annotated[tuple[Annotated[float, real(0, 1)], ...], listing("numbers", length=3)] = Field(
        description="subtracted from red, green, blue in 0..1"
    )
    std: Annotated[tuple[Annotated[float, real(1e-6, 1)], ...], listing("numbers", length=3)] = (
        Field(description="red, green, blue are divided by it")
    )


def _preprocessing_kind(value: Any) -> str:
    return "<mapping>" if isinstance(value, (dict, Preprocessing)) else "<name>"


Weights = Literal["random", "builtin"]
"""Weights that are in no file of the user's."""


class Backbone(Section):
    """The frozen network that turns images into features."""

    model: Annotated[str, text(200)] = Field(
        description="timm's name of the network, or open_clip: and open_clip's name of a CLIP"
    )
    weights: Annotated[Place | Weights | None, optional(location(get_args(Weights)))] = Field(
        default=None,
        description="safetensors file; absent: timm's pretrained weights of that name; "
        "CLIPs always need one",
    )
    image_size: Annotated[int | None, optional(integer(8, 4096))] = Field(
        default=None,
        description="pixels of the square that a ViT sees, if not its own; less is faster",
    )
    preprocessing: Annotated[
        Annotated[str, choice(PREPROCESSING), Tag("<name>")]
        | Annotated[Preprocessing, Tag("<mapping>")],
        Discriminator(_preprocessing_kind),
    ] = Field(default="timm_default", description="a preset's name, or the steps")
    precision: Annotated[Literal["fp32", "bf16", "fp16"], choice(("fp32", "bf16", "fp16"))] = Field(
        default="fp32", description="arithmetic of the frozen forward pass"
    )


class Features(Section):
    """The part of the backbone's output that is kept."""

    dtype: Annotated[Literal["float16", "float32"], choice(("float16", "float32"))] = Field(
        default="float16", description="type of the stored features"
    )
    shard_size: Annotated[int, integer(1, MAX_COUNT)] = Field(
        default=512, description="images per shard; another value computes the features again"
    )
    pooling: Annotated[Literal["token", "avg", "map"], choice(("token", "avg", "map"))] = Field(
        default="token",
        description="class token, the network's attention pooling, or mean of the patch tokens",
    )


class ExtractResources(Section):
    """One task that extracts a shard of features."""

    cpus: Annotated[float, _cpus] = Field(default=1, description="CPU cores")
    gpus: Annotated[float, _gpus] = Field(default=0, description="GPUs; a fraction shares one")
    batch_size: Annotated[int | None, optional(integer(1, 1_000_000))] = Field(
        default=None, description="images per forward pass; null: 8 on CPUs, 256 on GPUs"
    )


class FitResources(Section):
    """One task that fits a closed-form method."""

    cpus: Annotated[float, _cpus] = Field(default=1, description="CPU cores")


class TrainResources(Section):
    """The worker group that trains a method."""

    workers: Annotated[int, integer(1, 10_000)] = Field(
        default=1, description="processes of one training"
    )
    cpus: Annotated[float, _cpus] = Field(default=1, description="CPU cores of each worker")
    gpus: Annotated[float, _gpus] = Field(default=0, description="GPUs of each worker")
    compile: Annotated[bool, flag()] = Field(
        default=False, description="compile the network; changes its last bits, hence results"
    )
    checkpoint_minutes: Annotated[float, real(0, 1e6)] = Field(
        default=5, description="minutes between snapshots of a task in training"
    )


class Resources(Section):
    """Resources that stages occupy on the cluster; part of no key."""

    extract: ExtractResources = Field(default=ExtractResources(), description="per extraction task")
    fit: FitResources = Field(default=FitResources(), description="per fit")
    train: TrainResources = Field(default=TrainResources(), description="per training")


class Recording(Section):
    """Records that MLflow is given besides numbers; part of no key."""

    models: Annotated[Literal["all", "fitted", "none"], choice(("all", "fitted", "none"))] = Field(
        default="all",
        description="results kept as MLflow models; fitted: those that trained no network",
    )


Method = tuple[str, dict[str, Any]]
"""A method's name and its hyper-parameters as written."""


def _method(value: Any) -> Method:
    """`name`, `{name: {...}}` or `(name, {...})` as a pair."""
    if isinstance(value, tuple) and len(value) == 2:
        value = {value[0]: value[1]}
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, dict):
        raise refuse(f"must be a method's name or {{name: {{...}}}}, got {shown(value)}")
    if len(value) != 1:
        raise refuse(f"must hold one method, got {len(value)}; start each with its own dash")
    ((name, parameters),) = value.items()
    if not isinstance(name, str) or not name:
        raise refuse(f"must be a method's name or {{name: {{...}}}}, got {shown(name)}")
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise refuse(
            f"hyper-parameters must be a mapping like {{lr: 0.1}}, got {shown(parameters)}", (name,)
        )
    return name, dict(parameters)


def _different(section: str) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Refuses equal entries of a section."""

    def check(entries: tuple[Any, ...]) -> tuple[Any, ...]:
        first: dict[str, int] = {}
        for index, entry in enumerate(entries):
            # Not `keys.canonical`: values it refuses (NaN) get a message of their own.
            text = json.dumps(plain(entry), sort_keys=True, default=str)
            earlier = first.setdefault(text, index)
            if earlier != index:
                raise refuse(f"same as {section}.{earlier}; keep one", (index,))
        return entries

    return check


# Not said in the annotations, which Python 3.14 evaluates late: it cannot read formatted text, and
# `text` is a field by then.
_SEEDS = listing(f"integers in 0..{MAX_SEED}")
_NAME = name_of_files()


class PipelineSpec(Section):
    """A whole pipeline: data, stream of tasks, backbone, methods, seeds, resources."""

    pipeline: Annotated[str, _NAME] = Field(
        description="name of the pipeline, and of its MLflow experiment"
    )
    stream: StreamField = Field(
        default=None, description="tasks that bring their own images, in order of arrival"
    )
    disjoint_classes: Annotated[bool, flag()] = Field(
        default=False,
        description="classes of different tasks of `stream` are different, whatever their names",
    )
    transfer: Annotated[bool, flag()] = Field(
        default=False,
        description="ask every model about later tasks, too, where a method knows classes by name",
    )
    dataset: Annotated[Dataset | None, Before(full_dataset, _DATASET_SAYS)] = Field(
        default=None,
        description="images and labels that are cut into tasks; needed without `stream`",
        validate_default=True,
    )
    scenario: Scenario | None = Field(
        default=None,
        description="how they are cut; needed without `stream`",
        validate_default=True,
    )
    backbone: Backbone = Field(description="frozen network")
    vit: Backbone | None = Field(
        default=None, description="a ViT beside a CLIP, for methods with a branch on each"
    )
    features: Features = Field(default=Features(), description="stored features")
    text: Text = Field(default=Text(), description="texts of the classes, for methods on CLIP")
    reference: Reference | None = Field(
        default=None, description="data of no task, for methods that ask for it"
    )
    methods: Annotated[
        tuple[Annotated[Method, Rule(_method, "method")], ...],
        listing("names or {name: {hyper-parameter: value}}"),
        AfterValidator(_different("methods")),
    ] = Field(description="methods to compare")
    merge: Annotated[
        tuple[Annotated[Entry, Rule(combination("merge").check, "merge")], ...],
        listing("{merge: {of: method, field: value}}", least=0),
        AfterValidator(_different("merge")),
    ] = Field(default=(), description="merged checkpoints of methods, as further results")
    ensemble: Annotated[
        tuple[Annotated[Entry, Rule(combination("ensemble").check, "ensemble")], ...],
        listing("{rule: {of: [methods], field: value}}", least=0),
        AfterValidator(_different("ensemble")),
    ] = Field(default=(), description="combined scores of methods, as further results")
    seeds: Annotated[
        tuple[Annotated[int, seed], ...],
        _SEEDS,
        AfterValidator(no_duplicates),
    ] = Field(default=(0,), description="one run of every method per seed")
    resources: Resources = Field(default=Resources(), description="sizes on the cluster")
    tracking: Recording = Field(default=Recording(), description="what MLflow keeps")

    @field_validator("dataset", "scenario")
    @classmethod
    def _cut_or_listed(cls, value: Any, info: ValidationInfo) -> Any:
        listed = info.data.get("stream")
        if "stream" in info.data and listed is None and value is None:
            raise refuse("missing; it is required, unless tasks are listed under stream")
        if listed is not None and value is not None:
            raise refuse(
                "not beside stream, whose tasks bring their own images; remove one of them"
            )
        return value

    @field_validator("scenario")
    @classmethod
    def _domains_exist(cls, value: Scenario | None, info: ValidationInfo) -> Scenario | None:
        dataset = info.data.get("dataset")
        if value is None:
            return value
        if dataset is not None and value.kind == "domain_incremental" and dataset.domain is None:
            raise refuse(
                "domain_incremental needs the column with the domains; give dataset.domain",
                ("kind",),
            )
        return value

    @property
    def max_pixels(self) -> int | None:
        """Largest width times height of an image; None for the program's own limit."""
        if self.stream is None:
            return self.dataset.max_pixels if isinstance(self.dataset, FileDataset) else None
        return max(task.max_pixels for task in self.stream)

    def written_path(self, key: str) -> Path:
        """The path of a hyper-parameter as in the file.

        Args:
            key: dotted path; hyper-parameters may be given as `methods.INDEX.field`.

        Returns:
            The path, with the method's name in it: `methods.INDEX.ranpac.field`.
        """
        path = parse_path(key)
        if len(path) < 3 or path[0] != "methods" or not isinstance(path[1], int):
            return path
        name = self.methods[path[1]][0]
        return path if path[2] == name else (*path[:2], name, *path[2:])

    def to_value(self) -> dict[str, Any]:
        """The spec with all defaults as JSON values, in the form `load` accepts."""
        value = plain(self.model_dump())
        value["methods"] = [
            {name: plain(parameters)} if parameters else name for name, parameters in self.methods
        ]
        for section in ("merge", "ensemble"):
            value[section] = [{name: plain(given)} for name, given in getattr(self, section)]
        return value
