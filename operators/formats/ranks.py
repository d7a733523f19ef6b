"""Ranks of exemplars as the stage `exemplars` stored them."""

import numpy as np
from safetensors.torch import load as load_tensors

from graftwork.operators.store import Store


def load(store: Store, operator: str, key: str) -> np.ndarray:
    """int32 [N]: the place of each training image within its class and domain.

    Raises:
        DamagedStage: it is missing or altered.
    """
    return load_tensors(store.read(operator, key, "ranks.safetensors"))["rank"].numpy()
