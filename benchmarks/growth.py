"""Price of the next task: five tasks, then a sixth, and the same with the first task's images gone.

    python -m benchmarks.growth DATA [--work FOLDER]

DATA holds `cifar100_small/`. Each task has six classes of it at 32 pixels; the sixth task has the
class whose name sorts first. The backbone is the one that comes with the package. For one method of
each kind the table has the stages that the sixth task makes necessary and the images that they
forward, and whether all files are those of the six tasks at once, bit by bit: as the stream grew,
and as it grew after the first task's training images were deleted and the task was sealed.
"""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import graftwork

STEPS = {"epochs": 1, "batch_size": 16, "augmentation": "none"}
METHODS: dict[str, dict[str, Any]] = {
    "closed form: `simplecil`": {"methods": ["simplecil"]},
    "closed form: `ranpac`": {"methods": [{"ranpac": {"projection_dim": 2000}}]},
    "first session: `aper_adapter`": {"methods": [{"aper_adapter": {**STEPS, "lr": 0.05}}]},
    "trained: `l2p`": {"methods": [{"l2p": {**STEPS, "lr": 0.005}}]},
    "trained: `slca`": {"methods": [{"slca": {**STEPS, "lr": 0.01, "alignment_epochs": 1}}]},
    "side by side: `magmax_independent`": {"methods": [{"magmax_independent": dict(STEPS)}]},
    "merge: `ema` of `finetune`": {
        "methods": [{"finetune": {**STEPS, "lr": 0.001}}],
        "merge": [{"ema": {"of": "finetune", "decay": 0.5}}],
    },
    "ensemble: `mean_prob` of two": {
        "methods": ["slda", {"l2p": {**STEPS, "lr": 0.005}}],
        "ensemble": [{"mean_prob": {"of": ["slda", "l2p"]}}],
    },
}
SIZE = 6


def write(data: Path, folder: Path) -> None:
    """The files of six tasks."""
    names = json.loads((data / "cifar100_small" / "classes.json").read_text())
    # The first class by name comes last.
    order = [*range(1, 6 * SIZE), 0]
    for split, count in (("train", 50), ("test", 25)):
        table = pq.read_table(data / "cifar100_small" / f"{split}.parquet")
        labels = table["label"].to_numpy()
        for task in range(6):
            own = order[SIZE * task : SIZE * (task + 1)]
            rows = [r for c in own for r in (labels == c).nonzero()[0][:count].tolist()]
            part = pa.table(
                {
                    "image": table["image"].take(rows),
                    "label": pa.array([names[labels[row]] for row in rows]),
                }
            )
            pq.write_table(part, folder / f"{task + 1}-{split}.parquet")


def spec(folder: Path, count: int, sealed: bool, sections: dict[str, Any]) -> str:
    """A file with the first tasks."""
    tasks = [
        {
            "name": f"week {n}",
            "train": str(folder / f"{n}-train.parquet"),
            "test": str(folder / f"{n}-test.parquet"),
            **({"sealed": True} if sealed and n == 1 else {}),
        }
        for n in range(1, count + 1)
    ]
    given = {
        "pipeline": "growth",
        "stream": tasks,
        "backbone": {
            "model": "vit_micro_patch4_32",
            "weights": "builtin",
            "preprocessing": "micro_32",
        },
        "features": {"shard_size": 300},
        **sections,
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(given))
    return str(path)


def digests(store: Path) -> dict[str, dict[str, str]]:
    """Key of every stage -> digests of its files."""
    return {
        path.parent.name: {
            name: entry["sha256"] for name, entry in json.loads(path.read_text())["files"].items()
        }
        for path in store.glob("*/*/manifest.json")
        if len(path.parent.name) == 64
    }


def differing(one: Path, other: Path) -> int:
    """Stages of both stores whose files differ, and stages that one of them lacks."""
    first, second = digests(one), digests(other)
    # A chain that stopped after five tasks left nothing that six at once do not.
    return sum(first.get(key) != second.get(key) for key in {*first, *second} if key in second)


def grow(folder: Path, store: Path, kinds: Sequence[str], gone: bool) -> dict[str, tuple[int, int]]:
    """Stages computed and images forwarded for the sixth task, by kind of method."""
    for kind in kinds:
        graftwork.run(spec(folder, 5, False, METHODS[kind]), store=store)
    place = folder / "1-train.parquet"
    aside = folder / "aside"
    if gone:
        place.rename(aside)
    found = {}
    with contextlib.ExitStack() as stack:
        if gone:
            stack.callback(lambda: aside.rename(place))
        # What all of them share: the new task's index and its features.
        shared = graftwork.run(spec(folder, 6, gone, {"methods": ["acil"]}), store=store)
        found["shared: index, frozen features (and `acil`)"] = (
            shared.stages.computed,
            shared.images_forwarded,
        )
        for kind in kinds:
            document = graftwork.run(spec(folder, 6, gone, METHODS[kind]), store=store)
            found[kind] = (document.stages.computed, document.images_forwarded)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="price of the next task")
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, default=None)
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp())
    folder = work / "data"
    folder.mkdir(parents=True, exist_ok=True)
    write(given.data, folder)
    kinds = list(METHODS)
    once = {}
    for kind in kinds:
        document = graftwork.run(spec(folder, 6, False, METHODS[kind]), store=work / "once")
        once[kind] = (document.stages.computed, document.images_forwarded)
    kept = grow(folder, work / "grown", kinds, gone=False)
    gone = grow(folder, work / "sealed", kinds, gone=True)
    print("| kind | six tasks at once | the sixth after five | after the first one's images went |")
    print("|---|---|---|---|")
    for kind in kept:
        cells = [rows.get(kind) for rows in (once, kept, gone)]
        texts = ["" if c is None else f"{c[0]} stages, {c[1]:,} images" for c in cells]
        print(f"| {kind} | {' | '.join(texts)} |")
    for name in ("grown", "sealed"):
        print(f"{name}: {differing(work / 'once', work / name)} stages differ from those at once")


main()
