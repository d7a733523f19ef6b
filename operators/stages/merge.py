"""Merges states of trained methods: what a stage does with the functions of `operators/merging`.

The models are states after tasks, in the layout of one method's learner; the result is one more,
in the layout of the newest, and is predicted with like any other.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graftwork.methods.contracts.card import State
from graftwork.methods.contracts.trained import Task, learned
from graftwork.methods.networks import network as networks
from graftwork.operators import building, merging
from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.backbones import loading
from graftwork.operators.errors import Diverged
from graftwork.operators.merging import readers
from graftwork.operators.merging.apply import Merged
from graftwork.operators.merging.contract import Merge
from graftwork.operators.merging.policy import Policy
from graftwork.operators.merging.readers import InMemory, Mean, Reader, TensorFile
from graftwork.operators.store import Store
from graftwork.operators.training import loop, opening, settings

FILE = "state.safetensors"
STATISTICS = "statistics.safetensors"


def run(work: Assignment, store: Store) -> Result:
    """The operator `merge`: one state of several, read and written tensor by tensor.

    Raises:
        DamagedStage: an input is damaged.
        Diverged: a merged tensor holds NaN or infinity.
        IncompatibleError: the models do not fit together, or the backbone changed since the plan.
    """
    keyed = work.parameters
    torch.set_num_threads(max(1, int(work.hints["cpus"])))
    merge: Merge = merging.build(keyed["merge"]["name"], keyed["merge"]["hyperparameters"])
    given = work.inputs("models")
    with ExitStack() as open_files:

        def opened(stage: tuple[str, str], name: str) -> TensorFile:
            return TensorFile(open_files.enter_context(store.file(*stage, name)))

        states = [opened(stage, FILE) for stage in given]
        base, policy = _surroundings(work, merge)
        merged = Merged(
            merge,
            states,
            base,
            [
                Mean([opened(part, STATISTICS) for part in work.inputs(f"statistics {number}")])
                for number in range(len(states))
            ]
            if merge.card.statistics
            else None,
            policy,
        )
        content = readers.to_bytes(merged.specs, _finite(merged, work.label))
    facts = [store.manifest(*stage)["facts"] for stage in given]
    return Result(
        files={FILE: content},
        facts={
            "models": len(states),
            "trainable_parameters": max(f["trainable_parameters"] for f in facts),
            "state_bytes": sum(spec.bytes for spec in merged.specs.values()),
        },
    )


def _finite(merged: Merged, label: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in merged:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise Diverged(f"{label}: {name} is NaN or infinite; lower the merge's scale")
        yield name, tensor


def _surroundings(work: Assignment, merge: Merge) -> tuple[Reader | None, Policy]:
    """The state before training, and what is known of the tensors, from a learner of the method."""
    keyed = work.parameters
    # The start of a chain is that of its first task; the rows it lacks are not merged anyway.
    task = opening.task_of({"task": keyed["start"]})
    learner, backbone = loop.open_learner(
        building.trained(keyed["method"]),
        _network(work),
        task,
        None,
        settings.Settings(seed=keyed["seed"]),
    )
    policy = Policy(
        head=keyed["head"],
        buffers=frozenset(name for name, _ in learner.named_buffers()),
        heads=_heads(work, learner.state_dict(), task)
        if keyed["head"] == "newest"
        else frozenset(),
        same_names=keyed["over"] != "tasks",
    )
    if not merge.card.base:
        return None, policy
    if keyed["over"] == "tasks":
        return InMemory(learned(learner, backbone)), policy
    # Models of several seeds or methods have the pre-trained weights in common, and nothing new.
    own = {id(tensor) for tensor in backbone}
    everything = learner.state_dict(keep_vars=True).items()
    return InMemory({n: t for n, t in everything if id(t) in own and t.requires_grad}), policy


def _network(work: Assignment) -> Any:
    """The network as loaded, not kept for other stages: a copy would be one more checkpoint."""
    hints, keyed = work.hints, work.parameters
    network = loading.load_apart(
        hints["model"], hints["weights"], hints["pooling"], keyed["backbone"], hints["image_size"]
    )
    return networks.check(network)


def _heads(work: Assignment, state: State, task: Task) -> frozenset[str]:
    """Names of what has a row per class: with one class more it has another shape."""
    more = replace(task, seen=task.seen + 1, current=(*task.current, task.seen))
    keyed = work.parameters
    other, _ = loop.open_learner(
        building.trained(keyed["method"]),
        _network(work),
        more,
        None,
        settings.Settings(seed=keyed["seed"]),
    )
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    return frozenset(name for name, t in state.items() if shapes.get(name, t.shape) != t.shape)
