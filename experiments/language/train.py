"""Train the decoder-only T5 on Wikipedia text: one epoch over packed windows, in bfloat16 on the cores or on a GPU.

    python -m experiments.language.train --shape tiny --tokens 10000000

Resumes from its own checkpoint after an interruption. Weights go to the user cache: they are too large for a clone.
With --epochs above 1 the weights after 1, 2, 4, … epochs are kept as well, at a constant learning rate.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from numpy import ndarray
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.nn import functional

from experiments.language.corpus import tokens_of
from experiments.language.model import SHAPES, T5DecoderLM, decoder_config
from residual_memory.demo.cifar100 import user_cache

VOCABULARY = 8_192
BATCH = 16  # windows a step
PEAK_LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 3e-3, 100, 0.1
ROUND = 200  # steps between two checkpoints


def weights_file(shape: str, n_tokens: int, epochs: int = 1, vocabulary: int = VOCABULARY) -> Path:
    """Where the weights of a training run are."""
    return user_cache() / "language" / "networks" / f"{shape}-{vocabulary}-{n_tokens}-epochs{epochs}.safetensors"


def load_network(shape: str, n_tokens: int, epochs: int = 1, vocabulary: int = VOCABULARY) -> T5DecoderLM:
    """A trained network.

    Raises
    ------
    FileNotFoundError : if it was not trained; the message says how to.
    """
    path = weights_file(shape, n_tokens, epochs, vocabulary)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name} is not trained yet: python -m experiments.language.train --shape {shape} "
            f"--tokens {n_tokens} --epochs {epochs} --vocabulary {vocabulary}"
        )
    network = T5DecoderLM(decoder_config(shape, vocabulary))
    load_model(network, str(path))
    return network.eval()


def learning_rate(step: int, n_steps: int, *, decays: bool) -> float:
    """Relative to the peak: a linear rise, then a cosine to a twentieth, or constant."""
    rise = min(1.0, (step + 1) / WARM_UP)
    fall = 0.525 + 0.475 * np.cos(np.pi * step / n_steps) if decays else 1.0
    return float(rise * fall)


def train(network: T5DecoderLM, windows: Int64[ndarray, "w 257"], *, shape: str, n_tokens: int, epochs: int) -> None:
    """Pass `epochs` times over the windows in random order, saving weights and checkpoints on the way."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = network.to(device).train()
    embedding = [p for name, p in network.named_parameters() if "embed_tokens" in name]
    others = [p for name, p in network.named_parameters() if "embed_tokens" not in name]
    groups = [{"params": embedding, "weight_decay": 0.0}, {"params": others, "weight_decay": WEIGHT_DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98))
    a_pass = len(windows) // BATCH
    n_steps = a_pass * epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, n_steps, decays=epochs == 1)
    )
    checkpoint = weights_file(shape, n_tokens, epochs).with_suffix(".pt")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done = state["steps"]

    @torch.compile
    def loss_of(tokens: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            logits = network(tokens[:, :-1]).logits
        return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    started, total = time.perf_counter(), 0.0
    order: ndarray = np.zeros(0, np.int64)
    for step in range(done, n_steps):
        if step == done or step % a_pass == 0:
            order = np.random.default_rng(step // a_pass).permutation(len(windows))
        rows = order[step % a_pass * BATCH :][:BATCH]
        loss = loss_of(torch.from_numpy(windows[rows]).to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        finished = step + 1
        if finished % ROUND == 0 or finished == n_steps:
            state = {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "steps": finished,
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
            seconds, passed = time.perf_counter() - started, (finished - 1) % ROUND + 1
            print(f"step {finished:6}/{n_steps}  loss {total / passed:.4f}  {seconds:.0f} s", flush=True)
            started, total = time.perf_counter(), 0.0
        epoch, left = divmod(finished, a_pass)
        if left == 0 and epoch & (epoch - 1) == 0:
            target = weights_file(shape, n_tokens, epoch)
            if epochs > 1:
                target = target.with_stem(target.stem + f"-of-{epochs}")
            save_model(network, str(target.with_suffix(".part")))
            os.replace(target.with_suffix(".part"), target)


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(prog="python -m experiments.language.train", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    windows = tokens_of("enwiki", "train", options.vocabulary, limit=options.tokens).windows()
    network = T5DecoderLM(decoder_config(options.shape, options.vocabulary))
    train(network, windows, shape=options.shape, n_tokens=options.tokens, epochs=options.epochs)


if __name__ == "__main__":
    main()
