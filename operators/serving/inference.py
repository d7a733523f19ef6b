"""Predictions of a model for a shard of images: the classes that it finds likeliest.

Plain functions: a Ray task calls them on a worker, the command in its own process.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from graftwork.operators.serving.inputs import Place, Shard, name
from graftwork.operators.serving.predictor import Predictor, top


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Prediction of a model for one image.

    Args:
        place: of the image.
        best: (class name, score), likeliest first; empty if the image cannot be used.
        problem: why it cannot be used.
    """

    place: Place
    best: tuple[tuple[str, float], ...] = ()
    problem: str = ""

    @property
    def name(self) -> str:
        """Name of the image for people."""
        return name(self.place)


@lru_cache(maxsize=1)
def opened(folder: Path, device: str, weights: str | None) -> Predictor:
    """A model, opened once per process.

    Raises:
        ConfigError: the backbone's weights are not found.
        IncompatibleError: they are not those that the model was made with.
    """
    return Predictor(folder, device, weights)


def predict(
    predictor: Predictor,
    shard: Shard,
    count: int,
    decoders: int = 1,
    encoded: Iterable[bytes | str | None] | None = None,
) -> list[Prediction]:
    """Predictions of a shard's images, in order.

    Args:
        count: classes named per image.
        decoders: threads.
        encoded: the images, where they were read already.

    Raises:
        BadDataError: a table cannot be read.
    """
    images = shard.read() if encoded is None else encoded
    found = []
    for place, scores in zip(shard.places, predictor.scores(images, decoders), strict=True):
        if isinstance(scores, str):
            found.append(Prediction(place=place, problem=scores))
            continue
        columns = top(scores[None].numpy(), count)[0].tolist()
        best = tuple((predictor.classes[c], float(scores[c])) for c in columns)
        found.append(Prediction(place=place, best=best))
    return found
