"""Result of a run as an MLflow model: plain files, no pickle.

`mlflow.pyfunc.load_model("runs:/<run id>/model")` gives a model whose `predict` takes a table with
a column `image` (encoded bytes, or base64 text as JSON has it) and returns the predicted class and
its score; with `params={"logits": True}` the scores of all classes, a column each. It needs this
package and the backbone's weights, whose fingerprint is checked; where the weights are not at
their old place, `GRAFTWORK_WEIGHTS` names the new one. A method with a second network has two
places, with a comma between them; an empty one stays as it was.
"""

import base64
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.operators.errors import BadDataError, ChangedWeights, ConfigError, IncompatibleError
from graftwork.operators.images.prefetch import batched, prefetch
from graftwork.operators.images.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

    Views = tuple[Tensor, ...]
    """Pixels uint8 [1, 3, h, w] of an image, prepared for each network."""
from graftwork.operators.serving.model_files import BESIDE, FORMAT, MAIN, WEIGHTS


class Predictor:
    """A model on a device.

    Args:
        folder: the model's folder `data`.
        device: "cpu" or "cuda".
        weights: place of the backbone's weights, and after a comma that of the network beside it;
            None for `GRAFTWORK_WEIGHTS`, or the places where they were when the model was made.

    Raises:
        ConfigError: the backbone's weights are not found.
        IncompatibleError: they are not those that the model was made with, or the model was
            written by a newer version of this program.
    """

    def __init__(self, folder: Path, device: str = "cpu", weights: str | None = None) -> None:
        from graftwork.operators.serving import kinds
        from graftwork.operators.training import forward

        about = json.loads((folder / "model.json").read_text())
        if about["format"] > FORMAT:
            raise IncompatibleError(
                f"{folder}: the model has format {about['format']}, this program reads up to "
                f"{FORMAT}; update graftwork"
            )
        networks = {MAIN: about, **({BESIDE: about[BESIDE]} if BESIDE in about else {})}
        self._views = {
            name: (Preprocessing.from_json(network["preprocessing"]), network["size"])
            for name, network in networks.items()
        }
        self._device = device
        self._batch = forward.PLAIN_BATCH[device]
        self.classes: list[str] = [about["classes"][label] for label in about["columns"]]
        """Names of the classes, one per column of the scores."""
        places = _places(weights or os.environ.get(WEIGHTS) or "", tuple(networks))
        model = kinds.Model(folder=folder, about=about, device=device, weights=places)
        for name, network in networks.items():
            try:
                replace(model, network=name).backbone()
            except (ConfigError, IncompatibleError) as error:
                place = places.get(name)
                raise _about_weights(network["backbone"], place, error, name) from error
        self._score = kinds.open_predictor(model)

    def scores(
        self, images: Iterable[bytes | str | None], decoders: int = 1
    ) -> Iterator["Tensor | str"]:
        """Scores [C] of every image, in order, or why it cannot be used.

        Streams: two batches, and two images per decoder, are in memory.

        Args:
            images: encoded images (JPEG, PNG, WEBP), or why one could not be read; None for an
                empty cell of a table.
            decoders: threads.
        """
        for chunk in self._decoded(images, decoders):
            rows = iter(self._rows([item for item in chunk if not isinstance(item, str)]))
            for item in chunk:
                yield item if isinstance(item, str) else next(rows)

    def logits(self, images: Sequence[bytes]) -> "Tensor":
        """Scores [N, C] of encoded images.

        Raises:
            BadDataError: an image cannot be used.
        """
        import torch

        found = list(self.scores(images))
        for number, row in enumerate(found):
            if isinstance(row, str):
                raise BadDataError(f"image {number}: {row}")
        rows: list[Any] = found
        return torch.stack(rows) if rows else torch.zeros(0, len(self.classes))

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """MLflow's entry: a table with a column `image` to a table with `class` and `score`.

        Args:
            params: `logits`: the scores of all classes instead, a column each.
        """
        import pandas as pd

        encoded = [
            base64.b64decode(value) if isinstance(value, str) else bytes(value)
            for value in model_input["image"]
        ]
        scores = self.logits(encoded)
        if params and params.get("logits"):
            return pd.DataFrame(scores.double().numpy(), columns=self.classes)
        best = top(scores.numpy(), 1)[:, 0]
        return pd.DataFrame(
            {
                "class": [self.classes[column] for column in best.tolist()],
                "score": scores.double().numpy()[range(len(best)), best],
            }
        )

    def _rows(self, pixels: list["Views"]) -> list["Tensor"]:
        """Scores of prepared images, those of one size together."""
        import torch

        from graftwork.operators.images.pixels import normalise

        rows: list[Any] = [None] * len(pixels)
        groups: dict[tuple[tuple[int, ...], ...], list[int]] = defaultdict(list)
        for position, views in enumerate(pixels):
            groups[tuple(tuple(view.shape) for view in views)].append(position)
        for positions in groups.values():
            # Always the same number of rows: no image's scores depend on how many there are.
            filled = positions + positions[:1] * (self._batch - len(positions))
            batch = {
                name: normalise(
                    torch.cat([pixels[position][view] for position in filled]).to(self._device),
                    preprocessing,
                )
                for view, (name, (preprocessing, _)) in enumerate(self._views.items())
            }
            with torch.no_grad():
                found = self._score(batch).cpu()
            for position, row in zip(positions, found, strict=False):
                finite = bool(torch.isfinite(row).all())
                rows[position] = row if finite else "its scores are NaN or infinite"
        return rows

    def _decoded(
        self, images: Iterable[bytes | str | None], decoders: int
    ) -> Iterator[list["Views | str"]]:
        """Batches of prepared images, decoded ahead by threads, in order."""
        # While the network works on a batch, the next one and two images per thread.
        depth = self._batch + 2 * decoders
        prepared = prefetch(self._prepared, images, workers=decoders, depth=depth)
        yield from batched(prepared, self._batch)

    def _prepared(self, image: bytes | str | None) -> "Views | str":
        """An image as each network sees it, or why there is none."""
        from graftwork.operators.images import codec
        from graftwork.operators.images.pixels import resize_and_crop

        if image is None or isinstance(image, str):
            return image or "no image bytes"
        views = []
        try:
            decoded = codec.rgb(image)
            for preprocessing, size in self._views.values():
                views.append(resize_and_crop([decoded], preprocessing))
                height, width = views[-1].shape[2:]
                if size not in (None, height) or size not in (None, width):
                    return f"has {width}x{height} pixels, the backbone takes {size}x{size}"
        except BadDataError as error:
            return str(error)
        return tuple(views)


def top(scores: Any, count: int) -> Any:
    """Columns [N, count] of the largest scores [N, C], largest first; of equal ones the first."""
    import numpy as np

    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def _places(given: str, names: Sequence[str]) -> dict[str, str]:
    """Places of weights by network, those that are given."""
    places = given.split(",", len(names) - 1)
    return {name: place for name, place in zip(names, places, strict=False) if place}


def _about_weights(
    backbone: Mapping[str, Any],
    place: str | None,
    error: ConfigError | IncompatibleError,
    network: str,
) -> ConfigError | IncompatibleError:
    """Error about a network's weights, and what to do where there is no spec."""
    model, wanted = backbone["model"], backbone["fingerprint"][:12]
    kind = ConfigError if isinstance(error, ConfigError) else IncompatibleError
    problem = f"{error.value}: {error.what}" if error.value else error.what
    if isinstance(error, ChangedWeights):
        where = place or backbone["weights"] or "timm's hub"
        problem = f"weights at {where} are not those that the model was made with"
    where = WEIGHTS if network == MAIN else f"{WEIGHTS}, behind a comma"
    advice = f"name the file of its weights (state {wanted}) in {where}"
    return kind(problem, value=f"backbone {model}", advice=advice)


def load_pyfunc(path: str) -> Predictor:
    """Loads the model for MLflow."""
    return Predictor(Path(path))
