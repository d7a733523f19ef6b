"""Ray's token, and the environment variables through which Ray learns of it.

The token itself never appears in an argument, a runtime environment or a log.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftwork.operators.errors import ConfigError

TOKEN_HINT = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token of the cluster"
FOLLOWED = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Variables that override an explicit address somewhere in Ray. We mean those that we pass."""


def token() -> str | None:
    """The user's token, looked for where Ray looks for it.

    Raises:
        ConfigError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return value
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            return Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"RAY_AUTH_TOKEN_PATH={path}: {reason}") from error
    try:
        default = Path.home() / ".ray" / "auth_token"
    except RuntimeError:  # neither HOME nor an entry for the user
        return None
    try:
        return default.read_text().strip() if default.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{default}: the token cannot be read: {reason}") from error


QUIET = {"RAY_DEDUP_LOGS_SKIP_REGEX": "."}
"""Keeps Ray from printing to our standard output, where a program expects one JSON document.

It reports every dead worker there, regardless of `log_to_driver`; the policy reports it, too.
"""

SETTLED = {"PYTHONBREAKPOINT": ""}
"""Variables that Ray sets while its own threads run, which may be reading the environment.

To replace a variable is harmless then. To add one is not: it can move the environment in memory,
and a thread that is looking something up ends the process with SIGSEGV.
"""


@contextmanager
def client_environment() -> Iterator[None]:
    """Makes Ray use the user's token, also for an address given explicitly, and that address.

    Ray itself sends a token to an explicit address only when RAY_AUTH_MODE=token is set as well.
    """
    changes: dict[str, str | None] = {**dict.fromkeys(FOLLOWED), **QUIET, **SETTLED}
    if "RAY_AUTH_MODE" not in os.environ and token():
        changes["RAY_AUTH_MODE"] = "token"
    with environment(changes):
        yield


@contextmanager
def environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Changes environment variables for a while; None removes one."""
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if "ray" in sys.modules:
        # Ray reads these variables once, when it is imported.
        from ray import _raylet

        compiled: Any = _raylet  # without types
        compiled.Config.initialize("")
        compiled.AuthenticationTokenLoader.instance().reset_cache()
