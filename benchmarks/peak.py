"""Run `resmem build` with the arguments given, and print its time and its peak memory above the start.

In a process of its own, since a peak cannot be reset.
"""

import json
import sys
import time
from pathlib import Path

from residual_memory.cli.main import main as resmem


def main() -> None:
    """Arguments: those of `resmem build`."""
    before, started = process_bytes("VmRSS:"), time.perf_counter()
    sys.argv = ["resmem", "build", *sys.argv[1:]]
    try:
        resmem()
    except SystemExit as left:
        if left.code:
            raise
    print(json.dumps({"peak_bytes": process_bytes("VmHWM:") - before, "seconds": time.perf_counter() - started}))


def process_bytes(name: str) -> int:
    """A size of this process as Linux counts it: ru_maxrss would begin at the parent's peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
