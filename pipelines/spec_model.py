"""The sections of a spec: what may be written, and its typed, checked form.

Importing this module loads neither torch nor Ray nor MLflow: a run whose stages are all cached
reads its spec, finds everything in the store, and never needs them.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from operators.keys import canonical
from operators.scenario import MAX_SEED, OrderName, expand
from pipelines.fields import (
    Before,
    Rule,
    choice,
    integer,
    listing,
    location,
    no_duplicates,
    optional,
    real,
    refuse,
    text,
)
from pipelines.problems import shown

BUILTIN_DATASETS = ("digits",)
PREPROCESSING = ("lamda_224", "ranpac_cifar_224", "slca_norm", "timm_default", "micro_32")
MAX_COUNT = 1_000_000_000

_seed = integer(0, MAX_SEED)
_count = integer(1, MAX_COUNT)
_cpus = real(0.01, 4096, whole_above_one=True)
_gpus = real(0, 4096, whole_above_one=True)
_name = text(100, forbidden="/")


class _Section(BaseModel):
    """What all sections share: values cannot be changed, unknown keys are refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Limits(_Section):
    """First rows of each class in file order; null means all of them."""

    train: Annotated[int | None, optional(_count)] = Field(
        None, description="rows of each class used for training"
    )
    test: Annotated[int | None, optional(_count)] = Field(
        None, description="rows of each class used for testing"
    )


def _limits(value: Any) -> Any:
    if isinstance(value, (dict, Limits)):
        return value
    limit = optional(_count).check(value)
    return {"train": limit, "test": limit}


_LimitsField = Annotated[Limits, Before(_limits, "integer (both splits), mapping, or null")]
_LIMITS_SAYS = "first rows of each class in file order"


class BuiltinDataset(_Section):
    """A data set that comes with the package."""

    builtin: Annotated[Literal["digits"], choice(BUILTIN_DATASETS)] = Field(
        description="name of a data set that needs no files"
    )
    limit_per_class: _LimitsField = Field(Limits(), description=_LIMITS_SAYS)

    @property
    def domain(self) -> None:
        """No built-in data set has domains."""
        return None


_places = listing("paths or URLs", single=True)
_Place = Annotated[str, location()]
_Name = Annotated[str, text(200)]


def _classes(value: Any) -> str | tuple[str, ...] | None:
    """Path of a JSON list, or the names themselves."""
    if not isinstance(value, (list, tuple)):
        return optional(location()).check(value)
    if not value:
        raise refuse("must name at least one class, got an empty list")
    for index, name in enumerate(value):
        try:
            text(200).check(name)
        except PydanticCustomError as error:
            raise refuse(error.message(), (index,)) from error
    return no_duplicates(tuple(value))


class FileDataset(_Section):
    """Images in files."""

    train: Annotated[tuple[_Place, ...], _places] = Field(
        description="Parquet file, glob, folder with a folder per class, URL, or a list of those"
    )
    test: Annotated[tuple[_Place, ...], _places] = Field(description="the same, for testing")
    image: Annotated[str, text()] = Field(
        "image", description="column with the encoded image, binary or struct {bytes, path}"
    )
    label: Annotated[str, text()] = Field("label", description="column with the class id")
    domain: Annotated[str | None, optional(text())] = Field(
        None, description="column with the domain; domain_incremental needs it"
    )
    classes: Annotated[
        str | tuple[str, ...] | None,
        Rule(_classes, "path of a JSON list, list of names, or null"),
    ] = Field(None, description="class names by class id, for reports")
    limit_per_class: _LimitsField = Field(Limits(), description=_LIMITS_SAYS)
    on_bad_image: Annotated[Literal["error", "skip"], choice(("error", "skip"))] = Field(
        "error", description="what to do with an image that cannot be decoded"
    )
    max_pixels: Annotated[int, integer(1, MAX_COUNT)] = Field(
        89_478_485, description="larger images count as bad images"
    )


def _dataset(value: Any) -> Any:
    if isinstance(value, str):
        if value not in BUILTIN_DATASETS:
            raise refuse(
                f"no built-in data set {shown(value)} (known: {', '.join(BUILTIN_DATASETS)}); "
                "files are given as {train: ..., test: ...}"
            )
        return {"builtin": value}
    return value


def _dataset_kind(value: Any) -> str:
    has_name = "builtin" in value if isinstance(value, dict) else isinstance(value, BuiltinDataset)
    return "<builtin>" if has_name else "<files>"


Dataset = Annotated[
    Annotated[BuiltinDataset, Tag("<builtin>")] | Annotated[FileDataset, Tag("<files>")],
    Discriminator(_dataset_kind),
]


def _orders(value: Any) -> tuple[Any, ...]:
    """All accepted ways of writing orders, one by one."""
    if value == "natural":
        return expand("natural")
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in ("count", "first")]
        if unknown:
            raise refuse('unknown key; an order sweep has "count" and "first"', (unknown[0],))
        if "count" not in value:
            raise refuse("missing; say how many orders", ("count",))
        count = _at("count", integer(1, 10_000).check, value["count"])
        first = _at("first", integer(0, MAX_SEED + 1 - count).check, value.get("first", 0))
        return expand({"count": count, "first": first})
    says = 'seeds, "natural" and explicit lists; or "natural", or {count: n, first: 0}'
    return listing(says).change(value)


def _at(key: str, check: Callable[[Any], Any], value: Any) -> Any:
    """The checked value; a problem with it is reported at `key`."""
    try:
        return check(value)
    except PydanticCustomError as error:
        raise refuse(error.message(), (key,)) from error


def _order(value: Any) -> Any:
    if value == "natural":
        return value
    if isinstance(value, (list, tuple)):
        if not value:
            raise refuse("an explicit order must not be empty")
        numbers = all(isinstance(item, int) and not isinstance(item, bool) for item in value)
        if not numbers and not all(isinstance(item, str) for item in value):
            raise refuse("an explicit order must hold class ids, or domain names in quotes")
        repeated = [item for index, item in enumerate(value) if item in value[:index]]
        if repeated:
            raise refuse(f"an explicit order must not repeat {shown(repeated[0])}")
        return list(value)
    if isinstance(value, str):
        raise refuse(f'must be a seed, "natural" or a list, got {shown(value)}')
    return _seed.check(value)


class Scenario(_Section):
    """How the data becomes a stream of tasks."""

    kind: Annotated[
        Literal["class_incremental", "domain_incremental"],
        choice(("class_incremental", "domain_incremental")),
    ] = Field(description="new classes with every task, or a new domain with every task")
    increment: Annotated[int | None, optional(_count)] = Field(
        None,
        description="classes of each task after the first; class_incremental only, required there",
        validate_default=True,
    )
    initial: Annotated[int | None, optional(_count)] = Field(
        None,
        description="classes of the first task, `increment` if absent; class_incremental only",
        validate_default=True,
    )
    orders: Annotated[
        tuple[Annotated[OrderName, Rule(_order, "order")], ...],
        Before(_orders, 'list of seeds, "natural" and explicit lists; {count, first}; "natural"'),
    ] = Field(
        None,
        description="class (or domain) orders; absent: [1993], natural for domain_incremental",
        validate_default=True,
    )

    @field_validator("increment", "initial")
    @classmethod
    def _fits_kind(cls, value: int | None, info: ValidationInfo) -> int | None:
        kind = info.data.get("kind")
        if kind == "domain_incremental" and value is not None:
            raise refuse("only for class_incremental; every task is one domain, remove it")
        if kind == "class_incremental" and value is None:
            if info.field_name == "increment":
                raise refuse("missing; class_incremental needs the number of classes per task")
            return info.data.get("increment")
        return value

    @field_validator("orders", mode="wrap")
    @classmethod
    def _orders_of_kind(
        cls, value: Any, handler: Callable[[Any], tuple[OrderName, ...]], info: ValidationInfo
    ) -> tuple[OrderName, ...]:
        kind = info.data.get("kind")
        if value is None:
            return ("natural",) if kind == "domain_incremental" else (1993,)
        orders = no_duplicates(handler(value))
        for index, order in enumerate(orders):
            if isinstance(order, list) and kind is not None:
                wanted = str if kind == "domain_incremental" else int
                what = "domain names" if kind == "domain_incremental" else "class ids"
                if not isinstance(order[0], wanted):
                    raise refuse(f"an explicit order of {kind} must hold {what}", (index,))
        return orders


class Preprocessing(_Section):
    """What happens to an image before the backbone sees it, step by step."""

    resize: Annotated[int | None, optional(integer(1, 4096))] = Field(
        None, description="pixels of the shorter side; null: not resized"
    )
    interpolation: Annotated[Literal["bilinear", "bicubic"], choice(("bilinear", "bicubic"))] = (
        Field("bilinear", description="of the resizing")
    )
    crop: Annotated[int | None, optional(integer(1, 4096))] = Field(
        None, description="pixels of the centre crop; null: not cropped"
    )
    mean: Annotated[
        tuple[Annotated[float, real(-1000, 1000)], ...], listing("numbers", length=3)
    ] = Field(description="subtracted from red, green, blue in 0..1")
    std: Annotated[
        tuple[Annotated[float, real(1e-6, 1000)], ...], listing("numbers", length=3)
    ] = Field(description="red, green, blue are divided by it")


def _preprocessing_kind(value: Any) -> str:
    return "<mapping>" if isinstance(value, (dict, Preprocessing)) else "<name>"


class Backbone(_Section):
    """The frozen network that turns images into features."""

    model: Annotated[str, text(200)] = Field(description="timm's name of the network")
    weights: Annotated[str | None, optional(location(("random", "builtin")))] = Field(
        None, description="safetensors file; absent: timm's pretrained weights of that name"
    )
    preprocessing: Annotated[
        Annotated[str, choice(PREPROCESSING), Tag("<name>")]
        | Annotated[Preprocessing, Tag("<mapping>")],
        Discriminator(_preprocessing_kind),
    ] = Field("timm_default", description="a preset's name, or the steps")
    precision: Annotated[Literal["fp32", "bf16", "fp16"], choice(("fp32", "bf16", "fp16"))] = (
        Field("fp32", description="arithmetic of the frozen forward pass")
    )


class Features(_Section):
    """What is kept of the backbone's output."""

    dtype: Annotated[Literal["float16", "float32"], choice(("float16", "float32"))] = Field(
        "float16", description="type of the stored features"
    )
    shard_size: Annotated[int, integer(1, MAX_COUNT)] = Field(
        512, description="images per shard; changes no result and no key"
    )
    pooling: Annotated[Literal["token", "avg"], choice(("token", "avg"))] = Field(
        "token", description="class token, or mean of the patch tokens"
    )


class ExtractResources(_Section):
    """One task that extracts a shard of features."""

    cpus: Annotated[float, _cpus] = Field(1, description="CPU cores")
    gpus: Annotated[float, _gpus] = Field(0, description="GPUs; a fraction shares one")
    batch_size: Annotated[int | None, optional(integer(1, 1_000_000))] = Field(
        None, description="images per forward pass; null: found by measuring"
    )


class FitResources(_Section):
    """One task that fits a closed-form method."""

    cpus: Annotated[float, _cpus] = Field(1, description="CPU cores")


class TrainResources(_Section):
    """The worker group that trains a method."""

    workers: Annotated[int, integer(1, 10_000)] = Field(1, description="processes of one training")
    cpus: Annotated[float, _cpus] = Field(1, description="CPU cores of each worker")
    gpus: Annotated[float, _gpus] = Field(0, description="GPUs of each worker")


class Resources(_Section):
    """What stages occupy on the cluster; part of no key."""

    extract: ExtractResources = Field(ExtractResources(), description="per extraction task")
    fit: FitResources = Field(FitResources(), description="per fit")
    train: TrainResources = Field(TrainResources(), description="per training")


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


def _different(methods: tuple[Method, ...]) -> tuple[Method, ...]:
    first: dict[str, int] = {}
    for index, method in enumerate(methods):
        earlier = first.setdefault(canonical(method), index)
        if earlier != index:
            raise refuse(f"same as methods.{earlier}; keep one", (index,))
    return methods


class PipelineSpec(_Section):
    """A whole pipeline: data, stream of tasks, backbone, methods, seeds, resources."""

    pipeline: Annotated[str, _name] = Field(
        description="name of the pipeline, and of its MLflow experiment"
    )
    dataset: Annotated[Dataset, Before(_dataset, '"digits", or mapping')] = Field(
        description="images and labels"
    )
    scenario: Scenario = Field(description="stream of tasks")
    backbone: Backbone = Field(description="frozen network")
    features: Features = Field(Features(), description="stored features")
    methods: Annotated[
        tuple[Annotated[Method, Rule(_method, "method")], ...],
        listing("names or {name: {hyper-parameter: value}}"),
        AfterValidator(_different),
    ] = Field(description="methods to compare")
    seeds: Annotated[
        tuple[Annotated[int, _seed], ...],
        listing(f"integers in 0..{MAX_SEED}"),
        AfterValidator(no_duplicates),
    ] = Field((0,), description="one run of every method per seed")
    resources: Resources = Field(Resources(), description="sizes on the cluster")

    @field_validator("scenario")
    @classmethod
    def _domains_exist(cls, value: Scenario, info: ValidationInfo) -> Scenario:
        dataset = info.data.get("dataset")
        if dataset is not None and value.kind == "domain_incremental" and dataset.domain is None:
            raise refuse(
                "domain_incremental needs the column with the domains; give dataset.domain",
                ("kind",),
            )
        return value

    def method_path(self, index: int, field: str) -> str:
        """Key path of a method's hyper-parameter, for messages."""
        return f"methods.{index}.{self.methods[index][0]}.{field}"

    def to_value(self) -> dict[str, Any]:
        """The spec with all defaults as JSON values, in the form `load` accepts."""
        value = _plain(self.model_dump())
        value["methods"] = [
            {name: _plain(parameters)} if parameters else name for name, parameters in self.methods
        ]
        return value


def _plain(value: Any) -> Any:
    """Tuples as lists, at any depth."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
