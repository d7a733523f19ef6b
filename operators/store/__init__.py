"""The store of results: committed whole, checked at every read."""

from operators.store.store import Store

__all__ = ["Store"]
