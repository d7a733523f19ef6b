"""Folders as people have them: what is used, what is left out, and that it is said."""

import io
import os
from collections.abc import Mapping
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from graftwork.operators.data import dataset
from graftwork.operators.data.dataset import Dataset
from graftwork.operators.errors import BadDataError
from graftwork.operators.files import kinds
from graftwork.operators.files.kinds import LeftOut
from graftwork.operators.files.listing import images_below, list_folder
from graftwork.operators.serving import inputs
from graftwork.operators.store import Store
from graftwork.operators.store.memo import Memo
from graftwork.pipelines.planning import sources
from tests import pngs


class Remembering(Memo):
    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}

    def get(self, preimage: Mapping[str, object]) -> bytes | None:
        return self.entries.get(str(preimage))

    def put(self, preimage: Mapping[str, object], content: bytes) -> None:
        self.entries[str(preimage)] = content


def image(number: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (number, 7, 9)).save(buffer, kind)
    return buffer.getvalue()


def folder(path: Path, files: Mapping[str, bytes]) -> str:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return str(path)


BASE = {"cat/0.png": image(0), "dog/0.png": image(1)}
PASSED_OVER = {
    "__MACOSX/cat/._0.jpg": b"x",
    "$RECYCLE.BIN/0.jpg": image(2, "JPEG"),
    "System Volume Information/0.png": image(3),
    "lost+found/0.png": image(4),
    "@eaDir/0.jpg": image(5, "JPEG"),
    ".git/HEAD": b"x",
    ".ipynb_checkpoints/0.png": image(6),
    "cat/._0.png": b"x",
    "cat/.DS_Store": b"x",
    "cat/Thumbs.db": b"x",
    "dog/desktop.ini": b"x",
}
LOST = {
    "cat/1.heic": b"x",
    "dog/1.HEIC": b"x",
    "dog/2.svg": b"<svg/>",
    "dog/noname": image(7),
    "metadata.csv": b"file_name,label\n",
    "stray.jpg": image(8, "JPEG"),
}
ASIDE = {"labels.csv": b"x", "cat/notes.txt": b"x"}


def index(train: str, test: str, memo: Memo | None = None, **more: object) -> Dataset:
    return dataset.index({"train": [train], "test": [test], **more}, memo or Remembering(), 1)


def counts(entries: tuple[LeftOut, ...]) -> dict[str, int]:
    return {entry.what: entry.count for entry in entries}


def test_every_format_counts_under_each_of_its_names(tmp_path: Path) -> None:
    files = {}
    for number, (kind, extensions) in enumerate(kinds.FORMATS.items()):
        for extension in extensions:
            data = image(10 + number, kind)
            files |= {f"cat/f{number}{extension}": data, f"cat/u{number}{extension.upper()}": data}
    found = index(folder(tmp_path / "set", BASE | files), folder(tmp_path / "test", BASE))
    assert len(found.train) == len(BASE) + len(files)
    assert found.left_out == {"train": (), "test": ()}
    assert found.train.labels.tolist() == [0] * (1 + len(files)) + [1]


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_what_is_not_used_is_counted_by_its_reason(tmp_path: Path, place: str) -> None:
    files = BASE | PASSED_OVER | LOST | ASIDE | {"cat/deep/er.png": image(9)}
    root = folder(tmp_path / "set", files)
    filesystem, path = None, root
    if place == "memory":
        filesystem, path = fsspec.filesystem("memory"), f"/left-out-{tmp_path.name}"
        for name, content in files.items():
            filesystem.pipe_file(f"{path}/{name}", content)
    found = list_folder(root, filesystem, path)
    assert found.classes == ("cat", "dog")
    assert [name for name, _, _ in found.files] == ["cat/0.png", "cat/deep/er.png", "dog/0.png"]
    assert counts(found.left_out) == {
        ".heic files": 2,
        "Hugging Face's files of labels": 1,
        ".svg files": 1,
        "files without an extension": 1,
        "images outside the class folders": 1,
        ".csv files": 1,
        ".txt files": 1,
        "hidden and system files": 11,
    }
    assert [e.what for e in found.left_out if e.lost] == list(counts(found.left_out))[:5]
    assert found.left_out[0].first == "cat/1.heic"
    below, left_out = images_below(filesystem, path)
    assert below == ["cat/0.png", "cat/deep/er.png", "dog/0.png", "stray.jpg"]
    expected = counts(found.left_out)
    del expected["images outside the class folders"]
    assert counts(left_out) == expected


def test_system_folders_are_no_classes_and_change_no_key(tmp_path: Path) -> None:
    plain = index(folder(tmp_path / "plain", BASE), folder(tmp_path / "test", BASE))
    odd = folder(tmp_path / "odd", BASE | PASSED_OVER | LOST | ASIDE)
    found = index(odd, str(tmp_path / "test"))
    assert found.classes == ("cat", "dog")
    assert found.train.stage().key == plain.train.stage().key


def test_the_count_does_not_come_from_the_memo(tmp_path: Path) -> None:
    root, memo = folder(tmp_path / "set", BASE), Remembering()
    assert index(root, root, memo).left_out["train"] == ()
    folder(tmp_path / "set", LOST)
    for _ in range(2):
        found = index(root, root, memo)
        assert sum(counts(found.left_out["train"]).values()) == len(LOST)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", BASE)
    os.mkfifo(tmp_path / "set/cat/pipe.png")
    found = index(root, root)
    assert (len(found.train), counts(found.left_out["train"])) == (
        2,
        {"pipes, sockets and devices": 1},
    )


def test_held_out_images_count_the_folder_once(tmp_path: Path) -> None:
    more = {f"{name}/{n}.png": image(20 + n) for n in range(1, 9) for name in ("cat", "dog")}
    root = folder(tmp_path / "set", BASE | more | LOST)
    found = index(root, root, holdout=0.25)
    assert list(found.left_out) == ["train"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("1.png", b"", "empty (0 bytes)"),
        ("1.jpg", b"<!DOCTYPE html><html>", "but a web page"),
        ("1.jpg", b"version https://git-lfs.github.com/spec/v1", "but a pointer of Git LFS"),
        ("1.jpg", b"\0\0\0\x18ftypheic", "but HEIC"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    root = folder(tmp_path / "set", BASE | {f"cat/{name}": content})
    with pytest.raises(BadDataError) as caught:
        index(root, root)
    first = str(caught.value).split("\n")[0]
    assert first.startswith(f"{root}/cat/{name}: ")
    assert why in first


def test_a_wrong_name_is_no_wrong_image(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", BASE | {"cat/1.jpg": image(3), "cat/2.png": image(4, "GIF")})
    assert len(index(root, root).train) == 4


def test_a_class_folder_without_a_name_is_refused(tmp_path: Path) -> None:
    folder(tmp_path / "set", BASE)
    os.mkdir(os.fsencode(tmp_path / "set") + b"/\xff\xfe")
    with pytest.raises(BadDataError, match=r"class folder b'\\xff\\xfe' is no UTF-8; rename it"):
        index(str(tmp_path / "set"), str(tmp_path / "set"))


def test_one_line_says_what_a_run_leaves_out(tmp_path: Path) -> None:
    used = {f"{c}/{n}.png": pngs.png(10 * n + c, label=c) for c in range(6) for n in range(2)}
    files = {f"{split}.parquet/{name}": data for split in ("train", "test") for name, data in
             (used | {f"0/{n}.heic": b"x" for n in range(24)}).items()}  # fmt: skip
    root = Path(folder(tmp_path / "data", files))
    made = pngs.plan(Store(str(tmp_path / "store")), root, methods=["simplecil"])
    assert sources.remarks(made.sources) == [
        "warning: left out: .heic files: 48 (0/0.heic) (graftwork doctor lists all)"
    ]
    for heic in root.rglob("*.heic"):
        heic.unlink()
    made = pngs.plan(Store(str(tmp_path / "store")), root, methods=["simplecil"])
    assert sources.remarks(made.sources) == []


def test_served_images_are_found_and_counted_alike(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", BASE | LOST | PASSED_OVER | {"cat/2.TIF": image(5, "TIFF")})
    found = inputs.find([root])
    assert len(found) == 4
    assert sum(e.count for e in found.left_out if e.lost) == 5
    assert len(inputs.find([f"{root}/cat/*"])) == 2
    only = folder(tmp_path / "only", {"a.heic": b"x"})
    with pytest.raises(BadDataError, match=r"no images found .* left out: .heic files: 1 \(a.heic"):
        inputs.find([only])


def test_a_picture_in_16_bits_has_the_features_of_the_one_in_8(tmp_path: Path) -> None:
    """From files to features, through the operators."""
    stored, found = Store(str(tmp_path / "store")), {}
    for bits in (8, 16):
        root = tmp_path / f"bits{bits}"
        for split in ("train.parquet", "test.parquet"):
            for label in range(6):
                grey = np.random.default_rng(label).integers(0, 256, (16, 16), dtype=np.uint8)
                values = grey if bits == 8 else grey.astype(np.uint16) * 257
                place = root / split / str(label) / "0.png"
                place.parent.mkdir(parents=True)
                Image.fromarray(values).save(place)
        made = pngs.plan(stored, root, methods=["simplecil"])
        stages = [s for s in made.stages if s.operator in ("dataset", "features")]
        pngs.compute(stages, stored)
        features = [s for s in stages if s.operator == "features"]
        found[bits] = (
            {s.key for s in features},
            [stored.read(s.operator, s.key, "features.parquet") for s in features],
        )
    assert found[8][0].isdisjoint(found[16][0])
    assert found[8][1] == found[16][1]
