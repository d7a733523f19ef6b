"""Run the tests as other machines would: other kernels, other numbers of threads, other Pythons.

    python tests/round.py [--whole] [--python INTERPRETER]... [--only TEXT] [--markdown FILE]

Each row is a fresh `pytest -n 2` with other variables, which torch and its libraries read when they
start. They can only take instructions away: a processor without AVX-512 shows less. Interpreters
need an environment of their own with the extra `test`. Exit status 1 if any row has a failure or
no test.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src" if (ROOT / "src").is_dir() else ROOT
"""What processes import that the tests start, whatever is installed."""
KERNELS = (
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
)
"""Of torch's own operators, of oneDNN (convolutions) and of MKL (matrix products)."""
VERSIONS = """
import json, platform, torch
print(json.dumps({
    "python": platform.python_version(),
    "torch": torch.__version__,
    "kernels": torch.backends.cpu.get_cpu_capability(),
}))
"""


@dataclass(frozen=True)
class Row:
    """One run of the tests.

    Args:
        name: what is different.
        variables: of the environment, beside those of this process.
        python: interpreter.
    """

    name: str
    variables: Mapping[str, str]
    python: str


@dataclass(frozen=True)
class Outcome:
    """What became of a row.

    Args:
        row: the row.
        versions: of `python`, `torch` and its `kernels`.
        passed: tests.
        failed: names of tests that failed, or broke before or after they ran.
        skipped: tests.
        seconds: of the whole process.
        said: last lines of the process, if it ran no test.
    """

    row: Row
    versions: Mapping[str, str]
    passed: int
    failed: Sequence[str]
    skipped: int
    seconds: float
    said: str = ""

    @property
    def good(self) -> bool:
        return self.passed > 0 and not self.failed and not self.said


def rows(pythons: Sequence[str]) -> list[Row]:
    """All rows: the machine as it is, its kernels, two threads, and the other interpreters."""
    one, here = {"OMP_NUM_THREADS": "1"}, sys.executable
    kernels = [(" ".join(f"{k}={v}" for k, v in kernel.items()), kernel) for kernel in KERNELS]
    others = [(f"other Python: {Path(python).parent.parent.name}", python) for python in pythons]
    return [
        Row("as it is", one, here),
        *(Row(name, one | variables, here) for name, variables in kernels),
        Row("OMP_NUM_THREADS=2", {"OMP_NUM_THREADS": "2"}, here),
        *(Row(name, one, python) for name, python in others),
    ]


def read_junit(text: str) -> tuple[int, list[str], int]:
    """Tests that passed, names of those that failed, and tests that were skipped."""
    passed, failed, skipped = 0, list[str](), 0
    for case in ElementTree.fromstring(text).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in outcomes:
            skipped += 1
        else:
            passed += 1
    return passed, failed, skipped


def run(row: Row, words: Sequence[str], versions: str = VERSIONS) -> Outcome:
    """Runs the tests of a row.

    Args:
        words: of pytest.
        versions: program that prints the versions as JSON.
    """
    environment = {**os.environ, **row.variables, "PYTHONPATH": str(SOURCES)}
    # What torch says of its kernels has to come from a process with the row's variables.
    found = subprocess.run(
        [row.python, "-c", versions], env=environment, stdout=subprocess.PIPE, check=True
    )
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        started = time.perf_counter()
        done = subprocess.run(
            [row.python, "-m", "pytest", "-q", f"--junitxml={report}", *words],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        seconds = time.perf_counter() - started
        passed, failed, skipped = read_junit(report.read_text()) if report.exists() else (0, [], 0)
    # Exit statuses: 0 all passed, 1 some failed; anything else is no run.
    said = "" if done.returncode in (0, 1) else "\n".join(done.stdout.splitlines()[-15:])
    return Outcome(row, json.loads(found.stdout), passed, failed, skipped, seconds, said)


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(outcomes: Sequence[Outcome]) -> str:
    """The round as Markdown."""
    head = ["row", "Python", "torch", "kernels", "passed", "failed", "skipped", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for found in outcomes:
        versions = [found.versions[name] for name in ("python", "torch", "kernels")]
        counts = [found.passed, len(found.failed), found.skipped, f"{found.seconds:.0f}"]
        name = f"`{found.row.name}`" if "=" in found.row.name else found.row.name
        lines.append("| " + " | ".join(map(str, [name, *versions, *counts])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", metavar="FILES", help="for pytest; default: all tests")
    parser.add_argument("--whole", action="store_true", help="the tests that start Ray, too")
    parser.add_argument("--python", action="append", default=[], metavar="INTERPRETER")
    parser.add_argument("--only", metavar="TEXT", default="", help="rows whose names contain it")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the table there")
    given = parser.parse_args()
    words = ["-n", "2", *([] if given.whole else ["-m", "not ray"]), *given.files]
    outcomes = list[Outcome]()
    for row in rows(given.python):
        if given.only in row.name:
            print(f"{row.name} ...", flush=True)
            found = run(row, words)
            outcomes.append(found)
            for name in found.failed:
                print(f"  FAILED {name}")
            print(f"  {found.passed} passed, {found.seconds:.0f} s", found.said, flush=True)
    what = "all tests" if given.whole else "the tests that start no Ray"
    text = f"{processor()}, {os.cpu_count()} cores, {what}:\n\n{table(outcomes)}\n"
    print(f"\n{text}")
    if given.markdown:
        given.markdown.write_text(text)
    sys.exit(0 if outcomes and all(found.good for found in outcomes) else 1)


if __name__ == "__main__":
    main()
