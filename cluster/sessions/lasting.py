"""A connection to Ray that is opened when it is first needed, and then shared."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType

from graftwork.cluster.sessions.session import Session


class Lasting:
    """A connection for several pieces of work, one after the other.

    Calling it gives the connection for the length of a `with` block. The first block opens it; it
    is closed by `close`, or at the end of a `with` block of the object itself.

    Args:
        connect: opens a connection.
    """

    def __init__(self, connect: Callable[[], AbstractContextManager[Session]]) -> None:
        self._connect = connect
        self._stack = ExitStack()
        self._session: Session | None = None

    @property
    def opened(self) -> bool:
        """Tells whether there is a connection."""
        return self._session is not None

    @contextmanager
    def __call__(self) -> Iterator[Session]:
        if self._session is None:
            self._session = self._stack.enter_context(self._connect())
        yield self._session

    def close(self) -> None:
        """Ends the connection, if there is one."""
        self._session = None
        self._stack.close()

    def __enter__(self) -> "Lasting":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
