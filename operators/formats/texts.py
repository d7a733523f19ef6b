"""Features of texts as the stage `text` stored them."""

from functools import lru_cache
from typing import TYPE_CHECKING

from safetensors.torch import load as load_tensors
from torch import Tensor

from graftwork.operators.store import Store

if TYPE_CHECKING:
    pass


@lru_cache(maxsize=2)
def load(store: Store, operator: str, key: str) -> Tensor:
    """Features [T, K, E] of a stored stage.

    Raises:
        DamagedStage: it is missing or altered.
    """
    return load_tensors(store.read(operator, key, "text.safetensors"))["features"]
