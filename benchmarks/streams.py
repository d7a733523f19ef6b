"""Streams as the world has them, on real images: the tables of the README.

    python -m benchmarks.streams DATA WEIGHTS [--store FOLDER] [--only NAME]...

DATA holds `cifar100_small/` and `pacs_small/`, WEIGHTS is the file of timm's ViT-Ti
(`vit_tiny_patch16_224.augreg_in21k_ft_in1k`), which reads 112 pixels here. Two sources one after
the other; a blurry stream, online; few shots; and domains one of which lacks a class.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pyarrow.compute
import pyarrow.parquet as pq
import yaml

import graftwork

CLOSED: list[Any] = [
    "simplecil",
    "slda",
    "fecam",
    "acil",
    {"ranpac": {"projection_dim": 2000}},
    "joint_linear",
]
LIMIT = {"train": 50, "test": 25}
compute: Any = pyarrow.compute


def filtered(source: Path, target: Path, keep: Any) -> str:
    """A Parquet file with some of the rows."""
    table = pq.read_table(source)
    pq.write_table(table.filter(keep(table)), target)
    return str(target)


def sections(data: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Name of a study -> its data, scenario and methods."""
    cifar, pacs = data / "cifar100_small", data / "pacs_small"
    names = json.loads((cifar / "classes.json").read_text())
    whole = {
        "train": str(cifar / "train.parquet"),
        "test": str(cifar / "test.parquet"),
        "classes": str(cifar / "classes.json"),
        "limit_per_class": LIMIT,
    }

    def photos(split: str) -> str:
        source = pacs / f"{split}.parquet"
        return filtered(
            source, work / f"photos-{split}.parquet", lambda t: compute.equal(t["domain"], "photo")
        )

    def without_horses(table: Any) -> Any:
        """All rows but the horses among the cartoons; class 4 are horses."""
        return compute.or_(
            compute.not_equal(table["domain"], "cartoon"), compute.not_equal(table["label"], 4)
        )

    return {
        "sources": {
            "stream": [
                *(
                    {
                        "name": f"CIFAR-100, part {n + 1}",
                        **whole,
                        "only": names[20 * n : 20 * n + 20],
                    }
                    for n in range(5)
                ),
                {
                    "name": "PACS photos",
                    "train": photos("train"),
                    "test": photos("test"),
                    "classes": str(pacs / "classes.json"),
                },
            ],
            "methods": CLOSED,
        },
        "blurry": {
            "dataset": whole,
            "scenario": {
                "kind": "class_incremental",
                "blurry": {"tasks": 5, "disjoint": 50, "mixed": 10},
                "online": {"every": 500},
                "orders": [1, 2, 3, 4, 5],
            },
            "methods": CLOSED,
        },
        "few shots": {
            "dataset": whole,
            "scenario": {
                "kind": "class_incremental",
                "initial": 60,
                "increment": 5,
                "few_shot": {"shots": 5},
            },
            "methods": CLOSED,
        },
        "missing class": {
            "dataset": {
                "train": filtered(
                    pacs / "train.parquet", work / "no-horses.parquet", without_horses
                ),
                "test": str(pacs / "test.parquet"),
                "classes": str(pacs / "classes.json"),
                "domain": "domain",
            },
            "scenario": {
                "kind": "domain_incremental",
                "orders": [["cartoon", "photo", "art_painting", "sketch"]],
            },
            "methods": CLOSED,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="streams on real images")
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--store", type=Path, default=Path("streams-store"))
    parser.add_argument("--only", action="append")
    given = parser.parse_args()
    given.store.mkdir(parents=True, exist_ok=True)
    for name, study in sections(given.data.absolute(), given.store.absolute()).items():
        if given.only and name not in given.only:
            continue
        path = given.store / f"{name.replace(' ', '-')}.yaml"
        backbone = {
            "model": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
            "weights": str(given.weights.absolute()),
            "image_size": 112,
            "preprocessing": {"resize": 112, "crop": 112, "mean": [0.5] * 3, "std": [0.5] * 3},
        }
        spec = {"pipeline": name, "backbone": backbone, **study}
        # No anchors: a value that stands in two places is written twice.
        path.write_text(yaml.dump(spec, Dumper=_Plain, sort_keys=False))
        document = graftwork.run(path, store=given.store, progress=True)
        print(f"\n{name}: {document.images_forwarded:,} images in {document.seconds:.0f} s")
        for result in document.results:
            numbers = {k: round(v, 2) for k, v in result.metrics.items() if k in SHOWN}
            print(result.label, f"order {result.order}", json.dumps(numbers), flush=True)


SHOWN = ("a_avg", "a_last", "a_last_macro_task", "forgetting", "a_auc", "base", "novel", "harmonic")


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


main()
