"""Shapes of ragged streams by name, and every method, merge and rule planned and computed on them.

A shape says how many images every class has in every task. Classes are plain colours under a little
noise, so that frozen features tell them apart. Names of classes stand in another order than their
numbers, and columns in a third one.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from graftwork import methods
from graftwork.operators import ensembling, merging
from graftwork.operators.store import Store
from graftwork.pipelines.planning.plan import Plan
from graftwork.pipelines.planning.runs import Run
from tests import pngs
from tests.test_conformance import SMALL
from tests.test_promptfusion import BESIDE
from tests.test_text import BACKBONE

Counts = Mapping[int, int]
"""Class -> images."""
Place = tuple[str, int, int, int]
"""Split, task, class and number of an image."""
Network = Literal["vit", "clip"]
NETWORKS: tuple[Network, ...] = ("vit", "clip")

NAMES = ("hen", "ant", "gnu", "bee", "fox", "cat", "elk", "dog")
"""Of the classes."""
COLOURS = [[40 + 170 * (label >> bit & 1) for bit in range(3)] for label in range(8)]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A stream.

    Args:
        name: what the documents call it.
        train: training images of each class, for every task.
        test: test images.
        arrival: classes in the order in which they get their columns.
        seen: columns after each task.
        cut: tasks that bring their own images, or a data set that is cut into classes or domains.
        others: training images of classes that no task learns, in a data set that is cut.
        absent: names in `dataset.classes` of which there is no image at all.
        same: an image -> the one whose bytes it has.
        names: of the classes.
    """

    name: str
    train: tuple[Counts, ...]
    test: tuple[Counts, ...]
    arrival: tuple[int, ...]
    seen: tuple[int, ...]
    cut: Literal["listed", "class", "domain"] = "listed"
    others: Counts = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    same: Mapping[Place, Place] = field(default_factory=dict)
    names: tuple[str, ...] = NAMES

    @property
    def tasks(self) -> range:
        """Numbers of the tasks."""
        return range(len(self.train))

    def tested(self) -> list[tuple[int, int]]:
        """Task and column of every test image, in the order of tables of predictions."""
        first = {c: min(t for t in self.tasks if c in self.train[t]) for c in self.arrival}
        # One that is tested before its class is trained waits for it.
        found = [
            (max(task, first[label]), self.arrival.index(label))
            for task in self.tasks
            for label, count in self.test[task].items()
            for _ in range(count)
            if label in first
        ]
        return sorted(found, key=lambda pair: pair[0])

    def trained(self, task: int) -> dict[int, int]:
        """Training images of a task, by column."""
        return {self.arrival.index(label): n for label, n in self.train[task].items()}


def of_each(classes: Sequence[int], count: int) -> Counts:
    return dict.fromkeys(classes, count)


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            name="one class in a task",
            train=(of_each([0], 4), of_each([1, 2], 4), of_each([3], 4)),
            test=(of_each([0], 2), of_each([1, 2], 2), of_each([3], 2)),
            arrival=(0, 1, 2, 3),
            seen=(1, 3, 4),
        ),
        Shape(
            name="one image in a class",
            train=({0: 4, 1: 1, 2: 4}, {3: 1}),
            test=({0: 2, 1: 2, 2: 1}, {3: 2}),
            arrival=(1, 2, 0, 3),
            seen=(3, 4),
        ),
        Shape(
            name="tasks of 3, 1 and 4 classes",
            train=(of_each([0, 1, 2], 4), of_each([3], 4), of_each([4, 5, 6, 7], 4)),
            test=(of_each([0, 1, 2], 2), of_each([3], 1), of_each([4, 5, 6, 7], 2)),
            arrival=(1, 2, 0, 3, 5, 7, 6, 4),
            seen=(3, 4, 8),
        ),
        Shape(
            name="a domain without a class",
            train=({0: 4, 1: 4}, {1: 4, 2: 4}, {0: 4, 2: 3}),
            test=({0: 2, 1: 2, 2: 1}, {0: 1, 1: 2, 2: 2}, {0: 2, 1: 1, 2: 2}),
            arrival=(1, 0, 2),
            seen=(2, 3, 3),
            cut="domain",
        ),
        Shape(
            name="a class that is never trained",
            train=(of_each([2, 0], 4), of_each([4], 4)),
            test=(of_each([2, 0], 2), of_each([4], 2)),
            arrival=(2, 0, 4),
            seen=(2, 3),
            cut="class",
            others={1: 3, 3: 3},
            absent=("cow", "zebra"),
        ),
        Shape(
            name="a class without test images",
            train=(of_each([0, 1], 4), of_each([2, 3], 4)),
            test=({0: 2}, {3: 3}),
            arrival=(1, 0, 3, 2),
            seen=(2, 4),
        ),
        Shape(
            name="equal images",
            train=(of_each([0, 1], 4), of_each([1, 2], 4)),
            test=(of_each([0, 1], 2), of_each([1, 2], 2)),
            arrival=(1, 0, 2),
            seen=(2, 3),
            cut="domain",
            same={
                # In two classes of one domain, in one class of two, and in both; tested, too.
                ("train", 0, 1, 0): ("train", 0, 0, 0),
                ("train", 1, 1, 1): ("train", 0, 1, 1),
                ("train", 1, 2, 0): ("train", 0, 0, 0),
                ("test", 0, 1, 0): ("test", 0, 0, 0),
                ("test", 1, 1, 0): ("test", 0, 0, 0),
                ("test", 1, 2, 1): ("train", 0, 0, 0),
            },
        ),
    )
}


@cache
def picture(split: str, task: int, label: int, number: int) -> bytes:
    """An image of 16 pixels: its class's colour under noise."""
    seed = [split == "test", task, label, number]
    noise = np.random.default_rng(seed).integers(-25, 26, (pngs.SIZE, pngs.SIZE, 3))
    pixels = (np.array(COLOURS[label]) + noise).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def rows(shape: Shape, split: str, task: int) -> list[pngs.Row]:
    """The images of a task, class by class."""
    counts = (shape.train if split == "train" else shape.test)[task]
    places = [(split, task, label, n) for label, count in counts.items() for n in range(count)]
    return [
        (picture(*shape.same.get(place, place)), place[2], f"domain {task}") for place in places
    ]


def sections(shape: Shape, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Writes the images; what a spec says of them, as overrides and sections."""
    count = len(shape.train)
    tasks = {split: [rows(shape, split, n) for n in range(count)] for split in ("train", "test")}
    if shape.cut == "listed":
        for split, parts in tasks.items():
            for number, part in enumerate(parts):
                pngs.write(folder / f"{number}-{split}.parquet", part, shape.names)
        stream = [
            {
                "name": f"task {n}",
                **{split: str(folder / f"{n}-{split}.parquet") for split in ("train", "test")},
            }
            for n in range(count)
        ]
        return [], {"stream": stream, "dataset": None, "scenario": None}
    more = [
        (picture("train", 9, label, n), label, "domain 0")
        for label, images in shape.others.items()
        for n in range(images)
    ]
    train = [*more, *(row for part in tasks["train"] for row in part)]
    pngs.data(folder, train, [row for part in tasks["test"] for row in part], shape.names)
    if shape.cut == "domain":
        order = [f"domain {n}" for n in range(count)]
        scenario = {"kind": "domain_incremental", "orders": [order]}
        return ["dataset.domain=domain"], {"scenario": scenario}
    known = sorted({*(shape.names[row[1]] for row in train), *shape.absent})
    order = [known.index(shape.names[label]) for label in shape.arrival]
    order += [n for n in range(len(known)) if n not in order]
    first = shape.seen[0]
    sizes = {"initial": first, "increment": shape.seen[1] - first, "tasks": count}
    return (
        [f"dataset.classes={json.dumps(known)}"],
        {"scenario": {"kind": "class_incremental", "orders": [order], **sizes}},
    )


# Every method, merge and rule.

VALUES: dict[str, Any] = SMALL | {
    "epochs": 1,
    "freeze_epochs": 0,
    "batch_size": 8,
    "augmentation": "none",
    "samples_per_class": 8,
    "tii_samples_per_class": 8,
    "centroids": 2,
    "projection_dim": 24,
    "context_length": 2,
    "exemplars": 6,
    "blocks": 2,
    "layers": 2,
    "last_block": 1,
    "components_per_task": 2,
    "image_prompt_length": 2,
    "vit_prompt_length": 2,
}
"""Given to every method that has a field of the name."""
FITTING: dict[str, dict[str, Any]] = {
    "esn": {"prompt_length": 3},
    "coop": {"warmup_epochs": 0},
    "zscl": {"lr": 1e-3, "warmup": 2, "average_every": 2, "constraint": 0.1},
    "dualprompt": {"g_last": 0, "e_first": 1, "e_last": 1},
}
MERGED, MEMBERS = "finetune", ("finetune", "simplecil", "l2p")
"""What is merged, and what ensembles are of."""


@dataclass(frozen=True)
class Case:
    """A result of a run.

    Args:
        label: of the run.
        network: of its backbone.
    """

    label: str
    network: Network


def methods_on(network: Network) -> list[str]:
    return [name for name in methods.METHODS if methods.load(name).card.network == network]


CASES = [
    *(Case(name, network) for network in NETWORKS for name in methods_on(network)),
    *(Case(f"{name} merge", "vit") for name in merging.MERGES),
    *(Case(f"{name} ensemble", "vit") for name in ensembling.RULES),
]


def entry(name: str, **changes: Any) -> Any:
    """A method as a spec names it."""
    known = {part.name for part in methods.fields(name)}
    given = {key: v for key, v in (VALUES | changes).items() if key in known}
    return {name: {**given, **FITTING.get(name, {})}}


@dataclass(frozen=True, eq=False)
class Computed:
    """A shape with all its results on one network."""

    shape: Shape
    store: Store
    plan: Plan

    def run(self, label: str) -> Run:
        return pngs.run_of(self.plan, label)


def planned(
    shape: Shape, network: Network, folder: Path, store: Store, given: Sequence[Any] = ()
) -> Computed:
    """The plan of methods on a shape; of all of them with all merges and rules if none is given."""
    folder.mkdir(parents=True, exist_ok=True)
    overrides, parts = sections(shape, folder)
    parts["features"] = {"shard_size": 64}
    # Enough to learn in one of the shapes; getting through takes less.
    changes = {"epochs": 5, "batch_size": 4, "lr": 0.05} if "4" in shape.name else {}
    parts["methods"] = given or [entry(name, **changes) for name in methods_on(network)]
    if network == "clip":
        pngs.data(folder / "reference", pngs.rows(1, 9000), pngs.rows(1, 9000))
        images = str(folder / "reference" / "test.parquet")
        parts["reference"] = {"images": images, "texts": ["a river", "snow"]}
        parts |= {"backbone": BACKBONE, "vit": BESIDE}
    elif not given:
        measured = {"fisher": {"images": 3}, "regmean": {"images": 3}}
        parts["merge"] = [
            {name: {"of": MERGED, "name": f"{name} merge", **measured.get(name, {})}}
            for name in merging.MERGES
        ]
        parts["ensemble"] = [
            {name: {"of": list(MEMBERS), "name": f"{name} ensemble"}} for name in ensembling.RULES
        ]
    # Through JSON: YAML would write an object that occurs twice as one.
    made = pngs.plan(store, folder, *overrides, **json.loads(json.dumps(parts)))
    return Computed(shape, store, made)


def computed(name: str, network: Network, folder: Path) -> Computed:
    """All results of a shape."""
    found = planned(SHAPES[name], network, folder, Store(str(folder / "store")))
    pngs.compute(found.plan.stages, found.store)
    return found
