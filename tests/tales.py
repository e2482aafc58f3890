"""Documents that follow rules, a small tokenizer of them, and a small model that has learned nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

VOCABULARY = 320


def tale(n: int, seed: int) -> str:
    """Documents whose words follow each other by rules: a memory knows what comes next, a fresh model does not."""
    rules = {"the": ["cat", "owl"], "cat": ["saw"], "owl": ["saw"], "saw": ["a"], "a": ["mouse", "bell"]}
    random = np.random.default_rng(seed)
    documents = []
    for _ in range(n):
        words = ["the"]
        while len(words) < 15:
            following = rules.get(words[-1], ["the"])
            words.append(following[int(random.integers(len(following)))])
        documents.append(" ".join(words) + ".\n")
    return "\n".join(documents)


def tokenizer(texts: list[str]) -> Any:
    """A small byte-level BPE."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def model(*, positions: int = 64) -> Any:
    """A GPT-2 that has learned nothing."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=positions,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.set_seed(0)
    return transformers.GPT2LMHeadModel(config)


def save_model(folder: Path, *, positions: int = 64) -> None:
    """The same in a folder."""
    model(positions=positions).save_pretrained(folder)
