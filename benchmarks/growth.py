"""Price of the next task: five tasks, then a sixth, and the same with the first task's images gone.

    python -m benchmarks.growth DATA [--work FOLDER]

DATA holds `cifar100_small/`. Each task has six classes of it, twenty training and ten test images
of each, at 32 pixels; the sixth task has the class whose name sorts first. The backbone is the one
that comes with the package. For one method of each kind the table has the stages that the sixth
task makes necessary and the images that they forward, and whether all files are those of the six
tasks at once, bit by bit: as the stream grew, and as it grew after the first task's training images
were deleted and the task was sealed; what keeps exemplars as images is refused then. Stages run in
this process, without Ray.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from graftwork.cluster.execution.worker import run_stage
from graftwork.operators.stage import OPERATORS
from graftwork.operators.store import Store
from graftwork.pipelines.explaining.sealed import gone
from graftwork.pipelines.planning import sources
from graftwork.pipelines.planning.plan import Plan, make_plan
from graftwork.pipelines.spec.loading import load_resolved

STEPS = {"epochs": 1, "batch_size": 16, "augmentation": "none"}
METHODS: dict[str, dict[str, Any]] = {
    "closed form: `simplecil`": {"methods": ["simplecil"]},
    "closed form: `ranpac`": {"methods": [{"ranpac": {"projection_dim": 2000}}]},
    "first session: `aper_adapter`": {"methods": [{"aper_adapter": {**STEPS, "lr": 0.05}}]},
    "trained: `l2p`": {"methods": [{"l2p": {**STEPS, "lr": 0.005}}]},
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
CLIP: dict[str, dict[str, Any]] = {
    "on CLIP: `zs_clip`": {"methods": ["zs_clip"]},
    "on CLIP, 72 features kept: `proof`": {"methods": [{"proof": {**STEPS, "exemplars": 72}}]},
    "fused, 72 images kept: `promptfusion`": {
        "methods": [{"promptfusion": {"epochs": 1, "batch_size": 16, "exemplars": 72}}]
    },
}
MICRO = {"model": "vit_micro_patch4_32", "weights": "builtin", "preprocessing": "micro_32"}
NETWORKS: list[tuple[dict[str, Any], dict[str, dict[str, Any]]]] = [
    ({"backbone": MICRO}, METHODS),
    (
        {
            "backbone": {
                "model": "open_clip:clip_micro_32",
                "weights": "random",
                "preprocessing": {"resize": 32, "crop": 32, "mean": [0.5] * 3, "std": [0.5] * 3},
            },
            "vit": dict(MICRO),
        },
        CLIP,
    ),
]
"""Networks of a spec, and what runs on them: kinds of methods, with their sections."""
SIZE = 6


def write(data: Path, folder: Path) -> None:
    """The files of six tasks."""
    names = json.loads((data / "cifar100_small" / "classes.json").read_text())
    # The first class by name comes last.
    order = [*range(1, 6 * SIZE), 0]
    for split, count in (("train", 20), ("test", 10)):
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
        "features": {"shard_size": 120},
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


def together(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sections of several kinds in one spec."""
    found: dict[str, Any] = {"methods": [], "merge": [], "ensemble": []}
    for sections in several:
        for section, entries in sections.items():
            found[section] += [entry for entry in entries if entry not in found[section]]
    return found


Price = tuple[int, int] | None
"""Stages that a store lacks and images that these forward; None for a kind that is refused."""


def price(folder: Path, store: Store, count: int, sealed: bool) -> dict[str, Price]:
    """Prices each kind by its plan, then computes them all."""
    found: dict[str, Price] = {}
    stages = images = 0
    started = time.perf_counter()
    for networks, kinds in NETWORKS:
        for kind, sections in kinds.items():
            made = planned(spec(folder, count, sealed, networks | sections), store)
            lacking = made.missing(made.stored(store))
            refused = gone(made, lacking)
            for each in refused:
                print(f"{kind}: {each.error()}", flush=True)
            found[kind] = None if refused else (len(lacking), sum(map(made.images, lacking)))
        own = together([kinds[kind] for kind in kinds if found[kind] is not None])
        made = planned(spec(folder, count, sealed, networks | own), store)
        sources.keep(made.sources, store.memo)
        for stage in (lacking := made.missing(made.stored(store))):
            run_stage(OPERATORS[stage.operator], stage.assignment(), store)
        stages, images = stages + len(lacking), images + sum(map(made.images, lacking))
    found["all of them"] = (stages, images)
    print(f"{stages} stages in {time.perf_counter() - started:.0f} s", flush=True)
    return found


def planned(path: str, store: Store) -> Plan:
    return make_plan(load_resolved(path, ()), store.memo)


def main() -> None:
    parser = argparse.ArgumentParser(description="price of the next task")
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, default=None)
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp())
    folder = work / "data"
    folder.mkdir(parents=True, exist_ok=True)
    write(given.data, folder)
    stores = {name: Store(str(work / name)) for name in ("once", "grown", "sealed")}
    once = price(folder, stores["once"], 6, sealed=False)
    price(folder, stores["grown"], 5, sealed=False)
    grown = price(folder, stores["grown"], 6, sealed=False)
    price(folder, stores["sealed"], 5, sealed=False)
    (folder / "1-train.parquet").unlink()
    sealed = price(folder, stores["sealed"], 6, sealed=True)
    print("| kind | six tasks at once | the sixth after five | after the first one's images went |")
    print("|---|---|---|---|")
    for kind in once:
        prices = (once[kind], grown[kind], sealed[kind])
        cells = [f"{p[0]} stages, {p[1]:,} images" if p else "refused" for p in prices]
        print(f"| {kind} | {' | '.join(cells)} |")
    for name in ("grown", "sealed"):
        whole, found = digests(work / "once"), digests(work / name)
        there = [key for key in whole if key in found]
        other = sum(whole[key] != found[key] for key in there)
        print(f"{name}: {len(there)} of the {len(whole)} stages of six at once, {other} differ")


main()
