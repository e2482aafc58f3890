"""How commands end when something is wrong: the code, one line of cause, one of remedy, and a guess at a typo."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

import residual_memory as rm
from residual_memory.memory.storage import Directory
from tests.cli.workshop import as_folder, columns, done, resmem

MODEL = ("--model", "net:make_model")

SIZES = ("--rows", "9", "--dim", "3", "--outputs", "2")

TYPOS: list[tuple[tuple[str, ...], str]] = [
    (("biuld", "x"), "did you mean 'build'?"),
    (("evalute", "mem"), "did you mean 'evaluate'?"),
    (("tune", "mem", "--dta", "held.npz"), "--data"),
    (("--versoin",), "--version"),
    (("tune", "memm", "--data", "held.npz"), "did you mean 'mem'?"),
    (("verify", "memm"), "did you mean 'mem'?"),
    (("tune", "mem", "--data", "hled.npz"), "did you mean 'held.npz'?"),
    (("tune", "mem", "--data", "held.npz", "--metric", "acuracy"), "did you mean 'accuracy'?"),
    (("tune", "mem", "--data", "held.npz", "--metric", "rmse"), "expected 'accuracy' or 'log_loss'"),
    (("tune", "mem", "--data", "held.npz", "--index", "exat"), "did you mean 'exact'?"),
    (("tune", "mem", "--data", "held.npz", "--index", "faiss:IFV4,Flat"), "faiss cannot make 'IFV4,Flat'"),
    (("tune", "mem", "--data", "held.npz", "--index", "faiss:IVF4,Flat?nprob=2"), "no query option 'nprob'"),
    (("tune", "mem", "--data", "held.npz", "--index", "faiss:IVF4,Flat?nprobe=two"), "not a number"),
    (("build", "new", "--data", "train.npz", "--metric", "euclidian"), "did you mean 'euclidean'?"),
    (("build", "new", "--data", "train.npz", "--key-dtype", "float61"), "did you mean 'float64'?"),
    (("build", "new", "--data", "train.npz", "--task", "clasification"), "did you mean 'classification'?"),
    (("build", "new", "--data", "train.npz", "--class-names", "nmaes.txt"), "did you mean 'names.txt'?"),
    (("build", "new", "--data", "net:train", *MODEL, "--layer", "33"), "did you mean '3'?"),
    (("build", "new", "--data", "net:train", *MODEL, "--side", "ouput"), "did you mean 'output'?"),
    (("build", "new", "--data", "net:train", *MODEL, "--outputs", "logit"), "did you mean 'logits'?"),
    (("build", "new", "--data", "net:train", *MODEL, "--autocast", "bfloat"), "did you mean 'bfloat16'?"),
    (("build", "new", "--data", "net:train", "--model", "nett:make_model"), "did you mean 'net'?"),
    (("build", "new", "--data", "net:train", "--model", "net:make_modl"), "did you mean 'net:make_model'?"),
    (("build", "new", "--data", "net:trian", *MODEL), "did you mean 'net:train'?"),
    (("build", "new", "--data", "net:train", *MODEL, "--predictions", "flods.npy"), "did you mean 'folds.npy'?"),
    (("build", "new", "--data", "net.py"), "expected .npz, .parquet, .arrow"),
    (("build", "new", "--data", "names.txt"), "add --model, a folder or MODULE:NAME"),
    (("evaluate", "mem", "--data", "held.npz", "--bandwidth", "atuo"), "expected a number above 0 or 'auto'"),
    (("evaluate", "mem", "--data", "held.npz", "--bandwidth", "-1"), "expected a number above 0"),
    (("evaluate", "mem", "--data", "held.npz", "--n-neighbors", "0"), "expected at least 1"),
    (("evaluate", "mem", "--data", "held.npz", "--n-neighbors", "five"), "valid integer"),
    (("evaluate", "mem", "--data", "held.npz", "--shrinkage", "-0.5"), "expected a number above 0"),
    (("audit", "privcy", "mem"), "did you mean 'privacy'?"),
    (("audti", "privacy", "mem"), "did you mean 'audit'?"),
    (("audit",), "Missing command"),
    (("audit", "privacy", "mem"), "Missing option '--data'"),
    (("audit", "privacy", "memm", "--data", "held.npz"), "did you mean 'mem'?"),
    (("audit", "privacy", "mem", "--data", "hled.npz"), "did you mean 'held.npz'?"),
    (("audit", "privacy", "mem", "--data", "held.npz", "--max-wieght", "1"), "--max-weight"),
    (("audit", "privacy", "mem", "--data", "held.npz", "--max-weight", "0"), "--max-weight is 0"),
    (("audit", "privacy", "mem", "--data", "held.npz", "--members", "0"), "--members is 0"),
    (("audit", "privacy", "mem", "--data", "held.npz", "--index", "exat"), "did you mean 'exact'?"),
    (("audit", "privacy", "mem", "--data", "names.txt"), "is text"),
    (("predict", "mem", "--data", "held.npz", "--out", "out.txt"), "ends in .npz, .csv or .parquet"),
    (("predict", "mem", "--data", "held.npz", "--out", "nowhere/out.npz"), "there is no folder nowhere"),
    (("explain", "mem", "--data", "held.npz", "--row", "200"), "200 rows, from 0 to 199"),
    (("forget", "mem", "seven"), "whole numbers"),
    (("forget", "mem", "999"), "does not hold"),
    (("forget", "mem"), "no ids are given"),
    (("forget", "mem", "--ids-file", "ids"), "there is no file ids"),
    (("add", "mem", "--data", "held.npz", "--first-row", "201"), "has 200 rows"),
    (("estimate", "--rows", "0", "--dim", "3", "--outputs", "2"), "expected at least 1"),
    (("estimate", *SIZES, "--prediction-dtype", "log8"), "add --top-m M"),
    (("estimate", *SIZES, "--prediction-dtype", "log9"), "did you mean 'log8'"),
    (("estimate", *SIZES, "--top-m", "3"), "expected 1 to 2"),
    (("estimate", *SIZES, "--top-m", "1", "--task", "regression"), "regression keeps 'dense'"),
    (("demo", "--out", "nowhere/report.html"), "there is no folder nowhere"),
    (("info",), "Missing argument 'MEMORY'"),
    (("tune", "mem"), "Missing option '--data'"),
]


@pytest.mark.parametrize(("words", "said"), TYPOS, ids=[" ".join(words) for words, _ in TYPOS])
def test_a_mistake_exits_with_2_and_says_what_is_meant(
    memory: Path, net: Path, words: tuple[str, ...], said: str
) -> None:
    Path("names.txt").write_text("a\nb\n")
    Path("folds.npy").write_bytes(b"")
    ran = resmem(*words)
    assert ran.code == 2
    assert said in ran.err
    lines = [line for line in ran.err.splitlines() if "user's own print" not in line]
    assert [line.split(":")[0] for line in lines] == ["error", "remedy"]
    assert not ran.out
    assert not Path("new").exists()


def test_with_json_an_error_is_an_object_too(memory: Path) -> None:
    for words, kind in (
        (("tune", memory, "--data", "hled.npz"), "DataNotFound"),
        (("info", "nothing"), "MemoryNotFound"),
    ):
        error = resmem(*words, "--json").json["error"]
        assert error["type"] == kind
        assert error["exit_code"] == 2
        assert error["cause"]
        assert error["remedy"]


def test_a_column_of_a_similar_name_is_suggested(here: Path) -> None:
    data = columns(20)
    data["kyes"] = data.pop("keys")
    import numpy as np

    np.savez("bad.npz", **data)  # type: ignore[arg-type]
    assert "is 'kyes' meant to be it?" in resmem("build", "mem", "--data", "bad.npz").err


# ---------------------------------------------------------------------- corrupt, locked, refused


def test_a_damaged_saved_index_is_told_but_is_no_damage_of_the_memory(memory: Path) -> None:
    with rm.Memory.open(memory, writable=True) as held:
        rm.ResidualKNN(held, n_neighbors=2, index="faiss:IVF1,Flat").save_index()
    assert resmem("verify", memory, "--json").json["ignored"] == []
    (file,) = memory.glob("index-*.bin")
    file.write_bytes(b"half")
    ran = resmem("verify", memory, "--json")
    assert ran.code == 0
    assert (ran.json["ok"], ran.json["problems"]) == (True, [])
    assert [problem["file"] for problem in ran.json["ignored"]] == [file.name]
    told = resmem("verify", memory).out
    assert told.startswith("whole")
    assert "passed over and built again" in told


def test_damage_is_a_finding_of_verify_and_an_error_elsewhere(memory: Path) -> None:
    segment = next(memory.glob("rows-*"))
    content = bytearray(segment.read_bytes())
    content[-1] ^= 1
    segment.write_bytes(content)
    ran = resmem("verify", memory, "--json")
    assert ran.code == 1
    assert ran.json["problems"][0]["file"] == segment.name
    assert "bytes 0 to" in ran.json["problems"][0]["what"]
    assert segment.name[:20] in resmem("verify", memory).out
    segment.write_bytes(content[:-10])
    for command in (("info", memory), ("tune", memory, "--data", "held.npz"), ("compact", memory)):
        ran = resmem(*command)
        assert ran.code == 3
        assert segment.name in ran.err
        assert "remedy: resmem verify" in ran.err


def test_a_damaged_manifest_is_corrupt(memory: Path) -> None:
    manifest = memory / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"400", b"401", 1))
    assert resmem("info", memory).code == 3
    assert resmem("verify", memory).code == 1


def test_a_memory_of_a_newer_library_exits_with_3(memory: Path) -> None:
    manifest = memory / "manifest.json"
    body = json.loads(manifest.read_text())["body"] | {"format": 999}
    inner = json.dumps(body, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    manifest.write_text(f'{{"crc32":{zlib.crc32(inner.encode())},\n"body":{inner}}}\n')
    ran = resmem("info", memory)
    assert ran.code == 3
    assert "upgrade" in ran.err


def test_a_locked_memory_exits_with_4(memory: Path) -> None:
    with rm.Memory.open(memory, writable=True):
        for command in (
            ("forget", memory, 1),
            ("tune", memory, "--data", "held.npz"),
            ("build", memory, "--data", "train.npz"),
        ):
            ran = resmem(*command)
            assert ran.code == 4
            assert f"process {os.getpid()}" in ran.err
        done("tune", memory, "--data", "held.npz", "--no-save")  # reading needs no lock
    done("forget", memory, 1)


def test_a_full_disk_exits_with_1_and_the_memory_stays(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise rm.errors.StorageFailure(errno.ENOSPC, "No space left on device; free some space and try again")

    monkeypatch.setattr(Directory, "write", full)
    ran = resmem("add", memory, "--data", "held.npz")
    assert ran.code == 1
    assert "free some space" in ran.err
    assert len(rm.Memory.open(memory)) == 400


def test_a_place_that_is_a_file_exits_with_1_or_2(here: Path) -> None:
    assert resmem("build", "train.npz/mem", "--data", "train.npz").code in (1, 2)
    ran = resmem("build", "train.npz", "--data", "train.npz")
    assert ran.code == 2
    assert "already exists" in ran.err


def test_rows_that_were_added_before_an_error_are_counted(memory: Path) -> None:
    data = columns(100_000, 5)
    data["keys"][-1, 0] = float("nan")
    as_folder(memory.parent / "bad", data)
    ran = resmem("add", memory, "--data", "bad")
    assert ran.code == 2
    added = len(rm.Memory.open(memory)) - 400
    assert added > 0
    assert f"--first-row {added}" in ran.err


@pytest.mark.parametrize(
    ("module", "words", "extra"),
    [
        ("pyarrow", ("build", "new", "--data", "some.parquet"), "report"),
        ("pyarrow", ("predict", "mem", "--data", "held.npz", "--out", "out.parquet"), "report"),
        ("PIL", ("build", "new", "--data", "images", *MODEL), "report"),
        ("torch", ("build", "new", "--data", "net:held_out", *MODEL), "torch"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    memory: Path, net: Path, monkeypatch: pytest.MonkeyPatch, module: str, words: tuple[str, ...], extra: str
) -> None:
    from tests.cli.workshop import as_images

    Path("some.parquet").write_bytes(b"")
    if module == "PIL":
        as_images(net / "images", 2, 1)
    if module == "torch":
        Path("net.py").write_text("held_out = [(1.0, 0)]\nmake_model = None\n")
    monkeypatch.setitem(sys.modules, module, None)
    ran = resmem(*words)
    assert ran.code == 2
    assert f"remedy: pip install 'residual-memory[{extra}]'" in ran.err


# ---------------------------------------------------------------------- as a program


def test_the_program_runs_and_is_light(here: Path) -> None:
    heavy = {"torch", "faiss", "pyarrow", "PIL"}
    code = f"import sys, residual_memory.cli.main; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
    ran = subprocess.run(
        [sys.executable, "-m", "residual_memory.cli.main", "info", "nothing"], capture_output=True, text=True
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: there is no memory at nothing")


def test_ctrl_c_exits_with_130(here: Path) -> None:
    Path("slow.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "residual_memory.cli.main", "build", "mem", "--data", "slow:data"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    assert running.stderr.readline() == "ready\n"  # what a module prints goes to stderr
    time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "run the same command again to go on" in err
