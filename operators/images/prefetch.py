"""Work done ahead by threads: decoding while the network computes, reading while images decode."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")


def prefetch(
    function: Callable[[Item], Found],
    items: Iterable[Item],
    *,
    workers: int,
    depth: int | None = None,
) -> Iterator[Found]:
    """Results of a function, in the order of its items, computed ahead by threads.

    Items are taken by the thread that asks for results, so that their reader needs no lock. At
    most `depth` of them are taken without their result being handed out: the memory holds so many
    items or results, and the one that is in use. An error, of the function or of the items, is
    raised in its item's place. A caller that stops early cancels what has not begun and waits for
    what has; no thread is left then, nor after an error or the last result.

    Args:
        function: called from several threads.
        workers: threads.
        depth: items taken ahead; None for two per thread, of which one may be ready while the
            thread works on the other.

    Raises:
        ValueError: no thread, or no depth.
    """
    depth = 2 * workers if depth is None else depth
    if workers < 1 or depth < 1:
        raise ValueError(f"workers and depth must be at least 1, got {workers} and {depth}")
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
    try:
        futures = _begun(function, items, pool)
        waiting = deque(islice(futures, depth))
        while waiting:
            found = waiting.popleft().result()
            # Before the result is handed out: the threads work while it is used.
            waiting.extend(islice(futures, 1))
            yield found
    finally:
        pool.shutdown(cancel_futures=True)


def _begun(
    function: Callable[[Item], Found], items: Iterable[Item], pool: ThreadPoolExecutor
) -> Iterator[Future[Found]]:
    """Futures of items, the last one failed if the items end in an error."""
    try:
        for item in items:
            yield pool.submit(function, item)
    except Exception as error:  # raised again where the result is asked for
        failed: Future[Found] = Future()
        failed.set_exception(error)
        yield failed


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Items in lists of `size`, the last one shorter; never empty."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
