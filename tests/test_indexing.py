"""Indexing by parts: the same index however and wherever it is done, and only news is read."""

import hashlib
import io
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from rich.console import Console

from graftwork.cluster import indexing
from graftwork.cluster.indexing import OnCluster, worth_a_start
from graftwork.cluster.sessions import head as heads
from graftwork.cluster.sessions.lasting import Lasting
from graftwork.cluster.sessions.session import Session, connect
from graftwork.operators import live
from graftwork.operators.data import dataset, parts, sources, tables
from graftwork.operators.data.parts import Examine, Part, examine, here
from graftwork.operators.errors import BadDataError, GraftworkError
from graftwork.operators.store import Store
from graftwork.operators.store.memo import Memo
from graftwork.pipelines.planning.plan import make_plan
from graftwork.pipelines.running import progress
from graftwork.pipelines.running import run as program
from graftwork.pipelines.running.run import run_pipeline
from graftwork.pipelines.running.where import Where
from graftwork.pipelines.spec.loading import load_resolved
from tests.ray_operators import DeadlyMemo
from tests.test_dataset import assert_same

ROOT = Path(__file__).resolve().parent.parent
PATHS = [str(ROOT / "src"), str(ROOT)]


def png(number: int, size: int = 4) -> bytes:
    """An image of its own for every number."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def cells(first: int, count: int) -> list[bytes | None]:
    return [png(n) for n in range(first, first + count)]


def table(path: Path, images: Sequence[bytes | None], group: int = 10) -> Path:
    """A Parquet file of labels 0..4, with row groups of so many rows."""
    labels = pa.array(np.arange(len(images)) % 5, pa.int16())
    style = pa.array([f"d{n % 2}" for n in range(len(images))])
    columns = {"image": pa.array(images, pa.binary()), "label": labels, "style": style}
    pq.write_table(
        pa.table(columns),
        path,
        row_group_size=group,
        write_page_checksum=True,
        use_dictionary=False,
        compression="none",
    )
    return path


def folder(root: Path, count: int) -> Path:
    for n in range(count):
        (root / f"c{n % 3}").mkdir(parents=True, exist_ok=True)
        (root / f"c{n % 3}/{n:04}.png").write_bytes(png(n))
    return root


@pytest.fixture
def memo(tmp_path: Path) -> Memo:
    return Store(str(tmp_path / "store")).memo


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 20 rows, or of about 4 files."""
    monkeypatch.setattr(parts, "ROWS", 20)
    monkeypatch.setattr(parts, "FILES", 4)


class Counting:
    """Examines in this process, and counts parts and images."""

    def __init__(self, inner: Examine = here) -> None:
        self.inner = inner
        self.parts: list[Part] = []

    def __call__(
        self, wanted: Sequence[Part], memo: Memo, threads: int
    ) -> Iterator[tuple[int, bytes | BadDataError]]:
        self.parts += wanted
        yield from self.inner(wanted, memo, threads)

    @property
    def images(self) -> int:
        return sum(part.images for part in self.parts)


def shuffled(
    wanted: Sequence[Part], memo: Memo, threads: int
) -> Iterator[tuple[int, bytes | BadDataError]]:
    """Examines parts at the same time, and hands the results out in another order."""

    def one(part: Part) -> bytes | BadDataError:
        try:
            return examine(part, memo).findings
        except BadDataError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        found = list(enumerate(pool.map(one, wanted)))
    random.Random(0).shuffle(found)
    yield from found


def described(tmp_path: Path, kind: str) -> dict[str, Any]:
    if kind == "folder":
        return {"train": [str(folder(tmp_path / "set", 50))], "test": [str(tmp_path / "set")]}
    if kind == "remote folder":
        remote = fsspec.filesystem("memory")
        for n in range(50):
            remote.pipe_file(f"/indexing/set/c{n % 3}/{n:04}.png", png(n))
        return {"train": ["memory://indexing/set"], "test": ["memory://indexing/set"]}
    images = cells(0, 95)
    if kind == "skip":
        images[7], images[31], images[94] = None, b"?", png(3)[:60]
    table(tmp_path / "a.parquet", images)
    table(tmp_path / "b.parquet", cells(95, 33))
    found: dict[str, Any] = {
        "train": [str(tmp_path / "*.parquet")],
        "test": [str(tmp_path / "b.parquet")],
    }
    if kind == "limits":
        found |= {"limit_per_class": {"train": 7, "test": 2}, "domain": "style"}
    return found | ({"on_bad_image": "skip"} if kind == "skip" else {})


KINDS = ("table", "limits", "skip", "folder", "remote folder")


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_the_whole(
    tmp_path: Path, kind: str, memo: Memo, monkeypatch: pytest.MonkeyPatch
) -> None:
    description = described(tmp_path, kind)
    one = Counting()
    whole = dataset.index(description, memo, 2, one)
    read = list(sources.read(whole.train.places(0, len(whole.train))))
    digests = b"".join(hashlib.sha256(data).digest() for data in read)
    assert whole.train.digests.tobytes() == digests
    for number, (rows, files) in enumerate([(1, 1), (25, 3), (40, 4)]):
        monkeypatch.setattr(parts, "ROWS", rows)
        monkeypatch.setattr(parts, "FILES", files)
        for place, how in (("here", here), ("shuffled", shuffled)):
            many = Counting(how)
            other = Store(str(tmp_path / f"{number} {place}")).memo
            assert_same(dataset.index(description, other, 2, many), whole)
            assert many.images == one.images
            assert len(many.parts) > len(one.parts)
            # From the memo of the whole data set, and from that of its parts.
            again = Counting()
            assert_same(dataset.index(description, other, 2, again), whole)
            assert again.parts == []


def test_parts_are_runs_of_row_groups(tmp_path: Path, memo: Memo, small: None) -> None:
    path = str(table(tmp_path / "a.parquet", cells(0, 95)))
    found = Counting()
    description = {"train": [path], "test": [path]}
    dataset.index(description, memo, 2, found)
    assert [part.hints["runs"] for part in found.parts] == [
        [[0, 0, 20]],
        [[0, 20, 40]],
        [[0, 40, 60]],
        [[0, 60, 80]],
        [[0, 80, 95]],
    ]
    groups, _ = tables.read_columns(path, "image", {})
    assert groups[:, 0].tolist() == [10] * 9 + [5]
    assert sum(part.size for part in found.parts) == pytest.approx(groups[:, 1].sum(), abs=5)
    few = Counting()
    limited = description | {"limit_per_class": {"train": 3, "test": 3}}
    dataset.index(limited, memo, 2, few)  # the first 15 rows
    assert [part.hints["runs"] for part in few.parts] == [[[0, 0, 15]]]


def test_large_images_make_smaller_parts(
    tmp_path: Path, memo: Memo, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(table(tmp_path / "a.parquet", cells(0, 95)))
    groups, _ = tables.read_columns(path, "image", {})
    monkeypatch.setattr(parts, "BYTES", int(groups[:3, 1].sum()))
    found = Counting()
    dataset.index({"train": [path], "test": [path]}, memo, 2, found)
    assert [part.images for part in found.parts][:2] == [30, 30]
    root = str(folder(tmp_path / "set", 60))
    for size, fewest, most in ((1 << 30, 1, 5), (400, 3, 40)):  # a PNG here has about 80 bytes
        monkeypatch.setattr(parts, "BYTES", size)
        many = Counting()
        dataset.index({"train": [root], "test": [root]}, Store(f"{tmp_path}/{size}").memo, 2, many)
        assert fewest <= len(many.parts) <= most
        assert many.images == 60


def test_a_file_that_is_appended_is_all_that_is_read(
    tmp_path: Path, memo: Memo, small: None
) -> None:
    table(tmp_path / "0.parquet", cells(0, 95))
    description = {"train": [str(tmp_path / "*.parquet")], "test": [str(tmp_path / "0.parquet")]}
    first, second = Counting(), Counting()
    dataset.index(description, memo, 2, first)
    assert first.images == 95  # once, although they are in both splits
    table(tmp_path / "1.parquet", cells(95, 30))
    after = dataset.index(description, memo, 2, second)
    assert [part.images for part in second.parts] == [20, 10]
    fresh = dataset.index(description, Store(str(tmp_path / "other")).memo)
    assert_same(after, fresh)


@pytest.mark.parametrize("remote", [False, True])
def test_of_a_folder_the_parts_are_read_that_changed(
    tmp_path: Path, memo: Memo, small: None, remote: bool
) -> None:
    root = folder(tmp_path / "set", 120)
    far = fsspec.filesystem("memory")
    if remote:
        far.put(str(root), "/indexing/changing", recursive=True)
    place = "memory://indexing/changing" if remote else str(root)
    description = {"train": [place], "test": [place]}

    def put(name: str, data: bytes) -> None:
        if remote:
            far.pipe_file(f"/indexing/changing/{name}", data)
        else:
            (root / name).write_bytes(data)

    whole = Counting()
    dataset.index(description, memo, 2, whole)
    count = len(whole.parts)
    assert 5 < count < 80  # where a folder is cut depends on its files' times, too
    for name, data in (("c2/9999.png", png(999)), ("c0/0001.png", png(1000)), ("c1/0004.png", b"")):
        put(name, data)
        more = Counting()
        found = dataset.index(description | {"on_bad_image": "skip"}, memo, 2, more)
        # Skipping decodes: another question, and all parts the first time.
        changed = Counting()
        if not data:
            with pytest.raises(BadDataError, match=r"0004\.png: empty"):
                dataset.index(description, memo, 2, changed)
            assert len(found.bad_images) == 2
        else:
            dataset.index(description, memo, 2, changed)
        # The part of the file; two, if it was the last of its part, or is now.
        assert 1 <= len(changed.parts) <= 2
    if remote:
        far.rm("/indexing/changing", recursive=True)


def test_an_interrupted_index_goes_on(tmp_path: Path, memo: Memo, small: None) -> None:
    path = str(table(tmp_path / "a.parquet", cells(0, 95)))
    description = {"train": [path], "test": [path]}

    def interrupted(
        wanted: Sequence[Part], memo: Memo, threads: int
    ) -> Iterator[tuple[int, bytes | BadDataError]]:
        for number, found in here(wanted, memo, threads):
            if number == 3:
                raise KeyboardInterrupt
            yield number, found

    with pytest.raises(KeyboardInterrupt):
        dataset.index(description, memo, 2, interrupted)
    rest = Counting()
    dataset.index(description, memo, 2, rest)
    assert [part.images for part in rest.parts] == [15]  # four of five were done


def test_a_killed_driver_leaves_the_parts_that_it_finished(tmp_path: Path, small: None) -> None:
    path = str(table(tmp_path / "a.parquet", cells(0, 95)))
    code = (
        "import os, signal, sys\n"
        "from graftwork.operators.data import dataset, parts\n"
        "from graftwork.operators.store import Store\n"
        "parts.ROWS = 20\n"
        "def dying(wanted, memo, threads):\n"
        "    for number, found in parts.here(wanted, memo, threads):\n"
        "        if number == 2:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield number, found\n"
        "path, store = sys.argv[1:]\n"
        "dataset.index({'train': [path], 'test': [path]}, Store(store).memo, 2, dying)\n"
    )
    store = tmp_path / "store"
    done = subprocess.run([sys.executable, "-c", code, path, str(store)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    rest = Counting()
    dataset.index({"train": [path], "test": [path]}, Store(str(store)).memo, 2, rest)
    assert [part.images for part in rest.parts] == [20, 15]


# --- what cannot be used --------------------------------------------------------------------------


def lines(description: Mapping[str, Any], memo: Memo, how: Examine) -> list[str]:
    with pytest.raises(BadDataError) as caught:
        dataset.index(description, memo, 2, how)
    return str(caught.value).split("\n")


def broken(tmp_path: Path) -> dict[str, Any]:
    """Images of several kinds that cannot be used, in two files and in several parts."""
    images = cells(0, 95)
    images[7], images[31], images[94] = None, b"?", b""
    more = cells(0, 45)
    more[1], more[44] = b"??", png(1, 50)
    return {
        "train": [str(table(tmp_path / "a.parquet", images))],
        "test": [str(table(tmp_path / "b.parquet", more))],
        "max_pixels": 1024,
    }


def test_all_bad_images_are_named_however_it_is_cut(
    tmp_path: Path, memo: Memo, monkeypatch: pytest.MonkeyPatch
) -> None:
    description = broken(tmp_path)
    whole = lines(description, memo, here)
    assert [line.replace(f"{tmp_path}/", "") for line in whole] == [
        "a.parquet row 7: no image bytes",
        "a.parquet row 31: not PNG, JPEG, WEBP, BMP, TIFF, GIF or PPM, but text",
        "a.parquet row 94: empty (0 bytes)",
        "b.parquet row 1: not PNG, JPEG, WEBP, BMP, TIFF, GIF or PPM, but text",
        "b.parquet row 44: 50x50 = 2500 pixels, more than max_pixels 1024",
        "5 unusable images; on_bad_image: skip leaves them out",
    ]
    assert lines(description, memo, Counting()) == whole  # from the memo
    monkeypatch.setattr(parts, "ROWS", 10)
    for number, how in enumerate((here, shuffled)):
        assert lines(description, Store(str(tmp_path / str(number))).memo, how) == whole


def test_damaged_files_are_all_named_however_it_is_cut(
    tmp_path: Path, memo: Memo, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        path = table(tmp_path / f"{name}.parquet", cells(0, 95))
        data = bytearray(path.read_bytes())
        for n in (15, 55):
            data[data.index(png(n)) + 20] ^= 4
        path.write_bytes(data)
    table(tmp_path / "c.parquet", cells(0, 95))
    description = {"train": [str(tmp_path / "*.parquet")], "test": [str(tmp_path / "c.parquet")]}
    whole = lines(description, memo, here)
    assert [line.replace(f"{tmp_path}/", "") for line in whole] == [
        f"{name}.parquet: could not verify page integrity, CRC checksum verification failed for "
        "page_ordinal 0"
        for name in "ab"
    ]
    monkeypatch.setattr(parts, "ROWS", 20)
    for number, how in enumerate((here, shuffled)):
        assert lines(description, Store(str(tmp_path / str(number))).memo, how) == whole


def meddling(change: Callable[[], Any]) -> Examine:
    """Examines in this process; the data is changed while the first part is read."""

    def examining(
        wanted: Sequence[Part], memo: Memo, threads: int
    ) -> Iterator[tuple[int, bytes | BadDataError]]:
        read, first = sources.read_or_reason, [True]

        def changing(hints: Mapping[str, Any]) -> Iterator[bytes | str | None]:
            yield from read(hints)
            if first.pop() if first else False:
                change()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "read_or_reason", changing)
            yield from list(here(wanted, memo, threads))

    return examining


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, memo: Memo, small: None) -> None:
    path = table(tmp_path / "a.parquet", cells(0, 95))
    description = {"train": [str(path)], "test": [str(path)]}
    change = meddling(lambda: os.utime(path, (1, 1)))
    assert lines(description, memo, change) == [f"{path} changed while it was read; run again"]
    again = Counting()
    dataset.index(description, memo, 2, again)
    assert again.images == 95  # nothing of it was remembered
    shorter = meddling(lambda: table(path, cells(0, 15)))
    other = Store(str(tmp_path / "other")).memo
    assert lines(description, other, shorter) == [f"{path} changed while it was read; run again"]


def test_what_cannot_be_read_is_looked_at_again(tmp_path: Path, memo: Memo, small: None) -> None:
    """A file that cannot be read now may be read later, or elsewhere."""
    root = folder(tmp_path / "set", 12)
    (root / "c1/0500.png").symlink_to(tmp_path / "gone.png")
    (root / "c1/0600.png").write_bytes(b"?")
    description = {"train": [str(root)], "test": [str(root)]}
    whole = lines(description, memo, here)
    assert whole[:2] == [
        f"{root}/c1/0500.png: dangling symlink to {tmp_path}/gone.png",
        f"{root}/c1/0600.png: not PNG, JPEG, WEBP, BMP, TIFF, GIF or PPM, but text",
    ]
    again = Counting()
    assert lines(description, memo, again) == whole
    [part] = again.parts
    assert f"{root}/c1/0500.png" in part.hints["files"]


def test_a_folder_that_changes_while_it_is_read(tmp_path: Path, memo: Memo, small: None) -> None:
    root = folder(tmp_path / "set", 30)
    description = {"train": [str(root)], "test": [str(root)]}
    for what in (
        lambda: (root / "c0/0000.png").write_bytes(png(77)),
        lambda: (root / "c2/later.png").write_bytes(png(78)),
    ):
        change = meddling(what)
        assert lines(description, memo, change) == [f"{root} changed while it was read; run again"]
    found = dataset.index(description, memo)
    assert found.train.digests[0].tobytes() == hashlib.sha256(png(77)).digest()
    assert len(found.train) == 31


# --- size ---------------------------------------------------------------------------------------


def test_an_image_takes_52_bytes(tmp_path: Path, memo: Memo) -> None:
    path = str(table(tmp_path / "a.parquet", cells(0, 95)))
    for _ in range(2):  # built, and from the memo
        found = dataset.index({"train": [path], "test": [path]}, memo).train
        where = found.where
        held = (found.digests, found.labels, found.domains, where.file, where.row)
        assert sum(array.nbytes for array in held) == 52 * 95


def parts_of(images: Sequence[int], size: int = 0, decode: bool = False) -> list[Part]:
    return [
        Part(
            hints={},
            images=count,
            size=size,
            marks=b"",
            identity={"n": n},
            max_pixels=None,
            decode=decode,
        )
        for n, count in enumerate(images)
    ]


def test_a_cluster_is_started_for_much_alone(tmp_path: Path, memo: Memo, small: None) -> None:
    assert not worth_a_start(parts_of([50_000, 49_999]))
    assert worth_a_start(parts_of([50_000, 50_000]))
    assert not worth_a_start(parts_of([5_000, 4_999], decode=True))
    assert worth_a_start(parts_of([5_000, 5_000], decode=True))
    assert not worth_a_start(parts_of([10, 10], size=(2 << 30) - 1))
    assert worth_a_start(parts_of([10, 10], size=2 << 30))

    def refused() -> Any:
        raise AssertionError("a cluster for so little")

    path = str(table(tmp_path / "a.parquet", cells(0, 95)))
    with Lasting(refused) as connection:
        found = dataset.index({"train": [path], "test": [path]}, memo, 2, OnCluster(connection))
        assert not connection.opened
    assert len(found.train) == 95


def test_progress_is_a_line_now_and_then(
    tmp_path: Path, memo: Memo, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    monkeypatch.setattr(live, "INTERVAL", 0.0)
    path = str(table(tmp_path / "a.parquet", cells(0, 95)))
    heard: list[tuple[int, int]] = []
    with live.sink(lambda facts: heard.append((facts["examined"], facts["images"])), 0.0):
        dataset.index({"train": [path], "test": [path]}, memo)
    assert heard == [(20, 95), (40, 95), (60, 95), (80, 95), (95, 95)]
    console = Console(file=io.StringIO(), width=200)
    with progress.Display(console).indexing():
        live.say(examined=0, images=95)
        live.say(examined=95, images=95)
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert said[0] == "0/95 images indexed, 0 images/s"
    assert said[1].startswith("95/95 images indexed, ")
    quiet = Console(file=io.StringIO())
    with progress.Display(quiet, quiet=True).indexing():
        live.say(examined=1, images=95)
    assert quiet.file.getvalue() == ""  # type: ignore[attr-defined]


# --- the head node ------------------------------------------------------------------------------


def test_a_head_node_that_does_not_answer_is_given_some_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(heads, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = server.getsockname()
        both = [
            heads.Head(Session(address="here", local=local, nodes=(), head=place))
            for local in (True, False)
        ]
        now[0] += 1.5
        assert [head.answers() for head in both] == [True, True]
    found = []
    for _ in range(12):
        now[0] += 1.5
        found.append([head.answers() for head in both])
    # Two seconds for a Ray of our own, fifteen for another one.
    assert [own for own, _ in found].index(False) == 1
    assert [other for _, other in found].index(False) == 9
    assert both[0].silent == "the head node of Ray at here does not answer"


# --- on Ray -------------------------------------------------------------------------------------


def test_workers_find_what_one_process_finds(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One Ray for all: kinds of sources, errors, a worker that dies, files that workers lack."""
    monkeypatch.setattr(indexing, "worth_a_start", lambda parts: True)

    def fresh(name: str) -> Memo:
        return Store(str(tmp_path / name)).memo

    with Lasting(lambda: connect(None, num_cpus=2, python_path=PATHS)) as connection:
        spread = OnCluster(connection)
        for kind in KINDS:
            (tmp_path / kind).mkdir()
            description = described(tmp_path / kind, kind)
            on_ray = Counting(spread)
            store = fresh(f"ray {kind}")
            found = dataset.index(description, store, 2, on_ray)
            assert len(on_ray.parts) > 1
            assert_same(found, dataset.index(description, fresh(f"here {kind}"), 2))
            # The workers remembered their parts; those whose files they lack were examined here.
            entries = len(list((tmp_path / f"ray {kind}" / "memo").iterdir()))
            assert entries == len(on_ray.parts) + 1
        (tmp_path / "bad").mkdir()
        description = broken(tmp_path / "bad")
        assert lines(description, fresh("bad ray"), spread) == lines(
            description, fresh("bad here"), here
        )
        description = described(tmp_path / "table", "table")
        deadly = DeadlyMemo(fresh("deadly").blobs, str(tmp_path / "died"))
        found = dataset.index(description, deadly, 2, spread)
        assert_same(found, dataset.index(description, fresh("alive"), 2))
        assert len((tmp_path / "died").read_text().split()) == 1
        # A store that nobody can write to ends it.
        gone = tmp_path / "gone"
        gone.write_text("a file, not a folder")
        with pytest.raises(GraftworkError):
            dataset.index(description, Store(str(gone)).memo, 2, spread)


def test_a_run_indexes_and_computes_on_one_ray(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray is started once, for the index, and goes on with the stages; a second run needs none."""
    opened: list[str | None] = []

    def counting(address: str | None, **more: Any) -> Any:
        opened.append(address)
        return connect(address, num_cpus=2, python_path=PATHS, **more)

    monkeypatch.setattr(program, "connect", counting)
    monkeypatch.setattr(indexing, "worth_a_start", lambda parts: True)
    for name, first in (("train", 0), ("test", 95)):
        table(tmp_path / f"{name}.parquet", cells(first, 95))
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "pipeline: indexed\n"
        f"dataset: {{train: {tmp_path}/train.parquet, test: {tmp_path}/test.parquet}}\n"
        "scenario: {kind: class_incremental, initial: 3, increment: 2, orders: [natural]}\n"
        "backbone: {model: vit_micro_patch4_32, weights: builtin, preprocessing: micro_32}\n"
        "methods: [simplecil]\n"
    )
    where = Where(store=str(tmp_path / "store"))
    found = run_pipeline(load_resolved(str(spec)), where, progress.Display(quiet=True))
    assert opened == [None]
    assert found.stages.computed == found.stages.total
    assert not ray.is_initialized()
    again = run_pipeline(load_resolved(str(spec)), where, progress.Display(quiet=True))
    assert opened == [None]
    assert again.results[0].metrics == found.results[0].metrics
    # The index was put together by workers; one process comes to the same keys.
    keys = [path.name for path in (tmp_path / "store/dataset").iterdir()]
    monkeypatch.setattr(indexing, "worth_a_start", lambda parts: False)
    other = Store(str(tmp_path / "other"))
    plan = make_plan(load_resolved(str(spec)), other.memo)
    assert {s.key for s in plan.stages if s.operator == "dataset"} == set(keys)
