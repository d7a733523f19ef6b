"""Running sums of a closed-form fit, from which a longer stream goes on.

They stand beside the stages, under the key of the fit that they are the sums of. A fit that begins
with another one's tasks takes its sums and replaces them by its own: of a stream that grows, the
newest are kept. Whatever is wrong with them, the rows are summed again, to the same bits.

Shapes: K classes.
"""

import hashlib
import json
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from graftwork.methods.contracts.card import State
from graftwork.operators.store import Store

FOLDER = "sums"


def name(key: str) -> str:
    """Place of a fit's sums in the store."""
    return f"{FOLDER}/{key}"


def keep(store: Store, key: str, sums: State, ids: Sequence[int]) -> None:
    """Keeps the sums of a fit.

    Args:
        ids: class numbers that they are kept under, by arrival.
    """
    head = json.dumps(list(ids)).encode() + b"\n"
    body = head + save_tensors({each: t.cpu().contiguous() for each, t in sums.items()})
    checksum = hashlib.sha256(body).hexdigest().encode()
    store.blobs.replace(name(key), checksum + b"\n" + body)


def find(store: Store, key: str, ids: Sequence[int]) -> State | None:
    """The sums of a fit; None if there are none, or none under these class numbers.

    Args:
        ids: class numbers by arrival; more than at the time do no harm.
    """
    data = store.blobs.get(name(key))
    if data is None:
        return None
    checksum, _, body = data.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        return None
    head, _, tensors = body.partition(b"\n")
    known = json.loads(head)
    if known != list(ids)[: len(known)]:
        return None
    try:
        found = load_tensors(tensors)
    except SafetensorError:
        return None  # written by another version of this program
    # In memory of its own: BLAS may sum in another order where an operand is not aligned.
    return {each: tensor.clone() for each, tensor in found.items()}


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
