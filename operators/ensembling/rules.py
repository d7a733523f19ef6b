"""Rules of ensembles as values: hyper-parameters, and scores of all models to one.

Shapes: E models, N rows, K classes.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from graftwork.methods.contracts.hyperparameters import require
from graftwork.operators.ensembling import scores
from graftwork.operators.ensembling.scores import Scale, scaled

POSITIVE = "above 0"


@dataclass(frozen=True, kw_only=True)
class RuleCard:
    """Facts about a rule.

    Args:
        title: its name for people.
        paper: URL, empty for common knowledge.
        summary: what it does, in a sentence.
        version: raised when results change; part of keys.
    """

    title: str
    paper: str
    summary: str
    version: int = 1


class RuleOf(Protocol):
    """A rule with its hyper-parameters; a frozen keyword-only dataclass."""

    card: ClassVar[RuleCard]

    def combine(self, stack: Tensor) -> Tensor:
        """Scores [N, K] of the logits [E, N, K] of all models, each row by itself."""
        ...


@dataclass(frozen=True, kw_only=True)
class MeanLogit:
    """The mean of logits: up to normalisation the geometric mean of probabilities.

    Args:
        scale: of each model's scores of an image before: to mean 0 and deviation 1, to norm 1, or
            as they are.
        temperature: divides the scores after that.
    """

    scale: Scale = "none"
    temperature: float = 1.0

    card: ClassVar[RuleCard] = RuleCard(
        title="Mean of logits", paper="", summary="The mean of the models' logits."
    )

    def __post_init__(self) -> None:
        require(self, {"temperature": (self.temperature > 0, POSITIVE)})

    def combine(self, stack: Tensor) -> Tensor:
        return scores.mean_logit(scaled(stack, self.scale, self.temperature))


@dataclass(frozen=True, kw_only=True)
class MeanProb:
    """The arithmetic mean of probabilities.

    Args:
        scale: of each model's scores of an image before: to mean 0 and deviation 1, to norm 1, or
            as they are.
        temperature: divides the scores after that.
    """

    scale: Scale = "none"
    temperature: float = 1.0

    card: ClassVar[RuleCard] = RuleCard(
        title="Mean of probabilities", paper="", summary="The mean of the models' probabilities."
    )

    def __post_init__(self) -> None:
        require(self, {"temperature": (self.temperature > 0, POSITIVE)})

    def combine(self, stack: Tensor) -> Tensor:
        return scores.mean_prob(scaled(stack, self.scale, self.temperature))


@dataclass(frozen=True, kw_only=True)
class MaxLogit:
    """The largest logit of any model; needs models of one scale.

    Args:
        scale: of each model's scores of an image before: to mean 0 and deviation 1, to norm 1, or
            as they are.
        temperature: divides the scores after that.
    """

    scale: Scale = "none"
    temperature: float = 1.0

    card: ClassVar[RuleCard] = RuleCard(
        title="Largest logit", paper="", summary="The class with the largest logit of any model."
    )

    def __post_init__(self) -> None:
        require(self, {"temperature": (self.temperature > 0, POSITIVE)})

    def combine(self, stack: Tensor) -> Tensor:
        return scores.max_logit(scaled(stack, self.scale, self.temperature))


@dataclass(frozen=True, kw_only=True)
class MaxProb:
    """The largest probability of any model, each over all of its classes.

    Args:
        scale: of each model's scores of an image before: to mean 0 and deviation 1, to norm 1, or
            as they are.
        temperature: divides the scores after that.
    """

    scale: Scale = "none"
    temperature: float = 1.0

    card: ClassVar[RuleCard] = RuleCard(
        title="Largest probability", paper="", summary="The class that any model is surest of."
    )

    def __post_init__(self) -> None:
        require(self, {"temperature": (self.temperature > 0, POSITIVE)})

    def combine(self, stack: Tensor) -> Tensor:
        return scores.max_prob(scaled(stack, self.scale, self.temperature))


@dataclass(frozen=True, kw_only=True)
class Vote:
    """A vote of each model's favourite; of classes with as many votes the one with the larger mean.

    Args:
        scale: of each model's scores of an image before: to mean 0 and deviation 1, to norm 1, or
            as they are.
        temperature: divides the scores after that.
    """

    scale: Scale = "none"
    temperature: float = 1.0

    card: ClassVar[RuleCard] = RuleCard(
        title="Majority vote", paper="", summary="The class that most models choose."
    )

    def __post_init__(self) -> None:
        require(self, {"temperature": (self.temperature > 0, POSITIVE)})

    def combine(self, stack: Tensor) -> Tensor:
        return scores.vote(scaled(stack, self.scale, self.temperature))


@dataclass(frozen=True, kw_only=True)
class EnergyRoute:
    """The answer of the model with the largest negative free energy, T * logsumexp(z / T).

    Wang et al. (ESN), https://arxiv.org/abs/2211.15969.

    Args:
        scale: of each model's scores of an image before: to mean 0 and deviation 1, to norm 1, or
            as they are.
        temperature: T; near 0 the largest logit decides.
        by_size: subtract T * log of the model's number of classes.
    """

    scale: Scale = "none"
    temperature: float = 1.0
    by_size: bool = False

    card: ClassVar[RuleCard] = RuleCard(
        title="Routing by energy",
        paper="https://arxiv.org/abs/2211.15969",
        summary="The answer of the model with the largest negative free energy.",
    )

    def __post_init__(self) -> None:
        require(self, {"temperature": (self.temperature > 0, POSITIVE)})

    def combine(self, stack: Tensor) -> Tensor:
        return scores.energy_route(scaled(stack, self.scale), self.temperature, self.by_size)
