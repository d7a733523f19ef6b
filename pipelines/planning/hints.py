"""Hints of stages: places of images, worked out when somebody looks at them."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


class Hints(Mapping[str, Any]):
    """Hints of a stage, with the places of its images worked out when somebody looks at them.

    A sweep plans ten thousand stages, of which few are sent to a worker.
    """

    def __init__(self, places: Callable[[], dict[str, Any]], fixed: Mapping[str, Any]) -> None:
        self._places, self._fixed = places, fixed

    def but(self, **changes: Any) -> "Hints":
        """With other values for some of them."""
        return Hints(self._places, {**self._fixed, **changes})

    def __getitem__(self, name: str) -> Any:
        return self._places() if name == "places" else self._fixed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(("places", *self._fixed))

    def __len__(self) -> int:
        return 1 + len(self._fixed)
