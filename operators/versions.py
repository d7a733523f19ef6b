"""Versions of the libraries that results may depend on."""

import contextlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from graftwork import __version__


@cache
def library_versions() -> dict[str, str]:
    """Versions of what a result may depend on, for the manifest (not for the key)."""
    names = ("torch", "torchvision", "timm", "pillow", "pyarrow", "numpy")
    # Not from the metadata: a cluster runs a shipped checkout with nothing installed.
    own = {"python": platform.python_version(), "graftwork": __version__}
    known = own | {name: version(name) for name in names}
    with contextlib.suppress(PackageNotFoundError):  # the extra `clip`
        known["open_clip"] = version("open_clip_torch")
    return known
