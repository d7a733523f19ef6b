"""What it costs to index many images: the first time, again, and after a file was appended.

    nice python benchmarks/indexing.py FOLDER [IMAGES]

FOLDER is filled with 64 Parquet files of small PNGs of 1,000 classes, about 300 bytes each, every
image another one, and removed again. Each step plans a spec (two closed-form methods, ten tasks) in
a process of its own, as `graftwork run` does before it computes: images are examined on a local
Ray, in the last step in the process itself. What a step needs besides the images (backbone,
methods) is in the memo before.
"""

import json
import resource
import shutil
import struct
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FILES, CLASSES, SIDE = 64, 1000, 9
SPEC = """
pipeline: indexing
dataset: {{train: "{0}/train-*.parquet", test: "{0}/test.parquet"}}
backbone: {{model: vit_micro_patch4_32, weights: builtin, preprocessing: micro_32}}
scenario: {{kind: class_incremental, initial: 100, increment: 100, orders: [natural]}}
methods: [simplecil, ranpac]
"""


def png(pixels: np.ndarray) -> bytes:
    """A PNG of pixels uint8 [SIDE, SIDE, 3]."""
    rows = np.zeros((SIDE, 1 + 3 * SIDE), np.uint8)
    rows[:, 1:] = pixels.reshape(SIDE, -1)
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes(), 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def write(path: Path, first: int, count: int) -> None:
    """A file of `count` images of noise, in row groups as data sets on a hub have them.

    Args:
        first: number of its first image; files with another one hold other images.
    """
    pixels = np.random.default_rng(first).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    table = {
        "image": pa.array(map(png, pixels), pa.binary()),
        "label": pa.array((first + np.arange(count)) % CLASSES, pa.int16()),
    }
    pq.write_table(pa.table(table), path, row_group_size=1000, compression="none")


def plan(folder: Path, local: bool) -> None:
    """Prints what planning took: seconds, bytes at most, and whether Ray was started."""
    from graftwork.cluster.indexing import OnCluster
    from graftwork.cluster.sessions.lasting import Lasting
    from graftwork.cluster.sessions.session import connect
    from graftwork.operators.data.parts import here
    from graftwork.operators.store import Store
    from graftwork.pipelines.planning.plan import make_plan
    from graftwork.pipelines.running.progress import Display
    from graftwork.pipelines.spec.loading import load_resolved

    loaded = load_resolved(str(folder / "spec.yaml"))
    store = Store(str(folder / ("local" if local else "store")))
    started = time.perf_counter()
    with Lasting(partial(connect, None)) as connection, Display().indexing():
        made = make_plan(loaded, store.memo, here if local else OnCluster(connection))
        stages = len({stage.key for stage in made.stages})
        seconds = time.perf_counter() - started
        opened = connection.opened
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    digest = made.data.digest[:12]
    print(json.dumps([seconds, peak, opened, made.data.counts[0], stages, digest]))


def measured(folder: Path, *options: str) -> list[Any]:
    """Plans in a new process."""
    command = [sys.executable, __file__, "--plan", str(folder), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def step(name: str, folder: Path, *options: str) -> None:
    """Plans in a new process, and prints a line of the table."""
    seconds, peak, opened, images, stages, digest = measured(folder, *options)
    print(
        f"| {name} | {images:,} | {stages} | {seconds:.1f} | {images / seconds:,.0f} | {peak:.0f} "
        f"| {'yes' if opened else 'no'} | {digest} |",
        flush=True,
    )


def main(folder: Path, images: int) -> None:
    """Makes the data set, measures, and removes it."""
    folder.mkdir(parents=True)
    each = images // FILES
    try:
        started = time.perf_counter()
        write(folder / "test.parquet", images + each, CLASSES)
        write(folder / "train-000.parquet", 0, CLASSES)
        (folder / "spec.yaml").write_text(SPEC.format(folder))
        for options in ((), ("--local",)):
            measured(folder, *options)
        for number in range(FILES):
            write(folder / f"train-{number:03}.parquet", number * each, each)
        size = sum(path.stat().st_size for path in folder.glob("*.parquet"))
        print(
            f"{FILES} files, {size / 1e6:.0f} MB, made in {time.perf_counter() - started:.0f} s\n"
        )
        print(
            "| plan | images | stages | seconds | images/s | peak MiB of the driver | Ray | data |"
        )
        print("|---|---|---|---|---|---|---|---|")
        step("first", folder)
        step("again", folder)
        write(folder / f"train-{FILES:03}.parquet", images, each)
        step("a file appended", folder)
        step("again", folder)
        step("first, in one process", folder, "--local")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    if "--plan" in sys.argv:
        plan(Path(words[0]), "--local" in sys.argv)
    else:
        main(Path(words[0]).absolute(), int((words[1:] or ["130000"])[0]))
