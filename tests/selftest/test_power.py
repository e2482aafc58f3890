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


TRIAL = """
import sys
from residual_memory.selftest.power import power_losses
muted = tuple(sys.argv[2:]) or None
found = power_losses(most=int(sys.argv[1]), muted=muted, stop_at=1 if muted else 1000)
print(dict(states=found.states, violations=found.violations, sites=sorted(found.sites)))
"""


def tried(most: int, muted: Site | None = None) -> dict[str, Any]:
    """What power losses did, in a process where no types are checked: there are many."""
    return ast.literal_eval(in_plain_python(TRIAL, str(most), *(muted or ())))


def test_no_power_loss_loses_what_was_acknowledged_or_brings_back_what_was_erased() -> None:
    found = tried(30)
    assert found["violations"] == ()
    assert found["states"] > 900
    assert found["sites"] == SITES


@pytest.mark.parametrize("muted", SITES, ids=lambda site: f"{site[0]} in {site[1]}")
def test_without_any_one_sync_or_rename_a_power_loss_does_harm(muted: Site) -> None:
    assert tried(24, muted)["violations"]


def test_no_sync_or_rename_of_a_memory_is_left_out_of_the_list() -> None:
    tree = ast.parse(inspect.getsource(storage.Directory).lstrip())
    made = {
        (call.func.attr, function.name)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
    }
    assert {site for site in made if site[0] in ("sync", "rename", "sync_folder")} - {("sync", "put")} == set(SITES)


def test_the_recorder_does_what_a_disk_does(tmp_path: Path) -> None:
    directory = storage.Directory(tmp_path / "memory", RecordingDisk(tmp_path))
    directory.make()
    directory.replace("a", b"content")
    assert (tmp_path / "memory" / "a").read_bytes() == b"content"
