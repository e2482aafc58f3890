"""Whether rows that are said to be held out are in a memory after all."""

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray

from residual_memory.memory.memory import Memory
from residual_memory.validation import as_keys

HELD_TOO_OFTEN = 0.05  # of the held-out rows may be in the memory before the user is told


def share_held(memory: Memory, keys: Float[ndarray, "q d"], sample: int = 256) -> float:
    """The part of a sample of the keys that the memory holds to the last bit: figures on those would be too good.

    Forgotten rows do not count.
    """
    layout = memory.layout
    rows = np.unique(np.linspace(0, len(keys) - 1, min(sample, len(keys))).astype(int))
    some = as_keys(keys[rows], metric=layout.metric).astype(layout.key_dtype)
    wanted = _row_hashes(some)
    held, start, snapshot = np.zeros(len(some), bool), 0, memory.snapshot
    for block in snapshot.keys.blocks(1 << 13):
        held |= np.isin(wanted, _row_hashes(block[snapshot.alive[start : start + len(block)]]))
        start += len(block)
    return float(held.mean())


def _row_hashes(keys: Float[ndarray, "b d"]) -> Shaped[ndarray, " b"]:
    """64 bits for each row, the same for the same numbers."""
    words = np.ascontiguousarray(keys + 0).view(f"u{keys.dtype.itemsize}").astype(np.uint64)  # + 0: no negative zeros
    odd = np.random.default_rng(0).integers(0, 1 << 63, keys.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return words @ odd
