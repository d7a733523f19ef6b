"""The memo: what was learnt by an expensive look at something unchanged."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graftwork.operators.keys import digest
from graftwork.operators.store.blobs import Blobs


@dataclass(frozen=True)
class Memo:
    """Results of expensive looks at unchanged inputs, by what identifies the input.

    Never part of a result: without it the same keys come out, later. A damaged entry is a miss.
    """

    blobs: Blobs

    def get(self, preimage: Mapping[str, Any]) -> bytes | None:
        """Content that `put` stored for the same preimage, None if it is missing or damaged."""
        data = self.blobs.get(f"memo/{digest(preimage)}")
        if data is None:
            return None
        checksum, _, content = data.partition(b"\n")
        return content if hashlib.sha256(content).hexdigest().encode() == checksum else None

    def put(self, preimage: Mapping[str, Any], content: bytes) -> None:
        """Stores content for a preimage; the newest wins."""
        name = f"memo/{digest(preimage)}"
        data = hashlib.sha256(content).hexdigest().encode() + b"\n" + content
        self.blobs.replace(name, data)
