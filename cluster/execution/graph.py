"""Planning: the order of a graph, and which of its stages must be computed. Pure, without Ray."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from graftwork.operators.stage import Stage


@dataclass(frozen=True)
class Plan:
    """Stages of a run, and those that it has to compute.

    Args:
        stages: all distinct stages of the graph, inputs before their readers.
        compute: those that must be computed, in the same order.
    """

    stages: tuple[Stage, ...]
    compute: tuple[Stage, ...]

    @property
    def cached(self) -> tuple[Stage, ...]:
        """Stages that are stored or whose readers all are: nothing needs to be done for them."""
        compute = set(self.compute)
        return tuple(stage for stage in self.stages if stage not in compute)


def inputs_of(stage: Stage) -> Iterator[Stage]:
    """The stages that a stage reads, in the order of its roles."""
    for stages in (*stage.inputs.values(), *stage.reads.values()):
        yield from stages


def walk(targets: Iterable[Stage]) -> tuple[Stage, ...]:
    """All distinct stages of a graph, inputs before readers, first target first.

    The order doubles as priority: what the first target needs stands before what only the second
    needs, so that results appear one after the other instead of all at the end.

    Args:
        targets: the stages whose results are wanted.
    """
    # An explicit stack: a hundred tasks of train and merge stages would exceed Python's recursion
    # limit.
    seen: set[int] = set()
    order: dict[str, Stage] = {}
    stack: list[tuple[Stage, Iterator[Stage]]] = []
    for target in targets:
        if id(target) not in seen:
            seen.add(id(target))
            stack.append((target, inputs_of(target)))
        while stack:
            stage, rest = stack[-1]
            child = next(rest, None)
            if child is None:
                order.setdefault(stage.key, stage)
                stack.pop()
            elif id(child) not in seen:
                seen.add(id(child))
                stack.append((child, inputs_of(child)))
    return tuple(order.values())


def needed(targets: Sequence[Stage], stored: Callable[[Stage], bool]) -> Plan:
    """Demand-driven plan: a stored stage is a hit and its inputs are not looked at.

    Args:
        targets: the stages whose results are wanted.
        stored: whether a stage's result is in the store; asked at most once per stage.
    """
    stages = walk(targets)
    wanted = {target.key for target in targets}
    compute: list[Stage] = []
    for stage in reversed(stages):  # readers before inputs
        if stage.key in wanted and not stored(stage):
            compute.append(stage)
            wanted.update(child.key for child in inputs_of(stage))
    return Plan(stages, tuple(reversed(compute)))
