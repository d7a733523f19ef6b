"""Entries of a table: one for every class of every task, those of a task behind those before it.

A class that returns has an entry for each of its tasks, so that how many there are depends on the
classes of all tasks. A `Task` tells those of one; of the earlier ones a learner knows what was
stored, which `Learner.adopt` shows it.

Shapes: E entries, N of them the task's own, C classes seen.
"""

import torch
from torch import Tensor

from graftwork.methods.contracts.trained import Task


def usual(task: Task) -> int:
    """Entries of earlier tasks, where each had new classes only, or all classes again.

    For a learner that has not been shown a state; in most streams no state says otherwise.
    """
    return task.before if task.before < task.seen else task.index * task.seen


def earlier(tasks: Tensor, task: Task) -> int:
    """Entries of earlier tasks among stored ones.

    Args:
        tasks: task of each stored entry [E] int64; stored after the task before, or after this one.
    """
    finished = bool((tasks == task.index).any())
    return len(tasks) - (len(task.current) if finished else 0)


def pairs(task: Task, before: int) -> Tensor:
    """Task and column of each entry [E, 2] int64; -1 for the earlier ones, which come from a state.

    Args:
        before: E - N.
    """
    own = torch.tensor([(task.index, column) for column in task.current])
    return torch.cat([torch.full((before, 2), -1), own])
