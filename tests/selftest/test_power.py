import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from residual_memory.memory import storage
from residual_memory.selftest.power import RecordingDisk, Site
from tests.problems import in_plain_python

# What must be synced or renamed, and by whom: the simulator has to notice each of them when it is left out.
SITES: list[Site] = [
    ("rename", "replace"),
    ("sync", "replace"),
    ("sync", "write"),
    ("sync_folder", "make"),
    ("sync_folder", "replace"),
    ("sync_folder", "sync"),
    ("sync_folder", "write"),
]
# The same where memories are joined.
JOINING_SITES: list[Site] = [
    ("rename", "move"),
    ("rename", "replace"),
    ("sync", "replace"),
    ("sync_folder", "move"),
    ("sync_folder", "replace"),
]


TRIAL = """
import sys
from residual_memory.selftest import power
muted = tuple(sys.argv[3:]) or None
found = getattr(power, sys.argv[1])(most=int(sys.argv[2]), muted=muted, stop_at=1 if muted else 1000)
print(dict(states=found.states, violations=found.violations, sites=sorted(found.sites)))
"""


def tried(most: int, muted: Site | None = None, trials: str = "power_losses") -> dict[str, Any]:
    """What power losses did, in a process where no types are checked: there are many."""
    return ast.literal_eval(in_plain_python(TRIAL, trials, str(most), *(muted or ())))


def test_no_power_loss_loses_what_was_acknowledged_or_brings_back_what_was_erased() -> None:
    found = tried(30)
    assert found["violations"] == ()
    assert found["states"] > 900
    assert found["sites"] == SITES


@pytest.mark.parametrize("muted", SITES, ids=lambda site: f"{site[0]} in {site[1]}")
def test_without_any_one_sync_or_rename_a_power_loss_does_harm(muted: Site) -> None:
    assert tried(24, muted)["violations"]


def test_no_power_loss_loses_a_row_of_memories_that_are_joined() -> None:
    found = tried(20, trials="joining_losses")
    assert found["violations"] == ()
    assert found["states"] > 100
    assert {*JOINING_SITES, ("sync_folder", "make")} == set(found["sites"])


@pytest.mark.parametrize("muted", [site for site in JOINING_SITES if site[0] != "rename"], ids=" in ".join)
def test_without_any_one_sync_a_power_loss_loses_rows_of_memories_that_are_joined(muted: Site) -> None:
    assert tried(20, muted, "joining_losses")["violations"]


def test_no_sync_or_rename_of_a_memory_is_left_out_of_the_list() -> None:
    tree = ast.parse(inspect.getsource(storage.Directory).lstrip())
    made = {
        (call.func.attr, function.name)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
    }
    assert {site for site in made if site[0] in ("sync", "rename", "sync_folder")} - {("sync", "put")} == {
        *SITES,
        *JOINING_SITES,
    }


def test_the_recorder_does_what_a_disk_does(tmp_path: Path) -> None:
    directory = storage.Directory(tmp_path / "memory", RecordingDisk(tmp_path))
    directory.make()
    directory.replace("a", b"content")
    assert (tmp_path / "memory" / "a").read_bytes() == b"content"
