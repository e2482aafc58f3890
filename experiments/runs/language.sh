#!/usr/bin/env bash
# Trains the networks that the language recipe needs and that are not in the user cache yet, then measures.
# On 2 cores: the base half an hour, the larger one 25 minutes, eight epochs of a million tokens 25.
set -euo pipefail
cd "$(dirname "$0")/../.."
# glibc hands large blocks back to the system after each step and faults them in again in the next: a third of the time.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456

python -m experiments.language.train --shape tiny --tokens 10000000
python -m experiments.language.train --shape twice --tokens 5000000
python -m experiments.language.train --shape tiny --tokens 1000000 --epochs 8
python -m experiments language
