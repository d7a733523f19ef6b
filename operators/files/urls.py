"""Places that may be read and written: plain local paths and a short list of fsspec protocols.

fsspec knows more than fifty protocols and composes them (`filecache::http://...`); a spec or a
command line must not reach the network, another host's files or a home directory through them.
Endpoints and keys come from the environment or a profile, never from the URL.
"""

import re
import unicodedata

from graftwork.operators.errors import ConfigError

PROTOCOLS = ("file", "s3", "gs", "abfs", "hf", "memory")
"""Protocols of fsspec that `check` lets through; `memory` is for tests and not advertised."""

_USER_AND_PASSWORD = re.compile(r"(^|//)([^/\s:@]*:[^/\s]*)@")
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:A[KS]IA[0-9A-Z]{12,}|hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_[A-Za-z0-9_]{16,})"
)


def has_credentials(text: str) -> bool:
    """Tells whether the text holds `user:password@` or what looks like an access token."""
    return bool(_TOKEN.search(text) or _USER_AND_PASSWORD.search(text))


def mask(text: str) -> str:
    """The text with everything that looks like a credential replaced by `***`."""
    return _USER_AND_PASSWORD.sub(r"\1***@", _TOKEN.sub("***", text))


def has_control_characters(text: str) -> bool:
    """Tells whether the text holds line breaks or other control characters, or half a character."""
    return any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def check(url: str) -> str:
    """Let a plain local path or an allowed fsspec URL through.

    Local paths may be relative, hold blanks, `..` or any printable character, and start with a
    dash. Nothing is looked up: the place need not exist.

    Args:
        url: path or URL as the user wrote it.

    Returns:
        The same text.

    Raises:
        ConfigError: one line saying what is not allowed; credentials are masked.
    """
    if not url:
        raise ConfigError("is empty; give a path or URL")
    if has_control_characters(url):
        raise ConfigError("invalid character in path (newline, NUL or another control character)")
    if has_credentials(url):
        raise ConfigError(
            f'credentials in URLs not allowed ("{mask(url)}"); use the environment or a profile'
        )
    if "::" in url:
        raise ConfigError(f'URL chaining not allowed ("{url}"); name one place without "::"')
    if url.startswith("~"):
        raise ConfigError(f'"~" is not expanded ("{url}"); write the full path')
    # fsspec reads `data:...` as a protocol although it has no `//`.
    protocol, separator, rest = url.partition("data:" if url.startswith("data:") else "://")
    if not separator:
        return url
    protocol = protocol or "data"
    if protocol not in PROTOCOLS:
        advertised = ", ".join(p for p in PROTOCOLS if p != "memory")
        raise ConfigError(f'protocol "{protocol}" not supported ({advertised})')
    _check_rest(url, protocol, rest)
    return url


def _check_rest(url: str, protocol: str, rest: str) -> None:
    """Refuse what must not follow `protocol://`."""
    authority = rest.partition("/")[0]
    # abfs://container@account.dfs.core.windows.net/path is how Azure writes its addresses.
    if "@" in authority and protocol != "abfs":
        raise ConfigError(
            f'user names in URLs not allowed ("{protocol}://***@{rest.partition("@")[2]}"); '
            "use the environment or a profile"
        )
    if "?" in rest:
        raise ConfigError(
            f'query strings in URLs not allowed ("{url.partition("?")[0]}?..."); set endpoints in '
            'the environment, and use "*" in patterns'
        )
    if ".." in re.split(r"[/\\]", rest):
        raise ConfigError(f'".." not allowed in URLs ("{url}"); write the full path')
    if rest.startswith("~"):
        raise ConfigError(f'"~" is not expanded ("{url}"); write the full path')
    if not authority and protocol != "memory" and not (protocol == "file" and rest.strip("/")):
        raise ConfigError(f'"{url}" names no {"path" if protocol == "file" else "bucket"}')
