"""Parts of a data set, examined as Ray tasks: each worker reads, hashes and remembers its own."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from graftwork.cluster.sessions.answers import answer
from graftwork.cluster.sessions.head import Head
from graftwork.cluster.sessions.lasting import Lasting
from graftwork.cluster.sessions.session import Session
from graftwork.operators.data.parts import Part, examine, here, tell
from graftwork.operators.errors import BadDataError, ClusterLost, GraftworkError, StageFailed
from graftwork.operators.store.memo import Memo

WORTH_IMAGES = 100_000
"""Images that are worth the start of a cluster, which takes as long as one process takes for some
ten thousands."""
WORTH_BYTES = 4 << 30
"""Bytes of images that are worth it when there are fewer."""
DECODED = 10
"""An image that is decoded counts for so many of which only the header is read."""
AHEAD = 2
"""Parts per CPU that are handed to Ray at once."""
POLL = 0.5
"""Seconds between two looks at signals and at the head node."""


@dataclass(frozen=True)
class OnCluster:
    """Examines parts on a cluster, where that is worth it: an `Examine`.

    A single part is examined in this process. Several go to the cluster if it is there already, or
    if they are worth its start.

    Args:
        connection: opened only then.
    """

    connection: Lasting

    def __call__(
        self, parts: Sequence[Part], memo: Memo, threads: int
    ) -> Iterator[tuple[int, bytes | BadDataError]]:
        if len(parts) < 2 or not (self.connection.opened or worth_a_start(parts)):
            yield from here(parts, memo, threads)
            return
        with self.connection() as session:
            left = yield from _spread(parts, memo, session)
        # The files may be on this machine's own disk: no worker decides that they are not there.
        for number, found in here([parts[n] for n in left], memo, threads):
            yield left[number], found


def worth_a_start(parts: Sequence[Part]) -> bool:
    """Tells whether there is so much to examine that a cluster is started for it."""
    weights = [DECODED if part.decode else 1 for part in parts]
    images = sum(part.images * weight for part, weight in zip(parts, weights, strict=True))
    size = sum(part.size * weight for part, weight in zip(parts, weights, strict=True))
    return images >= WORTH_IMAGES or size >= WORTH_BYTES


def _spread(
    parts: Sequence[Part], memo: Memo, session: Session
) -> Generator[tuple[int, bytes | BadDataError], None, list[int]]:
    """Results as they come.

    Returns:
        Ascending places of parts whose files workers cannot read, or see as others.
    """
    import ray

    # What a part takes is read in small pieces: a CPU each, no other resource.
    task = ray.remote(max_retries=3, retry_exceptions=False)(_work).options(
        num_cpus=1, name="index"
    )
    slots, total = max(2, AHEAD * int(session.cpus)), sum(part.images for part in parts)
    head, waiting = Head(session), dict[Any, int]()
    elsewhere, done, following = list[int](), 0, iter(enumerate(parts))
    tell(done, total)
    try:
        while True:
            for number, part in islice(following, slots - len(waiting)):
                waiting[task.remote(part, memo)] = number  # pyright: ignore[reportCallIssue]
            if not waiting:
                return sorted(elsewhere)
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL)
            if not head.answers():
                raise ClusterLost(f"index: {head.silent}; run it again")
            if not ready:
                continue
            number = waiting.pop(ready[0])
            done += parts[number].images
            try:
                found = answer(ready[0], "index")
            except BadDataError as error:
                yield number, error
            else:
                if found is None:
                    elsewhere.append(number)
                else:
                    yield number, found
            tell(done, total)
    finally:
        for reference in waiting:  # after an error: nobody asks for the rest
            ray.cancel(reference, force=False)


def _work(part: Part, memo: Memo) -> bytes | GraftworkError | None:
    """Findings about a part, or what went wrong; None without the files that were found."""
    try:
        if not part.unchanged:
            return None
        found = examine(part, memo)
        return None if found.unread else found.findings
    except GraftworkError as error:
        return error
    except Exception as error:
        return StageFailed(f"index: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
