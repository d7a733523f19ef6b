"""Merges states of trained methods: what a stage does with the functions of `operators/merging`.

The models are states after tasks, in the layout of one method's learner; the result is one more,
in the layout of the newest, and is predicted with like any other.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.roles import roles
from graftwork.methods.contracts.trained import Learner, Task, learned
from graftwork.methods.networks import network as networks
from graftwork.operators import building, merging
from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.backbones import loading
from graftwork.operators.errors import Diverged, IncompatibleError
from graftwork.operators.formats.manifests import facts_of
from graftwork.operators.merging import readers
from graftwork.operators.merging.apply import Merged
from graftwork.operators.merging.contract import Merge
from graftwork.operators.merging.policy import Policy, decide
from graftwork.operators.merging.readers import Finite, InMemory, Mean, Reader, TensorFile
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.combining import MergeParameters
from graftwork.operators.parameters.hints import NetworkHints, NetworkPlace
from graftwork.operators.parameters.learners import LearnerRef
from graftwork.operators.store import Store
from graftwork.operators.training import loop, opening, settings

FILE = "state.safetensors"
STATISTICS = "statistics.safetensors"


def run(work: Assignment, store: Store) -> Result:
    """The operator `merge`: one state of several, read and written tensor by tensor.

    Raises:
        DamagedStage: an input is damaged.
        Diverged: a tensor of a model, of its statistics or of the result holds NaN or infinity.
        IncompatibleError: the models do not fit together, or the backbone changed since the plan.
    """
    parameters = from_json(MergeParameters, work.parameters)
    hints, asked = from_json(NetworkHints, work.hints), parameters.merge
    torch.set_num_threads(max(1, int(hints.cpus)))
    merge: Merge = merging.build(asked.name, asked.hyperparameters)
    given = work.inputs("models")
    with ExitStack() as open_files:

        def opened(stage: tuple[str, str], name: str) -> TensorFile:
            return TensorFile(open_files.enter_context(store.file(*stage, name)))

        # Named as people count tasks: a model is what a task, or a seed, left.
        states = [
            Finite(opened(stage, FILE), f"{work.label}: model {number + 1} of {len(given)}")
            for number, stage in enumerate(given)
        ]
        base, policy = _surroundings(parameters, hints.network, merge)
        merged = Merged(
            merge,
            states,
            base,
            [
                Finite(
                    Mean([opened(p, STATISTICS) for p in work.inputs(f"statistics {number}")]),
                    f"{work.label}: statistics of model {number + 1} of {len(given)}",
                )
                for number in range(len(states))
            ]
            if merge.card.statistics
            else None,
            policy,
        )
        content = readers.to_bytes(merged.specs, _finite(merged, work.label))
    trained = [facts_of(store, *stage).trainable_parameters for stage in given]
    return Result(
        files={FILE: content},
        facts={
            "models": len(states),
            "trainable_parameters": max(trained),
            "state_bytes": sum(spec.bytes for spec in merged.specs.values()),
        },
    )


def mismatch(learners: Sequence[LearnerRef], place: NetworkPlace) -> str:
    """Reason why models of several methods cannot be merged, by the shapes of what they hold.

    Args:
        learners: the models; nothing of them is there yet.
        place: of the backbone, whose weights are not read.

    Returns:
        Empty if they fit together.
    """
    models = []
    for ref in learners:
        network = loading.load(place.model, "random", place.pooling, place.image_size)
        learner, backbone = _opened(ref, network, opening.task_of(ref.task))
        models.append(InMemory(learned(learner, backbone)))
    try:
        decide(models, None, averages=True, policy=Policy(same_names=True))
    except IncompatibleError as error:
        return error.what
    return ""


def _finite(merged: Merged, label: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in merged:
        if not readers.is_finite(tensor):
            raise Diverged(f"{label}: {name} is NaN or infinite; lower the merge's scale")
        yield name, tensor


def _surroundings(
    parameters: MergeParameters, place: NetworkPlace, merge: Merge
) -> tuple[Reader | None, Policy]:
    """The state before training, and what is known of the tensors, from a learner of the method."""
    # The start of a chain is that of its first task; the rows it lacks are not merged anyway.
    task = opening.task_of(parameters.start)
    learner, backbone = _untrained(parameters.learner, place, task)
    newest = parameters.head == "newest"
    known = roles(learner)
    policy = Policy(
        head=parameters.head,
        statistics=frozenset(name for name, role in known.items() if role == "statistic"),
        counters=frozenset(name for name, role in known.items() if role == "counter"),
        heads=_heads(parameters.learner, place, learner.state_dict(), task)
        if newest
        else frozenset(),
        same_names=parameters.over != "tasks",
    )
    if not merge.card.base:
        return None, policy
    if parameters.over == "tasks":
        return InMemory(learned(learner, backbone)), policy
    # Models of several seeds or methods have the pre-trained weights in common, and nothing new.
    own = {id(tensor) for tensor in backbone}
    everything = learner.state_dict(keep_vars=True).items()
    return InMemory({n: t for n, t in everything if id(t) in own and t.requires_grad}), policy


def _untrained(ref: LearnerRef, place: NetworkPlace, task: Task) -> tuple[Learner, list[Tensor]]:
    """A learner that has seen nothing, and the backbone's own tensors."""
    # Not kept for other stages: a copy would be one more checkpoint.
    network = loading.load_apart(
        place.model, place.weights, place.pooling, ref.network.fingerprint, place.image_size
    )
    return _opened(ref, network, task)


def _opened(ref: LearnerRef, network: Any, task: Task) -> tuple[Learner, list[Tensor]]:
    return loop.open_learner(
        building.trained(ref.method),
        networks.check(network),
        task,
        None,
        settings.Settings(seed=ref.seed),
    )


def _heads(ref: LearnerRef, place: NetworkPlace, state: State, task: Task) -> frozenset[str]:
    """Names of what has a row per class: with one class more it has another shape."""
    more = replace(task, seen=task.seen + 1, current=(*task.current, task.seen))
    other, _ = _untrained(ref, place, more)
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    return frozenset(name for name, t in state.items() if shapes.get(name, t.shape) != t.shape)
