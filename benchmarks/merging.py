"""Merging checkpoints against the loop that one writes in ten lines.

    python benchmarks/merging.py [--megabytes N] [--count N] [--rounds N] [--threads N]
        [--only NAME] [--clock wall|cpu] [--peak NAME graftwork|bare FOLDER]

Both read safetensors files and write one. The bare loop loads all checkpoints, walks through the
names, and saves; graftwork reads tensor by tensor, and holds its result as the operator does.
Rounds of both alternate, the ratio is the median of the ratios of neighbours; above 1 graftwork is
faster. Peak memory is the private memory of a fresh process beyond what it had before it merged, as
a multiple of one checkpoint; pages of files, which the system can drop, are not in it.

`--clock cpu` counts the processor seconds of the process: for machines that others use too.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from graftwork.operators import merging
from graftwork.operators.merging.apply import Merged
from graftwork.operators.merging.readers import TensorFile, to_bytes

State = dict[str, Tensor]
CASES: dict[str, dict[str, object]] = {
    "mean": {},
    "ema": {},
    "slerp": {},
    "task_arithmetic": {},
    "magmax": {},
    "model_stock": {},
    "ties": {"trim": "tensor"},
    "dare": {},
}


def checkpoint(megabytes: int, seed: int) -> State:
    """Tensors of a ViT's shapes, float32."""
    generator = torch.Generator().manual_seed(seed)
    width = 384
    blocks = max(1, round(megabytes * 2**20 / 4 / (12 * width * width)))
    state = {}
    for block in range(blocks):
        for name, shape in {
            "attn.qkv.weight": (3 * width, width),
            "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width),
            "mlp.fc1.weight": (4 * width, width),
            "mlp.fc2.weight": (width, 4 * width),
            "norm1.weight": (width,),
        }.items():
            state[f"blocks.{block}.{name}"] = torch.randn(shape, generator=generator) * 0.02
    return state


def mean(models: list[Tensor], base: Tensor) -> Tensor:
    return torch.stack(models).mean(dim=0)


def ema(models: list[Tensor], base: Tensor) -> Tensor:
    average = models[0].clone()
    for model in models[1:]:
        average = 0.5 * average + 0.5 * model
    return average


def slerp(models: list[Tensor], base: Tensor) -> Tensor:
    a, b = models[-2:]
    cosine = (a.flatten() / a.norm()) @ (b.flatten() / b.norm())
    if abs(cosine) > 0.9995:
        return 0.5 * a + 0.5 * b
    angle = torch.acos(cosine)
    return (torch.sin(0.5 * angle) * a + torch.sin(0.5 * angle) * b) / torch.sin(angle)


def task_arithmetic(models: list[Tensor], base: Tensor) -> Tensor:
    return base + 0.3 * torch.stack([model - base for model in models]).sum(dim=0)


def magmax(models: list[Tensor], base: Tensor) -> Tensor:
    vectors = torch.stack([model - base for model in models])
    return base + 0.5 * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))[0]


def model_stock(models: list[Tensor], base: Tensor) -> Tensor:
    vectors = torch.stack([(model - base).flatten() for model in models])
    units = torch.nn.functional.normalize(vectors, dim=1)
    n = len(models)
    cosine = ((units @ units.T).sum() - n) / (n * (n - 1))
    t = n * cosine / (1 + (n - 1) * cosine)
    return t * torch.stack(models).mean(dim=0) + (1 - t) * base


def ties(models: list[Tensor], base: Tensor) -> Tensor:
    vectors = torch.stack([(model - base).flatten() for model in models])
    count = max(1, round(0.2 * vectors.shape[1]))
    kept = torch.zeros_like(vectors)
    places = vectors.abs().topk(count, dim=1).indices
    kept.scatter_(1, places, vectors.gather(1, places))
    signs = kept.sum(dim=0).sign()
    agrees = kept * signs > 0
    merged = (kept * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
    return base + merged.view_as(base)


def dare(models: list[Tensor], base: Tensor) -> Tensor:
    vectors = [(model - base) * (torch.rand_like(base) >= 0.5) / 0.5 for model in models]
    return base + torch.stack(vectors).mean(dim=0)


BARE: dict[str, Callable[[list[Tensor], Tensor], Tensor]] = {
    f.__name__: f for f in (mean, ema, slerp, task_arithmetic, magmax, model_stock, ties, dare)
}


def bare(name: str, places: list[Path], base: Path, target: Path) -> None:
    """All checkpoints in memory, one name after the other."""
    states, start = [load_file(place) for place in places], load_file(base)
    save_file({n: BARE[name]([s[n] for s in states], start[n]) for n in start}, target)


def graftwork(name: str, places: list[Path], base: Path, target: Path) -> None:
    """The merge as the operator does it."""
    merge = merging.build(name, CASES[name])
    start = TensorFile(base) if merge.card.base else None
    merged = Merged(merge, [TensorFile(place) for place in places], start)
    target.write_bytes(to_bytes(merged.specs, merged))


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SIDES = {"graftwork": graftwork, "bare": bare}


def peak(name: str, side: str, folder: Path) -> float:
    """Largest private memory of this process while it merges, beyond what it had before, in MiB."""

    def private() -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) / 1024
        raise OSError("no RssAnon in /proc/self/status")

    most, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, private())

    places = sorted(folder.glob("model-*.safetensors"))
    before = private()
    watcher = threading.Thread(target=watch)
    watcher.start()
    SIDES[side](name, places, folder / "base.safetensors", folder / "out.safetensors")
    done.set()
    watcher.join()
    return most - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=80)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--peak", nargs=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        name, side, folder = options.peak
        print(peak(name, side, Path(folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        places = [place / f"model-{i}.safetensors" for i in range(options.count)]
        for number, path in enumerate(places):
            save_file(checkpoint(options.megabytes, number + 1), path)
        save_file(checkpoint(options.megabytes, 0), place / "base.safetensors")
        size = places[0].stat().st_size / 2**20
        print(f"{options.count} checkpoints of {size:.0f} MiB, {options.threads} thread(s)")
        print("| merge | bare, s | graftwork, s | bare / graftwork | peak, x checkpoint (bare) |")
        print("|---|---|---|---|---|")
        for name in [options.only] if options.only else CASES:
            clock = CLOCKS[options.clock]
            print(row(name, places, place, options.rounds, size, clock), flush=True)


def row(
    name: str,
    places: list[Path],
    folder: Path,
    rounds: int,
    size: float,
    clock: Callable[[], float],
) -> str:
    """A line of the table."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds + 1):
        for side, run in SIDES.items():
            started = clock()
            run(name, places, folder / "base.safetensors", folder / "out.safetensors")
            seconds[side].append(clock() - started)
    # The first round reads the files into the cache.
    pairs = list(zip(seconds["bare"][1:], seconds["graftwork"][1:], strict=True))
    ratio = statistics.median(b / g for b, g in pairs)
    peaks = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--peak", name, side, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[side] = float(done.stdout) / size
    middle = [statistics.median(values) for values in zip(*pairs, strict=True)]
    return (
        f"| `{name}` | {middle[0]:.2f} | {middle[1]:.2f} | {ratio:.2f} "
        f"| {peaks['graftwork']:.2f} ({peaks['bare']:.2f}) |"
    )


if __name__ == "__main__":
    main()
