"""Draws of torch's random generator on a CPU, made without torch.

Published samplers draw with `torch.Generator`; planning has to start fast and imports no torch.
Both are the Mersenne Twister that NumPy's legacy generator seeds alike.
"""

import numpy as np


class Draws:
    """A generator that draws what `torch.Generator().manual_seed(seed)` does.

    Args:
        seed: 0 .. 2**32 - 1.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.RandomState(seed)

    def permutation(self, count: int) -> np.ndarray:
        """Numbers int64 0..count-1 as `torch.randperm` shuffles them."""
        numbers = np.arange(count)
        # torch draws once for each place but the last, and takes the rest of the division.
        ahead = self._words(max(count - 1, 0)) % np.arange(count, 1, -1, dtype=np.int64)
        order = numbers.tolist()
        for place, far in enumerate(ahead.tolist()):
            other = place + far
            order[place], order[other] = order[other], order[place]
        return np.array(order, dtype=np.int64)

    def integers(self, below: int, count: int) -> np.ndarray:
        """Numbers int64 [count] in 0..below-1 as `torch.randint` draws them."""
        return self._words(count) % below

    def _words(self, count: int) -> np.ndarray:
        return self._random.randint(0, 1 << 32, count, dtype=np.uint32).astype(np.int64)
