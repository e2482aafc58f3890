"""Memories of every format that was ever written stay readable, for ever."""

import json
import shutil
from pathlib import Path

import pytest

from residual_memory.memory import Memory
from residual_memory.memory.format import FORMAT, READABLE
from tests.memory.golden.make import HERE, contents

GOLDEN = sorted(path.parent for path in HERE.glob("format-*/*/manifest.json"))


def test_there_are_golden_memories_of_every_format() -> None:
    assert {path.parent.name for path in GOLDEN} == {f"format-{number}" for number in READABLE}
    assert FORMAT in READABLE


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_golden_memory_is_read_as_it_was_written(golden: Path) -> None:
    memory = Memory.open(golden, verify=True)
    assert memory.verify(fast=True).ok
    assert contents(memory) == json.loads((golden / "contents.json").read_text())


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_golden_memory_can_be_changed_and_is_then_of_this_format(golden: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(golden, copy)
    wanted = json.loads((golden / "contents.json").read_text())
    with Memory.open(copy, writable=True) as memory:
        memory.save_setting({"n_neighbors": 1})
        memory.compact()
        changed = {**contents(memory), "version": wanted["version"], "setting": wanted["setting"]}
    assert changed == {**wanted, "n_forgotten": 0}
    body = json.loads((copy / "manifest.json").read_text())["body"]
    assert body["format"] == FORMAT
    assert "setting" in {change.what for change in Memory.open(copy, verify=True).history}
