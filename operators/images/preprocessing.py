"""Preparation of an image for the backbone, as a value; no torch here.

The arithmetic is in `pixels.py`. A description is resolved once, while planning: names
and defaults never reach a key, only the numbers do.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import version
from typing import Any

from graftwork.operators.errors import ConfigError, IncompatibleError

INTERPOLATIONS = ("bilinear", "bicubic")
TIMM_DEFAULT = "timm_default"
"""The name that stands for the backbone's own preprocessing, as timm describes it."""

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize the shorter edge, cut the centre, scale to 0..1, subtract the mean, divide by std.

    Equal to torchvision's `Resize, CenterCrop, ToTensor, Normalize` on PIL images, to the last bit.

    Args:
        resize: pixels of the shorter edge afterwards; None keeps the size.
        stretch: resizes both edges to that, whatever the aspect.
        interpolation: "bicubic" or "bilinear"; with antialiasing where the image gets smaller.
        crop: pixels of the square that is cut out, padded with black; None keeps all.
        mean: of red, green, blue, in 0..1.
        std: of red, green, blue, in 0..1.

    Raises:
        ConfigError: a value is out of range.
    """

    resize: int | None = None
    interpolation: str = "bicubic"
    crop: int | None = None
    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)
    stretch: bool = False

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and 1 <= value <= 4096):
                raise ConfigError(
                    f"must be an integer in 1..4096: {value}", key=f"preprocessing.{name}"
                )
        if type(self.stretch) is not bool or (self.stretch and self.resize is None):
            raise ConfigError(
                f"must be true or false, and true only with resize: {self.stretch}",
                key="preprocessing.stretch",
            )
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise ConfigError(
                f'must be one of {known}: "{self.interpolation}"', key="preprocessing.interpolation"
            )
        for name in ("mean", "std"):
            value = getattr(self, name)
            lowest = 0.0 if name == "mean" else 1e-6
            if not (isinstance(value, (list, tuple)) and len(value) == 3) or not all(
                isinstance(v, (int, float)) and not isinstance(v, bool) and lowest <= v <= 1.0
                for v in value
            ):
                raise ConfigError(
                    f"must be three numbers in 0..1: {value}", key=f"preprocessing.{name}"
                )
            object.__setattr__(self, name, tuple(float(v) for v in value))

    def to_json(self) -> dict[str, Any]:
        """The resolved values, and the version of the library that decodes and resizes.

        Where torch resizes instead of Pillow it does so only if the result is provably the same
        (see `operators/images/pixels.py`), so its version changes nothing and is left out.
        """
        values = vars(self) | {"mean": list(self.mean), "std": list(self.std)}
        if not self.stretch:
            del values["stretch"]  # came after results were stored
        return values | {"pillow": _pillow()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `to_json`.

        Raises:
            IncompatibleError: written with another Pillow than this process has.
        """
        if value.get("pillow", _pillow()) != _pillow():
            raise IncompatibleError(
                f"preprocessing was planned with Pillow {value['pillow']}, here is {_pillow()}; "
                "install one version everywhere"
            )
        return cls(**{k: v for k, v in value.items() if k != "pillow"})


_CIFAR_MEAN: Triple = (0.5071, 0.4867, 0.4408)
_CIFAR_STD: Triple = (0.2675, 0.2565, 0.2761)
_HALF: Triple = (0.5, 0.5, 0.5)
_CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)

PRESETS: dict[str, Preprocessing] = {
    # The family of RevisitingCIL, PILOT (but for CODA-Prompt), EASE and MOS, and RanPAC except on
    # CIFAR: no normalisation, whatever the backbone was trained with. Their published numbers need
    # exactly this.
    "lamda_224": Preprocessing(resize=256, crop=224),
    "ranpac_cifar_224": Preprocessing(resize=224, crop=224),
    "slca_norm": Preprocessing(resize=256, crop=224, mean=_CIFAR_MEAN, std=_CIFAR_STD),
    # CLIP's own mean and standard deviation, of OpenAI and of most open_clip weights.
    "clip": Preprocessing(resize=224, crop=224, mean=_CLIP_MEAN, std=_CLIP_STD),
    # PROOF's for CLIP, and DAP's, which resize both edges. DAP's has no antialiasing, which matters
    # where images shrink.
    "proof_224": Preprocessing(resize=224, crop=224, mean=_CLIP_MEAN, std=_CLIP_STD, stretch=True),
    "dap_224": Preprocessing(
        resize=224,
        crop=224,
        interpolation="bilinear",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        stretch=True,
    ),
    "micro_32": Preprocessing(resize=32, crop=32, mean=_HALF, std=_HALF),
}


def from_timm(data_config: Mapping[str, Any]) -> Preprocessing:
    """The evaluation transform that timm builds from a model's data configuration.

    Args:
        data_config: `timm.data.resolve_model_data_config(model)`.

    Raises:
        ConfigError: the model wants something else than a centre crop of a square.
    """
    _, height, width = data_config["input_size"]
    mode = data_config.get("crop_mode") or "center"
    if height != width or mode != "center":
        what = f"input {height}x{width}" if height != width else f'crop mode "{mode}"'
        raise ConfigError(
            f"timm_default would need {what}, which is not supported; "
            "describe resize, crop, mean and std explicitly",
            key="preprocessing",
        )
    return Preprocessing(
        resize=math.floor(height / (data_config.get("crop_pct") or 0.875)),
        interpolation=data_config.get("interpolation", "bicubic"),
        crop=height,
        mean=tuple(data_config["mean"]),
        std=tuple(data_config["std"]),
    )


def resolve(
    description: str | Mapping[str, Any], data_config: Mapping[str, Any] | None = None
) -> Preprocessing:
    """Preprocessing that a spec asks for.

    Args:
        description: name of a preset, "timm_default", or a mapping with the fields of
            `Preprocessing`.
        data_config: timm's description of the backbone; needed for "timm_default".

    Raises:
        ConfigError: unknown name or field, or a value out of range.
    """
    if isinstance(description, Mapping):
        known = {field.name for field in fields(Preprocessing)}
        if unknown := sorted(set(description) - known):
            raise ConfigError(
                f"unknown key; known are {', '.join(sorted(known))}",
                key=f"preprocessing.{unknown[0]}",
            )
        return Preprocessing(**description)
    if description == TIMM_DEFAULT and data_config is not None:
        return from_timm(data_config)
    if description not in PRESETS:
        names = ", ".join([*PRESETS, TIMM_DEFAULT])
        raise ConfigError(f'unknown preset "{description}"; known are {names}', key="preprocessing")
    return PRESETS[description]


@cache
def _pillow() -> str:
    return ".".join(version("pillow").split(".")[:2])
