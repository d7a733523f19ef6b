"""Parameters of the operators before any learning: dataset, features, exemplars and text."""

from dataclasses import dataclass, field

from graftwork.operators.images.preprocessing import Preprocessing
from graftwork.operators.parameters.as_json import INLINE, OPTIONAL, named
from graftwork.operators.parameters.learners import MethodRef, Network, Numerics
from graftwork.operators.parameters.tasks import Columns


@dataclass(frozen=True, kw_only=True)
class DatasetParameters:
    """Parameters of `dataset`.

    Args:
        digest: of images, labels and domains in their order.
        classes: how many there are.
        domains: their names.
    """

    digest: str = field(metadata=named("split"))
    classes: int
    domains: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Graft:
    """Training that adapted a backbone on the first task.

    Args:
        method: the first session.
        task: what it knew of the task.
        seed: of the run.
    """

    method: MethodRef
    task: Columns
    seed: int


@dataclass(frozen=True, kw_only=True)
class FeatureKind:
    """Everything besides the image that a stored feature depends on.

    Args:
        network: the backbone.
        preprocessing: the test transform.
        pooling: what becomes the feature.
        dtype: "float16" or "float32", of what is stored.
        numerics: of the forward passes.
        graft: what adapted the backbone; None for the frozen one.
    """

    network: Network = field(metadata=INLINE)
    preprocessing: Preprocessing
    pooling: str
    dtype: str
    numerics: Numerics
    graft: Graft | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class ShardParameters:
    """Parameters of `features`.

    Args:
        kind: what the features depend on.
        digest: of the shard's images.
    """

    kind: FeatureKind = field(metadata=INLINE)
    digest: str = field(metadata=named("images"))


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A way to choose exemplars.

    Args:
        selection: "herding", "barycenter" or "random".
        seed: of what is drawn; None where nothing is.
        features: those that herding looks at; None where nothing is looked at.
    """

    selection: str
    seed: int | None = field(default=None, metadata=OPTIONAL)
    features: FeatureKind | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class RankParameters:
    """Parameters of `exemplars`.

    Args:
        ranking: how they are chosen.
        digest: of the images of one class in one domain.
    """

    ranking: Ranking = field(metadata=INLINE)
    digest: str = field(metadata=named("images"))


@dataclass(frozen=True, kw_only=True)
class TextKind:
    """Everything besides the name that the features of a class's texts depend on.

    Args:
        network: the CLIP, by the fingerprint of its text tower.
        templates: texts with one `{}` for a name.
        open_clip: version of the library that has the tokeniser.
        numerics: of the forward passes.
    """

    network: Network = field(metadata=INLINE)
    templates: tuple[str, ...]
    open_clip: str
    numerics: Numerics


@dataclass(frozen=True, kw_only=True)
class TextParameters:
    """Parameters of `text`.

    Args:
        kind: what the features depend on.
        names: of the classes.
    """

    kind: TextKind = field(metadata=INLINE)
    names: tuple[str, ...]
