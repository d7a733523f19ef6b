"""Seeds derived from what they are for, so that no generator's state has to be kept."""

import hashlib
import json


def derive(*parts: int | str) -> int:
    """A seed in 0..2**63 - 1 from JSON values; other parts give an unrelated one."""
    text = json.dumps(parts, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
