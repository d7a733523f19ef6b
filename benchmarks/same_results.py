"""Prove that a change altered no result: what an older commit stored is what this one asks for.

    python -m benchmarks.same_results --before REV --baseline FOLDER --data DATA --weights FILE

The code of REV fills a store in FOLDER with a few pipelines of `benchmarks/specs`; a FOLDER that is
filled is used as it is. This checkout then runs the same specs on a copy of that store. It passes
if every stage was found and every result is the same number. Keys that are equal do not say that
the bits are: `--recompute` runs the specs of this checkout on an empty store as well and compares
the digests of all files. That needs the processor and the libraries that filled the store.

DATA holds `cifar100_small/` and, for one spec, `pacs_small/`; FILE is a ViT-Ti of timm. Without
them only the specs that need no files are compared, and the last lines say so.
"""

import argparse
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.baseline import ROOT, Baseline, Code, archive, available, fill

VOLATILE = ("seconds", "cached", "mlflow_run_id")
"""What two runs with the same results differ in."""


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Places where two JSON values differ; what only the second one has does not count."""
    if isinstance(before, dict) and isinstance(after, dict):
        kept = [name for name in before if name not in VOLATILE]
        return [
            found
            for name in kept
            for found in (
                differences(before[name], after[name], f"{path}.{name}")
                if name in after
                else [f"{path}.{name}: gone"]
            )
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = zip(before, after, strict=True)
        return [f for i, (b, a) in enumerate(pairs) for f in differences(b, a, f"{path}.{i}")]
    if isinstance(before, float) and isinstance(after, float):
        if before == after or (math.isnan(before) and math.isnan(after)):
            return []
    elif before == after and type(before) is type(after):
        return []
    return [f"{path}: {str(before)[:60]} -> {str(after)[:60]}"]


def linked_copy(store: Path, target: Path) -> None:
    """A copy of a store on which a run leaves the original as it is.

    Files of stages are never changed in place, so that links will do for them; MLflow's database
    is, and is copied, as is all else.
    """

    def one(source: str, copy: str) -> None:
        parts = Path(source).relative_to(store).parts
        is_stage = len(parts) == 3 and len(parts[1]) == 64
        (os.link if is_stage else shutil.copy2)(source, copy)

    shutil.copytree(store, target, copy_function=one, dirs_exist_ok=True)


def manifests(store: Path) -> dict[str, dict[str, Any]]:
    """Key -> manifest of every stage of a store."""
    return {
        path.parent.name: json.loads(path.read_text())
        for path in store.glob("*/*/manifest.json")
        if len(path.parent.name) == 64
    }


def descends(key: str, stages: Mapping[str, Mapping[str, Any]], operators: Iterable[str]) -> bool:
    """Whether a stage is of one of the operators, or reads one that is, at any distance."""
    asked, waiting, seen = set(operators), [key], set[str]()
    while waiting:
        now = waiting.pop()
        if now in seen or now not in stages:
            continue
        seen.add(now)
        preimage = stages[now]["preimage"]
        if preimage["operator"] in asked:
            return True
        for keys in preimage["inputs"].values():
            waiting += [keys] if isinstance(keys, str) else keys
    return False


@dataclass(frozen=True)
class Compared:
    """How a spec fared.

    Args:
        spec: its name.
        stages: all of them.
        computed: operator -> how many were not found.
        why: a line per stage that was not found and should have been.
        results: how many were compared.
        different: places of results that are not the same.
        seconds: of the whole process.
    """

    spec: str
    stages: int
    computed: Mapping[str, int]
    why: Sequence[str]
    results: int
    different: Sequence[str]
    seconds: float

    @property
    def good(self) -> bool:
        return not self.why and not self.different


def compare(
    baseline: Baseline, code: Code, store: Path, spec: str, expected: set[str], computed_too: bool
) -> Compared:
    """Runs a spec with the newer code on a copy of the store, and compares what it says.

    Args:
        store: the copy.
        expected: operators whose stages, and what reads them, may be computed.
        computed_too: compare results that were computed again as well.
    """
    words = [str(baseline.spec(spec)), "--store", str(store)]
    log = baseline.log(f"compare-{spec}")
    rows = code.graftwork(["plan", *words], log)["stages"]
    missing = [row for row in rows if row["status"] != "hit"]
    computed = Counter(row["operator"] for row in missing)
    # What only reads a changed stage comes last.
    missing.sort(key=lambda row: row["why"].endswith("changed"))
    lines = {row["key"]: f"{row['stage']} ({row['operator']}): {row['why']}" for row in missing}
    if missing and not expected:
        return Compared(spec, len(rows), computed, list(lines.values()), 0, (), 0.0)
    before = json.loads(baseline.document(spec).read_text())
    started = time.perf_counter()
    after = code.graftwork(["run", *words], log)
    seconds = time.perf_counter() - started
    stages = manifests(store)
    why = [line for key, line in lines.items() if not descends(key, stages, expected)]
    if after["stages"]["computed"] != len(missing):
        why.append(f"planned to compute {len(missing)}, computed {after['stages']['computed']}")
    different = [f"{len(before['results'])} results -> {len(after['results'])}"]
    if len(before["results"]) == len(after["results"]):
        pairs = zip(before["results"], after["results"], strict=True)
        # One that was computed is so on purpose here, or the stage is listed above; it has other
        # numbers on purpose, unless the keys alone are new.
        different = [
            f"{old['label']}, order {old['order']}, seed {old['seed']}{found}"
            for old, new in pairs
            if new["cached"] or computed_too
            for found in differences(old, new)
        ]
    return Compared(spec, len(rows), computed, why, len(after["results"]), different, seconds)


def table(rows: Sequence[Compared]) -> str:
    """The outcome as Markdown, with the first reasons below."""
    lines = [
        "| spec | stages | hits | computed | results | different | seconds |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        computed = ", ".join(f"{n} {name}" for name, n in sorted(row.computed.items())) or "0"
        hits = row.stages - sum(row.computed.values())
        cells = [row.spec, row.stages, hits, computed, row.results, len(row.different)]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row.seconds:.0f}"])) + " |")
    for row in rows:
        for title, found in (("not found", row.why), ("different", row.different)):
            lines += [f"{row.spec}: {title}: {line}" for line in found[:12]]
            if len(found) > 12:
                lines.append(f"{row.spec}: {title}: and {len(found) - 12} more")
    return "\n".join(lines)


def bits(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Counter[str], list[str]]:
    """Stages that both stores have, by operator; and a line for each whose files differ."""
    same, different = Counter[str](), list[str]()
    for key in before.keys() & after.keys():
        old, new = (
            {name: entry["sha256"] for name, entry in manifest["files"].items()}
            for manifest in (before[key], after[key])
        )
        operator = before[key]["preimage"]["operator"]
        if old == new:
            same[operator] += 1
        else:
            names = sorted(n for n in old.keys() | new.keys() if old.get(n) != new.get(n))
            different.append(f"{before[key]['label']} ({operator}): {', '.join(names)}")
    return same, sorted(different)


def recompute(baseline: Baseline, code: Code, specs: Iterable[str]) -> bool:
    """Runs specs on an empty store and prints which stages have other bits; True if none has."""
    with tempfile.TemporaryDirectory(dir=baseline.folder, prefix="recomputed-") as folder:
        store = Path(folder, "store")
        for spec in specs:
            words = ["run", str(baseline.spec(spec)), "--store", str(store)]
            code.graftwork(words, baseline.log(f"recompute-{spec}"))
        same, different = bits(manifests(baseline.store), manifests(store))
    print("\nComputed again: " + ", ".join(f"{n} {name}" for name, n in sorted(same.items())))
    print(f"{same.total()} stages have the same bits, {len(different)} have others")
    for line in different[:40]:
        print(f"other bits: {line}")
    return not different


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", metavar="REV", required=True, help="the older commit")
    parser.add_argument(
        "--baseline", metavar="FOLDER", type=Path, help="kept, and reused if filled"
    )
    parser.add_argument("--data", metavar="FOLDER", type=Path)
    parser.add_argument("--weights", metavar="FILE", type=Path)
    parser.add_argument("--only", metavar="SPECS", help="names, with commas between them")
    parser.add_argument("--fill", action="store_true", help="only fill the store")
    parser.add_argument("--recompute", action="store_true", help="compare bits as well")
    parser.add_argument(
        "--expect-computed", metavar="OPERATORS", default="", help="changed on purpose"
    )
    parser.add_argument(
        "--same-numbers", action="store_true", help="of results that are computed again, too"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="graftwork-same-") as folder:
        baseline = Baseline((given.baseline or Path(folder, "baseline")).absolute())
        code = Path(folder, "code")
        code.mkdir()
        sys.exit(0 if run(given, baseline, archive(given.before, code)) else 1)


def run(given: argparse.Namespace, baseline: Baseline, older: Code) -> bool:
    """Fills, compares and prints; True if nothing is different."""
    places = {"DATA": given.data, "WEIGHTS": given.weights}
    places = {name: place.absolute() for name, place in places.items() if place}
    known = set(places)
    if known == {"DATA", "WEIGHTS"}:
        known |= {"CLIP"} | ({"DOMAINS"} if (given.data / "pacs_small").is_dir() else set())
    specs, skipped = available(older, known)
    if given.only:
        specs = {name: specs[name] for name in given.only.split(",")}
    fill(baseline, older, specs, places)
    if given.fill:
        return True
    newer = Code(ROOT)
    newer.check(baseline.log("import"))
    print(f"{given.before} -> {ROOT}, {platform.processor() or platform.machine()}", flush=True)
    expected = {name for name in given.expect_computed.split(",") if name}
    with tempfile.TemporaryDirectory(dir=baseline.folder, prefix="compared-") as folder:
        store = Path(folder, "store")
        linked_copy(baseline.store, store)
        rows = [
            compare(baseline, newer, store, spec, expected, given.same_numbers) for spec in specs
        ]
    print(table(rows))
    good = all(row.good for row in rows)
    if given.recompute:
        good &= recompute(baseline, newer, specs)
    for name, why in skipped.items():
        print(f"NOT COMPARED: {name}: {why}")
    print(f"no {'other ' if expected else ''}result changed" if good else "SOMETHING CHANGED")
    return good


if __name__ == "__main__":
    main()
