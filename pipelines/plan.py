"""From a spec to a graph of stages.

Planning reads the data set's index and the backbone's fingerprint (both remembered in the store)
and is pure from there on: the same bytes give the same keys on any machine.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.graph import walk
from operators import backbone as backbones
from operators import dataset as datasets
from operators import preprocessing as preprocessings
from operators.backbone import Backbone
from operators.dataset import Dataset, Split
from operators.errors import BadDataError, ConfigError, IncompatibleError
from operators.preprocessing import Preprocessing
from operators.scenario import OrderName, Task, tasks
from operators.stage import Resources, Stage
from operators.store import Memo
from pipelines.spec import Loaded
from pipelines.spec_model import BuiltinDataset, PipelineSpec


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of the spec with every hyper-parameter resolved.

    Args:
        name: name in `METHODS`.
        hyperparameters: all of them, defaults included.
        card: the method's card as JSON values.
        label: the name, with what the spec sets where a method stands in it twice.
    """

    name: str
    hyperparameters: dict[str, Any]
    card: dict[str, Any]
    label: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """One method on one class order with one seed: two stages of its own."""

    method: Method
    order: OrderName
    tasks: tuple[Task, ...]
    seed: int
    fit: Stage
    evaluate: Stage


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The graph of a spec, with what the stages were made of."""

    spec: PipelineSpec
    dataset: Dataset
    backbone: Backbone
    preprocessing: Preprocessing
    features: dict[str, tuple[Stage, ...]]
    runs: tuple[Run, ...]

    @property
    def targets(self) -> list[Stage]:
        """What the run is for: the evaluations."""
        return [run.evaluate for run in self.runs]

    def images(self, stage: Stage) -> int:
        """Images of a feature shard."""
        return self._images[stage.key]

    @cached_property
    def _images(self) -> dict[str, int]:
        size = self.spec.features.shard_size
        counts = {}
        for split in (self.dataset.train, self.dataset.test):
            for number, stage in enumerate(self.features[split.name]):
                counts[stage.key] = min(size, len(split.labels) - number * size)
        return counts

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Every stage once, inputs before what reads them."""
        return walk(self.targets)


def make_plan(loaded: Loaded, memo: Memo) -> Plan:
    """The graph of a spec.

    Raises:
        ConfigError: the spec asks for what does not exist; all problems at once.
        BadDataError: the data cannot be used.
        IncompatibleError: the weights do not fit the backbone.
    """
    with loaded.locating():
        return _make_plan(loaded, memo)


def _make_plan(loaded: Loaded, memo: Memo) -> Plan:
    spec = loaded.spec
    methods, backbone = _resolve(loaded, memo)
    dataset = datasets.index(spec.dataset.model_dump(mode="json"), memo)
    given = spec.backbone.preprocessing
    preprocessing = preprocessings.resolve(
        given if isinstance(given, str) else given.model_dump(), backbone.data_config
    )
    _check_input_size(preprocessing, backbone)
    features = {
        split.name: feature_stages(spec, split, backbone, preprocessing)
        for split in (dataset.train, dataset.test)
    }
    return Plan(
        spec=spec,
        dataset=dataset,
        backbone=backbone,
        preprocessing=preprocessing,
        features=features,
        runs=tuple(_runs(spec, dataset, features, methods)),
    )


def _resolve(loaded: Loaded, memo: Memo) -> tuple[tuple[Method, ...], Backbone]:
    """Methods and backbone, before a look at the data, which may take long."""
    problems: list[ConfigError | IncompatibleError] = []
    methods, backbone, spec = None, None, loaded.spec
    try:
        methods = resolve_methods(loaded, memo)
    except ConfigError as error:
        problems.append(error)
    try:
        backbone = backbones.resolve(
            spec.backbone.model, spec.backbone.weights, spec.features.pooling, memo
        )
    except (ConfigError, IncompatibleError) as error:
        problems.append(error)
    if methods is None or backbone is None:
        raise type(problems[0])("\n".join(map(str, problems))) from problems[0]
    return methods, backbone


def resolve_methods(loaded: Loaded, memo: Memo) -> tuple[Method, ...]:
    """The spec's methods with all hyper-parameters; asks the memo before importing torch.

    Raises:
        ConfigError: unknown methods or hyper-parameters, all of them at once.
    """
    source = _source_digest()
    requested = loaded.spec.methods
    names = [name for name, _ in requested]
    resolved, problems = [], []
    for number, (name, given) in enumerate(requested):
        preimage = {"kind": "method", "name": name, "given": given, "source": source}
        known = memo.get(preimage)
        if known is None:
            from operators import describe  # imports torch

            found, wrong = describe.method(name, given)
            problems += [(f"methods.{number}{path}", what) for path, what in wrong]
            if wrong:
                continue
            known = json.dumps(found).encode()
            memo.put(preimage, known)
        facts = json.loads(known)
        label = name if names.count(name) == 1 else f"{name} {_short(given)}".strip()
        resolved.append(Method(name=name, label=label, **facts))
    if problems:
        raise loaded.error(problems)
    return tuple(resolved)


def _check_input_size(preprocessing: Preprocessing, backbone: Backbone) -> None:
    """A ViT's position embeddings fit one size of image, unless timm says otherwise."""
    height = backbone.data_config["input_size"][1]
    fixed = backbone.data_config.get("fixed_input_size", False)
    if fixed and preprocessing.crop not in (None, height):
        raise ConfigError(
            f"backbone.preprocessing: gives images of {preprocessing.crop} pixels, but "
            f"{backbone.model} takes {height}; choose another preprocessing"
        )


def feature_stages(
    spec: PipelineSpec, split: Split, backbone: Backbone, preprocessing: Preprocessing
) -> tuple[Stage, ...]:
    """The feature shards of a split: consecutive samples, in the data set's order.

    Neither labels nor places are in the keys: relabelling or moving the data changes no feature,
    and appended samples leave full shards as they are.
    """
    resources, size = spec.resources.extract, spec.features.shard_size
    max_pixels = None if isinstance(spec.dataset, BuiltinDataset) else spec.dataset.max_pixels
    count = len(split.labels)
    starts = range(0, count, size)
    keyed = {
        # The same tensors in another architecture (another activation, say) are another network.
        "architecture": backbone.model.partition(".")[0],
        "backbone": backbone.fingerprint,
        "preprocessing": preprocessing.to_json(),
        "pooling": spec.features.pooling,
        "dtype": spec.features.dtype,
        "numerics": {
            "device": "cuda" if resources.gpus else "cpu",
            "precision": spec.backbone.precision,
            "torch": ".".join(version("torch").split(".")[:2]),
        },
    }
    return tuple(
        Stage(
            operator="features",
            parameters=keyed | {"images": split.images_digest(start, min(start + size, count))},
            hints={
                "places": split.places(start, min(start + size, count)),
                "model": backbone.model,
                "weights": backbone.weights,
                "batch_size": resources.batch_size,
                "cpus": resources.cpus,
                "max_pixels": max_pixels,
            },
            resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
            label=f"features {split.name} {number + 1}/{len(starts)}",
        )
        for number, start in enumerate(starts)
    )


def _runs(
    spec: PipelineSpec,
    dataset: Dataset,
    features: dict[str, tuple[Stage, ...]],
    methods: Iterable[Method],
) -> Iterable[Run]:
    scenario = spec.scenario
    cpus = Resources(cpus=spec.resources.fit.cpus)
    train, test = dataset.train.stage(), dataset.test.stage()
    num_classes = len(dataset.classes)
    domains = tuple(range(len(dataset.domains)))
    streams: list[tuple[OrderName, tuple[Task, ...], list[dict[str, list[int]]]]] = []
    for order in scenario.orders:
        stream = tasks(
            scenario.kind,
            num_classes,
            dataset.domains,
            scenario.initial,
            scenario.increment,
            order,
        )
        described = [_task_json(task) for task in stream]
        _check_rows(dataset, described, order)
        streams.append((order, stream, described))
    everything = [_task_json(Task(index=0, classes=tuple(range(num_classes)), domains=domains))]
    for method in methods:
        description = {
            "name": method.name,
            "version": method.card["version"],
            "hyperparameters": method.hyperparameters,
        }
        separable = method.card["separable"] and scenario.kind == "class_incremental"
        for order, stream, described in streams:
            for seed in spec.seeds:
                label = f"{method.label} order {order} seed {seed}"
                used_seed = seed if method.card["uses_seed"] else None
                fit = Stage(
                    operator="fit",
                    parameters={
                        "method": description,
                        "seed": used_seed,
                        "num_classes": num_classes,
                        # One fit on all classes serves every order of a separable method.
                        "tasks": everything if separable else described,
                    },
                    inputs={"features": features["train"], "dataset": (train,)},
                    hints={"cpus": spec.resources.fit.cpus},
                    resources=cpus,
                    label=f"fit {method.label if separable else label}",
                )
                evaluate = Stage(
                    operator="evaluate",
                    parameters={
                        "method": description,
                        "separable": separable,
                        "order": order,
                        "seed": seed,
                        "num_classes": num_classes,
                        "tasks": described,
                    },
                    inputs={
                        "model": (fit,),
                        "features": features["test"],
                        "dataset": (test,),
                    },
                    hints={"cpus": spec.resources.fit.cpus},
                    resources=cpus,
                    label=f"evaluate {label}",
                )
                yield Run(
                    method=method, order=order, tasks=stream, seed=seed, fit=fit, evaluate=evaluate
                )


def _check_rows(dataset: Dataset, stream: Sequence[dict[str, list[int]]], order: OrderName) -> None:
    """Every task needs rows to learn from and rows to be tested on."""
    for split in (dataset.train, dataset.test):
        present = set(zip(split.labels.tolist(), split.domains.tolist(), strict=True))
        for number, task in enumerate(stream):
            if not any((c, d) in present for c in task["classes"] for d in task["domains"]):
                where = ", ".join(dataset.domains[d] for d in task["domains"])
                raise BadDataError(
                    f"scenario: task {number} of order {order} has no {split.name} images"
                    + (f" (domain {where})" if where else "")
                )


def _task_json(task: Task) -> dict[str, list[int]]:
    return {"classes": list(task.classes), "domains": list(task.domains)}


def _short(given: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in given.items())


def _source_digest() -> str:
    """Digest of the methods' sources: what the memo remembers of them holds for these alone."""
    import methods

    total = hashlib.sha256()
    for path in sorted(Path(next(iter(methods.__path__))).glob("*.py")):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()
