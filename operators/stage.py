"""A stage of the graph as a value, and what an operator is.

A `Stage` says what is computed: operator, parameters and inputs, which make its content key, and
beside them what is needed to compute it but changes nothing in the result (`hints`, `resources`).
An `Operator` says how: a plain function that reads inputs from the store and returns files.
Neither knows Ray; `cluster/execution/executor.py` brings them to the workers.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graftwork.operators.keys import digest

if TYPE_CHECKING:
    from graftwork.operators.store import Store
from graftwork.operators.assignment import Assignment, Result


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Resources that one attempt of a stage occupies on the cluster; never part of a key.

    Args:
        cpus: CPUs of each process.
        gpus: GPUs of each process.
        workers: processes of the stage's worker group; more than one only in a chain.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    workers: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One node of the graph, equal to another when their keys are equal.

    Args:
        operator: name in `OPERATORS`.
        parameters: JSON value with everything that changes the result.
        inputs: role -> stages, in the order in which the operator reads them.
        reads: the same, for stages whose keys are no part of this one's: the parameters name what
            is read of them (the digest of rows, the kind of features), and other stages with the
            same content would do as well.
        hints: JSON value with what is needed to compute the result and does not change it
            (places of files, batch sizes).
        resources: what the stage occupies while it runs.
        label: what people see, for example `features train 3/20`.
        group: what people see of several stages as one, for example `features train`: the shards of
            a split, the tasks of a run; empty for a stage that stands for itself.
        chain: name shared by stages that one worker group computes one after the other, unique
            in the graph and seen by people, for example `l2p order 1993 seed 0`; empty for a
            stage on its own.
    """

    operator: str
    parameters: Mapping[str, Any]
    inputs: Mapping[str, tuple["Stage", ...]] = field(default_factory=dict)
    reads: Mapping[str, tuple["Stage", ...]] = field(default_factory=dict)
    hints: Mapping[str, Any] = field(default_factory=dict)
    resources: Resources = Resources()
    label: str = ""
    group: str = ""
    chain: str = ""

    def __post_init__(self) -> None:
        # Now, while the inputs' keys are known: later, a long chain would recurse to its start.
        assert self.key

    @cached_property
    def preimage(self) -> dict[str, Any]:
        """Preimage of the key, in clear text; stored in the manifest."""
        return {
            "operator": self.operator,
            "version": OPERATORS[self.operator].version,
            "parameters": dict(self.parameters),
            "inputs": {role: [s.key for s in stages] for role, stages in self.inputs.items()},
        }

    @cached_property
    def key(self) -> str:
        """sha256 of the preimage, 64 hex digits."""
        return digest(self.preimage)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stage) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def assignment(self) -> "Assignment":
        """The stage without its ancestry: what travels to a worker."""
        return Assignment(
            key=self.key,
            preimage=self.preimage,
            hints=dict(self.hints),
            input_operators={
                role: stages[0].operator for role, stages in self.inputs.items() if stages
            },
            reads={
                role: tuple((stage.operator, stage.key) for stage in stages)
                for role, stages in self.reads.items()
            },
            label=self.label,
        )


@dataclass(frozen=True, kw_only=True)
class Operator:
    """Function that computes a kind of stage.

    Args:
        version: raised by the author when results change; part of every key.
        function: `module:name` of `(Assignment, Store) -> Result`, imported only where it runs, so
            that planning imports neither torch nor Ray.
    """

    version: int
    function: str

    def load(self) -> Callable[[Assignment, "Store"], Result]:
        module, name = self.function.split(":")
        return getattr(importlib.import_module(module), name)


OPERATORS: dict[str, Operator] = {
    "dataset": Operator(version=1, function="graftwork.operators.stages.dataset:run"),
    "features": Operator(version=1, function="graftwork.operators.stages.features:run"),
    "exemplars": Operator(version=2, function="graftwork.operators.stages.exemplars:run"),
    "text": Operator(version=1, function="graftwork.operators.stages.text:run"),
    "fit": Operator(version=2, function="graftwork.operators.stages.fit:run"),
    "train": Operator(version=2, function="graftwork.operators.stages.train:run"),
    "join": Operator(version=2, function="graftwork.operators.stages.join:run"),
    "predict": Operator(version=3, function="graftwork.operators.stages.predict:run"),
    "score": Operator(version=2, function="graftwork.operators.stages.score:run"),
    "blend": Operator(version=2, function="graftwork.operators.stages.blend:run"),
    "statistics": Operator(version=4, function="graftwork.operators.stages.statistics:run"),
    "merge": Operator(version=3, function="graftwork.operators.stages.merge:run"),
    "ensemble": Operator(version=2, function="graftwork.operators.stages.ensemble:run"),
    "evaluate": Operator(version=2, function="graftwork.operators.stages.evaluate:run"),
}
