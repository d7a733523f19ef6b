"""Training steps of all methods that train a ViT against a bare loop with the same network.

    python benchmarks/training.py [--model NAME] [--size PIXELS] [--methods A,B] [--batch N]
        [--steps N] [--rounds N] [--threads N] [--precision fp32] [--edge PIXELS]
        [--only ready|loaded] [--clock wall|cpu]

The bare loop has the method's learner, optimiser, clipping and precision, and takes ready tensors:
zero_grad, forward, backward, step. `ready`: the training loop on ready tensors too, queries
included; its steps and the bare ones alternate. `loaded`: encoded images, decoded and augmented by
the threads of a run; the bare loop has them as tensors, and computes queries where the training
loop must (not with augmentation "none", where they come from the cache of features). Rounds of
both alternate; the clock of the training loop starts when it asks for its first batch, before
anything is decoded. The ratio is the median of the ratios of neighbours.

`--clock cpu` counts the processor seconds of the process, all threads together: for machines that
others use too. It sees all work, but no waiting; use it with one thread.
"""

import argparse
import copy
import hashlib
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from graftwork import methods
from graftwork.methods.contracts.trained import Task, Trained, trains
from graftwork.methods.networks import vit as seams
from graftwork.methods.parts.first_session import Peft
from graftwork.operators.backbones import loading
from graftwork.operators.backbones.loading import PRECISIONS
from graftwork.operators.data.index_file import SplitIndex
from graftwork.operators.images.preprocessing import Preprocessing
from graftwork.operators.training import batches, forward, loop
from graftwork.operators.training.rows import TaskRows
from graftwork.operators.training.settings import Images, Settings

CLASSES = 10
PER_ROUND = 4
"""Steps of a round with loading: few, so that neighbours are close in time."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]
TASK = Task(index=0, count=10, current=tuple(range(CLASSES)), before=0, seen=CLASSES)


Rates = tuple[float, float, float]
"""Images per second of the training loop and of the bare loop, and their ratio."""


class Stop(Exception):
    """Ends a task after its last step: what comes then is no training step."""


@dataclass(frozen=True)
class Case:
    """A method and what it runs on."""

    label: str
    name: str
    values: dict[str, Any]
    network: Any
    settings: Settings

    @cached_property
    def method(self) -> Trained:
        """The method, or the experts of an independent one."""
        return trains(methods.build(self.name, self.values))

    def vit(self) -> Any:
        """A network that the method may change."""
        return seams.check(copy.deepcopy(self.network))

    def augmented(self, name: str) -> "Case":
        """With another augmentation, where the method leaves the choice."""
        if "augmentation" not in {field.name for field in fields(methods.load(self.name))}:
            return self
        return replace(self, values=self.values | {"augmentation": name})


class Bare:
    """The loop that one writes in ten lines."""

    def __init__(self, case: Case) -> None:
        self._device = case.settings.device
        self.learner, _ = loop.open_learner(case.method, case.vit(), TASK, None, case.settings)
        self.learner.begin()
        self.learner.train()
        recipe = case.method.recipe(TASK)
        self._optimizer, self._clip = recipe.optimizer(self.learner.groups()), recipe.clip
        self._parameters = [p for p in self.learner.parameters() if p.requires_grad]
        self._dtype = PRECISIONS[case.settings.precision]

    def step(self, images: Tensor, targets: Tensor, query: Tensor | None) -> None:
        """One step; the query is computed where it is needed and not given."""
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device, dtype=self._dtype, enabled=self._dtype is not None):
            if query is None and self.learner.needs_query:
                with torch.no_grad():
                    tokens = self.learner.network.forward_features(images)
                    query = seams.read_out(self.learner.network, tokens).float()
            loss = self.learner(images, targets, query)["loss"]
        loss.backward()
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        self.learner.after_step()


class Ready:
    """Images for the training loop that need no work."""

    query: Tensor | None

    def __init__(self, pixels: Tensor, targets: Tensor, query: Tensor | None) -> None:
        self._pixels, self.targets, self.query = pixels, targets, query
        self.exemplars = torch.zeros(len(targets), dtype=torch.bool)

    def batch(self, rows: Any, epoch: int, augmentation: str) -> Tensor:
        return self._pixels[: len(rows)]

    def normalise(self, pixels: Tensor) -> Tensor:
        return pixels

    def name(self, row: int) -> str:
        return str(row)


class Watched:
    """Images of a task, and when they were first asked for."""

    def __init__(self, images: Images) -> None:
        self.targets, self.query, self.exemplars = images.targets, images.query, images.exemplars
        self.normalise, self.name, self._batch = images.normalise, images.name, images.batch
        self.started = 0.0

    def batch(self, rows: Any, epoch: int, augmentation: str) -> Tensor:
        self.started = self.started or clock()
        return self._batch(rows, epoch, augmentation)


def cases(wanted: list[str], batch: int, network: Any, settings: Settings) -> Iterator[Case]:
    """Every method that trains a ViT, and every kind of first session."""
    small = {"batch_size": batch, "epochs": 1, "alignment_epochs": 1, "milestone": 1}
    for name in (*methods.METHODS, *methods.PARTS):
        found = methods.load(name)
        if (found.card.contract, found.card.network) != ("trained", "vit"):
            continue
        fitting = {f.name: small[f.name] for f in fields(found) if f.name in small}
        kinds: list[dict[str, Any]] = [{}]
        if name == "first_session":
            kinds = [{"peft": kind} for kind in get_args(Peft)]
        for values in kinds:
            label = "-".join([name, *values.values()])
            if not wanted or name in wanted or label in wanted:
                yield Case(label, name, fitting | values, network, settings)


def train(case: Case, images: Images, steps: int, say: Callable[[], None]) -> None:
    """Steps of the training loop, `say` after each."""
    left = iter(range(steps - 1))

    def after(**facts: Any) -> None:
        say()
        if next(left, None) is None:
            raise Stop

    try:
        loop.train_task(case.method, case.vit(), TASK, images, None, case.settings, say=after)
    except Stop:
        return
    raise AssertionError("a task has more steps than that")


def rates(images: int, ours: list[float], bare: list[float]) -> Rates:
    """Medians of pairs of measurements that were taken in turn."""
    ratios = [theirs / mine for mine, theirs in zip(ours, bare, strict=True)]
    middle = statistics.median
    return images / middle(ours), images / middle(bare), middle(ratios)


def ready(case: Case, batch: int, steps: int, pixels: Tensor) -> Rates:
    """Images per second of the training loop and of the bare loop, on ready tensors."""
    case = case.augmented("none")
    targets = torch.arange(batch * steps) % CLASSES
    query = forward.frozen_features(case.vit(), pixels)
    bare, ours, theirs = Bare(case), [], []
    mark = clock()

    def after() -> None:
        nonlocal mark
        now = clock()
        ours.append(now - mark)
        bare.step(pixels, targets[:batch], query)
        mark = clock()
        theirs.append(mark - now)

    train(case, Ready(pixels, targets, query.repeat(steps, 1)), steps, after)
    # The first steps allocate the optimiser's state.
    return rates(batch, ours[2:], theirs[2:])


def loaded(case: Case, augmentation: str, batch: int, rounds: int, given: TaskRows) -> Rates:
    """Images per second of the training loop with encoded images, of the bare loop with tensors."""
    case, count = case.augmented(augmentation), len(given.targets)
    steps = count // batch
    chunks = batches.chunks(list(range(count)), batch)
    inputs = [given.normalise(given.batch(rows, 0, augmentation)) for rows in chunks]
    features = torch.cat([forward.frozen_features(case.vit(), images) for images in inputs])
    given.query = features if augmentation == "none" else None
    tensors = [
        (images, given.targets[rows], None if given.query is None else given.query[rows])
        for images, rows in zip(inputs, chunks, strict=True)
    ]
    bare, ours, theirs = Bare(case), [], []
    for _ in range(rounds + 1):
        watched = Watched(given)
        train(case, watched, steps, lambda: None)
        now = clock()
        ours.append(now - watched.started)
        for _, step in zip(range(steps), cycle(tensors), strict=False):
            bare.step(*step)
        theirs.append(clock() - now)
    return rates(count, ours[1:], theirs[1:])


def encoded(count: int, edge: int) -> list[bytes]:
    """Smooth pictures with some noise; PNG where they are as small as CIFAR's, otherwise JPEG."""
    random, images = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((edge, edge), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + random.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "PNG" if edge <= 64 else "JPEG")
        images.append(file.getvalue())
    return images


def rows_of(images: list[bytes], size: int) -> TaskRows:
    """The images as those of a task."""
    hashes = b"".join(hashlib.sha256(image).digest() for image in images)
    none = np.zeros(len(images), np.int32)
    digests = np.frombuffer(hashes, np.uint8).reshape(-1, 32)
    index = SplitIndex(digests=digests, labels=none, domains=none)
    return TaskRows(
        images,
        digests=digests,
        samples=index.sample_ids(),
        name=str,
        targets=torch.arange(len(images)) % CLASSES,
        query=None,
        preprocessing=Preprocessing(resize=size * 256 // 224, crop=size),
        seed=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--methods", default="")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--edge", type=int, default=32)
    parser.add_argument("--only", choices=["ready", "loaded"])
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    options = parser.parse_args()
    global clock
    clock = CLOCKS[options.clock]
    torch.set_num_threads(options.threads)
    size = options.size
    network = loading.load(options.model, "random", "token", size)
    pixels = torch.rand(options.batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    given = rows_of(encoded(options.batch * PER_ROUND, options.edge), size)
    columns = {
        "ready": lambda case: ready(case, options.batch, options.steps, pixels),
        "loaded, none": lambda case: loaded(case, "none", options.batch, options.rounds, given),
        "loaded, lamda": lambda case: loaded(case, "lamda", options.batch, options.rounds, given),
    }
    if options.only:
        columns = {name: c for name, c in columns.items() if name.startswith(options.only)}
    print(f"{options.model}, {size} pixels, batch {options.batch}, {options.precision},", end=" ")
    print(f"{options.threads} threads; images of {options.edge} pixels, images/s\n")
    print("".join(["| method |", *(f" {name} | bare | ratio |" for name in columns)]))
    print("".join(["|---|", *("---|---|---|" for _ in columns)]))
    settings = Settings(seed=0, precision=options.precision, decoders=options.threads)
    wanted = [m for m in options.methods.split(",") if m]
    for case in cases(wanted, options.batch, network, settings):
        print(f"| {case.label} |", end="", flush=True)
        for measure in columns.values():
            ours, bare, ratio = measure(case)
            print(f" {ours:.1f} | {bare:.1f} | {ratio:.3f} |", end="", flush=True)
        print(flush=True)


if __name__ == "__main__":
    main()
