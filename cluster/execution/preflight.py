"""Checks before the first stage is handed to a cluster, instead of waiting forever."""

import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from graftwork.cluster.execution.policy import section
from graftwork.cluster.sessions.session import Node
from graftwork.operators.errors import ClusterLost, ConfigError, StorageError, together
from graftwork.operators.stage import Stage
from graftwork.operators.store import Store

ANSWER = 60.0
"""Seconds that a node gets to look for the store; its first worker may have to start."""


def check_resources(stages: Iterable[Stage], nodes: Sequence[Node]) -> None:
    """Refuses stages that fit on no node, and groups larger than the cluster.

    Ray would queue them without end.

    Raises:
        ConfigError: names every such request once, and what the largest node has.
    """
    problems: dict[str, None] = {}
    for stage in stages:
        cpus, gpus, workers = stage.resources.cpus, stage.resources.gpus, stage.resources.workers
        place = section(stage.operator)
        if any(cpus <= node.cpus and gpus <= node.gpus for node in nodes):
            room = sum(_room(node, cpus, gpus) for node in nodes)
            if workers > room:
                each = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
                has = f"{sum(node.cpus for node in nodes):g} CPUs"
                has += f" and {sum(node.gpus for node in nodes):g} GPUs"
                problems[
                    f"{place}.workers={workers} with {each} each, but the cluster has room for "
                    f"{room:g}: {has}; lower {place}.workers, {place}.cpus or {place}.gpus"
                ] = None
            continue
        most_cpus = max((node.cpus for node in nodes), default=0)
        most_gpus = max((node.gpus for node in nodes), default=0)
        if gpus and not any(node.gpus for node in nodes):
            problem = f"{place}.gpus={gpus:g} but the cluster has 0 GPUs"
        elif gpus > most_gpus:
            problem = f"{place}.gpus={gpus:g} but no node has more than {most_gpus:g} GPUs"
        elif cpus > most_cpus:
            problem = f"{place}.cpus={cpus:g} but no node has more than {most_cpus:g} CPUs"
        else:
            problem = f"{place}: no node has {cpus:g} CPUs and {gpus:g} GPUs at once"
        problems[problem] = None
    if problems:
        raise together([ConfigError(problem) for problem in problems])


def _room(node: Node, cpus: float, gpus: float) -> float:
    """Number of processes that fit on a node."""
    return min(
        (has // one for has, one in ((node.cpus, cpus), (node.gpus, gpus)) if one), default=1
    )


def check_store(store: Store, nodes: Sequence[Node]) -> None:
    """Makes sure that a store at a local path is the same folder on every node.

    Raises:
        StorageError: a node does not see what this process has written.
        ClusterLost: a node does not answer.
    """
    if "://" in store.url and not store.url.startswith("file://"):
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name, content = f"memo/probe-{uuid.uuid4().hex}", uuid.uuid4().hex.encode()
    store.blobs.put(name, content)
    try:
        look = ray.remote(num_cpus=0, max_retries=1)(read_probe)
        answers = {
            look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
            ).remote(store, name): node
            for node in nodes
        }
        ready, late = ray.wait(list(answers), num_returns=len(answers), timeout=ANSWER)
        for ref in ready:
            if ray.get(ref) != content:
                raise StorageError(
                    f"store {Path(store.url).absolute()} is not visible from node "
                    f"{answers[ref].ip}; use a folder that all nodes share, or an object store URL"
                )
        if late:
            raise ClusterLost(f"node {answers[late[0]].ip} did not answer within {ANSWER:g} s")
    finally:
        store.blobs.remove(name)


def read_probe(store: Store, name: str) -> bytes | None:
    """Content that a node finds under the name that the driver has written."""
    return store.blobs.get(name)
