"""Decoding and resizing against torchvision's own transforms, per core, with equal pixels.

    python benchmarks/preprocessing.py train.parquet [images]

One thread; both ways see the same encoded images, alternately, and the best of five rounds counts.
The second table is of decoding ahead of a consumer that does nothing: with two batches in flight
whatever the number of threads, and with two per thread. More threads than cores show nothing.
"""

import io
import os
import sys
import time
from functools import partial
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

from graftwork.operators.images.pixels import prepare
from graftwork.operators.images.prefetch import batched, prefetch
from graftwork.operators.images.preprocessing import PRESETS

BATCH = 16


def pil_pixels(data: bytes, transform: Any) -> torch.Tensor:
    """float [3, h, w] by torchvision."""
    return transform(Image.open(io.BytesIO(data)).convert("RGB"))


def ahead(images: list[bytes], threads: int, depth: int) -> float:
    """Images per second that threads decode for a consumer."""
    started = time.perf_counter()
    decode = partial(prepare, preprocessing=PRESETS["lamda_224"])
    for _ in prefetch(decode, batched(images, BATCH), workers=threads, depth=depth):
        pass
    return len(images) / (time.perf_counter() - started)


def main() -> None:
    torch.set_num_threads(1)
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 400
    images = pq.read_table(sys.argv[1], columns=["image"])["image"].to_pylist()[:count]
    transform = Compose([Resize(256, InterpolationMode.BICUBIC), CenterCrop(224), ToTensor()])
    ours, theirs, expected, found = [], [], [], []
    for _ in range(5):
        started = time.perf_counter()
        expected = [pil_pixels(data, transform) for data in images]
        theirs.append(count / (time.perf_counter() - started))
        started = time.perf_counter()
        found = [
            prepare(images[i : i + BATCH], PRESETS["lamda_224"]) for i in range(0, count, BATCH)
        ]
        ours.append(count / (time.perf_counter() - started))
    difference = max(
        int((batch[i].short() - (expected[n * BATCH + i] * 255).round().short()).abs().max())
        for n, batch in enumerate(found)
        for i in range(len(batch))
    )
    print("| decode + resize, one thread | images/s |\n|---|---|")
    print(f"| torchvision Resize, CenterCrop, ToTensor on PIL images | {max(theirs):.0f} |")
    print(f"| graftwork | {max(ours):.0f} |")
    print(f"\nratio {max(ours) / max(theirs):.2f}; largest difference of a pixel {difference}/255")
    heading = (
        f"| threads, of {os.cpu_count()} cores | two batches in flight, images/s | two per thread |"
    )
    print(f"\n{heading}\n|---|---|---|")
    for threads in (1, 2, 4, 8):
        rounds = [(ahead(images, threads, 2), ahead(images, threads, 2 * threads)) for _ in "12345"]
        fixed, following = map(max, zip(*rounds, strict=True))
        print(f"| {threads} | {fixed:.0f} | {following:.0f}, ratio {following / fixed:.2f} |")


main()
