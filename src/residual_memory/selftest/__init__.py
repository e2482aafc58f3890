"""Trials of the store by kills, power losses, flipped bytes, full disks and forged files; `resmem doctor` runs some."""
