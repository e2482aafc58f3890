"""The durable store: `Memory`, its snapshots, its format and its input and output."""

from residual_memory.memory.checking import Problem, VerifyReport, verify
from residual_memory.memory.memory import Memory, require_empty
from residual_memory.memory.snapshot import Column, Snapshot

__all__ = ["Column", "Memory", "Problem", "Snapshot", "VerifyReport", "require_empty", "verify"]
