"""Train the decoder-only T5 on Wikipedia text: one epoch over packed windows, in bfloat16 on the cores or on a GPU.

    python -m experiments.language.train --shape tiny --tokens 10000000

Resumes from its own checkpoint after an interruption. Weights go to the user cache: they are too large for a clone.
With --epochs above 1 the learning rate is constant, and the weights after 1, 2, 4, … epochs are kept.
"""

import argparse
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from numpy import ndarray
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.nn import functional

from experiments.checkpoint import Checkpoint
from experiments.language.corpus import tokens_of
from experiments.language.model import SHAPES, T5DecoderLM, decoder_config
from residual_memory.demo.cifar100 import user_cache

BATCH = 16  # windows a step
PEAK_LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 3e-3, 100, 0.1
ROUND = 200  # steps between two checkpoints
COMPILED = 100  # steps from which on compiling takes less time than it saves


@dataclass(frozen=True)
class Training:
    """What a network was trained on.

    Attributes
    ----------
    shape, vocabulary : of the network.
    corpus, split, tokens : the first tokens of this text.
    epochs : passes over it; above 1 at a constant learning rate.
    """

    shape: str = "tiny"
    vocabulary: int = 8_192
    corpus: str = "enwiki"
    split: str = "train"
    tokens: int = 10_000_000
    epochs: int = 1

    def weights(self, epoch: int = 1) -> Path:
        """Where the weights after this many passes are."""
        passes = "" if self.epochs == 1 else f"-epoch{epoch}of{self.epochs}"
        name = f"{self.shape}-{self.vocabulary}-{self.corpus}-{self.split}-{self.tokens}{passes}.safetensors"
        return user_cache() / "language" / "networks" / name

    @property
    def windows(self) -> Int64[ndarray, "w 257"]:
        """The text, cut for training."""
        return tokens_of(self.corpus, self.split, self.vocabulary, limit=self.tokens).windows()

    def load(self, epoch: int = 1) -> T5DecoderLM:
        """The trained network.

        Raises
        ------
        FileNotFoundError : if it was not trained; the message says how to.
        """
        path = self.weights(epoch)
        if not path.is_file():
            options = " ".join(f"--{name} {value}" for name, value in asdict(self).items())
            raise FileNotFoundError(f"{path.name} is not trained yet: python -m experiments.language.train {options}")
        network = T5DecoderLM(decoder_config(self.shape, self.vocabulary))
        load_model(network, str(path))
        return network.eval()


def learning_rate(step: int, n_steps: int, *, decays: bool) -> float:
    """Relative to the peak: a linear rise, then a cosine to a twentieth, or constant."""
    rise = min(1.0, (step + 1) / WARM_UP)
    fall = 0.525 + 0.475 * np.cos(np.pi * step / n_steps) if decays else 1.0
    return float(rise * fall)


def train(training: Training, *, seed: int = 0) -> None:
    """Pass over the text in random order, saving weights after 1, 2, 4, … passes and checkpoints on the way."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    windows = training.windows
    network = T5DecoderLM(decoder_config(training.shape, training.vocabulary)).to(device).train()
    embedding = [p for name, p in network.named_parameters() if "embed_tokens" in name]
    others = [p for name, p in network.named_parameters() if "embed_tokens" not in name]
    groups = [{"params": embedding, "weight_decay": 0.0}, {"params": others, "weight_decay": WEIGHT_DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98))
    a_pass = max(1, len(windows) // BATCH)
    n_steps = a_pass * training.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, n_steps, decays=training.epochs == 1)
    )
    checkpoint = training.weights(training.epochs).with_suffix(".pt")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    kept = Checkpoint(checkpoint, network, optimizer, schedule)
    done = kept.resume()

    def loss_of(tokens: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            logits = network(tokens[:, :-1]).logits
        return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    compiled = torch.compile(loss_of) if n_steps > COMPILED else loss_of
    started, total = time.perf_counter(), 0.0
    order: ndarray = np.zeros(0, np.int64)
    for step in range(done, n_steps):
        if step == done or step % a_pass == 0:
            order = np.random.default_rng(step // a_pass).permutation(len(windows))
        rows = order[step % a_pass * BATCH :][:BATCH]
        loss = compiled(torch.from_numpy(windows[rows]).to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        finished = step + 1
        if finished % ROUND == 0 or finished == n_steps:
            kept.save(finished)
            seconds, passed = time.perf_counter() - started, (finished - 1) % ROUND + 1
            print(f"step {finished:6}/{n_steps}  loss {total / passed:.4f}  {seconds:.0f} s", flush=True)
            started, total = time.perf_counter(), 0.0
        epoch, left = divmod(finished, a_pass)
        if left == 0 and epoch & (epoch - 1) == 0:
            target = training.weights(epoch)
            save_model(network, str(target.with_suffix(".part")))
            os.replace(target.with_suffix(".part"), target)


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(prog="python -m experiments.language.train", description=__doc__.splitlines()[0])
    usual = Training()
    parser.add_argument("--shape", choices=SHAPES, default=usual.shape)
    parser.add_argument("--vocabulary", type=int, default=usual.vocabulary)
    parser.add_argument("--corpus", default=usual.corpus)
    parser.add_argument("--split", default=usual.split)
    parser.add_argument("--tokens", type=int, default=usual.tokens)
    parser.add_argument("--epochs", type=int, default=usual.epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    seed = options.pop("seed")
    training = Training(**options)
    if training.weights(training.epochs).exists():
        print(f"{training.weights(training.epochs)} is there already")
        return
    train(training, seed=seed)


if __name__ == "__main__":
    main()
