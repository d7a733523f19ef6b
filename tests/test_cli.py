"""The command line as people meet it: one line per mistake, its exit status, clean streams."""

import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from graftwork import __version__
from graftwork.operators import housekeeping
from graftwork.operators.backbones import loading, weights
from graftwork.operators.errors import BadDataError, IncompatibleError
from graftwork.operators.stages import features
from graftwork.operators.store import Store
from graftwork.pipelines import cli
from graftwork.pipelines.planning.plan import make_plan
from graftwork.pipelines.spec.loading import load_resolved
from tests.processes import started

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "operators/backbones/shipped/vit_micro_patch4_32.safetensors"
VARIABLES = ("MLFLOW_TRACKING_URI", "GRAFTWORK_STORE", "RAY_ADDRESS")


class Done(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Runs the command in this process, in an empty folder; no error may show a traceback."""
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["graftwork", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        assert "--debug" in words or "Traceback" not in out + err
        return Done(ended.value.code, out, err)

    return run


def png(number: int, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def table(path: Path, labels: list[Any], **columns: Any) -> Path:
    images = pa.array([png(number) for number in range(len(labels))], pa.binary())
    pq.write_table(pa.table({"image": images, "label": labels, **columns}), path)
    return path


def folder(path: Path, classes: int = 2) -> Path:
    for number in range(classes):
        (path / f"c{number}").mkdir(parents=True)
        for image in range(2):
            (path / f"c{number}/{image}.png").write_bytes(png(10 * number + image))
    return path


def write_spec(path: Path, **changes: Any) -> Path:
    spec = {
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
    path.write_text(yaml.safe_dump(spec | changes, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def spec(tmp_path: Path) -> str:
    write_spec(tmp_path / "spec.yaml")
    return "spec.yaml"


def lines(done: Done) -> list[str]:
    """The errors, each of one line that begins as it has to."""
    found = done.err.splitlines()
    assert done.out == "" and found
    assert all(line.startswith("error: ") for line in found)
    return [line.removeprefix("error: ") for line in found]


def touched(path: Path) -> list[str]:
    """What a store holds beyond its accelerators."""
    return [p.name for p in path.iterdir() if p.name != "memo"] if path.exists() else []


# --- usage ----------------------------------------------------------------------------------------


def test_no_arguments_print_the_help(call: Command) -> None:
    for words in ((), ("cache",)):
        done = call(*words)
        assert done.code == 2 and done.err == ""
        assert "Usage: graftwork" in done.out and "verify" in done.out + "verify"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plann", "x"], "no such command 'plann'. Did you mean 'plan'?; see graftwork -h"),
        (["frobnicate"], "no such command 'frobnicate'; see graftwork -h"),
        (["cache", "lss"], "no such command 'lss'. Did you mean 'ls'?; see graftwork cache -h"),
        (["run"], "missing argument 'SPEC'; see graftwork run -h"),
        (
            ["run", "x", "--sett", "y"],
            "no such option: --sett (Possible options: --set, --store); see graftwork run -h",
        ),
        (["run", "x", "y"], "unexpected extra argument(s) (y); see graftwork run -h"),
        (
            ["cache", "gc", "--days", "1"],
            "--days 1 would touch files of running pipelines; add --force",
        ),
        (["methods", "ranpacc"], 'methods: unknown method "ranpacc"; did you mean "ranpac"?'),
        (["run", "quickstrat"], 'quickstrat: not found; did you mean the preset "quickstart"?'),
        (["run", "."], ".: is a directory; name a file in it"),
        (["run", "x", "--bad\x1b[31m"], None),
    ],
)
def test_mistakes_on_the_command_line(call: Command, words: list[str], message: str | None) -> None:
    done = call(*words)
    assert done.code == 2
    [line] = lines(done)
    assert "\x1b" not in line
    if message:
        assert line == message


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["results", "--format", "xml"], "--format"),
        (["ui", "--port", "0"], "--port"),
        (["ui", "--port", "abc"], "--port"),
        (["cache", "gc", "--days", "-1"], "--days"),
    ],
)
def test_values_of_options(call: Command, words: list[str], name: str) -> None:
    done = call(*words)
    [line] = lines(done)
    assert done.code == 2 and line.startswith(f"'{name}': ") and "; see graftwork " in line


def commands() -> Iterator[list[str]]:
    for command in cli.app.registered_commands:
        assert command.callback is not None
        yield [command.name or command.callback.__name__]
    yield from (["cache", str(command.name)] for command in cli.cache_app.registered_commands)


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_has_help_with_an_example(call: Command, words: list[str]) -> None:
    done = call(*words, "-h")
    assert (done.code, done.err) == (0, "")
    assert f"graftwork {' '.join(words)}" in done.out.split("Example:")[1]
    assert max(map(len, done.out.splitlines())) <= 80
    assert "\x1b" not in done.out  # no terminal, no colours


def test_debug_shows_the_traceback(call: Command) -> None:
    done = call("--debug", "run", "none.yaml")
    assert done.code == 2
    assert "Traceback" in done.err and done.err.splitlines()[-1].startswith("error: none.yaml")


def test_a_bug_is_one_line_too(call: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "graftwork.operators.catalogue.cards", lambda: {}["a secret of ghp_0123456789abcdefghij"]
    )
    done = call("methods")
    [line] = lines(done)
    assert done.code == 1
    assert line.startswith("unexpected KeyError: 'a secret of ***'; --debug shows where")


# --- specs ----------------------------------------------------------------------------------------


def plan_errors(
    call: Command, spec: str, code: int, *sets: str, command: str = "plan"
) -> list[str]:
    """Errors without the option that caused them, which every line repeats."""
    options = [word for value in sets for word in ("--set", value)]
    done = call(command, spec, "--store", "store", *options)
    assert done.code == code, done
    assert touched(Path("store")) == []
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
    found = []
    for line in lines(done):
        for value in sets:
            line = line.removeprefix(f"--set {value}: ")
        found.append(line)
    return found


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "backbone.model=vit_micro_patch4_23",
            'backbone.model: unknown timm model "vit_micro_patch4_23"; '
            'did you mean "vit_micro_patch4_32"?',
        ),
        (
            "methods=[simplecl]",
            'methods.0: unknown method "simplecl"; did you mean "simplecil"?',
        ),
        (
            "methods=[ranpac: {projection_dm: 3}]",
            'methods.0.ranpac.projection_dm: unknown hyper-parameter "projection_dm"; '
            'did you mean "projection_dim"?',
        ),
        (
            "methods=[ranpac: {projection_dim: abc}]",
            "methods.0.ranpac.projection_dim: must be an integer, got 'abc'",
        ),
        (
            "methods.0.simplecil.x=3",
            'methods.0.simplecil.x: unknown hyper-parameter "x"; known: none',
        ),
        (
            "scenario.initial=11",
            "scenario.initial: task 0 wants 11 classes, the data set has 10; use at most 10",
        ),
        (
            "scenario.orders=[[0, 1, 12]]",
            "scenario.orders: each class is named once, and the data set has 10 classes: "
            "unknown 12",
        ),
        (
            "scenario.orders=[[0, 0]]",
            "scenario.orders.0: an explicit order must not repeat 0",
        ),
        (
            "scenario={kind: domain_incremental}",
            "scenario.kind: domain_incremental needs the column with the domains; "
            "give dataset.domain",
        ),
        ("seeds=[4294967296]", "seeds.0: must be an integer in 0..4294967295, got 4294967296"),
        ("backbone.weights=/none.safetensors", "backbone.weights: /none.safetensors: not found"),
        (
            "backbone.model=vit_micro_patch4_32.tagg",
            'backbone.model: vit_micro_patch4_32 has no weights with the tag "tagg"; tags: none',
        ),
    ],
)
def test_a_wrong_value(call: Command, spec: str, option: str, message: str) -> None:
    extra = ["backbone.weights=random"] if option.startswith("backbone.model") else []
    assert plan_errors(call, spec, 2, *extra, option) == [message]


def test_all_problems_at_once_with_their_lines(call: Command, tmp_path: Path) -> None:
    path = write_spec(
        tmp_path / "bad.yaml",
        methods=["ranpacc", {"ranpac": {"projection_dim": -3, "lamda": 1}}],
        backbone={"model": "vit_micro_patch4_23", "weights": "builtin"},
    )
    numbers = {
        text.split(":")[0].strip(" -"): number
        for number, text in enumerate(path.read_text().splitlines(), 1)
    }
    done = call("run", "bad.yaml")
    assert done.code == 2
    found = lines(done)
    assert f'bad.yaml:{numbers["ranpacc"]}: methods.0: unknown method "ranpacc"' in found[0]
    assert any(
        line.startswith(f"bad.yaml:{numbers['projection_dim']}: methods.1.ranpac.projection_dim: ")
        for line in found
    )
    assert any("lamda" in line and "unknown hyper-parameter" in line for line in found)
    assert found[-1].startswith(f"bad.yaml:{numbers['weights']}: backbone.weights: ")


def test_secrets_are_refused_and_never_echoed(call: Command, spec: str) -> None:
    for secret in ("hf_abcdefghijklmnopqrstuvwx", "AKIAIOSFODNN7EXAMPLE"):
        for words in (
            ["run", spec, "--set", f"backbone.weights={secret}"],
            ["run", spec, "--set", f"{secret}=1"],
            ["run", spec, "--tracking", secret],
            ["run", spec, f"--{secret}"],
            ["run", secret],
            ["methods", secret],
            [secret],
            ["plan", spec, "--store", f"s3://{secret}@bucket/x"],
            ["results", "--tracking", f"http://me:{secret}@127.0.0.1:9"],
        ):
            done = call(*words)
            assert done.code == 2
            assert all(secret not in line for line in lines(done)), words


def test_odd_paths(call: Command, tmp_path: Path) -> None:
    for name in ("with space", "ünï-文", "-dash"):
        (tmp_path / name / "store").mkdir(parents=True)
        path = write_spec(tmp_path / name / "-my spec.yaml").relative_to(tmp_path)
        done = call("plan", "--store", f"{name}/store", "--json", "--", path)
        assert done.code == 0, done
        assert json.loads(done.out)["pipeline"] == "tiny"
        assert (tmp_path / name / "store/memo").is_dir()


# --- weights --------------------------------------------------------------------------------------


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "truncated.safetensors",
            "truncated: its header expects {full} bytes, the file has 20000; copy the file again",
        ),
        ("empty.safetensors", "empty (0 bytes); copy the file again"),
        ("text.safetensors", "not a safetensors file (12 bytes); copy the file again"),
        ("code.pth", "contains code ({os}.mkdir); convert it to safetensors"),
        ("code.pkl", "holds code or is damaged; convert it to safetensors"),
        ("list.pth", "is not a dictionary of tensors"),
    ],
)
def test_weights_that_are_none(
    call: Command, spec: str, tmp_path: Path, name: str, message: str
) -> None:
    data = WEIGHTS.read_bytes()
    match name:
        case "truncated.safetensors":
            (tmp_path / name).write_bytes(data[:20000])
        case "empty.safetensors":
            (tmp_path / name).touch()
        case "text.safetensors":
            (tmp_path / name).write_text("hello, world")
        case "code.pth":
            torch.save({"a": Code()}, tmp_path / name)
        case "code.pkl":
            (tmp_path / name).write_bytes(pickle.dumps(Code()))
        case "list.pth":
            torch.save([1], tmp_path / name)
    [line] = plan_errors(call, spec, 3, f"backbone.weights={name}")
    full = message.format(full=len(data), os=os.name)
    assert line.startswith(f"backbone.weights: {tmp_path / name}: {full}") or line.startswith(
        f"backbone.weights: {name}: {full}"
    )
    assert not Path("executed").exists()


def test_weights_of_another_architecture(call: Command, spec: str) -> None:
    options = (f"backbone.weights={WEIGHTS}", "backbone.model=vit_tiny_patch16_224")
    [line] = plan_errors(call, spec, 3, *options)
    assert f"{WEIGHTS} does not fit vit_tiny_patch16_224 (" in line
    assert line.count("expected ") == 5  # the first differences, with shapes
    assert "[192, 192], file has none" in line


def test_weights_in_a_pth_file(tmp_path: Path) -> None:
    state = load_file(WEIGHTS)
    torch.save({"state_dict": state}, tmp_path / "good.pth")
    loading.load("vit_micro_patch4_32", str(tmp_path / "good.pth"), "token")
    torch.save(state, tmp_path / "half.pth")
    data = (tmp_path / "half.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(IncompatibleError, match="holds code or is damaged"):
        weights.read_weights(str(tmp_path / "half.pth"))


def test_pretrained_weights_offline(
    call: Command, spec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    begin = time.monotonic()
    options = ("backbone.model=vit_tiny_patch16_224", "backbone.weights=null")
    [line] = plan_errors(call, spec, 2, *options)
    assert time.monotonic() - begin < 10
    assert line == (
        "backbone.weights: weights of vit_tiny_patch16_224 are not cached and the hub is "
        "unreachable (Name or service not known); give a file"
    )


# --- data -----------------------------------------------------------------------------------------


def data_errors(call: Command, code: int, train: Path, test: Path, **more: Any) -> list[str]:
    options = {"train": str(train), "test": str(test), **more}
    write_spec(Path("data.yaml"), dataset=options, scenario=SCENARIO)
    return plan_errors(call, "data.yaml", code)


SCENARIO = {"kind": "class_incremental", "increment": 1}


def test_tables(call: Command, tmp_path: Path) -> None:
    good = table(tmp_path / "good.parquet", [0, 1, 0, 1])

    def one(train: Path, test: Path = good, **more: Any) -> str:
        [line] = dict.fromkeys(data_errors(call, 9, train, test, **more))
        return line.replace(f"{tmp_path}/", "")

    assert one(tmp_path / "no.parquet") == "data.yaml:3: dataset.train: no.parquet: not found"
    assert one(tmp_path / "x*.parquet") == "data.yaml:3: dataset.train: x*.parquet: nothing matches"
    assert one(good, label="lable") == (
        'data.yaml:5: dataset.label: good.parquet: no column "lable"; there are: label, image'
    )
    assert one(good, domain="style") == (
        'data.yaml:5: dataset.domain: good.parquet: no column "style"; there are: image, label'
    )
    assert one(good, label="image") == (
        'data.yaml:5: dataset.label: good.parquet: column "image" holds the images; name another'
    )
    beyond = table(tmp_path / "beyond.parquet", [0, 1, 100, 1])
    assert one(good, beyond, classes=["a", "b"]) == (
        "beyond.parquet row 2: label 100 out of range 0..1"
    )
    assert one(good, table(tmp_path / "more.parquet", [0, 1, 2])) == (
        "test has images of class 2, train has none"
    )
    gap = table(tmp_path / "gap.parquet", [0, 2])
    assert one(gap, gap).startswith("class 1 has no training images")
    assert one(table(tmp_path / "negative.parquet", [0, -1])) == (
        "negative.parquet row 1: label -1 out of range 0 and up"
    )
    real = table(tmp_path / "real.parquet", [0.5, 1])
    assert one(real) == (
        'data.yaml:2: dataset.label: real.parquet row 0: column "label" has 0.5, which is no label'
    )
    (tmp_path / "half.parquet").write_bytes(good.read_bytes()[:200])
    assert one(tmp_path / "half.parquet").startswith("half.parquet: not a readable Parquet file: ")
    none = table(tmp_path / "none.parquet", [0, None, 1])
    assert one(none) == "none.parquet row 1: no label"


def test_folders(call: Command, tmp_path: Path) -> None:
    good = folder(tmp_path / "good")

    def found(name: str, test: Path = good) -> list[str]:
        return [
            line.replace(f"{tmp_path}/", "") for line in data_errors(call, 9, tmp_path / name, test)
        ]

    (tmp_path / "empty").mkdir()
    assert found("empty") == [
        "data.yaml:3: dataset.train: empty: holds no class folders; give a folder with one folder "
        "per class, or Parquet files as empty/*.parquet"
    ]
    (folder(tmp_path / "hollow") / "c2").mkdir()
    assert found("hollow") == [
        'class 2 ("c2") has no training images; '
        "list all classes in dataset.classes if some are to have no images"
    ]
    extra = folder(tmp_path / "extra", 3)
    assert found("good", extra) == ['test has images of class 2 ("c2"), train has none']
    odd = folder(tmp_path / "odd")
    (odd / "c0/0.jpg").write_text("not an image")
    (odd / "c0/1.jpg").touch()
    (odd / "c1/0.png").write_bytes(bomb())
    (odd / ".DS_Store").touch()
    assert found("odd") == [
        "odd/c0/0.jpg: not PNG, JPEG, WEBP, BMP, TIFF, GIF or PPM, but text",
        "odd/c0/1.jpg: empty (0 bytes)",
        "odd/c1/0.png: 30000x30000 = 900000000 pixels, more than max_pixels 89478485",
        "3 unusable images; on_bad_image: skip leaves them out",
    ]
    looped = folder(tmp_path / "looped")
    (looped / "me").symlink_to("me")
    assert found("looped") == ["data.yaml:3: dataset.train: symlink loop at looped/me"]
    deep = folder(tmp_path / "deep")
    (deep / "c0/up").symlink_to("..")
    assert found("deep")[0].startswith("data.yaml:3: dataset.train: symlink loop at deep/c0/up")


def bomb() -> bytes:
    """The head of a PNG of 30000 x 30000 pixels, which takes no time to make."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_doctor_finds_truncated_images(call: Command, tmp_path: Path) -> None:
    bad = folder(tmp_path / "bad")
    (bad / "c0/0.png").write_bytes(png(0, (64, 64))[:1000])
    dataset = {"train": str(bad), "test": str(folder(tmp_path / "good"))}
    write_spec(tmp_path / "data.yaml", dataset=dataset, scenario=SCENARIO)
    done = call("doctor", "data.yaml")
    assert done.code == 9
    assert "1 unreadable image\n" in done.out
    assert done.err == (
        "error: dataset: 1 unusable images; mend them, or leave them out with "
        "dataset.on_bad_image: skip\n"
    )
    done = call("doctor", "data.yaml", "--json")
    assert done.code == 9 and len(json.loads(done.out)["problems"]) == 1
    done = call("doctor", "data.yaml", "--set", "dataset.on_bad_image=skip")
    assert (done.code, done.err) == (0, "")


def test_a_run_names_the_image_that_it_cannot_decode(tmp_path: Path) -> None:
    bad = folder(tmp_path / "bad")
    (bad / "c1/0.png").write_bytes(png(0, (64, 64))[:1000])  # its header is whole
    dataset = {"train": str(bad), "test": str(folder(tmp_path / "good"))}
    loaded = load_resolved(
        str(write_spec(tmp_path / "data.yaml", dataset=dataset, scenario=SCENARIO))
    )
    store = Store(str(tmp_path / "store"))
    made = make_plan(loaded, store.memo)
    [stage] = [s for s in made.stages if s.label.startswith("features train ")]
    with pytest.raises(BadDataError) as caught:
        features.run(stage.assignment(), store)
    assert str(caught.value) == (
        f"{bad}/c1/0.png: truncated or damaged: image file is truncated; "
        "mend it, or leave it out with dataset.on_bad_image: skip"
    )


# --- stores and MLflow ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("foo://x", 'protocol "foo" not supported (file, s3, gs, abfs, hf)'),
        ("hf://datasets/a/b", 'protocol "hf" can only be read (file, s3, gs, abfs)'),
        ("simplecache::s3://b/x", 'URL chaining not allowed ("simplecache::s3://b/x"); '),
        ("s3://user:pw@b/x", 'credentials in URLs not allowed ("s3://***@b/x"); '),
        ("s3://b/x?endpoint_override=http://e", 'query strings in URLs not allowed ("s3://b/x?.'),
        ("s3://b/../x", '".." not allowed in URLs ("s3://b/../x"); write the full path'),
        ("~/x", '"~" is not expanded ("~/x"); write the full path'),
        ("a\nb", "invalid character in path"),
        ("", "is empty; give a path or URL"),
    ],
)
def test_store_urls(call: Command, spec: str, url: str, message: str) -> None:
    for words in (["run", spec], ["plan", spec], ["doctor", spec], ["cache", "ls"], ["results"]):
        done = call(*words, "--store", url)
        [line] = lines(done)
        assert done.code == 2 and line.startswith(f"--store: {message}")


def test_a_store_that_is_a_file(call: Command, spec: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for words in (["run", spec], ["plan", spec], ["doctor", spec]):
        done = call(*words, "--store", "file")
        assert (done.code, lines(done)) == (6, [f"store {tmp_path}/file: Not a directory"])


def test_commands_that_look_at_a_store_want_one(call: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for words in (["cache", "ls"], ["cache", "verify"], ["cache", "gc"], ["results"], ["ui"]):
        for name, what in (("none", "not found"), ("file", "is no folder")):
            done = call(*words, "--store", name)
            assert done.code == 6
            message = f"--store: {tmp_path}/{name}: {what}; name the store of an earlier run"
            assert lines(done) == [message]
    assert not (tmp_path / "none").exists()


def test_a_remote_store_without_its_library(
    call: Command, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.url_to_fs", missing)
    for words in (["plan", spec], ["cache", "ls"]):
        done = call(*words, "--store", "s3://bucket/x")
        assert done.code == 2
        message = 'store s3://bucket/x: Install s3fs to access S3; pip install "graftwork[s3]"'
        assert lines(done) == [message]
    done = call("run", spec, "--store", "s3://bucket/x")
    assert (done.code, lines(done)) == (2, ["store s3://bucket/x is remote; pass --tracking"])


@pytest.mark.parametrize(("number", "words"), [(28, "is full: "), (30, "no permission: ")])
def test_a_store_that_takes_nothing(
    call: Command, spec: str, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("graftwork.operators.store.blobs.os.write", refuse)
    done = call("run", spec, "--store", "store")
    [line] = lines(done)
    assert done.code == 6 and line.startswith(f"store {Path('store').absolute()}") and words in line
    assert [path for path in Path("store").rglob("*") if path.is_file()] == []


def test_tracking_that_cannot_be_used(call: Command, spec: str) -> None:
    with socket.socket() as silent:  # accepts, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for uri, reason in (
            (f"http://127.0.0.1:{silent.getsockname()[1]}", "timed out"),
            ("http://127.0.0.1:9", "Connection refused"),
            ("foo://x", "'foo' is not one of sqlite, http, https, "),
            ("sqlite:///", "'sqlite:///' names no file; write sqlite:////absolute/path.db"),
        ):
            begin = time.monotonic()
            done = call("run", spec, "--store", "store", "--tracking", uri)
            assert time.monotonic() - begin < 5.5
            assert done.code == 2
            [line] = lines(done)
            assert line.startswith(f"tracking: cannot reach {uri}: {reason}")
    assert touched(Path("store")) == []


# --- streams --------------------------------------------------------------------------------------


def test_json_is_the_only_thing_on_stdout(call: Command, spec: str) -> None:
    Path("store").mkdir()
    for words in (
        ["plan", spec, "--store", "store"],
        ["doctor", spec, "--store", "store"],
        ["methods"],
        ["methods", "ranpac"],
        ["cache", "ls", "--store", "store"],
        ["cache", "verify", "--store", "store"],
        ["cache", "gc", "--store", "store"],
    ):
        done = call(*words, "--json")
        assert (done.code, done.err) == (0, "")
        json.loads(done.out)


def test_tables_fit_a_terminal_and_have_no_colours(call: Command, spec: str) -> None:
    Path("store").mkdir()
    for words in (
        ["plan", spec, "--store", "store"],
        ["doctor", spec, "--store", "store"],
        ["methods"],
        ["methods", "ranpac"],
        ["cache", "ls", "--store", "store"],
    ):
        out = call(*words).out
        assert out.endswith("\n") and "\x1b" not in out
        assert max(map(len, out.splitlines())) <= 80


def environment(**more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    return clean | {"PYTHONPATH": str(ROOT / "src")} | more


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "graftwork.pipelines", *words]


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    with started(command("methods", "--json"), cwd=tmp_path, env=environment()) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 0)


def test_an_old_locale(tmp_path: Path) -> None:
    write_spec(tmp_path / "spec.yaml", pipeline="ünï")
    done = subprocess.run(
        command("plan", "spec.yaml", "--store", "größe", "--set", "methods=[größe]"),
        cwd=tmp_path,
        env=environment(LC_ALL="C", PYTHONIOENCODING="ascii"),
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert done.stderr.startswith(
        b"error: --set methods=[gr\\xf6\\xdfe]: methods.0: unknown method"
    )


def test_a_crash_of_a_library_says_where_it_was(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from graftwork.operators import catalogue\n"
        "from graftwork.pipelines import cli\n"
        "catalogue.cards = lambda: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "sys.argv = ['graftwork', 'methods']\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr and "in main" in done.stderr


def test_signals_end_a_run_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_spec(
        tmp_path / "spec.yaml",
        dataset={"builtin": "digits", "limit_per_class": 60},
        features={"shard_size": 8},
        resources={"extract": {"batch_size": 8}},
    )
    kept: set[Path] = set()
    # The second run goes on where the first was stopped.
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        try:
            stored = stop_a_run(tmp_path, number, code, kept)
        except Crashed as crash:
            # Rare, and in a library, as all of ours is Python. It is one of the ends that a run
            # promises to survive: the same command goes on. Its trace is worth seeing anyway.
            with capsys.disabled():
                print(*crash.__notes__, file=sys.stderr)
            stored = stop_a_run(tmp_path, number, code, kept)
        assert kept < stored
        kept = stored


class Crashed(Exception):
    """A process died of SIGSEGV before anybody sent it a signal."""


def stop_a_run(folder: Path, number: signal.Signals, code: int, before: set[Path]) -> set[Path]:
    """Sends a signal once a run has stored something new; returns what is stored in the end."""

    def stored() -> set[Path]:
        return set(folder.glob("store/features/*/manifest.json"))

    words = command("run", "spec.yaml", "--store", "store", "--json")
    with started(words, cwd=folder, env=environment(), start_new_session=True) as process:
        until = time.monotonic() + 150
        while stored() <= before:
            if process.poll() == -signal.SIGSEGV:
                raise Crashed
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(number)
        begin = time.monotonic()
        out, err = process.communicate(timeout=60)
        # About two seconds on an idle machine, ten times that where files are not in memory.
        assert time.monotonic() - begin < 40
    assert (process.returncode, out) == (code, b"")
    assert err.decode().splitlines()[-1] == "interrupted; run the same command again to resume"
    assert b"Traceback" not in err
    # Ray ends a worker that is in the middle of a write, too: what that leaves, gc finds.
    left = {str(path.relative_to(folder / "store")) for path in folder.glob("store/**/*.tmp")}
    assert left <= set(garbage(folder / "store"))
    assert session_members(process.pid) == []
    return stored()


def garbage(store: Path) -> list[str]:
    """What `cache gc` lists."""
    return housekeeping.collect(Store(str(store)), 0, unused=False, delete=False)["files"]


def session_members(session: int) -> list[int]:
    """Processes that are left of a session, as Linux knows them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_the_version(call: Command) -> None:
    done = call("--version")
    assert (done.code, done.out) == (0, f"graftwork {__version__}\n")
