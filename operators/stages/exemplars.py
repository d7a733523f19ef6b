"""Ranks the training images of every class and domain as exemplars; see
`operators.data.exemplars`.
"""

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.data import exemplars
from graftwork.operators.formats import features
from graftwork.operators.formats.index import load_index
from graftwork.operators.store import Store


def run(work: Assignment, store: Store) -> Result:
    """The operator `exemplars`: the place of every training image within its class and domain.

    Raises:
        DamagedStage: an input is damaged.
    """
    keyed, [dataset] = work.parameters, work.inputs("dataset")
    index = load_index(store, *dataset)
    frozen = features.load(store, work.inputs("features")) if work.inputs("features") else None
    ranks = np.empty(len(index.labels), dtype=np.int32)
    for _, rows in exemplars.blocks(index.labels, index.domains):
        order_of = (
            exemplars.shuffle(index.digests[rows], keyed["seed"])
            if frozen is None
            else exemplars.herd(frozen[rows])
        )
        ranks[rows[order_of]] = np.arange(len(rows))
    return Result(files={"ranks.safetensors": save_tensors({"rank": torch.from_numpy(ranks)})})
