"""Content keys: sha256 over canonical JSON."""

import hashlib
import json
from typing import Any


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no blanks, ASCII; NaN and infinity are refused.

    Raises:
        ValueError: the value holds NaN or infinity.
        TypeError: the value is not made of dict, list, tuple, str, int, float, bool, None.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of `canonical(value)`, 64 hex digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()
