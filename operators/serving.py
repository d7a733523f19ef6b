"""A fitted method as an MLflow model: plain files, no pickle.

`mlflow.pyfunc.load_model("runs:/<run id>/model")` gives a model whose `predict` takes a table with
a column `image` (encoded bytes, or base64 text as JSON has it) and returns the predicted class and
its score. It needs this package and the backbone's weights; their fingerprint is checked.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from operators.scenario import seen_classes, stream_of
from operators.store import Store, library_versions


def model_files(
    store: Store,
    fit: tuple[str, str],
    tasks: Sequence[Mapping[str, Sequence[int]]],
    description: Mapping[str, Any],
) -> dict[str, bytes | str]:
    """The files of the model after the last task.

    Args:
        fit: operator and key of the stored fit.
        tasks: what the fit learned, in its order.
        description: `method`, `seed`, `classes` (names), `backbone`, `preprocessing`, `precision`.
    """
    # numpy, not torch: the driver does without torch.
    from safetensors.numpy import load, save

    tensors = load(store.read(*fit, "state.safetensors"))
    last = f"{len(tasks) - 1}/"
    state = {n.removeprefix(last): t for n, t in tensors.items() if n.startswith(last)}
    learned = list(seen_classes(stream_of(tasks), len(tasks) - 1))
    model = {**description, "learned": learned}
    versions = library_versions()
    return {
        "model/MLmodel": json.dumps(
            # YAML reads JSON; MLflow looks for these keys.
            {
                "artifact_path": "model",
                "flavors": {
                    "python_function": {
                        "loader_module": "operators.serving",
                        "data": "data",
                        "env": {"virtualenv": "python_env.yaml"},
                        "python_version": versions["python"],
                    }
                },
                "signature": {
                    "inputs": json.dumps([{"name": "image", "type": "binary", "required": True}]),
                    "outputs": json.dumps(
                        [
                            {"name": "class", "type": "string", "required": True},
                            {"name": "score", "type": "double", "required": True},
                        ]
                    ),
                },
            },
            indent=1,
        ),
        "model/python_env.yaml": json.dumps(
            {"python": versions["python"], "dependencies": ["-r requirements.txt"]}
        ),
        "model/requirements.txt": f"graftwork=={versions['graftwork']}\n",
        "model/data/model.json": json.dumps(model, indent=1),
        "model/data/state.safetensors": save(state),
    }


class Predictor:
    """A fitted method with its backbone.

    Args:
        folder: the model's folder `data`.

    Raises:
        IncompatibleError: the backbone's weights are not those that it was fitted on.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load

        from operators import backbone, fit, models
        from operators.preprocessing import Preprocessing

        self._model = json.loads((folder / "model.json").read_text())
        self._state = load((folder / "state.safetensors").read_bytes())
        self._method = fit.build(self._model["method"])
        self._preprocessing = Preprocessing.from_json(self._model["preprocessing"])
        about = self._model["backbone"]
        network = models.load_on_device(
            about["model"],
            backbone.place(about["model"], about["weights"]),
            about["pooling"],
            about["fingerprint"],
            "cpu",
            about.get("image_size"),
        )
        self._embed = models.embedder(network, about["pooling"])

    def logits(self, images: Sequence[bytes]) -> Any:
        """Scores [N, C] of encoded images, columns as in `learned`."""
        import numpy as np
        import torch

        from operators.extract import extract

        features = extract(
            images,
            self._embed,
            self._preprocessing,
            precision=self._model["precision"],
        )
        # As stored: the method was fitted on features of this type.
        stored = torch.from_numpy(features.numpy().astype(np.dtype(self._model["dtype"])))
        return self._method.logits(self._state, stored.float(), self._model["seed"])

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """MLflow's entry: a table with a column `image` to a table with `class` and `score`."""
        import pandas as pd

        del params
        encoded = [
            base64.b64decode(value) if isinstance(value, str) else bytes(value)
            for value in model_input["image"]
        ]
        best = self.logits(encoded).max(dim=1)
        names = [self._model["classes"][self._model["learned"][i]] for i in best.indices.tolist()]
        return pd.DataFrame({"class": names, "score": best.values.double().tolist()})


def _load_pyfunc(path: str) -> Predictor:
    """What MLflow calls to load the model."""
    return Predictor(Path(path))
