"""SimpleCIL on the CIFAR-100 sample, computed again without anything of this project.

Plain timm, torchvision and numpy: one image after the other through torchvision's PIL transforms,
the model in float32, class means, cosine. The predictions are compared with those that the
pipeline stored, sample by sample.

    python benchmarks/reference.py DATA WEIGHTS STORE

DATA holds train.parquet and test.parquet, WEIGHTS is the ViT-Ti file, STORE is where
`graftwork run cifar100-small` kept its results.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
TRANSFORM: Any = Compose([Resize(256, InterpolationMode.BICUBIC), CenterCrop(224), ToTensor()])


def features_of(path: Path, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, 192] class tokens and [N] labels."""
    table = pq.read_table(path, columns=["image", "label"])
    images, rows = table["image"].to_pylist(), []
    with torch.inference_mode():
        for start in range(0, len(images), 10):
            batch = [
                TRANSFORM(Image.open(io.BytesIO(i)).convert("RGB"))
                for i in images[start : start + 10]
            ]
            rows.append(model.forward_features(torch.stack(batch))[:, 0].numpy())
            print(f"\r{path.name}: {start + 10}/{len(images)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return np.concatenate(rows), table["label"].to_numpy()


def simplecil(train: Any, test: Any, order: np.ndarray, increment: int) -> list[np.ndarray]:
    """Predictions after every task on the test images of the tasks seen, as the pipeline has them.

    Images stand task by task, classes are numbered in the order of their arrival.
    """
    (x, y), (u, _) = train, test
    means = np.stack([x[y == c].astype(np.float64).mean(0) for c in range(len(order))])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    unit = u / np.linalg.norm(u, axis=1, keepdims=True)
    rows, labels = by_task(test[1], order, increment)
    predictions = []
    for stop in range(increment, len(order) + 1, increment):
        shown = rows[labels < stop]
        predictions.append((unit[shown] @ means[order[:stop]].T).argmax(1))
    return predictions


def by_task(labels: np.ndarray, order: np.ndarray, increment: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the test images task by task, and their classes by arrival."""
    arrived = np.argsort(order)[labels]
    rows = np.argsort(arrived // increment, kind="stable")
    return rows, arrived[rows]


def main() -> None:
    data, weights, store = (Path(argument) for argument in sys.argv[1:4])
    model = timm.create_model(MODEL, num_classes=0).eval()
    state = {k: v for k, v in load_file(weights).items() if not k.startswith("head.")}
    model.load_state_dict(state, strict=True)
    train = features_of(data / "train.parquet", model)
    test = features_of(data / "test.parquet", model)
    order = np.random.RandomState(1993).permutation(100)
    expected = simplecil(train, test, order, 10)
    _, labels = by_task(test[1], order, 10)
    curve = []
    for stop, predicted in zip(range(10, 101, 10), expected, strict=True):
        curve.append(100 * float((predicted == labels[labels < stop]).mean()))
    print("reference curve", [round(a, 4) for a in curve])
    for manifest in sorted(store.glob("evaluate/*/manifest.json")):
        about = json.loads(manifest.read_text())
        keyed = about["preimage"]["parameters"]
        if keyed["method"]["name"] != "simplecil" or keyed["order"] != 1993:
            continue
        table = pq.read_table(manifest.parent / about["files"]["predictions.parquet"]["stored"])
        trained, stored = table["task_trained"].to_numpy(), table["predicted"].to_numpy()
        different = [
            int((stored[trained == task] != predicted).sum())
            for task, predicted in enumerate(expected)
        ]
        summary = json.loads(
            (manifest.parent / about["files"]["summary.json"]["stored"]).read_text()
        )
        print("pipeline curve ", [round(a, 4) for a in summary["curve"]])
        print("predictions that differ, per task:", different)


main()
