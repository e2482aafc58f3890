from pathlib import Path

import pytest

from residual_memory.selftest.kills import OPERATIONS, kills

TRIALS = 25


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_killed_process_loses_nothing_that_was_acknowledged(tmp_path: Path, operation: str) -> None:
    found = kills(tmp_path, operation, TRIALS)
    assert found.violations == ()
    assert found.trials == TRIALS
    assert found.under_way >= TRIALS // 3, "most kills fall in the middle of a change"
    assert found.acknowledged > 0


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_interrupted_process_goes_on_with_the_same_handle(tmp_path: Path, operation: str) -> None:
    found = kills(tmp_path, operation, 10, interrupt=True)
    assert found.violations == ()
    assert found.under_way > 0


def test_a_process_of_trials_that_fails_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "memory").write_text("no folder")
    with pytest.raises(AssertionError, match="ended with 1"):
        kills(tmp_path, "append", 1)
