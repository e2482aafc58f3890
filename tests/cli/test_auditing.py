"""`resmem audit privacy`: the library's figures, for people and for programs."""

from pathlib import Path

import numpy as np

import residual_memory as rm
from tests.cli.workshop import as_npz, columns, done, regression, resmem


def audited(memory: Path, **options: object) -> rm.PrivacyReport:
    held, opened = columns(200, 4), rm.Memory.open(memory)
    setting = rm.Setting.from_dict(opened.setting or {})
    return rm.audit_privacy(opened, held["keys"], held["labels"], held["predictions"], setting, **options)  # type: ignore[arg-type]


def test_the_figures_are_the_librarys_under_the_saved_setting(memory: Path) -> None:
    done("tune", memory, "--data", "held.npz")
    wanted = audited(memory)
    found = done("audit", "privacy", memory, "--data", "held.npz", "--json").json
    assert {name: found[name] for name in wanted.to_dict()} == wanted.to_dict()
    assert found["verdict"] == wanted.verdict
    assert found["setting"]["shrinkage"] > 0
    assert found["n_members"] == 400


def test_caps_members_and_seed_can_be_chosen(memory: Path) -> None:
    words = ("audit", "privacy", memory, "--data", "held.npz", "--json")
    chosen = ("--max-weight", 0.3, "--max-weight", 1, "--members", 50, "--seed", 7)
    found = done(*words, *chosen).json
    assert [cap["max_weight"] for cap in found["caps"]] == [0.3, 1.0]
    wanted = audited(memory, max_weights=(0.3, 1.0), n_members=50, seed=7)
    assert {name: found[name] for name in wanted.to_dict()} == wanted.to_dict()
    other = done(*words, *chosen[:-1], 8).json
    assert other["auc_base"] != found["auc_base"]


def test_people_see_a_line_a_cap_and_what_the_figures_mean(memory: Path) -> None:
    done("tune", memory, "--data", "held.npz")
    wanted = audited(memory, max_weights=(1.0, 0.1))
    out = done("audit", "privacy", memory, "--data", "held.npz", "--max-weight", 1, "--max-weight", 0.1).out
    line = next(line for line in out.splitlines() if line.strip().startswith("0.1 "))
    cap = wanted.caps[1]
    for figure in (f"{100 * cap.corrected.value:.1f} ±", f"{cap.auc_corrected.value:.3f} ±"):
        assert figure in line
    assert f"{cap.auc_calibrated.value:.3f} ±" in line
    assert "400 rows of the memory against 200 that it does not hold" in out
    text = " ".join(out.split())
    assert "at 0.5 nobody can tell" in text
    assert "no bound" in text


def test_a_regression_is_shown_in_its_own_unit(here: Path) -> None:
    as_npz(here / "a.npz", regression(300))
    as_npz(here / "b.npz", regression(100, 4))
    done("build", "mem", "--data", "a.npz")
    out = done("audit", "privacy", "mem", "--data", "b.npz").out
    assert "base, RMSE" in out
    assert "%" not in out.replace("95 %", "")


def test_rows_of_the_memory_are_no_held_out_rows(memory: Path) -> None:
    ran = resmem("audit", "privacy", memory, "--data", "train.npz")
    assert ran.code == 2
    assert "100 % of the held-out rows are in the memory" in ran.err
    assert "remedy: use data that it was not built from" in ran.err
    train, held = columns(400, 3), columns(200, 4)
    mixed = {name: np.concatenate([train[name][:40], held[name]]) for name in held}
    as_npz(Path("mixed.npz"), mixed)
    assert "warning: 17 % of the held-out keys" in done("audit", "privacy", memory, "--data", "mixed.npz").err


def test_an_error_of_a_command_in_a_group_names_both(memory: Path) -> None:
    ran = resmem("audit", "privacy", memory, "--data", "held.npz", "--members", "-1")
    assert "remedy: resmem audit privacy --help says what is expected" in ran.err
    assert "remedy: resmem audit --help" in resmem("audit").err
    assert "privacy" in done("audit", "--help").out
    assert "audit" in done("--help").out
