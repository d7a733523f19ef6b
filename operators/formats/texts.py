"""Features of texts as the stage `text` stored them."""

from functools import lru_cache

from safetensors.torch import load as load_tensors
from torch import Tensor

from graftwork.operators.store import Store


@lru_cache(maxsize=2)
def load(store: Store, operator: str, key: str) -> tuple[Tensor, tuple[str, ...]]:
    """Features [T, K, E] of a stored stage, and the names [K].

    Raises:
        DamagedStage: it is missing or altered.
    """
    names = store.manifest(operator, key)["preimage"]["parameters"]["names"]
    return load_tensors(store.read(operator, key, "text.safetensors"))["features"], tuple(names)
