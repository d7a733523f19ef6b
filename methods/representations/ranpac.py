"""RanPAC: a first session if wanted, a frozen random projection, then ridge regression."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from graftwork.methods.contracts.adapted import Parts
from graftwork.methods.contracts.augmentations import Augmentation
from graftwork.methods.contracts.card import Card, State
from graftwork.methods.contracts.fitted import Rows
from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.parts import first_session
from graftwork.methods.parts.prompt_tokens import PromptInit
from graftwork.methods.parts.sums import by_row, columns
from graftwork.methods.representations import moments, projection, ridge


@dataclass(frozen=True, kw_only=True)
class RanPAC:
    """Random projection with ReLU and a ridge regression to one-hot targets, from sums.

    McDonnell et al., https://arxiv.org/abs/2307.02251, Algorithm 1. Phase 1, which adapts the
    backbone on the first task, is left out by default ("no phase 1" in its tables); for CIFAR-100
    the paper has `first_session: adapter`, for ImageNet-R `ssf`. With a first session, the rows are
    the features of the adapted backbone alone.
    Shapes: N rows, D feature width, M projection width (D without projection), C classes seen,
    K all classes.

    Args:
        projection_dim: M, width of the random projection; 0 leaves it out.
        lambda_mode: which rows choose the strength of the ridge regression: held-out rows of the
            newest task as in the paper, held-out rows of all tasks seen, or none.
        ridge: the strength if it is fixed, or if a task is too small to hold out rows.
        score: plain outputs as in the paper, or the cosine between the projected row and each
            class's weights as in LAMDA-PILOT.
        first_session: what is trained on the first task, if anything; the fields below belong to
            it.
        epochs: passes over the images of the first task.
        batch_size: images per step of the first session, of all workers together.
        lr: learning rate of the first session.
        weight_decay: of everything that the first session trains.
        augmentation: of the training images of the first session.
        prompt_length: prompt tokens of VPT, in every block if deep.
        vpt_init: start of the prompts: uniform as VPT, zeros as the authors' code, where all stay
            equal.
        bottleneck: width of the adapters.
    """

    card: ClassVar[Card] = Card(
        title="RanPAC",
        paper="https://arxiv.org/abs/2307.02251",
        summary="Ridge regression on a frozen random projection of the features.",
        version=2,
        memory="what the first session trains; 2 * (M * M + M * C) floats, or N * D while fewer "
        "than M rows were seen",
        uses_seed=True,
        contract="adapted",
    )

    projection_dim: int = 10_000
    lambda_mode: Literal["last_task", "cumulative", "fixed"] = "last_task"
    ridge: float = 1.0
    score: Literal["linear", "cosine"] = "linear"
    first_session: Literal["none", "finetune", "vpt_shallow", "vpt_deep", "ssf", "adapter"] = "none"
    epochs: int = 20
    batch_size: int = 48
    lr: float = 0.01
    weight_decay: float = 5e-4
    augmentation: Augmentation = "lamda"
    prompt_length: int = 5
    vpt_init: PromptInit = "uniform"
    bottleneck: int = 64

    def __post_init__(self) -> None:
        allowed = 0 <= self.projection_dim <= 100_000
        require(
            self,
            {
                "projection_dim": (allowed, "between 0 and 100000"),
                "ridge": (self.ridge > 0, "greater than 0"),
                **first_session.rules(self),
            },
        )

    @property
    def uses_seed(self) -> bool:
        """Not without a projection, held-out rows and a first session."""
        drawn = self.projection_dim > 0 or self.lambda_mode != "fixed"
        return drawn or self.first_session != "none"

    def parts(self) -> Parts:
        """The first session if there is one; the classifier is this method itself."""
        kind = self.first_session
        session = None if kind == "none" else first_session.of(kind, self)
        return Parts(first_session=session, classifier=None, keeps_frozen=False)

    def statistics(self, rows: Rows, seed: int) -> State:
        """The rows themselves while N < M, their sums from then on; see `moments.collect`."""
        width = self.projection_dim or rows.features.shape[1]
        return moments.collect(rows, seed, width, self._sums)

    def add(self, a: State, b: State) -> State:
        """The statistics of both sets of rows.

        Raises:
            ValueError: the two were made with different seeds or widths.
        """
        return moments.add(a, b, self._width(a), self._sums)

    def solve(self, total: State, task: State, classes: Sequence[int], seed: int) -> State:
        """`weight` [C, M] float32; `ridge` and `ridge_used`, the strength chosen and the one that
        the factorisation needed, float64; `projection` [32] uint8, SHA-256 of the matrix.
        """
        index = columns(total["count"], classes)
        expand, held = self._expand(total), self._held_out(total)
        chosen = None
        if held is not None:
            source = task if self.lambda_mode == "last_task" else total
            chosen = moments.choose(source, expand, held)
        strength = self.ridge if chosen is None else chosen
        weights, used = moments.solve(total, expand, index, strength)
        state = {
            "weight": weights.T.float().contiguous(),
            "ridge": torch.tensor(strength, dtype=torch.float64),
            "ridge_used": torch.tensor(used, dtype=torch.float64),
        }
        if self.projection_dim:
            matrix = projection.gaussian(*total["draw"].tolist(), self.projection_dim)
            state["projection"] = projection.digest(matrix)
        return state

    def logits(self, state: State, features: Tensor, seed: int) -> Tensor:
        """Regression outputs or cosines [N, C]."""
        weight, matrix = state["weight"], None
        if self.projection_dim:
            matrix = projection.gaussian(seed, features.shape[1], self.projection_dim)
            projection.check(matrix, state["projection"])
        if self.score == "cosine":
            weight = F.normalize(weight, dim=1)

        def score(rows: Tensor) -> Tensor:
            hidden = rows.float()
            if matrix is not None:
                hidden = projection.relu_layer(hidden, matrix)
            if self.score == "cosine":
                hidden = F.normalize(hidden, dim=1)
            return hidden @ weight.T

        return by_row(score, features)

    def report(self, state: State) -> dict[str, Any]:
        """Strength chosen and used, SHA-256 of the projection."""
        facts: dict[str, Any] = {name: state[name].item() for name in ("ridge", "ridge_used")}
        if self.projection_dim:
            facts["projection_sha256"] = projection.text(state["projection"])
        return facts

    def _expand(self, state: State) -> moments.Expand:
        """The frozen layer before the regression, in float64."""
        if not self.projection_dim:
            return Tensor.double
        matrix = projection.gaussian(*state["draw"].tolist(), self.projection_dim)
        return lambda features: projection.relu_layer(features.double(), matrix)

    def _held_out(self, state: State) -> Callable[[Tensor], Tensor] | None:
        """From samples to the mask of the held-out rows; None if the strength is fixed."""
        # Differs from RanPAC/RanPAC, which holds out the last fifth of the newest task's rows in
        # the order of a shuffling loader: a hash of each sample's id needs no order of rows.
        seed = int(state["draw"][0])
        return None if self.lambda_mode == "fixed" else lambda ids: ridge.held_out(ids, seed)

    def _sums(self, state: State) -> State:
        held = self._held_out(state)
        mask = None if held is None else held(state["samples"])
        return moments.sums(state, self._expand(state), self._width(state), mask)

    def _width(self, state: State) -> int:
        return self.projection_dim or int(state["draw"][1])
