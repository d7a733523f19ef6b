"""Identity of a learner's state: method, network, columns, and how it is computed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graftwork.operators.images.preprocessing import Preprocessing
from graftwork.operators.parameters.as_json import INLINE, OPTIONAL, named
from graftwork.operators.parameters.tasks import Columns


@dataclass(frozen=True, kw_only=True)
class MethodRef:
    """A method, a merge or a rule, as keys hold it.

    Args:
        name: in the table of its kind.
        version: of its card.
        hyperparameters: all of them, defaults included.
    """

    name: str
    version: int
    hyperparameters: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A backbone, as keys know it.

    Args:
        architecture: timm's name without its tag, or the name of a CLIP.
        fingerprint: sha256 of its tensors, or of those of the tower that matters.
        beside: a second network that is given the same images; None for none.
    """

    architecture: str
    fingerprint: str = field(metadata=named("backbone"))
    beside: "Network | None" = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Circumstances that the last bits of a forward pass depend on.

    Args:
        device: "cpu" or "cuda".
        precision: "fp32", "bf16" or "fp16".
        torch: its version, major and minor.
        compile: whether the network is compiled; None where a stage has no learner.
        heads: "fp32" where a learner's classifier is more exact than its network; None where both
            are alike, or a stage has no learner.
    """

    device: str
    precision: str
    torch: str
    compile: bool | None = field(default=None, metadata=OPTIONAL)
    heads: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class LearnerRef:
    """Identity of a learner's state after a task.

    Args:
        method: the method that learns.
        seed: of the run.
        task: what the method may know of the task.
        network: the backbone.
        preprocessing: the test transform.
    """

    method: MethodRef
    seed: int
    task: Columns
    network: Network = field(metadata=INLINE)
    preprocessing: Preprocessing
