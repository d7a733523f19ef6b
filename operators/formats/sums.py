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
from graftwork.operators.store import Store

FOLDER = "sums"


def names(key: str) -> tuple[str, str]:
    """Places of a fit's sums in the store: the tensors, and what they must be."""
    return f"{FOLDER}/{key}", f"{FOLDER}/{key}.json"


def keep(store: Store, key: str, sums: State, ids: Sequence[int]) -> None:
    """Keeps the sums of a fit.

    Args:
        ids: class numbers that they are kept under, by arrival.
    """
    tensors, about = names(key)
    # A Gram matrix has gigabytes: no second copy of the bytes with something in front of them.
    data = save_tensors({each: t.cpu().contiguous() for each, t in sums.items()})
    store.blobs.replace(tensors, data)
    facts = {"ids": list(ids), "sha256": hashlib.sha256(data).hexdigest()}
    store.blobs.replace(about, json.dumps(facts).encode())


def find(store: Store, key: str, ids: Sequence[int]) -> State | None:
    """The sums of a fit; None if there are none, or none under these class numbers.

    Args:
        ids: class numbers by arrival; more than at the time do no harm.
    """
    tensors, about = names(key)
    head = store.blobs.get(about)
    facts = {} if head is None else _parsed(head)
    known = facts.get("ids")
    if known is None or known != list(ids)[: len(known)]:
        return None
    data = store.blobs.get(tensors)
    if data is None or hashlib.sha256(data).hexdigest() != facts.get("sha256"):
        return None
    try:
        found = load_tensors(data)
    except SafetensorError:
        return None  # written by another version of this program
    # In memory of its own: BLAS may sum in another order where an operand is not aligned.
    return {each: tensor.clone() for each, tensor in found.items()}


def _parsed(head: bytes) -> dict[str, Any]:
    """The facts about stored sums; none if they are damaged."""
    try:
        facts = json.loads(head)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def widened(sums: State, like: State, axes: dict[str, int]) -> State | None:
    """Sums with room for classes that came later; None if they do not go with other ones.

    Args:
        sums: the sums.
        like: sums over other rows, with the number of classes that is wanted.
        axes: name of a tensor -> its axis of classes.
    """
    count = like["count"].shape[0] if "count" in like else None
    found: State = {}
    for each, tensor in sums.items():
        axis = axes.get(each)
        if axis is not None and count is not None and tensor.shape[axis] < count:
            shape = list(tensor.shape)
            shape[axis] = count - tensor.shape[axis]
            tensor = torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)
        found[each] = tensor
    wide = all(
        axis >= tensor.ndim or tensor.shape[axis] == count
        for each, tensor in found.items()
        if (axis := axes.get(each)) is not None
    )
    return found if count is not None and wide else None
