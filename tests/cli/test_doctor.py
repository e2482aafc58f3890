import json
from pathlib import Path
from typing import Any

import pytest

from residual_memory.cli import doctor
from residual_memory.cli.main import main
from tests.problems import in_plain_python

# Few trials of each kind, in a process where no types are checked: tests/selftest has the many.
BRIEF = """
import sys
from residual_memory.cli import doctor
from residual_memory.cli.main import main
doctor._KILLS, doctor._STATES, doctor._DAMAGED, doctor._FORGED, doctor._SECONDS = 2, 1, 97, 50, 0.3
sys.exit(main(["doctor", sys.argv[1], "--json"]))
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    code = main(["doctor", *arguments, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


def test_a_good_disk_passes_every_trial_and_nothing_is_left(tmp_path: Path) -> None:
    found = json.loads(in_plain_python(BRIEF, str(tmp_path)))
    assert found["ok"]
    assert len(found["checks"]) == 10
    assert all(check["trials"] > 0 and check["wrong"] == 0 for check in found["checks"])
    assert min(found["speed"].values()) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_goes_wrong_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_checks", lambda _: [("power lost", 5, 1, "")])
    assert main(["doctor", str(tmp_path)]) == 1
    assert "1 trials went wrong: do not keep a memory on this disk" in capsys.readouterr().out


def test_versions_alone_take_no_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = run(capsys, str(tmp_path), "--only-versions")
    assert code == 0
    assert found["checks"] == []
    versions = {entry["package"]: entry["version"] for entry in found["packages"]}
    assert versions["numpy"]
    assert set(versions) > {"torch", "faiss-cpu", "scikit-learn", "pyarrow"}


def test_a_missing_package_is_shown_with_its_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"faiss": ("no-such-package",)})
    assert main(["doctor", str(tmp_path), "--only-versions"]) == 0
    assert "'residual-memory[faiss]'" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, said = run(capsys, str(tmp_path / "nowhere"))
    assert code == 2
    assert found["error"]["type"] == "DataNotFound"
    assert "nowhere" in said
