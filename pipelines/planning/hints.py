"""Hints of stages: places of images, worked out when somebody looks at them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.parameters.hints import ImageHints, Places, ShardHints, TrainHints

H = TypeVar("H", ImageHints, ShardHints, TrainHints)


class Hints(Mapping[str, Any], Generic[H]):
    """Hints of a stage as JSON, with the places of its images worked out when somebody looks.

    A sweep plans ten thousand stages, of which few are sent to a worker.

    Args:
        value: the hints, without places.
        places: where the images are.
    """

    def __init__(self, value: H, places: Callable[[], Places]) -> None:
        self.value, self.places = value, places
        self._fixed = to_json(value)

    def __getitem__(self, name: str) -> Any:
        return self.places() if name == "places" else self._fixed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fixed)

    def __len__(self) -> int:
        return len(self._fixed)
