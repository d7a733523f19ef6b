"""Features of the class names on the text tower of a frozen CLIP.

They are stored once for all methods, seeds and class orders, in the data set's own numbering: a
name's features do not depend on the other names.

Shapes: T templates, K classes, E joint width.
"""

from typing import TYPE_CHECKING

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.errors import BadDataError
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.features import TextParameters
from graftwork.operators.parameters.hints import NetworkHints
from graftwork.operators.store import Store

if TYPE_CHECKING:
    from graftwork.methods.networks.clip import Clip

CLASSES = 64
"""Texts encoded at once."""


def run(work: Assignment, store: Store) -> Result:
    """The operator `text`: features [T, K, E] float32, not of unit length, as `features`.

    Raises:
        BadDataError: a name is too long for the text tower.
        IncompatibleError: the backbone's weights changed since the plan.
    """
    # A fit, which only loads texts, does without timm.
    from graftwork.methods.networks.clip import Clip, phrases
    from graftwork.operators.backbones import loading

    parameters = from_json(TextParameters, work.parameters)
    hints = from_json(NetworkHints, work.hints)
    torch.set_num_threads(max(1, int(hints.cpus)))
    network = loading.load_on_device(
        hints.network.model,
        hints.network.weights,
        hints.network.pooling,
        parameters.kind.network.fingerprint,
        parameters.kind.numerics.device,
        hints.network.image_size,
    )
    assert isinstance(network, Clip), "planning asks for texts of a CLIP alone"
    try:
        found = torch.stack(
            [encode(network, phrases(parameters.names, t)) for t in parameters.kind.templates]
        )
    except ValueError as error:
        raise BadDataError(
            f"{error}; shorten the name or the template", key="dataset.classes"
        ) from error
    return Result(
        files={"text.safetensors": save_tensors({"features": found})},
        facts={"templates": len(found), "classes": len(parameters.names)},
    )


@torch.inference_mode()
def encode(clip: "Clip", texts: list[str]) -> Tensor:
    """Features [N, E] float32 of texts, on the CPU.

    Raises:
        ValueError: a text is longer than the context.
    """
    parts = [texts[start : start + CLASSES] for start in range(0, len(texts), CLASSES)]
    return torch.cat([clip.text(clip.tokenise(part)).float().cpu() for part in parts])
