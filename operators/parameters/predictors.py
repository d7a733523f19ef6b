"""Descriptions of predictors, as a served model's `model.json` holds them; files name states."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from graftwork.operators.parameters.as_json import OPTIONAL
from graftwork.operators.parameters.learners import MethodRef
from graftwork.operators.parameters.tasks import Columns


@dataclass(frozen=True, kw_only=True)
class GraftPart:
    """A first session that adapted the backbone.

    Args:
        method: the first session.
        task: what it knew of the task.
        seed: of the run.
        state: file of what it left.
    """

    method: MethodRef
    task: Columns
    seed: int
    state: str


@dataclass(frozen=True, kw_only=True)
class FittedPart:
    """A closed-form classifier on features of the frozen backbone, an adapted one, or both.

    Args:
        method: the classifier.
        seed: of what it draws.
        state: file of its state.
        learned: class ids of the columns.
        graft: what adapted the backbone; None for the frozen one.
        keeps_frozen: whether the frozen features stand before the adapted ones.
    """

    kind: Literal["fitted"] = "fitted"
    method: MethodRef
    seed: int
    state: str
    learned: tuple[int, ...]
    graft: GraftPart | None
    keeps_frozen: bool


@dataclass(frozen=True, kw_only=True)
class TrainedPart:
    """State of a trained method after its last task; also joined or merged.

    Args:
        method: whose learner it is.
        seed: of the run.
        task: what it knew of the last task.
        learned: class ids of the columns.
        state: file of its state.
        paired: true for a learner on both networks of the model; None for one on a single one.
    """

    kind: Literal["trained"] = "trained"
    method: MethodRef
    seed: int
    task: Columns
    learned: tuple[int, ...]
    state: str
    paired: bool | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class FusedPart:
    """The blend of two branches: one on the backbone, one on the network beside it.

    Args:
        method: the fused method.
        learned: class ids of the columns.
        state: file of the blend after the last task.
        clip: the branch on the backbone.
        vit: the branch on the network beside it.
    """

    kind: Literal["fused"] = "fused"
    method: MethodRef
    learned: tuple[int, ...]
    state: str
    clip: TrainedPart
    vit: TrainedPart


@dataclass(frozen=True, kw_only=True)
class EnsemblePart:
    """A rule over the scores of several models.

    Args:
        rule: the rule.
        learned: class ids of the columns, ascending.
        members: predictors of any kind, as JSON: each kind reads its own.
    """

    kind: Literal["ensemble"] = "ensemble"
    rule: MethodRef
    learned: tuple[int, ...]
    members: tuple[Mapping[str, Any], ...]


Part = FittedPart | TrainedPart | FusedPart | EnsemblePart
