"""`resmem export`, `import`, `merge` and `shrink`: what they print, and how they end."""

from pathlib import Path

import numpy as np
import pytest

import residual_memory as rm
from tests.cli.workshop import as_npz, columns, done, resmem
from tests.exchange.forms import SUFFIXES, assert_same, kept
from tests.problems import same_bits


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_memory_goes_out_and_in(memory: Path, suffix: str) -> None:
    done("tune", memory, "--data", "held.npz")
    done("forget", memory, 399)
    exported = done("export", memory, f"rows{suffix}", "--json").json
    assert exported["rows"] == 399
    assert exported["bytes"] == Path(f"rows{suffix}").stat().st_size
    imported = done("import", f"rows{suffix}", "again", "--json").json
    assert (imported["rows"], imported["next_id"], imported["layout"]["dim"]) == (399, 400, 6)
    assert_same(rm.Memory.open("again"), rm.Memory.open(memory))
    assert done("verify", "again", "--json").json["ok"]
    assert done("evaluate", "again", "--data", "held.npz").out == done("evaluate", memory, "--data", "held.npz").out


def test_they_say_what_they_did(memory: Path) -> None:
    assert done("export", memory, "rows.npz").out.startswith("400 rows of ")
    assert "rows.npz" in done("export", memory, "rows.npz", "--overwrite").out
    out = done("import", "rows.npz", "again").out
    assert out.startswith("400 rows in again, ")
    assert "classification with 4 outputs, keys of 6 numbers" in out
    assert "from again, again" in done("merge", "again", "again", "--to", "two", "--ids", "new").out


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["dense", "log8", "regression"])
def test_an_exported_file_is_data_of_build_and_add(here: Path, kind: str, suffix: str) -> None:
    original = kept(kind, text=True, groups=True)
    rm.export_memory(original, f"rows{suffix}")
    types = ("--key-dtype", "float64", "--prediction-dtype", original.layout.prediction_dtype)
    done("build", "built", "--data", f"rows{suffix}", *types)
    built = rm.Memory.open("built")
    assert_same(built, original)
    more = kept(kind, first=100, text=True, groups=True)
    rm.export_memory(more, f"more{suffix}")
    assert done("add", "built", "--data", f"more{suffix}", "--json").json["added"] == 57
    assert_same(rm.Memory.open("built"), rm.merge_memories([original, more]))


def test_the_loss_on_top_m_rows_warns_as_on_whole_ones(here: Path) -> None:
    data = columns(300)
    data["predictions"] = np.eye(4, dtype=np.float32)[data["labels"]] * 0.996 + 0.001
    as_npz(here / "whole.npz", data)
    cut = rm.top_m(data.pop("predictions"), 2)
    as_npz(here / "cut.npz", {**data, **vars(cut)})
    whole = done("build", "whole", "--data", "whole.npz").err
    assert "knows them by heart" in whole
    assert done("build", "cut", "--data", "cut.npz", "--n-outputs", 4).err == whole


def test_commands_that_need_whole_predictions_refuse_top_m_ones(memory: Path) -> None:
    data = columns(50, 4)
    cut = rm.top_m(data.pop("predictions"), 2)
    as_npz(memory.parent / "cut.npz", {**data, **vars(cut)})
    for command in (("tune",), ("evaluate",), ("predict",), ("explain", "--row", 0)):
        ran = resmem(command[0], memory, "--data", "cut.npz", *command[1:])
        assert ran.code == 2
        assert "top-m predictions, expected whole ones" in ran.err


def test_a_foreign_file_takes_options(here: Path) -> None:
    Path("names.txt").write_text("a\nb\nc\nd\ne\n")
    options = ("--class-names", "names.txt", "--metric", "cosine", "--key-dtype", "float16", "--n-outputs", 5)
    layout = done("import", "train.npz", "mem", *options, "--prediction-dtype", "float64", "--json").json["layout"]
    assert (layout["n_outputs"], layout["metric"], layout["key_dtype"]) == (5, "cosine", "float16")
    assert rm.Memory.open("mem").class_names == tuple("abcde")
    assert done("import", "train.npz", "values", "--task", "classification", "--json").json["rows"] == 400


def test_memories_are_merged(memory: Path) -> None:
    data = columns(30, 5)
    as_npz(memory.parent / "more.npz", {**data, "ids": np.arange(1000, 1030)})
    done("build", "more", "--data", "more.npz")
    merged = done("merge", memory, "more", "--to", "both", "--json").json
    assert (merged["rows"], merged["next_id"], merged["from"]) == (430, 1030, [str(memory), "more"])
    both = rm.Memory.open("both").snapshot
    assert same_bits(both.keys.take(np.arange(400, 430)), data["keys"])


def test_a_memory_shrinks(memory: Path) -> None:
    done("tune", memory, "--data", "held.npz")
    done("forget", memory, 399)
    options = ("--keep-rows", 0.5, "--twins-within", 0, "--top-m", 2, "--key-dtype", "float16")
    found = done("shrink", memory, "small", *options, "--json").json
    assert (found["rows_before"], found["rows"], found["bytes_per_row"]) == (399, 200, 8 + 12 + 2 + 2 * 2 + 3)
    assert found["left_out"] == {"twins": 0, "small": 0, "not_drawn": 199}
    assert found["twin_distance"] == 0
    assert found["bytes"] == rm.Memory.open("small").n_bytes < found["bytes_before"]
    assert (found["layout"]["prediction_dtype"], found["setting_kept"]) == ("log8", False)
    assert len(rm.Memory.open(memory)) == 399
    assert done("verify", "small", "--json").json["ok"]
    assert done("tune", "small", "--data", "held.npz", "--json").json["gain"] > 0


def test_it_says_what_became_smaller_and_what_did_not_move_along(memory: Path) -> None:
    done("tune", memory, "--data", "held.npz")
    out = " ".join(done("shrink", "mem", "small", "--smallest-residual", 0.7).out.split())
    gone = 400 - len(rm.Memory.open("small"))
    assert 0 < gone < 400
    assert f"{400 - gone} of 400 rows of mem in small, " in out
    assert f"left out 0 twins, {gone} small residuals, 0 not drawn bytes a row 52, before 52" in out
    assert "the setting did not move along; resmem tune chooses a new one" in out
    assert "setting" not in done("shrink", memory, "half", "--prediction-dtype", "float16").out
    assert rm.Memory.open("half").setting == rm.Memory.open(memory).setting


@pytest.mark.parametrize(
    ("words", "code", "said", "remedy"),
    [
        (("export", "mem", "rows.npy"), 2, "ends in '.npy', expected .npz", "is '.npz' meant?"),
        (("export", "mem", "train.npz"), 2, "train.npz is there already", "name another file, or ask to overwrite it"),
        (("export", "mem", "no/rows.npz"), 2, "there is no folder", "make it first"),
        (("export", "memm", "rows.npz"), 2, "there is no memory at memm", "did you mean 'mem'?"),
        (("import", "trian.npz", "new"), 2, "there is no file trian.npz", "did you mean 'train.npz'?"),
        (("import", "train.npz", "mem"), 2, "mem already exists and is not empty", "name another path"),
        (("import", "train.npz", "new", "--metric", "cosin"), 2, "--metric is 'cosin'", "did you mean 'cosine'?"),
        (("import", "train.npz", "new", "--task", "regresion"), 2, "--task is 'regresion'", "mean 'regression'?"),
        (("import", "train.npz", "new", "--key-dtype", "float8"), 2, "--key-dtype is 'float8'", "did you mean"),
        (("import", "train.npz", "new", "--prediction-dtype", "log8"), 2, "residuals='top-m' alone", "take 'float16'"),
        (("import", "train.npz", "new", "--n-outputs", "0"), 2, "--n-outputs is 0", "says what is expected"),
        (("import", "train.npz", "new", "--class-names", "nams"), 2, "there is no file nams", "says what is expected"),
        (("import", "bad.npz", "new"), 3, "bad.npz is damaged", "save it again"),
        (("merge", "mem", "mem", "--to", "new"), 2, "both hold 400 ids, for example 0", "ids='new'"),
        (("merge", "mem", "--to", "mem"), 2, "not empty", "name another path"),
        (("merge", "mem", "--to", "new", "--ids", "nw"), 2, "--ids is 'nw'", "did you mean 'new'?"),
        (("merge", "mem", "memm", "--to", "new"), 2, "there is no memory at memm", "did you mean 'mem'?"),
        (("merge", "mem"), 2, "Missing option '--to'", "resmem merge --help"),
        (("shrink", "mem", "new"), 2, "nothing would become smaller", "which rows may go"),
        (("shrink", "mem"), 2, "Missing argument 'TO'", "resmem shrink --help"),
        (("shrink", "memm", "new", "--top-m", "2"), 2, "there is no memory at memm", "did you mean 'mem'?"),
        (("shrink", "mem", "mem", "--top-m", "2"), 2, "not empty", "name another path"),
        (("shrink", "mem", "new", "--keep-rows", "50"), 2, "--keep-rows is 50, expected a number above 0", "shrink"),
        (("shrink", "mem", "new", "--twins-within", "-1"), 2, "--twins-within is -1", "resmem shrink --help"),
        (("shrink", "mem", "new", "--smallest-residual", "1"), 2, "the largest residual is 0.8", "ask for less"),
        (("shrink", "mem", "new", "--top-m", "9"), 2, "top_m is 9, expected at most 4", "resmem shrink --help"),
        (("shrink", "mem", "new", "--seed", "-1"), 2, "'--seed'", "resmem shrink --help"),
        (("shrink", "mem", "new", "--prediction-dtype", "log9"), 2, "--prediction-dtype is 'log9'", "did you mean"),
        (("shrnk", "mem", "new"), 2, "there is no command 'shrnk'", "did you mean 'shrink'?"),
        (("improt", "train.npz", "new"), 2, "there is no command 'improt'", "did you mean 'import'?"),
    ],
)
def test_a_mistake_is_told_with_its_remedy(
    memory: Path, words: tuple[str, ...], code: int, said: str, remedy: str
) -> None:
    Path("bad.npz").write_bytes(b"something else entirely")
    before = sorted(path.name for path in Path.cwd().iterdir())
    ran = resmem(*words)
    assert ran.code == code, ran.err
    cause, told = ran.err.splitlines()
    assert cause.startswith("error: ")
    assert said in cause
    assert remedy in told
    assert sorted(path.name for path in Path.cwd().iterdir()) == before


def test_memories_of_other_models_are_merged_on_demand(here: Path) -> None:
    for name in ("a", "b"):
        with rm.Memory.create(name, dim=1, n_outputs=2, source={"layer": name, "side": "input"}) as memory:
            memory.append([[0.0]], [1], [[0.5, 0.5]])
    ran = resmem("merge", "a", "b", "--to", "both", "--ids", "new")
    assert ran.code == 2
    assert "memory 2 at b has another source than memory 1 at a" in ran.err
    assert done("merge", "a", "b", "--to", "both", "--ids", "new", "--any-source", "--json").json["rows"] == 2
