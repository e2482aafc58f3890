"""A training that can be interrupted: network, optimizer and schedule in one file, replaced as a whole."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Checkpoint:
    """Where a training stands.

    Attributes
    ----------
    path : of the file.
    network, optimizer, schedule : what is trained; taken as they are when the file is written.
    """

    path: Path
    network: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def resume(self) -> int:
        """Load what the file holds, and say how many steps were done; 0 where there is no file."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        for name in ("network", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        return int(state["steps"])

    def save(self, steps: int) -> None:
        """Write the file, in the place of the one before."""
        state = {name: getattr(self, name).state_dict() for name in ("network", "optimizer", "schedule")}
        part = self.path.with_suffix(".part")
        torch.save({**state, "steps": steps}, part)
        os.replace(part, self.path)
