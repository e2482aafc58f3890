#!/usr/bin/env bash
# The table of ResNet-8 on CIFAR-100: trains the four networks (about 25 minutes of one core each, two at a time),
# then measures. Interrupted, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/../.."
networks="${XDG_CACHE_HOME:-$HOME/.cache}/residual-memory/networks"
mkdir -p "$networks"

train() { # images seed
    local out="$networks/resnet8-$1-seed$2.safetensors"
    [ -f "$out" ] || python -m experiments.cifar100.train --depth 8 --images "$1" --epochs 40 --seed "$2" --threads 1 --out "$out"
}

train 45000 0 & train 50000 0 & wait
train 50000 1 & train 50000 2 & wait
python -m experiments cifar100-resnet8
