"""Many class orders for the price of one pass over the images.

    python benchmarks/sweep.py STORE SPEC [--set KEY=VALUE]...

Runs `graftwork` as a user would, each time as a new process: extraction with SimpleCIL alone, fifty
class orders of four methods on the stored features, RanPAC at 2,000 dimensions for five orders,
and the finished sweep once more.
"""

import json
import subprocess
import sys
import time
from typing import Any


def graftwork(*words: str) -> tuple[dict[str, Any], float]:
    """The document of a run, and the seconds of the whole process."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "graftwork.pipelines", "run", *words, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout), time.perf_counter() - started


def main() -> None:
    store, spec, *rest = sys.argv[1:]
    common = (spec, "--store", store, *rest)
    four = "methods=[simplecil, slda, fecam, acil]"
    fifty = "scenario.orders={count: 50, first: 0}"
    steps = [
        ("extraction, simplecil, one order", ("--set", "methods=[simplecil]")),
        ("50 orders of simplecil, slda, fecam, acil", ("--set", four, "--set", fifty)),
        (
            "5 orders of ranpac at 2,000 dimensions",
            (
                "--set",
                "methods=[{ranpac: {projection_dim: 2000}}]",
                "--set",
                "scenario.orders={count: 5, first: 0}",
            ),
        ),
        ("the first run again", ("--set", "methods=[simplecil]")),
        ("the 50 orders again", ("--set", four, "--set", fifty)),
    ]
    print("| step | results | images forwarded | stages computed | seconds, whole process |")
    print("|---|---|---|---|---|")
    for name, words in steps:
        document, seconds = graftwork(*common, *words)
        print(
            f"| {name} | {len(document['results'])} | {document['images_forwarded']} "
            f"| {document['stages']['computed']} | {seconds:.1f} |",
            flush=True,
        )


main()
