"""What all runs of a spec share: data, backbone, preprocessing, and the stages made of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from operators.augmentation import AUGMENTATIONS
from operators.backbone import Backbone
from operators.dataset import Dataset, Split
from operators.errors import ConfigError, IncompatibleError
from operators.preprocessing import Preprocessing
from operators.stage import Resources, Stage
from operators.store import library_versions
from pipelines.spec_model import BuiltinDataset, PipelineSpec

if TYPE_CHECKING:
    from pipelines.runs import Method


@dataclass(frozen=True, kw_only=True, eq=False)
class Trunk:
    """Data, backbone and preprocessing of a spec.

    Args:
        spec: the spec.
        dataset: its images.
        backbone: the network.
        preprocessing: the test transform.
    """

    spec: PipelineSpec
    dataset: Dataset
    backbone: Backbone
    preprocessing: Preprocessing
    _made: dict[str, tuple[Stage, ...]] = field(default_factory=dict)
    _counts: dict[str, np.ndarray] = field(default_factory=dict)

    def features(self, split: Split) -> tuple[Stage, ...]:
        """The shards of the frozen backbone's features of a split."""
        if split.name not in self._made:
            self._made[split.name] = self.shards(split)
        return self._made[split.name]

    def shards(
        self, split: Split, graft: Mapping[str, Any] | None = None, model: Stage | None = None
    ) -> tuple[Stage, ...]:
        """The feature shards of a split: consecutive samples, in the data set's order.

        Neither labels nor places are in the keys: relabelling or moving the data changes no
        feature, and appended samples leave full shards as they are.

        Args:
            graft: description of what adapted the backbone; None for the frozen one.
            model: the stage that trained it.
        """
        spec = self.spec
        resources, size, count = spec.resources.extract, spec.features.shard_size, len(split)
        starts = range(0, count, size)
        keyed = {
            **self.network(),
            "preprocessing": self.preprocessing.to_json(),
            "pooling": spec.features.pooling,
            "dtype": spec.features.dtype,
            "numerics": self.numerics(resources.gpus),
            **({} if graft is None else {"graft": dict(graft)}),
        }
        adapted = "" if graft is None else "adapted "
        return tuple(
            Stage(
                operator="features",
                parameters=keyed | {"images": split.images_digest(start, stop)},
                inputs={} if model is None else {"graft": (model,)},
                hints=self.hints(
                    split,
                    partial(np.arange, start, stop),
                    images=stop - start,
                    batch_size=resources.batch_size,
                    cpus=resources.cpus,
                ),
                resources=Resources(cpus=resources.cpus, gpus=resources.gpus),
                label=f"{adapted}features {split.name} {number + 1}/{len(starts)}",
            )
            for number, start in enumerate(starts)
            for stop in [min(start + size, count)]
        )

    def network(self) -> dict[str, Any]:
        """The backbone, as keys know it."""
        return {
            # The same tensors in another architecture (another activation, say) are another net.
            "architecture": self.backbone.model.partition(".")[0],
            "backbone": self.backbone.fingerprint,
        }

    def numerics(self, gpus: float) -> dict[str, Any]:
        """What the last bits of a forward pass depend on."""
        return {
            "device": "cuda" if gpus else "cpu",
            "precision": self.spec.backbone.precision,
            "torch": ".".join(library_versions()["torch"].split(".")[:2]),
        }

    def hints(self, split: Split, rows: Callable[[], np.ndarray], **more: Any) -> "Hints":
        """Where backbone and images are.

        Args:
            rows: the images' rows of the split, ascending; asked for only if a stage is sent out.
            more: further hints.
        """
        given = self.spec.dataset
        return Hints(
            lambda: _places(split, rows()),
            {
                **self.where(),
                "max_pixels": None if isinstance(given, BuiltinDataset) else given.max_pixels,
                **more,
            },
        )

    def where(self) -> dict[str, Any]:
        """Where the backbone's weights are, as hints."""
        return {
            "model": self.backbone.model,
            "weights": self.backbone.weights,
            "pooling": self.spec.features.pooling,
            "image_size": self.backbone.image_size,
        }

    def counts(self, split: Split, task: Mapping[str, Sequence[int]]) -> np.ndarray:
        """Images of each class of a task `{classes, domains}`, in the order of its classes."""
        if split.name not in self._counts:
            shape = (len(self.dataset.classes), len(self.dataset.domains))
            table = np.zeros(shape, dtype=np.int64)
            np.add.at(table, (split.labels, split.domains), 1)
            self._counts[split.name] = table
        return self._counts[split.name][np.ix_(task["classes"], task["domains"])].sum(axis=1)


class Hints(Mapping[str, Any]):
    """Hints of a stage, with the places of its images worked out when somebody looks at them.

    A sweep plans ten thousand stages, of which few are sent to a worker.
    """

    def __init__(self, places: Callable[[], dict[str, Any]], fixed: Mapping[str, Any]) -> None:
        self._places, self._fixed = places, fixed

    def __getitem__(self, name: str) -> Any:
        return self._places() if name == "places" else self._fixed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(("places", *self._fixed))

    def __len__(self) -> int:
        return 1 + len(self._fixed)


def _places(split: Split, rows: np.ndarray) -> dict[str, Any]:
    return split.where.at(rows).hints(0, len(rows))


def check_trainable(trunk: Trunk, methods: Iterable["Method"]) -> None:
    """Refuses what a method that trains cannot be given.

    Raises:
        IncompatibleError: the backbone has blocks that the methods' seams do not fit.
        ConfigError: precision, pooling or preprocessing do not suit.
    """
    trained = [method for method in methods if method.trains]
    if not trained:
        return
    spec, backbone = trunk.spec, trunk.backbone
    name = trained[0].name
    if backbone.refused:
        raise IncompatibleError(
            f"backbone.model: {name} trains on ViTs with timm's standard blocks, not on "
            f"{backbone.model}: {backbone.refused}"
        )
    if spec.backbone.precision == "fp16":
        raise ConfigError(f"backbone.precision: {name} trains in fp32 or bf16, got fp16")
    if spec.features.pooling != backbone.natural_pooling:
        raise ConfigError(
            f"features.pooling: {name} reads the backbone's own pooling, "
            f"{backbone.natural_pooling}, got {spec.features.pooling}"
        )
    _check_crop(trunk, trained)


def _check_crop(trunk: Trunk, trained: Sequence["Method"]) -> None:
    for method in trained:
        value = AUGMENTATIONS[method.recipe["augmentation"]]
        if value != AUGMENTATIONS["none"] and trunk.preprocessing.crop is None:
            raise ConfigError(
                f"backbone.preprocessing: augmentation {method.recipe['augmentation']} of "
                f"{method.name} needs a crop size; set preprocessing.crop"
            )
