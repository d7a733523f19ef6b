"""A small data set of PNGs, specs on it, and running their stages in this process, without Ray."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

from graftwork.cluster.execution.worker import Done, run_stage
from graftwork.methods.contracts.trained import Task
from graftwork.operators.parameters.as_json import from_json
from graftwork.operators.parameters.hints import ImageHints, TrainHints
from graftwork.operators.parameters.learners import LearnerRef
from graftwork.operators.parameters.training import JoinParameters, TrainParameters
from graftwork.operators.stage import OPERATORS, Stage
from graftwork.operators.store import Store
from graftwork.operators.training import opening
from graftwork.operators.training.rows import FeatureRows, TaskRows
from graftwork.pipelines.planning.plan import Plan, make_plan
from graftwork.pipelines.planning.runs import Run
from graftwork.pipelines.spec.loading import load_resolved

MODEL, PARALLEL, SIZE = "vit_nano_patch8_16", "vit_nano_parallel_patch8_16", 16
CLASSES = 6

default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 0,
            "input_size": (3, SIZE, SIZE),
            "fixed_input_size": True,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for name in (MODEL, PARALLEL)
    }
)


@register_model
def vit_nano_patch8_16(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A ViT of 2 blocks and width 16 for images of 16 pixels; milliseconds per step."""
    return _nano(MODEL, pretrained, **kwargs)


@register_model
def vit_nano_parallel_patch8_16(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The same with blocks that methods cannot be attached to."""
    return _nano(PARALLEL, pretrained, block_fn=ParallelScalingBlock, **kwargs)


def _nano(name: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    args: dict[str, Any] = {
        "img_size": SIZE,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 0,
    }
    network = build_model_with_cfg(VisionTransformer, name, pretrained, **{**args, **kwargs})
    with torch.no_grad():
        # timm starts so near to zero that all images would have nearly the same feature.
        for parameter in network.blocks.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return network


def png(seed: int, size: tuple[int, int] = (SIZE, SIZE), label: int = 0) -> bytes:
    """An image of width and height `size`: noise, with a stripe of the class's own colour."""
    width, height = size
    random = np.random.default_rng(seed)
    pixels = random.integers(0, random.integers(60, 180), (height, width, 3))
    start = height * label // CLASSES
    pixels[start : start + 6, :, label % 3] += 75
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


Row = tuple[bytes, int, str]
"""Image, class, domain."""


def rows(per_class: int, seed: int, domains: Sequence[str] = ("a",)) -> list[Row]:
    """Images of several sizes, class after class, each in every domain."""
    sizes = [(16, 16), (20, 18), (17, 24)]
    return [
        (png(seed + 100 * label + 10 * place + n, sizes[n % 3], label), label, domain)
        for label in range(CLASSES)
        for place, domain in enumerate(domains)
        for n in range(per_class)
    ]


def write(path: Path, table: Iterable[Row], names: Sequence[str] = ()) -> Path:
    """A Parquet file with the columns image, label and domain.

    Args:
        names: of the classes, to be written as labels; numbers are without them.
    """
    images, labels, domains = zip(*table, strict=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    named = pa.array([names[label] for label in labels], pa.string()) if names else None
    columns = {
        "image": pa.array(images, pa.binary()),
        "label": pa.array(labels, pa.int16()) if named is None else named,
        "domain": pa.array(domains, pa.string()),
    }
    pq.write_table(pa.table(columns), path)
    return path


def data(
    folder: Path, train: Iterable[Row], test: Iterable[Row], names: Sequence[str] = ()
) -> Path:
    """Folder of a data set."""
    write(folder / "train.parquet", train, names)
    write(folder / "test.parquet", test, names)
    return folder


def plan(store: Store, folder: Path, *overrides: str, **sections: Any) -> Plan:
    """The plan of three tasks of two classes each, on a random tiny ViT.

    Args:
        folder: of `data`.
        overrides: as on the command line.
        sections: of the spec, in place of the ones here.
    """
    spec = {
        "pipeline": "pngs",
        "dataset": {"train": str(folder / "train.parquet"), "test": str(folder / "test.parquet")},
        "scenario": {"kind": "class_incremental", "increment": 2, "orders": [1993]},
        "backbone": {
            "model": MODEL,
            "weights": "random",
            "preprocessing": {
                "resize": SIZE, "crop": SIZE, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
            },
        },
        "features": {"shard_size": 4},
        "methods": [{"finetune": {"epochs": 2, "batch_size": 4}}],
    }  # fmt: skip
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec | sections))
    return make_plan(load_resolved(str(path), overrides), store.memo)


def compute(stages: Iterable[Stage], store: Store) -> list[Done]:
    """Runs stages as workers do, in the given order."""
    return [run_stage(OPERATORS[stage.operator], stage.assignment(), store) for stage in stages]


def learner_of(stage: Stage) -> LearnerRef:
    """What the state of a training, a join, a merge or a prediction belongs to."""
    names = {part.name for part in fields(LearnerRef)} - {"network"} | {"architecture", "backbone"}
    return from_json(LearnerRef, {k: v for k, v in stage.parameters.items() if k in names})


def task_of(stage: Stage) -> Task:
    """What a method knows of the task of a stage."""
    return opening.task_of(learner_of(stage).task)


def training_rows(stage: Stage, store: Store) -> TaskRows | FeatureRows:
    """The images that a training or a join works with."""
    work = stage.assignment()
    if stage.operator == "join":
        reading = from_json(ImageHints, work.hints)
        data = from_json(JoinParameters, work.parameters).data
    else:
        reading = from_json(TrainHints, work.hints).reading
        data = from_json(TrainParameters, work.parameters).data
    return opening.task_rows(work, store, learner_of(stage), data, reading)


def of(made: Plan, operator: str) -> list[Stage]:
    """The stages of an operator, inputs before what reads them."""
    return [stage for stage in made.stages if stage.operator == operator]


def run_of(made: Plan, label: str) -> Run:
    """The only run of a method, as it is called."""
    [found] = [run for run in made.runs if run.method.label == label]
    return found
