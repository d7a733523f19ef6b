"""The index of a split as the stage `dataset` stored it."""

from functools import lru_cache

from graftwork.operators.data.dataset import SplitIndex, read_index
from graftwork.operators.errors import DamagedStage
from graftwork.operators.store import Store


@lru_cache(maxsize=64)
def load_index(store: Store, operator: str, key: str) -> SplitIndex:
    """Digests, labels and domains of a stored dataset stage.

    Raises:
        DamagedStage: it is missing or altered.
    """
    try:
        return read_index(store.read(operator, key, "index.parquet"))
    except ValueError as error:
        raise DamagedStage(operator, key, f"index.parquet: {error}") from error
