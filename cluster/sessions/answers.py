"""Answers of Ray tasks, and what becomes of those that Ray lost."""

from typing import Any

from graftwork.operators.errors import ClusterLost, GraftworkError, OutOfMemory


def answer(reference: Any, what: str) -> Any:
    """The result of a task.

    Args:
        reference: Ray's, of a task that returns errors of ours instead of raising them.
        what: name of the work, for messages.

    Raises:
        OutOfMemory: Ray stopped the task, again and again, for want of memory.
        ClusterLost: Ray lost the task.
        GraftworkError: what the task returned as an error.
    """
    import ray
    from ray import exceptions

    try:
        found = ray.get(reference)
    except exceptions.OutOfMemoryError as error:
        raise OutOfMemory(f"{what}: a worker needs more memory than its node has") from error
    except (exceptions.RayError, ConnectionError) as error:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise ClusterLost(f"{what}: Ray lost a task: {reason}; run it again") from error
    if isinstance(found, GraftworkError):
        raise found
    return found
