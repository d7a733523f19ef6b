"""A memo that remembers nothing: every look at data is a real one."""

from collections.abc import Mapping
from typing import Any

from graftwork.operators.store.memo import Memo


class NoMemo(Memo):
    def __init__(self) -> None:
        pass

    def get(self, preimage: Mapping[str, Any]) -> bytes | None:
        return None

    def put(self, preimage: Mapping[str, Any], content: bytes) -> None:
        pass
