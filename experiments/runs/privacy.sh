#!/usr/bin/env bash
# Trains the language model that the privacy recipe needs, if it is not in the user cache yet, then measures.
# On one busy core: the model 15 minutes, the rest half an hour.
set -euo pipefail
cd "$(dirname "$0")/../.."
# glibc hands large blocks back to the system after each step and faults them in again in the next: a third of the time.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456

python -m experiments.language.train --shape tiny --tokens 2000000
python -m experiments privacy
