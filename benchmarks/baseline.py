"""What an older commit computes: its code, and a folder with a store that it filled."""

import json
import os
import string
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SPECS = ROOT / "benchmarks" / "specs"
CLUSTER_LOST = 5
"""Exit status of `graftwork`: a local Ray did not start in time, and the next try may."""
TRIES = 6


@dataclass(frozen=True)
class Code:
    """A checkout whose code is run, of either layout.

    Args:
        folder: its root.
    """

    folder: Path

    @property
    def python_path(self) -> Path:
        inside = self.folder / "src"
        return inside if (inside / "graftwork").is_dir() else self.folder

    def module(self, name: str) -> str:
        """The full name of a module that is called `name` below the packages."""
        return name if self.python_path == self.folder else f"graftwork.{name}"

    def file(self, name: str) -> Path:
        """The only file of that name.

        Raises:
            FileNotFoundError: there is none, or more than one.
        """
        packages = ("methods", "operators", "pipelines", "cluster")
        found = [p for folder in packages for p in (self.folder / folder).rglob(name)]
        if len(found) != 1:
            raise FileNotFoundError(f"{len(found)} files {name} in {self.folder}, wanted one")
        return found[0]

    def python(self, words: Sequence[str], log: Path) -> str:
        """What a Python process with this code prints; its stderr goes to a file.

        Raises:
            RuntimeError: it failed, with the last lines that it wrote.
        """
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(self.python_path)}
        command = [sys.executable, *words]
        with log.open("a") as errors:
            run = partial(
                subprocess.run, env=environment, cwd=log.parent, stdout=subprocess.PIPE, text=True
            )
            done = run(command, stderr=errors)
            for _ in range(TRIES - 1):
                if done.returncode != CLUSTER_LOST:
                    break
                done = run(command, stderr=errors)
        if done.returncode:
            last = "\n".join(log.read_text().splitlines()[-15:])
            raise RuntimeError(f"{' '.join(words)}: exit status {done.returncode}\n{last}")
        return done.stdout

    def graftwork(self, words: Sequence[str], log: Path) -> dict[str, Any]:
        """The document that a command prints with `--json`."""
        return json.loads(self.python(["-m", self.module("pipelines"), *words, "--json"], log))

    def check(self, log: Path) -> None:
        """Makes sure that this code is what its processes import, whatever is installed.

        Raises:
            RuntimeError: it is not.
        """
        name = self.module("pipelines")
        where = self.python(["-c", f"import {name} as p; print(p.__file__)"], log).strip()
        if not Path(where).resolve().is_relative_to(self.folder.resolve()):
            raise RuntimeError(f"{name} is imported from {where}, not from {self.folder}")


@dataclass(frozen=True)
class Baseline:
    """What the older commit computed.

    Args:
        folder: holds `store/`, `specs/`, `documents/` of finished runs, `logs/`, and what was made
            of the data.
    """

    folder: Path

    def __post_init__(self) -> None:
        for name in ("specs", "documents", "clip", "logs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def document(self, spec: str) -> Path:
        return self.folder / "documents" / f"{spec}.json"

    def spec(self, spec: str) -> Path:
        return self.folder / "specs" / f"{spec}.yaml"

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"


def archive(revision: str, folder: Path) -> Code:
    """The code of a commit, unpacked into a folder."""
    packed = subprocess.run(
        ["git", "-C", str(ROOT), "archive", revision], stdout=subprocess.PIPE, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)
    return Code(folder)


def few_rows(source: Path, target: Path, each: int, by: Sequence[str] = ("label",)) -> None:
    """Writes the first rows of each class of a Parquet file to another one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    groups = pq.read_table(source, columns=list(by)).to_pylist()
    seen, rows = Counter[str](), list[int]()
    for row, group in enumerate(groups):
        seen[str(group)] += 1
        if seen[str(group)] <= each:
            rows.append(row)
    pq.write_table(pq.read_table(source).take(pa.array(rows)), target)


def few_domains(baseline: Baseline, data: Path) -> Path:
    """A folder with a few images of each class and domain: a spec can limit classes alone."""
    folder = baseline.folder / "domains"
    if not folder.exists():
        unfinished = baseline.folder / "domains.part"
        unfinished.mkdir(exist_ok=True)
        for split, each in (("train", 6), ("test", 3)):
            few_rows(
                data / "pacs_small" / f"{split}.parquet",
                unfinished / f"{split}.parquet",
                each,
                ("label", "domain"),
            )
        unfinished.rename(folder)
    return folder


def small_clip(baseline: Baseline, code: Code, data: Path, vit: Path) -> Path:
    """Weights of a small CLIP: how good they are does not matter, so that seconds will do."""
    weights = baseline.folder / "clip" / "clip_small_96.safetensors"
    if weights.exists():
        return weights
    photographs = data / "cifar100_small"
    script = code.file("train_clip_small.py").relative_to(code.folder).with_suffix("")
    unfinished = weights.with_suffix(".part")
    with tempfile.TemporaryDirectory() as folder:
        files = {split: Path(folder, f"{split}.parquet") for split in ("train", "test")}
        few_rows(photographs / "train.parquet", files["train"], 8)
        few_rows(photographs / "test.parquet", files["test"], 2)
        words = ["-m", code.module(".".join(script.parts)), "--few", "8", "--steps", "60"]
        words += ["--train", str(files["train"]), "--test", str(files["test"])]
        words += ["--classes", str(photographs / "classes.json")]
        code.python([*words, "--start", str(vit), "--out", str(unfinished)], baseline.log("clip"))
    return unfinished.rename(weights)


def needs(text: str) -> set[str]:
    """Places that a spec leaves open."""
    return set(string.Template(text).get_identifiers())


def fill(
    baseline: Baseline, code: Code, specs: Mapping[str, str], places: Mapping[str, Path]
) -> None:
    """Runs specs with the older code, those that ran already excepted.

    Args:
        specs: name -> text.
        places: where data and weights are; what is made of them is added.
    """
    code.check(baseline.log("import"))
    for name, text in specs.items():
        if baseline.document(name).exists():
            continue
        print(f"filling the store: {name} ...", flush=True)
        started = time.perf_counter()
        found = dict(places)
        if "CLIP" in needs(text):
            found["CLIP"] = small_clip(baseline, code, places["DATA"], places["WEIGHTS"])
        if "DOMAINS" in needs(text):
            found["DOMAINS"] = few_domains(baseline, places["DATA"])
        spec = baseline.spec(name)
        spec.write_text(string.Template(text).substitute(found))
        words = ["run", str(spec), "--store", str(baseline.store)]
        document = code.graftwork(words, baseline.log(f"fill-{name}"))
        document["fill_seconds"] = round(time.perf_counter() - started)
        unfinished = baseline.document(name).with_suffix(".part")
        unfinished.write_text(json.dumps(document, indent=1))
        unfinished.rename(baseline.document(name))
        print(f"  {document['stages']['total']} stages in {document['fill_seconds']} s", flush=True)


def available(code: Code, given: set[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Texts of the specs that can be run, and for the others what is missing.

    Args:
        code: whose quickstart is run.
        given: places that are known.
    """
    texts = {"quickstart": code.file("quickstart.yaml").read_text()}
    texts |= {path.stem: path.read_text() for path in sorted(SPECS.glob("*.yaml"))}
    missing = {name: sorted(needs(text) - given) for name, text in texts.items()}
    skipped = {name: f"no {', '.join(places)}" for name, places in missing.items() if places}
    return {name: text for name, text in texts.items() if name not in skipped}, skipped
