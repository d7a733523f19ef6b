"""Document that a run returns: results with their metrics, and what was computed for them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from graftwork.operators.evaluation.metrics import Summary
from graftwork.operators.streams.scenario import OrderName


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A result that a merge or an ensemble was made of.

    Args:
        label: its method, with the hyper-parameters that were given.
        order: class order.
        seed: seed of the training.
        mlflow_run_id: its run; None while MLflow was away.
    """

    label: str
    order: OrderName
    seed: int
    mlflow_run_id: str | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """A method on one class order with one seed.

    Args:
        method: name in `METHODS`, or the kind of a merge or an ensemble.
        label: the method, with the hyper-parameters that were given.
        hyperparameters: all of them, defaults included.
        order: class order.
        seed: seed of the training.
        summary: all metrics, in percent: accuracies, matrix, curves, confusion.
        trainable_parameters: numbers that were trained.
        forwards: forward passes per test image.
        batch_information_at_test: a test image's prediction depends on its batch.
        seconds: of its fit and its evaluation, whenever they were computed.
        cached: it was stored before this run began.
        mlflow_run_id: its run; None while MLflow was away.
        parents: what it was made of.
    """

    method: str
    label: str
    hyperparameters: Mapping[str, Any]
    order: OrderName
    seed: int
    summary: Summary
    trainable_parameters: int
    forwards: int
    batch_information_at_test: bool
    seconds: float
    cached: bool
    mlflow_run_id: str | None
    parents: tuple[Parent, ...] = ()

    @property
    def metrics(self) -> Mapping[str, float]:
        """The single numbers by name, in percent: `a_last`, `a_avg`, `forgetting`, `bwt`, ..."""
        return self.summary.finals()

    def to_json(self) -> dict[str, Any]:
        """An entry of `results` of `graftwork run --json`: metrics among the other keys."""
        fields = {name: value for name, value in vars(self).items() if name != "summary"}
        return {
            **fields,
            "hyperparameters": dict(self.hyperparameters),
            "matrix": self.summary.matrix,
            "curve": self.summary.curve,
            **self.metrics,
            "seconds": round(self.seconds, 3),
            "parents": [asdict(parent) for parent in self.parents],
        }


@dataclass(frozen=True, kw_only=True)
class StageCounts:
    """Number of stages of a run, and of those computed, cached and failed."""

    total: int
    computed: int
    cached: int
    failed: int = 0


@dataclass(frozen=True, kw_only=True)
class Records:
    """Place of the run in MLflow.

    Args:
        tracking_uri: without passwords.
        experiment_id, run_id: None while MLflow was away.
    """

    tracking_uri: str
    experiment_id: str | None
    run_id: str | None


@dataclass(frozen=True, kw_only=True)
class Document:
    """A run that succeeded.

    Args:
        pipeline: its name, which is that of the MLflow experiment.
        seconds: from the start of planning to the last result.
        stages: how many were computed and how many were stored already.
        images_forwarded: images that went through a network in this run.
        results: one for every method, class order and seed, and for each merge and ensemble.
        mlflow: where the records are.
        status: "succeeded".
    """

    pipeline: str
    seconds: float
    stages: StageCounts
    images_forwarded: int
    results: tuple[Result, ...]
    mlflow: Records
    status: Literal["succeeded"] = "succeeded"

    def to_json(self) -> dict[str, Any]:
        """The document that `graftwork run --json` prints."""
        return {
            "pipeline": self.pipeline,
            "status": self.status,
            "seconds": round(self.seconds, 3),
            "stages": asdict(self.stages),
            "images_forwarded": self.images_forwarded,
            "results": [result.to_json() for result in self.results],
            "mlflow": asdict(self.mlflow),
        }
