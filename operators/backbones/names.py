"""Names of backbones in a spec, and the places of their weights."""

from pathlib import Path

from graftwork.operators.errors import ConfigError

CLIP = "open_clip:"
"""Prefix that marks the name of an open_clip model in a spec."""


def place(model: str, weights: str | None) -> str:
    """Place of a backbone's weights: a path or URL, "random", or "" for timm's own.

    Raises:
        ConfigError: no weights of this name ship with the package.
    """
    if weights != "builtin":
        return weights or ""
    # Not from backbones.shipped: importing that imports torch.
    path = Path(__file__).parent / "shipped" / f"{model}.safetensors"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.safetensors"))
        raise ConfigError(
            f'no builtin weights for "{model}" (known: {", ".join(known)})', key="backbone.weights"
        )
    return str(path)
