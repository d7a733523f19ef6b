"""Running sums of a closed-form fit, from which a longer stream goes on.

They stand beside the stages, under the key of the fit that they are the sums of. A fit that begins
with another one's tasks takes its sums and replaces them by its own: of a stream that grows, the
newest are kept. Whatever is wrong with them, the rows are summed again, to the same bits.

Shapes: K classes.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from graftwork.methods.contracts.card import State
from graftwork.methods.parts.sums import CLASS_AXES
from graftwork.operators.store import Store

FOLDER = "sums"


def names(key: str) -> tuple[str, str]:
    """Places of a fit's sums in the store: the tensors, and what they must be."""
    return f"{FOLDER}/{key}", f"{FOLDER}/{key}.json"


def keep(store: Store, key: str, sums: State, ids: Sequence[int], count: int) -> None:
    """Keeps the sums of a fit.

    Args:
        ids: class numbers that they are kept under, by arrival.
        count: K, classes that they have room for.
    """
    tensors, about = names(key)
    # A Gram matrix has gigabytes: no second copy of the bytes with something in front of them.
    data = save_tensors({each: t.cpu().contiguous() for each, t in sums.items()})
    store.blobs.replace(tensors, data)
    facts = {"ids": list(ids), "classes": count, "sha256": hashlib.sha256(data).hexdigest()}
    store.blobs.replace(about, json.dumps(facts).encode())


def find(store: Store, key: str, ids: Sequence[int], count: int) -> State | None:
    """The sums of a fit; None if there are none, or none that a longer stream can go on from.

    Args:
        ids: class numbers by arrival; more than at the time do no harm.
        count: K, classes that the sums are to have room for.
    """
    tensors, about = names(key)
    head = store.blobs.get(about)
    facts = {} if head is None else _parsed(head)
    known = facts.get("ids")
    if known is None or known != list(ids)[: len(known)] or facts["classes"] > count:
        return None
    data = store.blobs.get(tensors)
    if data is None or hashlib.sha256(data).hexdigest() != facts.get("sha256"):
        return None
    try:
        found = load_tensors(data)
    except SafetensorError:
        return None  # written by another version of this program
    # In memory of its own: BLAS may sum in another order where an operand is not aligned.
    found = {name: tensor.clone() for name, tensor in found.items()}
    return found if facts["classes"] == count else _widened(found, count)


def _parsed(head: bytes) -> dict[str, Any]:
    """The facts about stored sums; none if they are damaged."""
    try:
        facts = json.loads(head)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _widened(sums: State, count: int) -> State | None:
    """Sums with room for classes that came later; None if it is not known where that is.

    Args:
        count: classes that are wanted.
    """
    found: State = {}
    for name, tensor in sums.items():
        if name not in CLASS_AXES:
            return None
        if (axis := CLASS_AXES[name]) is not None:
            shape = list(tensor.shape)
            shape[axis] = count - shape[axis]
            tensor = torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)
        found[name] = tensor
    return found
