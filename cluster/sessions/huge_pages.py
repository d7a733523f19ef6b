"""Memory of worker processes: in huge pages, and kept for the next step.

A training step asks for some hundred megabytes of tensors and gives them back. By default glibc
returns each of them to the system, which then hands out zeroed pages of 4 KiB, one fault each, and
the processor's address cache is too small for so many. On virtual machines that is up to a sixth of
the time of a step of the training loop, and more of a bare one (`benchmarks/RESULTS.md`). The
arithmetic is the same.
"""

import os

VARIABLE = "GLIBC_TUNABLES"
TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",  # asks for huge pages with madvise; without them, nothing changes
        f"glibc.malloc.mmap_threshold={32 * 2**20}",  # the largest there is
        f"glibc.malloc.trim_threshold={2**30}",
        f"glibc.malloc.top_pad={64 * 2**20}",
    )
)


def environment() -> dict[str, str]:
    """Variables for new processes; what the user chose stays. Read once, when a process starts."""
    return {VARIABLE: os.environ.get(VARIABLE, TUNABLES)}
