"""Run `resmem build` with the arguments given, and print its time and its peak memory above the start.

In a process of its own, since a peak cannot be reset.
"""

import json
import resource
import sys
import time

from residual_memory.cli.main import main as resmem


def main() -> None:
    """Arguments: those of `resmem build`."""
    before, started = _peak_bytes(), time.perf_counter()
    sys.argv = ["resmem", "build", *sys.argv[1:]]
    try:
        resmem()
    except SystemExit as left:
        if left.code:
            raise
    print(json.dumps({"peak_bytes": _peak_bytes() - before, "seconds": time.perf_counter() - started}))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
