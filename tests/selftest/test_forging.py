import ast
import errno
from pathlib import Path

import pytest

from residual_memory.memory import Memory
from residual_memory.selftest import forging
from residual_memory.selftest.forging import damages, fuzz
from residual_memory.selftest.refusals import RefusingDisk
from residual_memory.selftest.workload import add, create, state_of
from tests.problems import in_plain_python


def test_each_flip_and_each_cut_is_found_in_its_file(tmp_path: Path) -> None:
    found = damages(tmp_path, every=11)
    assert (found.undetected, found.misnamed, found.wrong_answers, found.violations) == (0, 0, 0, ())
    assert found.trials > 500


def test_a_check_that_finds_nothing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forging, "_named", lambda path: set())
    found = damages(tmp_path, every=200)
    assert found.undetected == found.trials == len(found.violations)


def test_a_forged_file_is_read_or_refused_and_never_anything_else() -> None:
    found = fuzz(2_000)
    assert found.violations == ()
    assert (found.manifests, found.segments) == (1_400, 600)
    assert 0 < found.accepted < 1_000


def test_an_error_that_is_not_ours_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise IndexError("foreign")

    monkeypatch.setattr(forging, "rows_of", fails)
    assert "IndexError: foreign" in fuzz(100).violations[0]


REFUSED = """
import sys
from pathlib import Path
from residual_memory.selftest.refusals import refusals
found = refusals(Path(sys.argv[1]), error=int(sys.argv[2]))
print((found.trials, found.refused, found.violations))
"""


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_whichever_call_is_refused_a_change_is_whole_or_not_there(tmp_path: Path, error: int) -> None:
    trials, refused, violations = ast.literal_eval(in_plain_python(REFUSED, str(tmp_path), str(error)))
    assert violations == ()
    assert trials > 60
    assert refused > trials // 2


def test_a_refusing_disk_refuses_just_the_call_that_it_should(tmp_path: Path) -> None:
    disk = RefusingDisk(errno.EIO)
    assert disk.names(tmp_path) == []
    disk.arm(1)
    assert disk.names(tmp_path) == []
    with pytest.raises(OSError, match="Input/output"):
        disk.names(tmp_path)
    assert disk.names(tmp_path) == []
    assert disk.n_calls == 3


def test_a_row_that_is_not_that_of_its_id_is_noticed(tmp_path: Path) -> None:
    with create(str(tmp_path / "memory")) as memory:
        add(memory, range(5))
        assert state_of(memory) == frozenset(range(5))
        memory.append([[0.0] * 6], [0], [[0.5, 0.3, 0.2]], ids=[99], snippets=["<canary 00000099>"])
        with pytest.raises(AssertionError, match="keys"):
            state_of(memory)
    assert len(Memory.open(tmp_path / "memory")) == 6
