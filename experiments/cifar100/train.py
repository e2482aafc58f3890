"""Train a CIFAR residual network: one-cycle SGD with crops and flips, in bfloat16 on the cores.

    python -m experiments.cifar100.train --depth 8 --images 45000 --seed 0 --out NAME.safetensors

Resumes from its own checkpoint after an interruption, epoch by epoch.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from residual_memory.demo.cifar100 import find_cifar100, held_out_split, read_cifar100
from residual_memory.demo.resnet import CifarResNet, channels_last

PEAK_LEARNING_RATE, WEIGHT_DECAY, BATCH = 0.2, 5e-4, 128


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of 32 x 32 from the image padded by 4, and a flip of every second one."""
    n = len(images)
    padded = functional.pad(images, (4, 4, 4, 4))
    windows = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # [n, 3, 9, 9, 32, 32], a view
    tops, lefts = torch.randint(0, 9, (2, n), generator=generator)
    cropped = windows[torch.arange(n), :, tops, lefts]
    flips = torch.rand(n, generator=generator) < 0.5
    return torch.where(flips.view(-1, 1, 1, 1), cropped.flip(3), cropped)


def train(images: Tensor, labels: Tensor, *, depth: int, n_epochs: int, seed: int, checkpoint: Path) -> nn.Module:
    """Train from scratch, or go on from `checkpoint`; images are uint8 [n 3 32 32]."""
    torch.manual_seed(seed)
    network = channels_last(CifarResNet(depth))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    n_batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=n_epochs * n_batches, pct_start=0.2
    )
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]
    for epoch in range(first, n_epochs):
        started, total = time.perf_counter(), 0.0
        generator = torch.Generator().manual_seed(seed * 10_000 + epoch)
        order = torch.randperm(len(images), generator=generator)[: n_batches * BATCH]
        network.train()
        for rows in order.view(-1, BATCH):
            batch = augment(images[rows], generator).float().div_(255)
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(batch.contiguous(memory_format=torch.channels_last))
            loss = functional.cross_entropy(logits.float(), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item()
        state = {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "epoch": epoch + 1,
        }
        torch.save(state, checkpoint.with_suffix(".part"))
        os.replace(checkpoint.with_suffix(".part"), checkpoint)
        seconds = time.perf_counter() - started
        print(f"epoch {epoch + 1:3}/{n_epochs}  loss {total / n_batches:.4f}  {seconds:.0f} s", flush=True)
    return network.eval()


def main() -> None:
    """Read the options, train, and save the weights with their recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--images", type=int, choices=(45_000, 50_000), default=50_000)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    folder = find_cifar100()
    if folder is None:
        parser.error("CIFAR-100 was not found; run `make data`, or set RESMEM_DATA")
    data = read_cifar100(folder, "train")
    rows = held_out_split()[0] if options.images == 45_000 else np.arange(50_000)
    network = train(
        torch.from_numpy(data.images[rows]),
        torch.from_numpy(data.labels[rows]),
        depth=options.depth,
        n_epochs=options.epochs,
        seed=options.seed,
        checkpoint=options.out.with_suffix(".checkpoint"),
    )
    recipe = {"depth": options.depth, "images": options.images, "epochs": options.epochs, "seed": options.seed}
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, options.out, metadata={"recipe": json.dumps(recipe)})


if __name__ == "__main__":
    main()
