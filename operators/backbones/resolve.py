"""The backbone that a spec means, resolved without torch when it was resolved before.

The resolved value goes into the key of every feature: the digest of the state that was really
loaded, not the file's name or the model's tag.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from graftwork.operators.backbones.names import CLIP, place
from graftwork.operators.errors import ConfigError
from graftwork.operators.files.access import identity
from graftwork.operators.keys import program_digest
from graftwork.operators.store.memo import Memo
from graftwork.operators.versions import library_versions


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A backbone with its weights, as planning knows it.

    Args:
        model: timm name with its tag, or `open_clip:` and open_clip's name.
        weights: path or URL of the weights; "random" or "" (timm's pretrained tag).
        fingerprint: sha256 over name, dtype, shape and bytes of the loaded state.
        width: D of the features.
        data_config: timm's own preprocessing of the model (mean, std, crop, interpolation).
        image_size: pixels of the square that it sees, if not its own.
        refused: why methods cannot be attached to its blocks; empty if they can.
        natural_pooling: what attached methods read of it, "token" or "avg".
        image_fingerprint: of a CLIP, that of the image tower alone; empty otherwise.
        text_fingerprint: of a CLIP, that of the text tower alone; empty otherwise.
    """

    model: str
    weights: str
    fingerprint: str
    width: int
    pooling: str
    data_config: dict[str, Any]
    image_size: int | None = None
    refused: str = ""
    natural_pooling: str = "token"
    image_fingerprint: str = ""
    text_fingerprint: str = ""

    @property
    def network(self) -> str:
        """Kind of network, as the cards of methods call it: "vit" (all of timm's) or "clip"."""
        return "clip" if self.text_fingerprint else "vit"


def resolve(
    model: str, weights: str | None, pooling: str, memo: Memo, image_size: int | None = None
) -> Backbone:
    """Loads the model once to learn its fingerprint; afterwards the memo knows it.

    Args:
        model: timm name with its tag, the name of a backbone shipped with this package, or
            `open_clip:` and open_clip's name.
        weights: path or URL, "random", "builtin" (shipped with this package), or None for the
            weights that timm's tag names.
        pooling: "token", "avg" or "map".
        image_size: pixels of the square that a ViT shall see, if not its own.

    Raises:
        ConfigError: unknown model, or weights that cannot be found.
        IncompatibleError: the weights do not fit the model, or it gives no vector for an image.
    """
    location = place(model, weights)
    try:
        known_by = location if location in ("random", "") else identity(location)
    except ConfigError as error:
        raise error.about("backbone.weights") from error
    depends = ("torch", "timm", *(("open_clip",) if model.startswith(CLIP) else ()))
    preimage = {
        "kind": "backbone",
        "model": model,
        "pooling": pooling,
        "image_size": image_size,
        "weights": known_by,
        "versions": {k: v for k, v in library_versions().items() if k in depends},
        # The architectures and descriptions that this package ships, and what attaches to a model.
        "source": program_digest(),
    }
    if (known := memo.get(preimage)) is not None:
        return Backbone(**json.loads(known) | {"weights": location})
    from graftwork.operators.backbones import loading
    from graftwork.operators.backbones.examine import examine

    # It imports torch.
    from graftwork.operators.backbones.weights import fingerprint, tower_fingerprints

    network = loading.load(model, location, pooling, image_size)
    data_config = loading.data_config(network, image_size)
    # A square, as all preprocessing gives; which one suits the network is looked at later.
    side = min(data_config["input_size"][1:])
    seen = examine(network, model, pooling, (3, side, side))
    image_fingerprint, text_fingerprint = tower_fingerprints(network) or ("", "")
    backbone = Backbone(
        model=model,
        weights=location,
        pooling=pooling,
        fingerprint=fingerprint(network),
        width=seen.width,
        data_config=data_config,
        image_size=image_size,
        refused=seen.refused,
        natural_pooling=seen.natural_pooling,
        image_fingerprint=image_fingerprint,
        text_fingerprint=text_fingerprint,
    )
    memo.put(preimage, json.dumps(asdict(backbone)).encode())
    return backbone
