"""Train a CIFAR network: one-cycle SGD with crops and flips, in bfloat16 on the cores or on a GPU.

    python -m experiments.cifar100.train --network resnet8 --sample 90% --steps 7800 --seed 0

Resumes from its own checkpoint after an interruption. The weights go to experiments/networks, where the recipes look
for them.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from experiments.checkpoint import Checkpoint
from experiments.cifar100.networks import weights_file
from experiments.cifar100.samples import SAMPLES
from residual_memory.demo.cifar100 import find_cifar100, read_cifar100, user_cache
from residual_memory.demo.networks import NETWORKS, CifarNetwork, channels_last, network_named

PEAK_LEARNING_RATE, WEIGHT_DECAY, BATCH = 0.2, 5e-4, 128
ROUND = 390  # steps between two checkpoints: one epoch of all 50,000 images


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of 32 x 32 from the image padded by 4, and a flip of every second one."""
    n = len(images)
    padded = functional.pad(images, (4, 4, 4, 4))
    windows = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # [n, 3, 9, 9, 32, 32], a view
    tops, lefts = torch.randint(0, 9, (2, n), generator=generator)
    cropped = windows[torch.arange(n), :, tops, lefts]
    flips = torch.rand(n, generator=generator) < 0.5
    return torch.where(flips.view(-1, 1, 1, 1), cropped.flip(3), cropped)


def train(
    network: CifarNetwork, images: Tensor, labels: Tensor, *, n_steps: int, seed: int, checkpoint: Path
) -> CifarNetwork:
    """Train from the weights given, or go on from `checkpoint`; images are uint8 [n 3 32 32].

    The images pass in random order again and again until `n_steps` batches are done, however many images there are.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = channels_last(network.to(device))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=n_steps, pct_start=0.2)
    kept = Checkpoint(checkpoint, network, optimizer, schedule)
    done = kept.resume()
    while done < n_steps:
        started, total = time.perf_counter(), 0.0
        generator = torch.Generator().manual_seed(seed * 10_000 + done // ROUND)
        steps = min(ROUND, n_steps - done)
        passes = -(-steps * BATCH // len(images))
        order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(passes)])
        network.train()
        for rows in order[: steps * BATCH].view(-1, BATCH):
            batch = augment(images[rows], generator).to(device).float().div_(255)
            with torch.autocast(device, torch.bfloat16):
                logits = network(batch.contiguous(memory_format=torch.channels_last))
            loss = functional.cross_entropy(logits.float(), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item()
        done += steps
        kept.save(done)
        seconds = time.perf_counter() - started
        print(f"step {done:6}/{n_steps}  loss {total / steps:.4f}  {seconds:.0f} s", flush=True)
    return network.eval()


def main() -> None:
    """Read the options, train, and save the weights with their recipe."""
    parser = argparse.ArgumentParser(prog="python -m experiments.cifar100.train", description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="resnet8")
    parser.add_argument("--sample", choices=SAMPLES, default="100%")
    parser.add_argument("--steps", type=int, default=7_800, help="batches of 128 images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()

    out = weights_file(options.network, options.sample, options.steps, options.seed)
    if out.exists():
        print(f"{out} is there already")
        return
    torch.set_num_threads(options.threads)
    folder = find_cifar100()
    if folder is None:
        parser.error("CIFAR-100 was not found; run `make data`, or set RESMEM_DATA")
    data = read_cifar100(folder, "train")
    rows = SAMPLES[options.sample](data)
    torch.manual_seed(options.seed)
    checkpoints = user_cache() / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    network = train(
        network_named(options.network),
        torch.from_numpy(data.images[rows]),
        torch.from_numpy(data.labels[rows]),
        n_steps=options.steps,
        seed=options.seed,
        checkpoint=checkpoints / f"{out.stem}.pt",
    )
    recipe = {name: getattr(options, name) for name in ("network", "sample", "steps", "seed")}
    tensors = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    out.parent.mkdir(exist_ok=True)
    save_file(tensors, out, metadata={"recipe": json.dumps(recipe)})


if __name__ == "__main__":
    main()
