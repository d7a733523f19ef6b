"""Odd but possible situations of the command line, by the seed: every one ends with a plain line.

    python -m benchmarks.odd [--count 300] [--seed 0] [--only NUMBER] [--verbose]

A situation is a command with a file, a spec, a store or an environment as people happen to have
them: a folder where a file belongs, a full disk, a closed pipe, a database of another program. It
is wrong if the command says "unexpected ...; please report it", shows a traceback, gives an exit
status that is not documented, or does not end.

Every command runs in a process of its own, forked from one that has imported everything. Stages are
computed in that process and not on Ray; a cluster is never there. Root may do what others may not:
so some files are made unchangeable with `chattr`. Exit status 1 if anything was wrong.
"""

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from graftwork.cluster.execution import executor
from graftwork.cluster.execution.executor import Outcome
from graftwork.cluster.execution.graph import needed
from graftwork.cluster.execution.policy import Failure, Kind, Policy
from graftwork.cluster.execution.schedule import Schedule
from graftwork.cluster.execution.worker import Done, run_stage
from graftwork.operators.errors import GraftworkError
from graftwork.operators.stage import OPERATORS, Stage
from graftwork.operators.store import Store
from graftwork.pipelines import cli
from graftwork.pipelines.running import run as running

STATUSES = {0, *range(2, 11), 130, 143}
"""Exit statuses that docs/commands.md explains; 1 is that of a mistake of ours."""
SECONDS = 60.0
ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "operators/backbones/shipped/vit_micro_patch4_32.safetensors"


class Here:
    """A pool that computes in this process."""

    slots = 1

    def __init__(self, store: Store) -> None:
        self._store = store
        self._given: list[Stage] = []

    def submit(self, stage: Stage) -> None:
        self._given.append(stage)

    def wait(self, timeout: float) -> Sequence[tuple[str, Done | Failure]]:
        given, self._given = self._given, []
        return [(stage.key, self._compute(stage)) for stage in given]

    def _compute(self, stage: Stage) -> Done | Failure:
        try:
            return run_stage(OPERATORS[stage.operator], stage.assignment(), self._store, threads=1)
        except GraftworkError as error:
            return Failure(Kind.FAILED, str(error), error)

    def cancel(self) -> None:
        self._given.clear()


def compute_here(targets: Sequence[Stage], store: Store, *, connect: Any, on_event: Any) -> Outcome:
    """What `executor.execute` does, without Ray."""
    del connect
    plan = needed(targets, lambda stage: store.has(stage.operator, stage.key))
    for stage in plan.cached:
        on_event(executor.Event(kind="cached", stage=stage))
    if not plan.compute:
        return Outcome(total=len(plan.stages), computed=0, cached=len(plan.stages))
    return executor.run(Schedule(plan), store, Here(store), Policy(), on_event)


@dataclass
class Situation:
    """A command and where it is given; mutations change it.

    Args:
        folder: working directory, with `store/`, `images/`, `spec.yaml`.
        spec: content of `spec.yaml`, unless `text` is set.
        words: the command line.
        within: what happens in the process, before the command begins.
        signal: number and seconds after the beginning.
        told: what is odd.
    """

    folder: Path
    spec: dict[str, Any]
    words: list[str] = field(default_factory=list)
    text: bytes | None = None
    environment: dict[str, str | None] = field(default_factory=dict)
    within: list[Callable[[], Any]] = field(default_factory=list)
    signal: tuple[int, float] | None = None
    told: list[str] = field(default_factory=list)
    undo: list[Callable[[], Any]] = field(default_factory=list)


Change = Callable[[random.Random, Situation], str]


# --- the usual ------------------------------------------------------------------------------------


def usual_spec() -> dict[str, Any]:
    return {
        "pipeline": "tiny",
        "dataset": {"builtin": "digits", "limit_per_class": 2},
        "scenario": {"kind": "class_incremental", "increment": 5},
        "backbone": {
            "model": "vit_micro_patch4_32",
            "weights": "builtin",
            "preprocessing": "micro_32",
        },
        "methods": ["simplecil"],
    }


def folder_spec() -> dict[str, Any]:
    dataset = {"train": "images/train", "test": "images/test"}
    return usual_spec() | {
        "pipeline": "folder",
        "dataset": dataset,
        "scenario": {"kind": "class_incremental", "increment": 1},
    }


def template(folder: Path) -> None:
    """A folder in which everything is as it should be, with a store that was used."""
    rng = random.Random(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(2):
                image = Image.frombytes("RGB", (8, 8), rng.randbytes(192))
                image.save(folder / "images" / split / name / f"{number}.png")
    shutil.copy(WEIGHTS, folder / "weights.safetensors")
    (folder / "listed.csv").write_text("task,class\n0,cat\n1,dog\n")
    for spec in (usual_spec(), folder_spec()):
        (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
        status, output = call(Situation(folder, spec, ["run", "spec.yaml", "--store", "store"]))
        assert status == 0, output


COMMANDS: tuple[tuple[str, ...], ...] = (
    ("run", "spec.yaml"),
    ("run", "spec.yaml", "--json"),
    ("plan", "spec.yaml"),
    ("plan", "spec.yaml", "--mermaid"),
    ("plan", "spec.yaml", "--json"),
    ("doctor", "spec.yaml"),
    ("doctor", "spec.yaml", "--json"),
    ("split", "spec.yaml", "-o", "split.csv"),
    ("split", "spec.yaml", "-o", "out/split.parquet"),
    ("results",),
    ("results", "--format", "csv", "--pipeline", "tiny"),
    ("predict", "tiny/simplecil", "images"),
    ("predict", "folder/simplecil", "images/train/cat/0.png", "--output", "out.csv"),
    ("predict", "tiny/simplecil", "images", "--json", "--top", "3"),
    ("cache", "ls"),
    ("cache", "verify"),
    ("cache", "verify", "--repair"),
    ("cache", "gc"),
    ("cache", "gc", "--unused", "--delete", "--days", "0", "--force"),
)
ALONE: tuple[tuple[str, ...], ...] = (
    ("methods",),
    ("methods", "simplecil", "--json"),
    ("methods", "nonsense"),
    ("status", "job", "--address", "http://127.0.0.1:9"),
    ("logs", "job", "--address", "nonsense"),
    ("stop", "job\n", "--address", "http://[::1"),
    ("submit", "spec.yaml", "--address", "http://127.0.0.1:9"),
    ("predict", "tiny/simplecil", "images", "--address", "127.0.0.1:9"),
    ("ui", "--port", "0"),
    ("nonsense",),
    (),
)
"""Commands without `--store`, or that need nothing odd besides."""


# --- what may be odd ------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    *(None, "", "x" * 300, "数" * 80, -1, 0, 1, 10**30, 1e308, float("nan"), float("inf"), True),
    *([], {}, [[]], "1", "0x10", "1e3", "a\nb", "\x00", "%20", "../..", "/", "~", "-", ".", "a/b"),
    *("file:///etc/passwd", "s3://", "://", "none", "auto", "random", "images", "spec.yaml", "🙂"),
    *(["cat"], {"cat": 1}, {"name": "simplecil"}, {"method": "ranpac"}, [1, "a"], "2026-01-01"),
)

KEYS = (
    *("seeds", "orders", "dataset", "scenario", "stream", "backbone", "features", "methods"),
    *("tracking", "merges", "ensembles", "pipeline", "scenario.kind", "scenario.increment"),
    *("scenario.initial", "scenario.order", "scenario.manifest", "dataset.train", "dataset.test"),
    *("dataset.limit_per_class", "dataset.holdout", "dataset.classes", "dataset.label"),
    *("dataset.image", "dataset.on_bad_image", "dataset.max_pixels", "backbone.weights"),
    *("backbone.model", "backbone.precision", "backbone.preprocessing", "backbone.pooling"),
    *("features.dtype", "features.batch_size", "features.shard", "tracking.models"),
)


def paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all values in a spec."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*above, key)
        if isinstance(inner, dict | list):
            yield from paths(inner, (*above, key))


def odd_value(rng: random.Random, it: Situation) -> str:
    *above, key = rng.choice(list(paths(it.spec)))
    place: Any = it.spec
    for name in above:
        place = place[name]
    place[key] = rng.choice(VALUES)
    return f"{'.'.join(map(str, (*above, key)))}={place[key]!r:.60}"


def odd_override(rng: random.Random, it: Situation) -> str:
    word = f"{rng.choice(KEYS)}={rng.choice(VALUES)!s}"
    if it.words[0] in ("run", "plan", "doctor", "split"):
        it.words += ["--set", word.replace("\x00", "")]
    return f"--set {word[:60]!r}"


def odd_key(rng: random.Random, it: Situation) -> str:
    *above, key = rng.choice(list(paths(it.spec)))
    place: Any = it.spec
    for name in above:
        place = place[name]
    if isinstance(place, dict) and rng.random() < 0.5:
        del place[key]
        return f"without {key}"
    if isinstance(place, dict):
        new = rng.choice(("", 1, None, True, "extra", "数", "a.b", "x" * 300))
        place[new] = 1
        return f"with key {new!r:.30}"
    place.append(rng.choice(VALUES))
    return f"longer {above}"


TEXTS: tuple[bytes, ...] = (
    *(b"", b"\n", b"- 1\n", b"text", b"\xff\xfe\x00", "pipeline: é\n".encode("latin-1"), b"\x00"),
    *(b"a: [", b"a:\tb\n", b"a: &x 1\nb: *x\n", b"a: !!python/object/apply:os.system [ls]\n"),
    *(b"a: 1\na: 2\n", b"? [1]\n: 2\n", b"---\na: 1\n---\nb: 2\n", b"x" * (2 << 20)),
    *(b"[" * 5000, b"a: " + b"9" * 5000, b"a: 2026-13-45\n", b"%YAML 9.9\n---\na: 1\n"),
)


def odd_text(rng: random.Random, it: Situation) -> str:
    sound = yaml.safe_dump(it.spec).encode()
    it.text = rng.choice(
        (*TEXTS, b"\xef\xbb\xbf" + sound, sound.replace(b"\n", b"\r\n"), sound[: len(sound) // 2])
    )
    return f"spec is {it.text[:20]!r}"


def ruin(rng: random.Random, path: Path) -> str:
    """Makes of a file something else that may stand under its name."""
    kind = rng.choice(
        ("gone", "empty", "cut", "flipped", "text", "json", "folder", "dangling", "loop", "pipe")
    )
    if kind == "pipe" and path.name == "spec.yaml":
        kind = "gone"  # a spec may come from a pipe, as of `<(...)`, and is waited for
    data = path.read_bytes() if path.is_file() else b""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind in ("empty", "text", "json"):
        path.write_bytes({"empty": b"", "text": b"\xffnot this\n", "json": b'{"a": [1]}'}[kind])
    elif kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "flipped":
        changed = bytearray(data or b"x")
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
    elif kind == "folder":
        (path / "inner").mkdir(parents=True)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    return kind


def odd_file(rng: random.Random, it: Situation) -> str:
    """Any file of the store or of the images."""
    everything = sorted(p for p in it.folder.rglob("*") if p.is_file())
    kinds: dict[str, list[Path]] = {}
    for path in everything:  # a kind first: there are many features and one database
        name = path.relative_to(it.folder).parts
        kinds.setdefault("/".join(name[:2]) if name[0] == "store" else name[0], []).append(path)
    path = rng.choice(kinds[rng.choice(sorted(kinds))])
    return f"{path.relative_to(it.folder)!s:.70}: {ruin(rng, path)}"


def odd_folder(rng: random.Random, it: Situation) -> str:
    folders = sorted(p for p in it.folder.rglob("*") if p.is_dir() and "/mlflow-art" not in str(p))
    path = rng.choice(folders)
    return f"{path.relative_to(it.folder)!s:.70}: {ruin(rng, path)}"


NAMES = ("a b", "100%", "%20", "a#b", "a?b", "-rf", "quo'te", 'quo"te', "back\\slash", "new\nline")
NAMES += ("数据", "🙂", "é", ".hidden", "con", "x" * 250, "<b>", "$(ls)", "a:b", "*", "[a]", "{b}")


def odd_store_name(rng: random.Random, it: Situation) -> str:
    name = rng.choice(NAMES)
    os.rename(it.folder / "store", it.folder / name)
    it.words = [name if word == "store" else word for word in it.words]
    return f"store {name[:20]!r}"


def odd_class_name(rng: random.Random, it: Situation) -> str:
    it.spec = folder_spec()
    name = rng.choice((*NAMES, "\udcff\udcfe"))
    for split in ("train", "test"):
        os.rename(it.folder / "images" / split / "cat", it.folder / "images" / split / name)
    return f"class {name[:20]!r}"


def odd_pipeline_name(rng: random.Random, it: Situation) -> str:
    it.spec["pipeline"] = name = rng.choice((*NAMES, "数" * 80, "🙂" * 70, "x" * 300, "..", "a/b"))
    return f"pipeline {name[:20]!r}"


STORES = ("", ".", "/", "images", "spec.yaml", "none", "none/deep/er", "/proc/none", "/dev/null")
STORES += ("memory://x", "s3://nowhere/x", "gs://", "foo://x", "file://", "http://x", "~", "a::b")


def odd_store(rng: random.Random, it: Situation) -> str:
    name = rng.choice(STORES)
    it.words = [name if word == "store" else word for word in it.words]
    return f"--store {name}"


TRACKINGS = (
    "",
    "x",
    "sqlite://",
    "sqlite:///",
    "sqlite:///store",
    "sqlite:///spec.yaml",
    "http://",
)
TRACKINGS += (
    "http://127.0.0.1:9",
    "http://[::1",
    "sqlite:///none/x.db",
    "postgresql://",
    "file:///x",
)
TRACKINGS += ("sqlite:////dev/null", "sqlite:///%00", "http://127.0.0.1:notaport", "databricks")


def odd_tracking(rng: random.Random, it: Situation) -> str:
    word = rng.choice(TRACKINGS)
    it.environment["MLFLOW_TRACKING_URI"] = word
    return f"tracking {word!r}"


def odd_weights(rng: random.Random, it: Situation) -> str:
    it.spec["backbone"]["weights"] = name = rng.choice(
        ("weights.safetensors", "none.safetensors", "images", "spec.yaml", "", "weights.pth", "/")
    )
    told = f"weights {name!r}"
    if name == "weights.safetensors":
        told += " " + ruin(rng, it.folder / name)
    if name == "weights.pth":
        data = rng.choice((b"", b"\x80\x04cos\nsystem\n.", b"PK\x03\x04", b"text"))
        (it.folder / name).write_bytes(data)
    return told


def odd_environment(rng: random.Random, it: Situation) -> str:
    name, value = rng.choice(
        (
            *(("HOME", None), ("HOME", "/nowhere"), ("TMPDIR", "/nowhere"), ("LC_ALL", "C")),
            *(("COLUMNS", "1"), ("COLUMNS", "many"), ("TERM", ""), ("PYTHONIOENCODING", "ascii")),
            *(
                ("TZ", "Nowhere/None"),
                ("NO_COLOR", "1"),
                ("GRAFTWORK_WEIGHTS", "none"),
                ("USER", ""),
            ),
            *(("RAY_AUTH_TOKEN_PATH", "/nowhere"), ("RAY_ADDRESS", "nonsense"), ("LANG", "xx_YY")),
            *(("GRAFTWORK_STORE", ""), ("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon"), ("PATH", "")),
        )
    )
    it.environment[name] = value
    return f"{name}={value}"


def odd_process(rng: random.Random, it: Situation) -> str:
    """What the shell, the terminal or the administrator does to a process."""
    ways: dict[str, Callable[[], Any]] = {
        "stdin closed": lambda: os.close(0),
        "stdout closed": lambda: os.close(1),
        "stderr closed": lambda: os.close(2),
        "stdout full": lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1),
        "stdout a broken pipe": broken_pipe,
        "no working directory": lambda: shutil.rmtree(it.folder, ignore_errors=True),
        "files of 20 kB": lambda: limit(resource.RLIMIT_FSIZE, 20_000),
        "files of 0 bytes": lambda: limit(resource.RLIMIT_FSIZE, 0),
        "40 open files": lambda: limit(resource.RLIMIT_NOFILE, 40),
        "umask 777": lambda: os.umask(0o777),
    }
    name = rng.choice(sorted(ways))
    it.within.append(ways[name])
    return name


def broken_pipe() -> None:
    end, mine = os.pipe()
    os.close(end)
    os.dup2(mine, 1)


def limit(what: int, value: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(what, (value, resource.getrlimit(what)[1]))


def odd_moment(rng: random.Random, it: Situation) -> str:
    number, seconds = rng.choice((signal.SIGINT, signal.SIGTERM)), rng.random() * 1.5
    it.signal = number, seconds
    return f"{number.name} after {seconds:.2f} s"


def odd_rights(rng: random.Random, it: Situation) -> str:
    """Read-only as root meets it: files that cannot be changed."""
    place = rng.choice(("store", "store/mlflow.db", "store/memo", "store/reports", "images", "."))
    it.undo.append(lambda: os.system(f"chattr -R -i '{it.folder}' 2>/dev/null"))
    os.system(f"chattr -R +i '{it.folder / place}' 2>/dev/null")
    return f"{place} cannot be changed"


def odd_neighbours(rng: random.Random, it: Situation) -> str:
    """A store inside of the data, data inside of the store, names of other programs beside them."""
    way = rng.choice(("store in images", "images in store", "modules"))
    if way == "store in images":
        os.rename(it.folder / "store", it.folder / "images/train/store")
        it.words = ["images/train/store" if word == "store" else word for word in it.words]
    elif way == "images in store":
        shutil.copytree(it.folder / "images", it.folder / "store/features/images")
    else:
        for name in ("torch", "operators", "graftwork", "mlflow", "queue", "random", "ray", "yaml"):
            (it.folder / name).mkdir()
            (it.folder / name / "__init__.py").write_text("raise SystemExit('the wrong one')")
    return way


def odd_words(rng: random.Random, it: Situation) -> str:
    place = rng.randrange(len(it.words) + 1)
    word = rng.choice(
        ("-", "--", "", "--set", "--store", "-h", "数", "\udcff", "--json", "x=1", "*")
    )
    it.words.insert(place, word)
    return f"word {word!r} at {place}"


IN_SPEC: tuple[Change, ...] = (
    *(odd_value, odd_value, odd_override, odd_override, odd_key, odd_text),
    *(odd_class_name, odd_pipeline_name, odd_weights),
)
AROUND: tuple[Change, ...] = (
    *(odd_file, odd_file, odd_file, odd_folder, odd_store_name, odd_store, odd_tracking),
    *(odd_environment, odd_process, odd_process, odd_moment, odd_rights, odd_neighbours, odd_words),
)


def situation(seed: int, folder: Path) -> Situation:
    """The situation of a seed, in a copy of the template."""
    rng = random.Random(seed)
    it = Situation(folder, rng.choice((usual_spec, folder_spec))())
    alone = rng.random() < 0.06
    it.words = list(rng.choice(ALONE if alone else COMMANDS))
    if not alone:
        it.words += ["--store", "store"]
    for _ in range(1 if rng.random() < 0.7 else 2):
        it.told.append(change(rng, it))
    return it


def change(rng: random.Random, it: Situation) -> str:
    chosen = rng.choice(AROUND if "spec.yaml" not in it.words or rng.random() < 0.6 else IN_SPEC)
    try:
        return chosen(rng, it)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        return f"({chosen.__name__}: {type(error).__name__})"  # the one before left nothing


# --- the command ----------------------------------------------------------------------------------


def call(it: Situation) -> tuple[int, str]:
    """Exit status and output of a situation's command; status 999 if it did not end."""
    # Through a pipe: limits on files do not hold for it.
    end, output = os.pipe()
    os.set_blocking(end, False)
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            child(it, output)
        os._exit(98)
    os.close(output)
    said = bytearray()
    try:
        status = waited(pid, it.signal, lambda: said.extend(rest(end)))
    finally:
        said.extend(rest(end))
        os.close(end)
    return status, said.decode(errors="replace")


def rest(end: int) -> bytes:
    """What is in a pipe now."""
    found = b""
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(end, 65536):
            found += piece
    return found


def waited(pid: int, send: tuple[int, float] | None, hear: Callable[[], None]) -> int:
    began = time.monotonic()
    while time.monotonic() - began < SECONDS:
        if send and time.monotonic() - began > send[1]:
            os.kill(pid, send[0])
            send = None
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        hear()
        time.sleep(0.005)
    os.kill(pid, signal.SIGABRT)  # faulthandler then tells where it was
    time.sleep(0.5)
    hear()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 999


def child(it: Situation, output: int) -> None:
    """Becomes the command."""
    import faulthandler

    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(it.folder)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name, value in it.environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    tempfile.tempdir = None
    code = os.environ.get("PYTHONIOENCODING", "utf-8")
    for act in it.within:
        act()
    for number, name in enumerate(("stdout", "stderr"), start=1):
        try:
            os.fstat(number)
            stream = io.TextIOWrapper(
                io.FileIO(number, "w", closefd=False), code, "backslashreplace"
            )
        except OSError:
            stream = None  # as Python does
        setattr(sys, name, stream)
    if sys.stderr is not None:
        faulthandler.enable(sys.stderr)
    sys.argv = ["graftwork", *it.words]
    status = 1
    try:
        cli.main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 97
    except BaseException as error:
        status = 97
        with contextlib.suppress(Exception):
            print(f"Traceback: {error!r}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if stream is not None:  # as Python has it where it was closed
                stream.flush()
    os._exit(status)


def wrong(it: Situation, status: int, output: str) -> str:
    """What is wrong with the end of a command; empty if nothing is."""
    if status == 999:
        return "it did not end"
    if "please report it" in output or "unexpected error" in output:
        return "unexpected"
    if "Traceback" in output or 'File "' in output:
        return "a traceback"
    ended = it.signal and status == -it.signal[0]  # before the command had begun to listen
    return "" if status in STATUSES or ended else f"exit status {status}"


def prepare() -> None:
    """Imports what commands import, so that a forked process need not; nothing computes on Ray."""
    warnings.simplefilter("ignore")
    from graftwork.operators.tracking import sender

    sender.settle_environment()
    running.execute = compute_here
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    for name in ("MLFLOW_TRACKING_URI", "GRAFTWORK_STORE", "RAY_ADDRESS", "GRAFTWORK_WEIGHTS"):
        os.environ.pop(name, None)
    import mlflow.tracking  # noqa: F401
    import timm  # noqa: F401
    import torch

    torch.set_num_threads(1)


def tried(seed: int, source: Path, keep: bool = False) -> tuple[Situation, int, str]:
    """A situation, and how its command ended."""
    folder = Path(tempfile.mkdtemp(prefix="graftwork-odd-")) / "work"
    shutil.copytree(source, folder, symlinks=True)
    it = situation(seed, folder)
    try:
        spec = it.folder / "spec.yaml"
        if not spec.exists() and not spec.is_symlink():
            it.told.append("no spec")
        elif spec.is_file():
            text = it.text if it.text is not None else yaml.safe_dump(it.spec, allow_unicode=True)
            with contextlib.suppress(OSError):  # it cannot be changed
                spec.write_bytes(
                    text if isinstance(text, bytes) else text.encode("utf-8", "replace")
                )
        return it, *call(it)
    finally:
        for act in it.undo:
            act()
        if not keep:
            shutil.rmtree(folder.parent, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    prepare()
    with socket.socket(), tempfile.TemporaryDirectory(prefix="graftwork-odd-") as folder:
        source = Path(folder, "template")
        source.mkdir()
        template(source)
        seeds = range(options.seed, options.seed + options.count)
        statuses: Counter[int] = Counter()
        found = 0
        for seed in [options.only] if options.only is not None else seeds:
            it, status, output = tried(seed, source)
            statuses[status] += 1
            problem = wrong(it, status, output)
            found += bool(problem)
            if problem or options.verbose or options.only is not None:
                print(f"{seed}: {' '.join(it.words)!r}: {'; '.join(it.told)}: {status} {problem}")
                last = output.strip().splitlines()
                print(
                    "    " + "\n    ".join(last if options.only is not None else last[-2:])[:3000]
                )
                sys.stdout.flush()
    print(f"{sum(statuses.values())} situations, {found} wrong; exit statuses {dict(statuses)}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
