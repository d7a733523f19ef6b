"""Training of L2P, DualPrompt and CODA-Prompt against LAMDA-PILOT's own training loops.

    python benchmarks/pilot.py --pilot PATH [--model base|tiny] [--methods A,B] [--batch N]
        [--steps N] [--rounds N] [--threads N] [--workers N] [--clock wall|cpu]

PATH is a checkout of https://github.com/sun-hailong/LAMDA-PILOT. Its learners, networks, data set,
transforms and loader run as they are, on the CPU, with its settings for CIFAR-100; missing are its
download of weights, and a test pass every fifth epoch. Both sides have the same random weights of
the backbone, images (32 pixels, CIFAR's size), kind of augmentation, batch, optimiser and frozen
pass for queries. Ours decodes PNG files, PILOT has the pixels. A step is from batch to batch,
loading included; the first of a round is left out. Rounds of all sides alternate; medians.
Either runs in a process as its users have it: ours as workers are started
(`cluster/sessions/huge_pages.py`), unless GLIBC_TUNABLES says otherwise, PILOT
without any such variable.
Cached: with the test transform (augmentation "none") the queries come from the cache of features,
while PILOT computes them again for every batch; its own column stays with the training transform,
and the pass that fills the cache, once for all epochs and methods, is not counted.

`--clock cpu` counts the processor seconds of a process, for machines that others use too; then
PILOT loads in its own process as well (`--workers 0`), or its workers would be free of charge.
"""

import argparse
import copy
import hashlib
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import timm.layers
import torch
from PIL import Image
from timm.models import _manipulate
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from graftwork import methods
from graftwork.cluster.sessions import huge_pages
from graftwork.methods.contracts.trained import Task
from graftwork.methods.networks import vit as seams
from graftwork.operators.backbones import loading
from graftwork.operators.data.index_file import SplitIndex
from graftwork.operators.images.preprocessing import PRESETS
from graftwork.operators.training import forward, loop
from graftwork.operators.training.batches import chunks
from graftwork.operators.training.rows import TaskRows
from graftwork.operators.training.settings import Settings

CLASSES = 10
TASK = Task(index=0, count=10, current=tuple(range(CLASSES)), before=0, seen=CLASSES)
OURS: dict[str, dict[str, Any]] = {
    # As PILOT does it, where that may cost time.
    "l2p": {"clip": 0.0, "prompt_pos": "cls"},
    "dualprompt": {"clip": 0.0},
    "coda_prompt": {},
}
COLUMNS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("fp32", {}),
    "fp32, cached": ("fp32", {"augmentation": "none"}),
    "bf16": ("bf16", {}),
    "bf16, cached": ("bf16", {"augmentation": "none"}),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Stop(Exception):
    """Ends a task after its last step."""


def module(name: str, **contents: Any) -> None:
    """Stands in for a module of timm that newer versions have elsewhere."""
    made = ModuleType(name)
    made.__dict__.update(contents)
    sys.modules[name] = made


def old_timm() -> None:
    """The import paths, and the three functions, that PILOT's networks take from an older timm."""
    names = ("PatchEmbed", "Mlp", "DropPath", "trunc_normal_", "lecun_normal_")
    layers = {name: getattr(timm.layers, name) for name in names}
    module("timm.models.layers", **layers)
    module("timm.models.layers.weight_init", trunc_normal_=layers["trunc_normal_"])
    module("timm.models.registry", register_model=lambda function: function)
    module(
        "timm.models.helpers",
        named_apply=_manipulate.named_apply,
        checkpoint_seq=_manipulate.checkpoint_seq,
        adapt_input_conv=None,
        resolve_pretrained_cfg=lambda variant, **ignored: {"url": ""},
        build_model_with_cfg=lambda network, variant, pretrained, **given: network(
            **{name: v for name, v in given.items() if not name.startswith("pretrained_")}
        ),
    )


def create_model(name: str, pretrained: bool, **given: Any) -> Any:
    """timm's `create_model` for PILOT's networks: what is None keeps its default."""
    kind = name.split("_224_")[1]
    file = "coda_promtpt" if kind == "coda_prompt" else kind  # its spelling
    found: Any = importlib.import_module(f"backbone.vit_{file}")
    found.torch = OnCpu()
    return getattr(found, name)(**{key: v for key, v in given.items() if v is not None})


class OnCpu:
    """torch for CODA-Prompt's network, which adds to a tensor of zeros in place: on a GPU that is a
    copy, on the CPU it is a leaf that wants a gradient, and an error."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *shape: Any, requires_grad: bool = False, **given: Any) -> torch.Tensor:
        return torch.zeros(*shape, **given)


class Batches:
    """PILOT's loader, and the time whenever it hands out a batch and at the end."""

    def __init__(self, loader: Any, clock: Callable[[], float]) -> None:
        self._loader, self._clock = loader, clock
        self.times: list[float] = []

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self.times.append(self._clock())
            yield batch
        self.times.append(self._clock())


def theirs(
    name: str, options: argparse.Namespace, network: Any, pixels: np.ndarray, targets: np.ndarray
) -> Callable[[], list[float]]:
    """Seconds of the steps of a round of PILOT's training."""
    arguments = json.loads((options.pilot / "exps" / f"{name}.json").read_text())
    arguments |= {
        "pretrained": False,
        "device": [torch.device("cpu")],
        "nb_classes": 100,
        "nb_tasks": 10,
        "tuned_epoch": 1,
        "batch_size": options.batch,
        "backbone_type": f"vit_{options.model}_patch16_224_{name}",
    }
    learner = importlib.import_module(f"models.{name}").Learner(arguments)
    learner._cur_task, learner._total_classes = 0, CLASSES
    # All its weights that timm's ViT has too; L2P's positions are more.
    weights = network.state_dict()
    for part in (learner._network.backbone, getattr(learner._network, "original_backbone", None)):
        if part is not None:
            own = part.state_dict()
            fit = {n: w for n, w in weights.items() if n in own and own[n].shape == w.shape}
            part.load_state_dict(fit, strict=False)
    data = importlib.import_module("utils.data")
    manager = importlib.import_module("utils.data_manager")
    transform = manager.transforms.Compose(data.iCIFAR224(arguments).train_trsf)
    dataset = manager.DummyDataset(pixels, targets, transform)
    loader = DataLoader(dataset, options.batch, shuffle=True, num_workers=options.workers)
    if name == "coda_prompt":
        learner.data_weighting()
    optimizer = learner.get_optimizer()

    def a_round() -> list[float]:
        batches = Batches(loader, CLOCKS[options.clock])
        learner._init_train(batches, None, optimizer, None)
        return list(np.diff(batches.times))

    return a_round


def ours(
    name: str,
    options: argparse.Namespace,
    network: Any,
    rows: TaskRows,
    precision: str,
    **changes: Any,
) -> Callable[[], list[float]]:
    """Seconds of the steps of a round of our training."""
    fitting = {**OURS[name], "epochs": 1, "batch_size": options.batch, **changes}
    method = methods.build(name, fitting)
    settings = Settings(seed=0, precision=precision, decoders=options.threads)
    clock = CLOCKS[options.clock]

    def a_round() -> list[float]:
        times: list[float] = []

        def say(**facts: Any) -> None:
            times.append(clock())
            if facts["step"] == facts["steps"]:
                raise Stop

        vit = seams.check(copy.deepcopy(network))
        with suppress(Stop):
            loop.train_task(method, vit, TASK, rows, None, settings, say=say)
        # The first step has no start here, and is left out anyway.
        return [0.0, *np.diff(times)]

    return a_round


def images(pixels: np.ndarray, targets: np.ndarray) -> TaskRows:
    """Encoded images of the same pixels."""
    encoded = []
    for picture in pixels:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        encoded.append(file.getvalue())
    hashes = b"".join(hashlib.sha256(data).digest() for data in encoded)
    digests = np.frombuffer(hashes, np.uint8).reshape(-1, 32)
    none = np.zeros(len(encoded), np.int32)
    return TaskRows(
        encoded,
        digests=digests,
        samples=SplitIndex(digests=digests, labels=none, domains=none).sample_ids(),
        name=str,
        targets=torch.from_numpy(targets),
        query=None,
        preprocessing=PRESETS["lamda_224"],
        seed=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--pilot", type=Path, required=True)
    parser.add_argument("--model", default="base", choices=["base", "tiny"])
    parser.add_argument("--methods", default="")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    parser.add_argument("--side", choices=["pilot", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Prints the table: has both sides work in turn."""
    plain = {name: v for name, v in os.environ.items() if name != huge_pages.VARIABLE}
    sides = {
        side: subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--side", side],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for side, environment in (("pilot", plain), ("ours", plain | huge_pages.environment()))
    }

    def seconds(side: str, name: str, column: str) -> list[float]:
        pipes: Any = sides[side]
        pipes.stdin.write(json.dumps([name, column]) + "\n")
        pipes.stdin.flush()
        return json.loads(pipes.stdout.readline())

    # PILOT's CODA-Prompt is written for the width of the base model.
    fitting = [n for n in OURS if options.model == "base" or n != "coda_prompt"]
    wanted = [n for n in fitting if not options.methods or n in options.methods.split(",")]
    print(f"ViT-{options.model}/16, 224 pixels, batch {options.batch},", end=" ")
    print(f"{options.threads} threads, images/s, {options.clock} clock\n")
    print("| method | PILOT | " + " | ratio | ".join(COLUMNS) + " | ratio |")
    print("|---" * (2 * len(COLUMNS) + 2) + "|")
    for name in wanted:
        found: dict[str, list[float]] = {column: [] for column in ("PILOT", *COLUMNS)}
        for _ in range(options.rounds):
            for column, steps in found.items():
                steps += seconds("pilot" if column == "PILOT" else "ours", name, column)[1:]
        pilot, *rates = (options.batch / statistics.median(steps) for steps in found.values())
        others = (f"{rate:.2f} | {rate / pilot:.2f}" for rate in rates)
        print(f"| {name} | {pilot:.2f} | {' | '.join(others)} |", flush=True)
    for process in sides.values():
        process.communicate()


def serve(options: argparse.Namespace) -> None:
    """A side: trains a round for every line [method, column] and answers with seconds of steps."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever PILOT prints
    torch.set_num_threads(options.threads)
    network = seams.check(loading.load(f"vit_{options.model}_patch16_224", "random", "token"))
    random = np.random.default_rng(0)
    count = options.batch * options.steps
    pixels = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    targets = np.arange(count) % CLASSES
    rows = images(pixels, targets)
    if options.side == "pilot":
        old_timm()
        sys.path.append(str(options.pilot))
        networks: Any = importlib.import_module("utils.inc_net")
        networks.timm = SimpleNamespace(create_model=create_model)
    else:
        with torch.no_grad():
            parts = chunks(list(range(count)), options.batch)
            inputs = (rows.normalise(rows.batch(part, 0, "none")) for part in parts)
            rows.query = torch.cat([forward.frozen_features(network, batch) for batch in inputs])
    rounds: dict[tuple[str, str], Callable[[], list[float]]] = {}
    for line in sys.stdin:
        name, column = json.loads(line)
        if (name, column) not in rounds:
            if column == "PILOT":
                rounds = {(name, column): theirs(name, options, network, pixels, targets)}
            else:
                precision, changes = COLUMNS[column]
                made = ours(name, options, network, rows, precision, **changes)
                rounds[name, column] = made
        print(json.dumps(rounds[name, column]()), file=answers, flush=True)


if __name__ == "__main__":
    main()
