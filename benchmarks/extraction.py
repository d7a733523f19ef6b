"""Extraction end to end against the time that decoding and the network need alone.

    python benchmarks/extraction.py train.parquet weights.safetensors [images] [bf16]
    python benchmarks/extraction.py --memory train.parquet test.parquet

The floor is 1 / (1 / decode rate + 1 / forward rate), both measured alone, on the same one core,
around the end-to-end pass; the forward rate at its best micro-batch. End to end means everything
that a worker does for a shard: read Parquet, hash, decode, resize, forward, encode, commit.
`--memory` compares the peak memory of extracting few and all images, each in a new process, with
the small backbone that ships with the package.
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from graftwork.cluster.execution.worker import run_stage
from graftwork.operators.backbones import loading, resolve
from graftwork.operators.data import dataset, sources
from graftwork.operators.images.pixels import normalise, prepare
from graftwork.operators.images.preprocessing import PRESETS
from graftwork.operators.parameters.as_json import to_json
from graftwork.operators.parameters.features import FeatureKind, ShardParameters
from graftwork.operators.parameters.hints import ImageHints, NetworkPlace, ShardHints
from graftwork.operators.parameters.learners import Network, Numerics
from graftwork.operators.stage import OPERATORS, Resources, Stage
from graftwork.operators.store import Store

MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def rate(count: int, work: Callable[[], Any]) -> float:
    """Things per second."""
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


def stages(split: Any, about: Any, preset: str, precision: str, count: int) -> list[Stage]:
    """Feature stages of the first `count` images, as the planner makes them."""
    size = 512
    return [
        Stage(
            operator="features",
            parameters=to_json(
                ShardParameters(
                    digest=split.images_digest(start, stop),
                    kind=FeatureKind(
                        network=Network(architecture=about.model, fingerprint=about.fingerprint),
                        preprocessing=PRESETS[preset],
                        pooling="token",
                        dtype="float16",
                        numerics=Numerics(device="cpu", precision=precision, torch="benchmark"),
                    ),
                )
            ),
            hints=to_json(
                ShardHints(
                    reading=ImageHints(
                        network=NetworkPlace(
                            model=about.model,
                            weights=about.weights,
                            pooling="token",
                            image_size=None,
                        ),
                        cpus=1,
                        max_pixels=None,
                        images=stop - start,
                        places=split.places(start, stop),
                    ),
                    batch_size=None,
                )
            ),
            resources=Resources(),
            label=f"features {start}",
        )
        for start in range(0, count, size)
        for stop in [min(start + size, count)]
    ]


def against_the_floor(train: str, weights: str, count: int, precision: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        split = dataset.index({"train": [train], "test": [train]}, store.memo).train
        about = resolve.resolve(MODEL, weights, "token", store.memo)
        preprocessing = PRESETS["lamda_224"]
        images = list(sources.read(split.places(0, count)))
        network = loading.load_on_device(MODEL, weights, "token", about.fingerprint, "cpu")
        pixels = prepare(images[:128], preprocessing)

        @torch.inference_mode()
        def forward(batch: int) -> None:
            for chunk in pixels.split(batch):
                with loading.autocast("cpu", precision):
                    loading.pooled_features(network, normalise(chunk, preprocessing), "token")

        def decode() -> None:
            for start in range(0, len(images), 16):
                prepare(images[start : start + 16], preprocessing)

        def end_to_end() -> None:
            for stage in stages(split, about, "lamda_224", precision, count):
                run_stage(OPERATORS["features"], stage.assignment(), store)

        batches = (4, 8, 16, 32, 64)
        before = {b: rate(128, lambda b=b: forward(b)) for b in batches}
        decoding = rate(count, decode)
        found = rate(count, end_to_end)
        after = {b: rate(128, lambda b=b: forward(b)) for b in batches}
        # The mean of both sides: a noisy machine is noisy before and after.
        forwards = {b: 2 / (1 / before[b] + 1 / after[b]) for b in batches}
        best = max(forwards, key=lambda b: forwards[b])
        floor = 1 / (1 / decoding + 1 / forwards[best])
        print(f"| one core, {precision}, {count} images | images/s |\n|---|---|")
        print(f"| decode and resize alone | {decoding:.0f} |")
        for b in batches:
            print(f"| forward alone, micro-batch {b} | {forwards[b]:.1f} |")
        print(f"| floor | {floor:.1f} |\n| end to end | {found:.1f} |")
        print(f"\nend to end / floor = {found / floor:.3f}")


def memory(train: str, test: str) -> None:
    print("| images | peak memory of the process, MiB |\n|---|---|")
    peaks = []
    for limit in ("20", "all"):
        done = subprocess.run(
            [sys.executable, __file__, "--peak", train, test, limit],
            capture_output=True,
            text=True,
            check=True,
        )
        count, peak = done.stdout.split()
        peaks.append(int(peak))
        print(f"| {count} | {int(peak) / 1024:.0f} |")
    print(f"\nratio {peaks[1] / peaks[0]:.3f}")


def peak(train: str, test: str, limit: str) -> None:
    """Extracts both splits in this process and prints images and peak KiB."""
    torch.set_num_threads(1)
    limits = None if limit == "all" else int(limit)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        about = resolve.resolve("vit_micro_patch4_32", "builtin", "token", store.memo)
        found = dataset.index(
            {
                "train": [train],
                "test": [test],
                "limit_per_class": {"train": limits, "test": limits},
            },
            store.memo,
        )
        total = 0
        for split in (found.train, found.test):
            total += len(split)
            for stage in stages(split, about, "micro_32", "fp32", len(split)):
                run_stage(OPERATORS["features"], stage.assignment(), store)
    print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    match sys.argv[1:]:
        case ["--memory", train, test]:
            memory(train, test)
        case ["--peak", train, test, limit]:
            peak(train, test, limit)
        case [train, weights, *rest]:
            numbers = [int(word) for word in rest if word.isdigit()]
            precision = "bf16" if "bf16" in rest else "fp32"
            against_the_floor(train, weights, numbers[0] if numbers else 1024, precision)
        case _:
            sys.exit(__doc__)


main()
