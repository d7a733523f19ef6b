"""Weighted means of models: uniform soup, EMA, SWA, WiSE-FT."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graftwork.methods.contracts.hyperparameters import require
from graftwork.methods.parts.averaging import lerp
from graftwork.operators.merging.contract import Group, Groups, MergeCard


def mean(models: Iterable[Tensor]) -> Tensor:
    """The mean of tensors of one shape; at least one."""
    tensors = iter(models)
    total, count = next(tensors).clone(), 1
    for tensor in tensors:
        total += tensor
        count += 1
    return total.div_(count)


def ema(models: Iterable[Tensor], decay: float) -> Tensor:
    """Exponential moving average: e <- decay * e + (1 - decay) * th, starting with the first."""
    tensors = iter(models)
    average = next(tensors).clone()
    for tensor in tensors:
        # At both ends what is left out must not count: 0 times infinity is NaN.
        average = lerp(average, tensor, 1 - decay)
    return average


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean of all models: uniform soup.

    Wortsman et al., https://arxiv.org/abs/2203.05482.
    """

    card: ClassVar[MergeCard] = MergeCard(
        title="Uniform soup",
        paper="https://arxiv.org/abs/2203.05482",
        summary="The mean of all models.",
        least=1,
    )

    def merger(self, groups: Groups) -> Callable[[Group], Tensor]:
        return lambda group: mean(group.models)


@dataclass(frozen=True, kw_only=True)
class EMA:
    """Exponential moving average of models in their order; the first one is the start.

    Polyak and Juditsky, https://doi.org/10.1137/0330046. After N more models the start has the
    weight decay^N.

    Args:
        decay: weight of the average when a model is added; 0 gives the newest model, 1 the oldest.
    """

    decay: float = 0.5

    card: ClassVar[MergeCard] = MergeCard(
        title="Exponential moving average",
        paper="https://doi.org/10.1137/0330046",
        summary="A mean in which newer models weigh more.",
        least=1,
        ordered=True,
    )

    def __post_init__(self) -> None:
        require(self, {"decay": (0 <= self.decay <= 1, "in 0..1")})

    def merger(self, groups: Groups) -> Callable[[Group], Tensor]:
        return lambda group: ema(group.models, self.decay)


@dataclass(frozen=True, kw_only=True)
class SWA:
    """Stochastic weight averaging: the mean of every n-th model from a certain one on.

    Izmailov et al., https://arxiv.org/abs/1803.05407. Before the first of them, the newest model.

    Args:
        start: number of the first model that counts, from 0.
        every: from there on every n-th counts.
    """

    start: int = 0
    every: int = 1

    card: ClassVar[MergeCard] = MergeCard(
        title="Stochastic weight averaging",
        paper="https://arxiv.org/abs/1803.05407",
        summary="The mean of every n-th model of a series.",
        least=1,
        ordered=True,
    )

    def __post_init__(self) -> None:
        require(
            self,
            {
                "start": (self.start >= 0, "at least 0"),
                "every": (self.every >= 1, "at least 1"),
            },
        )

    def merger(self, groups: Groups) -> Callable[[Group], Tensor]:
        def merge(group: Group) -> Tensor:
            models = group.models
            places = range(self.start, len(models), self.every) or [len(models) - 1]
            return mean(models[place] for place in places)

        return merge


@dataclass(frozen=True, kw_only=True)
class WiSEFT:
    """Interpolates between the state before training and the newest model.

    Wortsman et al., https://arxiv.org/abs/2109.01903.

    Args:
        alpha: share of the newest model; 0 gives the state before training.
    """

    alpha: float = 0.5

    card: ClassVar[MergeCard] = MergeCard(
        title="WiSE-FT",
        paper="https://arxiv.org/abs/2109.01903",
        summary="Interpolates between the state before training and the newest model.",
        least=1,
        most=1,
        base=True,
    )

    def __post_init__(self) -> None:
        require(self, {"alpha": (0 <= self.alpha <= 1, "in 0..1")})

    def merger(self, groups: Groups) -> Callable[[Group], Tensor]:
        return lambda group: lerp(group.base, group.models[-1], self.alpha)
