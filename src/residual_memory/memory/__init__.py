"""The durable store: `Memory`, its snapshots, its format and its input and output."""

from residual_memory.memory.attributes import Attributes
from residual_memory.memory.checking import Problem, VerifyReport, verify
from residual_memory.memory.erasure import Certificate
from residual_memory.memory.held import HELD_TOO_OFTEN, share_held
from residual_memory.memory.memory import Memory, require_empty
from residual_memory.memory.salvage import Salvage, salvage
from residual_memory.memory.selection import Inventory
from residual_memory.memory.snapshot import Column, Snapshot

__all__ = [
    "HELD_TOO_OFTEN",
    "Attributes",
    "Certificate",
    "Column",
    "Inventory",
    "Memory",
    "Problem",
    "Salvage",
    "Snapshot",
    "VerifyReport",
    "require_empty",
    "salvage",
    "share_held",
    "verify",
]
