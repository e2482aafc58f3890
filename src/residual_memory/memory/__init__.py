"""The durable store: `Memory`, its snapshots, its format and its input and output."""

from residual_memory.memory.checking import Problem, VerifyReport, verify
from residual_memory.memory.held import HELD_TOO_OFTEN, share_held
from residual_memory.memory.memory import Memory, require_empty
from residual_memory.memory.snapshot import Column, Snapshot

__all__ = [
    "HELD_TOO_OFTEN",
    "Column",
    "Memory",
    "Problem",
    "Snapshot",
    "VerifyReport",
    "require_empty",
    "share_held",
    "verify",
]
