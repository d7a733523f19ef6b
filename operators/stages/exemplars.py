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
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.features import RankParameters
from graftwork.operators.store import Store


def run(work: Assignment, store: Store) -> Result:
    """The operator `exemplars`: the place of every training image within its class and domain.

    Raises:
        DamagedStage: an input is damaged.
    """
    parameters, [dataset] = from_json(RankParameters, work.parameters), work.inputs("dataset")
    index = load_index(store, *dataset)
    frozen = features.load(store, work.inputs("features")) if work.inputs("features") else None
    ranks = np.empty(len(index.labels), dtype=np.int32)
    for _, rows in exemplars.blocks(index.labels, index.domains):
        if frozen is not None:
            order_of = exemplars.herd(frozen[rows])
        else:
            assert parameters.seed is not None, "what is drawn has a seed"
            order_of = exemplars.shuffle(index.digests[rows], parameters.seed)
        ranks[rows[order_of]] = np.arange(len(rows))
    return Result(files={"ranks.safetensors": save_tensors({"rank": torch.from_numpy(ranks)})})
