"""The store of results: committed whole, checked at every read."""

from graftwork.operators.store.store import Store

__all__ = ["Store"]
