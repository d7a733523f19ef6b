"""The files of a served model: `model.json`, states, and MLflow's `MLmodel`."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.operators.backbones.names import CLIP
from graftwork.operators.keys import digest
from graftwork.operators.store import Store
from graftwork.operators.tracking.records import Artifacts
from graftwork.operators.versions import library_versions

if TYPE_CHECKING:
    from torch import Tensor

    Views = tuple[Tensor, ...]
    """Pixels uint8 [1, 3, h, w] of an image, prepared for each network."""


WEIGHTS = "GRAFTWORK_WEIGHTS"
"""Environment variable with the place of the backbone's weights, if it is another one now."""


MAIN, BESIDE = "main", "beside"
"""Names of a model's networks: the backbone, and a second one next to it."""


FORMAT = 1
"""Version of `model.json`. A newer one is refused."""


FOLDER = "model"
"""Folder of the model among the artifacts of its run."""


LOADER = "graftwork.operators.serving"
"""Module through which MLflow loads a model; its `__init__` has `_load_pyfunc`."""


Stored = tuple[str, str, str]
"""Place of a state: operator and key of a stage, and the prefix of its tensors' names there."""


def identity(description: Mapping[str, Any], states: Mapping[str, Stored]) -> str:
    """Digest of what a model predicts with: runs with equal ones share a model.

    The loader counts: a model that names another one is recorded again instead of found.
    """
    about = _without_place(description)
    if BESIDE in about:
        about[BESIDE] = _without_place(about[BESIDE])
    return digest([LOADER, about, {n: list(s) for n, s in states.items()}])


def _without_place(network: Mapping[str, Any]) -> dict[str, Any]:
    """A network's description without the place of its weights: the fingerprint identifies them."""
    backbone = {k: v for k, v in network["backbone"].items() if k != "weights"}
    return {**network, "backbone": backbone}


def model_files(
    store: Store, description: Mapping[str, Any], states: Mapping[str, Stored]
) -> Artifacts:
    """The files of a model, those of states to be written when they are wanted.

    Args:
        description: the content of `model.json`: `predictor` (see `operators.serving.kinds`),
            `columns` (ids of the classes seen, ascending), `classes` (names of all), `backbone`,
            `preprocessing`, `size` (pixels of the images that the backbone takes; None for any),
            `precision` and `dtype` of the features; `beside`, if there is a second network, with
            its own `backbone`, `preprocessing`, `size` and `precision`.
        states: file name -> where the state is stored.
    """
    versions = library_versions()
    pillow = ".".join(versions["pillow"].split(".")[:2])
    made_of = {name: {"operator": s[0], "key": s[1]} for name, s in states.items()}
    networks = [description, *([description[BESIDE]] if BESIDE in description else [])]
    clip = any(network["backbone"]["model"].startswith(CLIP) for network in networks)
    package = f"graftwork{'[clip]' if clip else ''}=={versions['graftwork']}"
    return {
        "model/MLmodel": json.dumps(_mlmodel(versions["python"]), indent=1),
        "model/python_env.yaml": json.dumps(
            {"python": versions["python"], "dependencies": ["-r requirements.txt"]}
        ),
        # Pixels are those of one version of Pillow, which preprocessing insists on.
        "model/requirements.txt": f"{package}\npillow=={pillow}.*\n",
        "model/data/model.json": json.dumps(
            {"format": FORMAT, **description, "made_of": made_of}, indent=1
        ),
        **{f"model/data/{name}": partial(_write, store, *s) for name, s in states.items()},
    }


def _mlmodel(python: str) -> dict[str, Any]:
    """Description that MLflow reads of a model; YAML reads JSON."""
    inputs = [{"name": "image", "type": "binary", "required": True}]
    outputs = [
        {"name": "class", "type": "string", "required": True},
        {"name": "score", "type": "double", "required": True},
    ]
    params = [{"name": "logits", "type": "boolean", "default": False, "shape": None}]
    return {
        "artifact_path": FOLDER,
        "flavors": {
            "python_function": {
                "loader_module": LOADER,
                "data": "data",
                "env": {"virtualenv": "python_env.yaml"},
                "python_version": python,
            }
        },
        "signature": {
            "inputs": json.dumps(inputs),
            "outputs": json.dumps(outputs),
            "params": json.dumps(params),
        },
    }


def _write(store: Store, operator: str, key: str, prefix: str, path: Path) -> None:
    """Writes a state into a file; of a stage with several states the one with the prefix."""
    if not prefix:
        store.copy(operator, key, "state.safetensors", path)
        return
    # numpy, not torch: the driver does without torch.
    from safetensors.numpy import load, save_file

    tensors = load(store.read(operator, key, "state.safetensors"))
    kept = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    save_file(kept, path)
