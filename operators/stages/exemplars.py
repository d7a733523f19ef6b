"""Ranks the training images of a class in a domain as exemplars; see `operators.data.exemplars`."""

from collections.abc import Callable

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from graftwork.operators.assignment import Assignment, Result
from graftwork.operators.data import exemplars
from graftwork.operators.data.digests import digest_of
from graftwork.operators.errors import DamagedStage
from graftwork.operators.formats import selection
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.features import RankParameters
from graftwork.operators.parameters.hints import CpuHints
from graftwork.operators.store import Store

HERDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "herding": exemplars.herd,
    "barycenter": exemplars.barycenter,
}
"""Selections by features [N, D] -> rows [N], best first."""


def run(work: Assignment, store: Store) -> Result:
    """The operator `exemplars`: the place of every image among those of its class and domain.

    Raises:
        DamagedStage: an input is damaged.
    """
    parameters = from_json(RankParameters, work.parameters)
    ranking = parameters.ranking
    given = from_json(CpuHints, work.hints).selection
    [rows] = selection.rows_of(work, store, given)
    if digest_of(rows.index.digests) != parameters.digest:
        raise DamagedStage(*work.inputs("dataset")[0], f"not the images of {work.label}")
    if ranking.features is not None:
        found = selection.matrix(work, store, given, rows)
        assert found is not None, "herding comes with shards of features"
        order_of = HERDINGS[ranking.selection](found)
    else:
        assert ranking.seed is not None, "what is drawn has a seed"
        order_of = exemplars.shuffle(rows.index.digests, ranking.seed)
    ranks = np.empty(len(rows), dtype=np.int32)
    ranks[order_of] = np.arange(len(rows))
    return Result(files={"ranks.safetensors": save_tensors({"rank": torch.from_numpy(ranks)})})
