"""The watch over the head node of a cluster that this process is connected to."""

import socket
import time

from graftwork.cluster.sessions.session import Session

SILENCE = 15.0
"""Seconds without an answer of the head node after which the cluster counts as lost."""
SILENCE_HERE = 2.0
"""The same for a Ray of our own, on this machine."""


class Head:
    """Tells whether the head node's port has accepted a connection lately.

    Without this, a driver whose head node dies waits for a minute, and is then ended by Ray without
    a word that a user could act on.

    Args:
        session: the connection to watch over.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._answered = self._asked = time.monotonic()

    def answers(self) -> bool:
        """Asks, at most once in a second."""
        now = time.monotonic()
        if self._session.head is None or now - self._asked < 1.0:
            return True
        self._asked = now
        try:
            socket.create_connection(self._session.head, timeout=1.0).close()
        except OSError:
            patience = SILENCE_HERE if self._session.local else SILENCE
            return time.monotonic() - self._answered < patience
        self._answered = time.monotonic()
        return True

    @property
    def silent(self) -> str:
        """Complaint about a head node that does not answer."""
        return f"the head node of Ray at {self._session.address} does not answer"
