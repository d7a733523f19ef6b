"""Specs: what is accepted, and the messages for everything else."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from pydantic import BaseModel

from graftwork.operators.errors import ConfigError
from graftwork.operators.images.preprocessing import PRESETS
from graftwork.pipelines.spec.fields import PLACE
from graftwork.pipelines.spec.loading import (
    MAX_BYTES,
    PipelineSpec,
    load_resolved,
    presets,
    with_absolute_places,
)
from graftwork.pipelines.spec.model import PREPROCESSING
from graftwork.pipelines.spec.problems import MAX_LINES
from graftwork.pipelines.spec.reference import keys, table

ROOT = Path(__file__).parent.parent

GOOD = """\
pipeline: p
dataset:
  train: train.parquet
  test: [a.parquet, "s3://b/*.parquet"]
scenario:
  kind: class_incremental
  increment: 10
backbone:
  model: vit
methods:
  - simplecil
  - ranpac: {projection_dim: 2000, lr: 1e-3}
"""
DOMAINS = GOOD.replace("class_incremental\n  increment: 10", "domain_incremental").replace(
    "train: train.parquet", "train: train.parquet\n  domain: style"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(text: str, *overrides: str) -> list[str]:
    """The lines of the error that a spec gives; the working directory is the test's own."""
    Path("conf.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_resolved("conf.yaml", overrides)
    return str(caught.value).split("\n")


def good(*overrides: str, text: str = GOOD) -> PipelineSpec:
    Path("conf.yaml").write_text(text, encoding="utf-8")
    return load_resolved("conf.yaml", overrides).spec


def test_defaults(folder: Path) -> None:
    spec = good()
    assert spec.to_value() == {
        "pipeline": "p",
        "stream": None,
        "disjoint_classes": False,
        "transfer": False,
        "dataset": {
            "train": ["train.parquet"],
            "test": ["a.parquet", "s3://b/*.parquet"],
            "image": "image",
            "label": "label",
            "domain": None,
            "classes": None,
            "limit_per_class": {"train": None, "test": None},
            "holdout": 0,
            "on_bad_image": "error",
            "max_pixels": 89478485,
        },
        "scenario": {
            "manifest": None,
            "kind": "class_incremental",
            "sizes": None,
            "tasks": None,
            "blurry": None,
            "increment": 10,
            "initial": 10,
            "few_shot": None,
            "long_tailed": None,
            "online": None,
            "orders": [1993],
        },
        "backbone": {
            "model": "vit",
            "weights": None,
            "image_size": None,
            "preprocessing": "timm_default",
            "precision": "fp32",
        },
        "vit": None,
        "features": {"dtype": "float16", "shard_size": 512, "pooling": "token"},
        "text": {"templates": ["a photo of a {}."]},
        "reference": None,
        "methods": ["simplecil", {"ranpac": {"projection_dim": 2000, "lr": 0.001}}],
        "merge": [],
        "ensemble": [],
        "seeds": [0],
        "resources": {
            "extract": {"cpus": 1, "gpus": 0, "batch_size": None},
            "fit": {"cpus": 1},
            "train": {
                "workers": 1,
                "cpus": 1,
                "gpus": 0,
                "compile": False,
                "checkpoint_minutes": 5,
            },
        },
        "tracking": {"models": "all"},
    }
    assert spec.methods == (("simplecil", {}), ("ranpac", {"projection_dim": 2000, "lr": 0.001}))
    domains = good(text=DOMAINS).scenario
    assert domains is not None
    assert domains.orders == ("natural",)


def test_values_cannot_be_changed(folder: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        good().pipeline = "other"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("scenario.orders=natural", "scenario", "orders", ("natural",)),
        (
            "scenario.orders=[1, natural, [2, 0, 1]]",
            "scenario",
            "orders",
            (1, "natural", [2, 0, 1]),
        ),
        ("scenario.orders={count: 3, first: 5}", "scenario", "orders", (5, 6, 7)),
        ("scenario.initial=50", "scenario", "initial", 50),
        ("dataset.train=-a b/ü.parquet", "dataset", "train", ("-a b/ü.parquet",)),
        ("dataset.classes=[cat, 'no']", "dataset", "classes", ("cat", "no")),
        ("dataset.max_pixels='1000'", "dataset", "max_pixels", 1000),
        ("resources.extract.gpus='2.5e-1'", "resources", "extract.gpus", 0.25),
        ("backbone.weights=random", "backbone", "weights", "random"),
        ("backbone.weights=builtin", "backbone", "weights", "builtin"),
        ("features.pooling=avg", "features", "pooling", "avg"),
    ],
)
def test_set_changes_a_value(
    folder: Path, override: str, section: str, field: str, value: object
) -> None:
    found = getattr(good(override), section)
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value


def test_limits_and_preprocessing_shorthands(folder: Path) -> None:
    spec = good(
        "dataset.limit_per_class.train=50", "backbone.preprocessing={mean: [0,0,0], std: [1,1,1]}"
    )
    assert spec.dataset is not None
    assert spec.dataset.limit_per_class.model_dump() == {"train": 50, "test": None}
    assert not isinstance(spec.backbone.preprocessing, str)
    assert spec.backbone.preprocessing.std == (1, 1, 1)
    dataset = load_resolved("quickstart", ["dataset.limit_per_class=5"]).spec.dataset
    assert dataset is not None
    both = dataset.limit_per_class
    assert (both.train, both.test) == (5, 5)


def test_set_reaches_into_methods(folder: Path) -> None:
    spec = good("methods.0.simplecil.x=1e-3", "methods.1={fecam: {beta: 0.5}}", "seeds=[1, 2]")
    assert spec.methods == (("simplecil", {"x": 0.001}), ("fecam", {"beta": 0.5}))
    assert spec.seeds == (1, 2)


# Each: option, the key path and message it leads to.
BAD_VALUES = [
    ("pipeline=a/b", 'pipeline: must not hold "/", got "a/b"'),
    ("pipeline=", "pipeline: must be text, got null"),
    ("pipeline=7", "pipeline: must be text, got 7; put it in quotes"),
    (
        "pipeline=" + "x" * 101,
        "pipeline: must be text of 1..100 characters without /, got 101 char",
    ),
    ('pipeline="a\\nb"', "pipeline: invalid character (newline, NUL or another control character)"),
    ("dataset=mnist", 'dataset: no built-in data set "mnist" (known: digits); files are given as'),
    (
        "dataset.train=foo://x",
        'dataset.train: protocol "foo" not supported (file, s3, gs, abfs, hf',
    ),
    ("dataset.train=a::b", 'dataset.train: URL chaining not allowed ("a::b")'),
    ("dataset.train=~/x", 'dataset.train: "~" is not expanded ("~/x"); write the full path'),
    ("dataset.train=[]", "dataset.train: must be a list of paths or URLs, got an empty list"),
    ("dataset.train=3", "dataset.train: must be a list of paths or URLs, got 3"),
    ("dataset.test=[a, 's3://b/../c']", 'dataset.test.1: ".." not allowed in URLs'),
    ("dataset.tets=x", 'dataset.tets: unknown key; did you mean "test"?'),
    ("dataset.classes=[cat, cat]", "dataset.classes.1: same as item 0; keep one"),
    (
        "dataset.limit_per_class=-1",
        "dataset.limit_per_class: must be an integer in 1..1000000000, g",
    ),
    (
        "dataset.limit_per_class=true",
        "dataset.limit_per_class: must be an integer in 1..1000000000",
    ),
    ("dataset.limit_per_class.train=0", "dataset.limit_per_class.train: must be an integer in 1.."),
    (
        "dataset.on_bad_image=ignore",
        'dataset.on_bad_image: must be one of error, skip, got "ignore"',
    ),
    ("dataset.max_pixels=0", "dataset.max_pixels: must be an integer in 1..1000000000, got 0"),
    (
        "scenario.kind=task",
        "scenario.kind: must be one of class_incremental, domain_incremental, go",
    ),
    ("scenario.increment=0", "scenario.increment: must be an integer in 1..1000000000, got 0"),
    ("scenario.increment=1.5", "scenario.increment: must be an integer in 1..1000000000, got 1.5"),
    (
        "scenario.increment=010",
        'scenario.increment: must be an integer in 1..1000000000, got "010"',
    ),
    ("scenario.increment=1e-3x", "scenario.increment: must be an integer in 1..1000000000, got "),
    ("scenario.increment=null", "scenario.increment: missing; class_incremental needs the number"),
    ("scenario.orders=[]", "scenario.orders: must be a list of seeds"),
    ("scenario.orders=[1, 1]", "scenario.orders.1: same as item 0; keep one"),
    ("scenario.orders=[-1]", "scenario.orders.0: must be an integer in 0..4294967295, got -1"),
    (
        "scenario.orders=[[a, 1]]",
        "scenario.orders.0: an explicit order must hold class ids, or names in quotes",
    ),
    ("scenario.orders=[[1, 1]]", "scenario.orders.0: an explicit order must not repeat 1"),
    ("scenario.orders={count: 0}", "scenario.orders.count: must be an integer in 1..10000, got 0"),
    ("scenario.orders={first: 0}", "scenario.orders.count: missing; say how many orders"),
    ("scenario.orders={cuont: 1}", "scenario.orders.cuont: unknown key; an order sweep has"),
    ("backbone.precision=fp8", 'backbone.precision: must be one of fp32, bf16, fp16, got "fp8"'),
    (
        "backbone.preprocessing=lambda_224",
        "backbone.preprocessing: must be one of lamda_224, ranpa",
    ),
    ("backbone.preprocessing={std: [1,1,1]}", "backbone.preprocessing.mean: missing; it is requir"),
    (
        "backbone.preprocessing={mean: [0,0], std: [1,1,1]}",
        "backbone.preprocessing.mean: must be a ",
    ),
    ("features.dtype=float64", "features.dtype: must be one of float16, float32, got"),
    (
        "methods=[]",
        "methods: must be a list of names or {name: {hyper-parameter: value}}, got an em",
    ),
    ("methods=[a, a]", "methods.1: same as methods.0; keep one"),
    ("methods=[{a: {x: 1}}, {a: {x: 1}}]", "methods.1: same as methods.0; keep one"),
    ("methods=[{a: 1}]", "methods.0.a: hyper-parameters must be a mapping like {lr: 0.1}, got 1"),
    ("methods=[{a: {}, b: {}}]", "methods.0: must hold one method, got 2; start each with its own"),
    ("methods=[7]", "methods.0: must be a method's name or {name: {...}}, got 7"),
    ("methods.0.simplecil.lr=.nan", "methods.0.simplecil.lr: must be a finite number, got NaN"),
    ("methods.0.simplecil.lr=-.inf", "methods.0.simplecil.lr: must be a finite number, got -Infin"),
    ("methods.0.simplecil.lr=1e999", "methods.0.simplecil.lr: must be a finite number, got Infini"),
    ("methods.0.simplecil.n=9223372036854775808", "methods.0.simplecil.n: number too large; must"),
    ("seeds=3", "seeds: must be a list of integers in 0..4294967295, got 3"),
    ("seeds=[4294967296]", "seeds.0: must be an integer in 0..4294967295, got 4294967296"),
    ("seeds=[1, 1]", "seeds.1: same as item 0; keep one"),
    ("seeds=[yes]", 'seeds.0: must be an integer in 0..4294967295, got "yes"'),
    ("resources.train.workers=0", "resources.train.workers: must be an integer in 1..10000, got 0"),
    ("resources.train.gpus=1.5", "resources.train.gpus: must be a whole number above 1, got 1.5"),
    ("resources.fit.cpus=-1", "resources.fit.cpus: must be a number in 0.01..4096, got -1"),
    ("resources.extract=4", "resources.extract: must be a mapping, got 4"),
    ("methods.7=a", "methods.7: no item 7; the list has 2, counted from 0"),
    ("methods.ranpac.lr=1", 'methods.ranpac.lr: items are numbered; write 1 for "ranpac"'),
    ("pipeline.x=1", 'pipeline.x: pipeline is "p", which has no keys'),
    ("seeds=[1", "seeds: not valid YAML: expected ',' or ']'"),
    ("seeds=[&a 1]", "seeds: anchor (&) not allowed; repeat the value"),
    ("pipelin", 'pipelin: expected "dotted.key=value"'),
    ("a..b=1", 'a..b: expected "dotted.key=value"'),
]


@pytest.mark.parametrize(("override", "message"), BAD_VALUES)
def test_a_bad_value_has_one_line_with_path_and_remedy(
    folder: Path, override: str, message: str
) -> None:
    (line,) = problems(GOOD, override)
    shown = override if len(override) <= 74 else override[:71] + "..."
    where, _, rest = line.partition(f": {message.partition(':')[0]}: ")
    assert where == f"--set {shown}".replace("\n", "\\n")
    assert rest.startswith(message.partition(": ")[2])


def test_all_problems_come_at_once_in_the_order_of_the_file(folder: Path) -> None:
    text = """\
pipelne: p
dataset: {train: a, test: b, limt_per_class: 3}
scenario:
  kind: class_incremental
  epohcs: 3
backbone:
  model: vit
  precision: fp64
methods:
  - ranpac
  - {}
seeds: [-1, 5,
        1.5]
"""
    assert problems(text, "features.shard_size=0") == [
        "conf.yaml:1: pipeline: missing; it is required",
        'conf.yaml:1: pipelne: unknown key; did you mean "pipeline"?',
        'conf.yaml:2: dataset.limt_per_class: unknown key; did you mean "limit_per_class"?',
        "conf.yaml:3: scenario.increment: missing; class_incremental needs the number of classes "
        "per task",
        "conf.yaml:5: scenario.epohcs: unknown key; known: manifest, kind, sizes, tasks, "
        "blurry, increment, initial, few_shot, long_tailed, online, orders",
        'conf.yaml:8: backbone.precision: must be one of fp32, bf16, fp16, got "fp64"; '
        'did you mean "fp16"?',
        "conf.yaml:11: methods.1: must hold one method, got 0; start each with its own dash",
        "conf.yaml:12: seeds.0: must be an integer in 0..4294967295, got -1",
        "conf.yaml:13: seeds.2: must be an integer in 0..4294967295, got 1.5",
        "--set features.shard_size=0: features.shard_size: must be an integer in 1..1000000000, "
        "got 0",
    ]


def test_yaml_problems_name_file_line_and_column(folder: Path) -> None:
    assert problems("a:\n\tb: 1\n") == ["conf.yaml:2:1: tab used for indentation; use spaces"]
    assert problems(GOOD + "pipeline: q\n") == [
        'conf.yaml:13: pipeline: duplicate key "pipeline" (first at line 1); keep one'
    ]
    assert problems(GOOD.replace("vit", "!!python/object/apply:os.system [ls]")) == [
        'conf.yaml:9: backbone.model: tag not allowed ("!!python/object/apply:os.system"); '
        "write a plain value"
    ]
    assert problems(GOOD.replace("vit", "*x")) == [
        "conf.yaml:9: backbone.model: alias (*) not allowed; repeat the value"
    ]
    assert problems("- a\n") == [
        "conf.yaml:1: must be a mapping of keys to values, got a list of 1"
    ]


def test_sources_that_cannot_be_read(folder: Path) -> None:
    (folder / "empty.yaml").write_text("# nothing\n")
    (folder / "latin.yaml").write_bytes(b"pipeline: caf\xe9\n")
    (folder / "big.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    names = ", ".join(presets())
    for source, message in {
        "none.yaml": f"none.yaml: not found; give a file, a URL, or a preset: {names}",
        "quickstrat": 'quickstrat: not found; did you mean the preset "quickstart"?',
        str(folder): f"{folder}: is a directory; name a file in it",
        "empty.yaml": "empty.yaml: empty config; see the presets for examples",
        "latin.yaml": "latin.yaml: not UTF-8 at byte 13; save it as UTF-8",
        "big.yaml": "big.yaml: larger than 1 MiB; is this the spec?",
        "foo://x": 'spec "foo://x": protocol "foo" not supported (file, s3, gs, abfs, hf)',
        "~/x": 'spec "~/x": "~" is not expanded ("~/x"); write the full path',
        "memory://none": f"memory://none: not found; give a file, a URL, or a preset: {names}",
        "a\nb": 'spec "a\\nb": invalid character in path (newline, NUL or another control '
        "character)",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_resolved(source)
        assert str(caught.value) == message


def test_a_spec_may_lie_behind_a_url_and_begin_with_a_byte_order_mark(folder: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/specs/p.yaml", b"\xef\xbb\xbf" + GOOD.encode())
    assert load_resolved("memory://specs/p.yaml").spec == good()
    assert load_resolved((folder / "conf.yaml").as_uri()).spec == good()


def test_a_file_comes_before_a_preset_of_its_name(folder: Path) -> None:
    (folder / "quickstart").mkdir()
    assert load_resolved("quickstart").spec.pipeline == "quickstart"
    (folder / "quickstart").rmdir()
    (folder / "quickstart").write_text(GOOD)
    assert load_resolved("quickstart").spec.pipeline == "p"


@pytest.mark.parametrize(
    "secret",
    ["AKIAIOSFODNN7EXAMPLE", "hf_abcdefghijklmnopqrstuvwxyz", "s3://user:pa55word@bucket/k"],
)
def test_credentials_are_refused_and_never_echoed(folder: Path, secret: str) -> None:
    places = (
        "pipeline",
        "dataset.train",
        "backbone.weights",
        "methods.0.simplecil.x",
        "unknown",
    )
    for place in places:
        lines = problems(GOOD, f"{place}={secret}")
        assert f"{place}: looks like a credential; use the environment" in lines[0]
        assert secret not in "".join(lines) and "pa55word" not in "".join(lines)
    lines = problems(GOOD.replace("model: vit", f'model: "{secret}"'))
    assert lines == ["conf.yaml:9: backbone.model: looks like a credential; use the environment"]
    assert secret not in "".join(problems(f'"{secret}": 1\n"{secret}": 2\n'))


def test_domain_incremental_rules(folder: Path) -> None:
    spec = good('scenario.orders=[3, natural, ["a", "b"]]', text=DOMAINS)
    assert spec.scenario is not None
    assert spec.scenario.orders == (3, "natural", ["a", "b"])
    assert problems(GOOD, "scenario.kind=domain_incremental") == [
        "conf.yaml:7: scenario.increment: only for class_incremental; every task is one domain, "
        "remove it"
    ]
    assert problems(DOMAINS, "dataset.domain=null") == [
        "conf.yaml:7: scenario.kind: domain_incremental needs the column with the domains; "
        "give dataset.domain"
    ]
    assert problems(DOMAINS, "scenario.initial=3") == [
        "--set scenario.initial=3: scenario.initial: only for class_incremental; every task is "
        "one domain, remove it"
    ]
    assert problems(DOMAINS, "scenario.orders=[[1, 2]]") == [
        "--set scenario.orders=[[1, 2]]: scenario.orders.0: an explicit order of "
        "domain_incremental must hold domain names"
    ]


def test_a_flood_of_problems_is_cut(folder: Path) -> None:
    lines = problems(GOOD + "".join(f"k{i}: 1\n" for i in range(200)))
    assert len(lines) == MAX_LINES + 1 and lines[-1] == "... and 150 more problems"


def test_problems_found_later_have_lines_too(folder: Path) -> None:
    good()
    loaded = load_resolved("conf.yaml", ["seeds=[1]"])
    error = loaded.error(
        [
            ("seeds", "too many"),
            ("methods.1.projection_dim", "too wide"),
            ("methods.0", "unknown"),
        ]
    )
    assert str(error).split("\n") == [
        "conf.yaml:11: methods.0: unknown",
        "conf.yaml:12: methods.1.ranpac.projection_dim: too wide",
        "--set seeds=[1]: seeds: too many",
    ]


EVERY_PLACE = """\
pipeline: p
dataset: {train: /d/train, test: [/d/a.parquet, "s3://b/*.parquet"], classes: /d/names.json}
scenario: {kind: class_incremental, increment: 10}
backbone: {model: clip, weights: /w/clip.safetensors}
vit: {model: vit, weights: /w/vit.safetensors}
reference: {images: /r/images, texts: /r/texts.json}
methods: [zscl, promptfusion]
"""
LISTED = """\
pipeline: p
stream: [{name: a, train: /d/train, test: [/d/a.parquet], classes: /d/names.json}]
backbone: {model: clip, weights: /w/clip.safetensors}
methods: [simplecil]
"""


def place_keys(model: type[BaseModel] = PipelineSpec, start: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path of every key whose type has a place in it, and `one` or `list`."""
    hints = get_type_hints(model, include_extras=True)
    for name in model.model_fields:
        yield from _places_in(hints[name], start + name, "one")


def _places_in(annotation: Any, path: str, many: str) -> Iterator[tuple[str, str]]:
    if PLACE in getattr(annotation, "__metadata__", ()):
        yield path, many
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from place_keys(annotation, f"{path}.")
    else:
        many = "list" if get_origin(annotation) is tuple else many
        for part in get_args(annotation):
            yield from _places_in(part, path, many)


def test_what_the_reference_calls_a_path_has_the_type_of_a_place() -> None:
    places = [path for path, _ in place_keys()]
    assert len(places) >= 7
    assert sorted(places) == sorted(k.path for k in keys() if re.search("path|URL", k.accepts))
    words = re.compile(r"\b(path|file|folder|glob|URL)s?\b")
    texts = [k for k in keys() if "text" in k.accepts and not k.description.startswith("column")]
    assert {k.path for k in texts if words.search(k.description)} <= set(places)


URLS = (
    "s3://b/x",
    "gs://b/x",
    "hf://datasets/a/b/*.parquet",
    "abfs://box@name.dfs.core.windows.net/x",
    "memory://x",
)


@pytest.mark.parametrize(("key", "many"), list(place_keys()))
def test_every_place_becomes_absolute(folder: Path, key: str, many: str) -> None:
    text = EVERY_PLACE
    if key.startswith("stream."):
        text, key = LISTED, key.replace("stream.", "stream.0.")
    if key == "scenario.manifest":
        text = text.replace("{kind: class_incremental, increment: 10}", "{manifest: /d/x.csv}")
    (folder / "conf.yaml").write_text(text)
    absolute = {
        "weights/a b.x": str(folder / "weights/a b.x"),
        "../up/*.parquet": str(folder.parent / "up/*.parquet"),
        "file:///d/x": "/d/x",
        **{place: place for place in ("/d/x", *URLS)},
    }
    cases = [[place] for place in absolute] + ([list(absolute)] if many == "list" else [])
    for places in cases:
        given = json.dumps(places if many == "list" else places[0])
        loaded = load_resolved("conf.yaml", [f"{key}={given}"])
        found, expected = yaml.safe_load(with_absolute_places(loaded)), yaml.safe_load(loaded.text)
        *parents, last = key.split(".")
        path = [int(name) if name.isdigit() else name for name in parents]
        inner = reduce(getitem, path, expected)
        # All other places are absolute, so that nothing else may change.
        after = [absolute[place] for place in places]
        inner[last] = after if many == "list" else after[0]
        assert found == expected


@pytest.mark.parametrize(
    "override",
    [
        "dataset=digits",
        "dataset.classes=[here, there]",
        "dataset.classes=null",
        "backbone.weights=builtin",
        "backbone.weights=random",
        "backbone.weights=null",
        "vit.weights=builtin",
        "vit=null",
        "reference.texts=[here, there]",
        "reference=null",
    ],
)
def test_what_is_no_place_stays(folder: Path, override: str) -> None:
    (folder / "conf.yaml").write_text(EVERY_PLACE)
    loaded = load_resolved("conf.yaml", [override])
    assert with_absolute_places(loaded) == loaded.text


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_their_resolved_text_too(folder: Path, name: str) -> None:
    loaded = load_resolved(name)
    assert loaded.spec.pipeline == name
    (folder / "resolved.yaml").write_text(loaded.text, encoding="utf-8")
    again = load_resolved("resolved.yaml")
    assert again.spec == loaded.spec and again.text == loaded.text


def test_what_the_cifar100_preset_says_of_other_protocols_can_be_run() -> None:
    text = presets()["cifar100"].read_text(encoding="utf-8")
    for said, override in (
        ("ranpac_cifar_224", "backbone.preprocessing=ranpac_cifar_224"),
        (
            "{resize: 224, crop: 224, interpolation: bilinear}",
            "backbone.preprocessing={resize: 224, crop: 224, interpolation: bilinear, "
            "mean: [0, 0, 0], std: [1, 1, 1]}",
        ),
        ("orders: natural", "scenario.orders=natural"),
        ("first_session: adapter", "methods=[{ranpac: {first_session: adapter}}]"),
    ):
        assert said in text
        assert load_resolved("cifar100", [override]).text != load_resolved("cifar100").text
    assert "what the published numbers" not in text and "as in the paper" not in text


def test_the_presets_the_project_ships() -> None:
    assert list(presets()) == [
        "cifar100",
        "cifar100-small",
        "cifar100-small-clip",
        "cifar100-small-trained",
        "pacs-domains",
        "pacs-domains-trained",
        "quickstart",
    ]


def test_preprocessing_names_are_those_that_exist() -> None:
    assert set(PREPROCESSING) == {*PRESETS, "timm_default"}


def test_the_reference_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8")
    assert table() in page, (
        "run `python -m graftwork.pipelines.spec.reference`, put the table in docs/spec.md"
    )
    for name in presets():
        assert f"`{name}`" in page
    # Every section and key has a description.
    assert all(key.description and key.accepts for key in keys())


def test_the_examples_of_the_reference_page_load(folder: Path) -> None:
    page = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8")
    examples = [part.split("```")[0] for part in page.split("```yaml\n")[1:]]
    assert len(examples) >= 2
    for example in examples:
        good(text=example)


def test_loading_a_spec_imports_nothing_heavy() -> None:
    code = (
        "import sys; from graftwork.pipelines.spec.loading import load_resolved;"
        "load_resolved('quickstart');"
        "print([m for m in ('torch', 'ray', 'mlflow', 'timm', 'pyarrow', 'fsspec', 'numpy')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
