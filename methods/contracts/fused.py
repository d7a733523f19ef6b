"""The contract of fused methods: two branches that train side by side, and a blend of their scores.

Each branch is a trained method of its own, on a network of its own; neither sees the other. After
every task the blend is fitted on the scores of both on the task's training rows, exemplars among
them, and what is tested are blended scores. Or, if its hyper-parameters say so, one learner on both
networks trains all of it by one loss.

Shapes: N rows, C classes seen.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from graftwork.methods.contracts.card import Card


@dataclass(frozen=True, kw_only=True)
class Branches:
    """Branches that a fused method consists of; each a key of `PARTS` with its hyper-parameters.

    Args:
        clip: on the spec's `backbone`.
        vit: on the spec's `vit`.

    Example:
        >>> graftwork.Branches(clip=("promptfusion_clip", {}), vit=("promptfusion_vit", {})).vit[0]
        'promptfusion_vit'
    """

    clip: tuple[str, dict[str, Any]]
    vit: tuple[str, dict[str, Any]]


class Fused(Protocol):
    """A method of two branches; a frozen keyword-only dataclass.

    Example:
        >>> method: graftwork.Fused = build("promptfusion", {})
        >>> method.branches().clip[0], method.branches().vit[0]
        ('promptfusion_clip', 'promptfusion_vit')
    """

    card: ClassVar[Card]

    def branches(self) -> Branches:
        """The branches, as the hyper-parameters have them."""
        ...

    def joint(self) -> tuple[str, dict[str, Any]] | None:
        """A key of `PARTS` and its hyper-parameters, for one learner in place of two branches."""
        ...

    def fit(self, clip: Tensor, vit: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The blend, from scores [N, C] of both branches and the columns [N] that are right."""
        ...

    def blend(self, state: dict[str, Tensor], clip: Tensor, vit: Tensor) -> Tensor:
        """Scores [N, C]; each row's from that row alone."""
        ...
