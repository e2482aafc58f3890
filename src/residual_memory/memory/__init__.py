"""The durable store: `Memory`, its snapshots, its format and its input and output."""

from residual_memory.memory.memory import Memory, Problem, VerifyReport, require_empty, verify
from residual_memory.memory.snapshot import Column, Snapshot

__all__ = ["Column", "Memory", "Problem", "Snapshot", "VerifyReport", "require_empty", "verify"]
