from pathlib import Path

from residual_memory.selftest.readers import readers


def test_eight_readers_beside_a_writer_see_committed_versions_alone(tmp_path: Path) -> None:
    found = readers(tmp_path, n_readers=8, seconds=20.0)
    assert found.violations == ()
    assert found.reads > 100
    assert found.seen > 10
    assert found.versions > found.seen // 2
