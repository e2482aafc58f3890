"""Text as token numbers: found on disk, encoded once by a BPE of our own, kept in the user cache."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt16
from numpy import ndarray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from residual_memory.demo.cifar100 import user_cache

END = "<|end|>"  # ends every document, and so begins the next one
WINDOW = 256  # predictions a window; a window has one token more
TOKENIZER_DOCUMENTS = 20_000


@dataclass(frozen=True)
class Tokens:
    """A stretch of encoded documents.

    Attributes
    ----------
    numbers : of the tokens, each document closed by the end token.
    starts : where each document begins.
    """

    numbers: UInt16[ndarray, " t"]
    starts: Int64[ndarray, " d"]

    def __len__(self) -> int:
        return len(self.numbers)

    def first(self, n: int) -> "Tokens":
        """The first n tokens."""
        return Tokens(self.numbers[:n], self.starts[self.starts < n])

    @property
    def documents(self) -> Int64[ndarray, " t"]:
        """The document of each token."""
        return np.searchsorted(self.starts, np.arange(len(self)), side="right") - 1

    def windows(self) -> Int64[ndarray, "w 257"]:
        """Windows of 256 predictions: each begins with the last token of the one before."""
        n = (len(self) - 1) // WINDOW
        places = np.arange(n)[:, None] * WINDOW + np.arange(WINDOW + 1)
        return self.numbers[places].astype(np.int64)


def find_text(corpus: str, split: str) -> Path:
    """The file of a corpus: looked for in `$RESMEM_DATA`, then in the user cache.

    Raises
    ------
    FileNotFoundError : if neither has it.
    """
    roots = [Path(named)] if (named := os.environ.get("RESMEM_DATA")) else []
    for root in (*roots, user_cache()):
        if (path := root / "text" / corpus / f"{split}.txt").is_file():
            return path
    raise FileNotFoundError(f"text/{corpus}/{split}.txt was not found; run `make data`, or set RESMEM_DATA")


def documents(path: Path) -> Iterator[str]:
    """The documents of a text file: blocks of lines between blank lines."""
    lines: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines).rstrip("\n")
                lines = []
    if lines:
        yield "".join(lines).rstrip("\n")


def tokenizer_of(vocabulary: int) -> Tokenizer:
    """Our byte-level BPE of that many tokens, trained on the first documents of the Wikipedia training text."""
    path = user_cache() / "language" / f"bpe-{vocabulary}.json"
    if path.is_file():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(islice(documents(find_text("enwiki", "train")), TOKENIZER_DOCUMENTS), trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path.with_suffix(".part")))
    os.replace(path.with_suffix(".part"), path)
    return tokenizer


def tokens_of(corpus: str, split: str, vocabulary: int, *, limit: int | None = None) -> Tokens:
    """The first `limit` tokens of a split, or all of them; encoded at the first call."""
    path = user_cache() / "language" / f"{corpus}-{split}-{vocabulary}-{limit or 'all'}.npz"
    if not path.is_file():
        tokenizer = tokenizer_of(vocabulary)
        pieces, n = [], 0
        batches = iter(partial(_taken, documents(find_text(corpus, split)), 1000), [])
        for batch in batches:
            pieces += [np.array([*encoded.ids, 0], np.uint16) for encoded in tokenizer.encode_batch_fast(batch)]
            n += sum(len(piece) for piece in pieces[-len(batch) :])
            if limit is not None and n >= limit:
                break
        starts = np.cumsum([0, *(len(piece) for piece in pieces[:-1])])
        tokens = Tokens(np.concatenate(pieces), starts)
        tokens = tokens if limit is None else tokens.first(limit)
        part = path.with_suffix(".part.npz")
        np.savez(part, numbers=tokens.numbers, starts=tokens.starts)
        os.replace(part, path)
    with np.load(path) as stored:
        return Tokens(stored["numbers"], stored["starts"])


def _taken(source: Iterator[str], n: int) -> list[str]:
    return list(islice(source, n))
