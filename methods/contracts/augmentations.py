"""Names of what may happen to training images; no torch here."""

from typing import Literal

Augmentation = Literal[
    "none",
    "flip",
    "lamda",
    "imagenet",
    "imagenet_bicubic",
    "imagenet_jitter",
    "slca",
    "clip",
    "vpt",
    "fine_grained",
]
"""What happens to training images; the values are in `operators/images/augmentation.py`."""
