"""Needs of a trained method as to the stream of tasks; this module does not import torch.

Streams may grow, so that most methods neither know nor need the number of tasks. A method that does
says so by a function of its own, `stream_needs(self) -> StreamNeeds`; planning asks before anything
runs.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Room:
    """Room for tasks in something of a fixed size.

    Args:
        field: hyper-parameter that is the size.
        size: its value.
        per_task: least that a task takes of it.

    Example:
        >>> Room(field="pool_size", size=12, per_task=5).tasks
        2
    """

    field: str
    size: int
    per_task: int = 1

    @property
    def tasks(self) -> int:
        """Most tasks that there is room for."""
        return self.size // self.per_task


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Passes over a task's images before everything is trained.

    Args:
        field: hyper-parameter that says so, 0 for none.
        count: its value.
    """

    field: str
    count: int


@dataclass(frozen=True, kw_only=True)
class StreamNeeds:
    """Needs of a method with its hyper-parameters as to a stream.

    Args:
        count: the number of tasks, `Task.count`; the stream can then not grow.
        room: the tasks that there is room for; None for any number.
        passes: passes before everything is trained; None for none. An online stream has one pass.
    """

    count: bool = False
    room: Room | None = None
    passes: Passes | None = None


def stream_needs(method: object) -> StreamNeeds:
    """Needs of a method as to a stream: none, unless it says so itself."""
    own = getattr(method, "stream_needs", None)
    return StreamNeeds() if own is None else own()
