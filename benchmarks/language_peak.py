"""Build a memory of the first N tokens of Wikipedia and print the peak of RAM above the model's, in its own process."""

import json
import sys
import time

import torch

import residual_memory as rm
from benchmarks.language import network
from benchmarks.peak import process_bytes
from experiments.language.corpus import tokens_of
from experiments.language.table import FULL, windows


def main() -> None:
    """Arguments: the memory to make, and the number of tokens."""
    path, n = sys.argv[1], int(sys.argv[2])
    base = FULL.base
    model, text = network(), tokens_of(base.corpus, base.split, base.vocabulary, limit=base.tokens).first(n + 1)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros((1, 256), dtype=torch.int64), use_cache=False)
    before, started = process_bytes("VmRSS:"), time.perf_counter()
    rm.build_memory(model, windows(text), path, autocast=torch.bfloat16, verbose=False).close()
    print(json.dumps({"peak_bytes": process_bytes("VmHWM:") - before, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
