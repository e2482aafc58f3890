"""What rows carry on the command line: marked as they come in, counted, forgotten by it, erased with a certificate."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residual_memory as rm
from residual_memory.cli.carrying import moment_of, moment_text
from residual_memory.memory.attributes import NEVER
from tests.cli.workshop import as_npz, columns, done, regression, resmem
from tests.exchange.forms import SUFFIXES

PAST, LATER = "2001-02-03", "2100-01-01"


@pytest.fixture
def crowd(here: Path) -> Path:
    """Rows of alice (0-99), bob (100-149, tagged eu) and nobody (150-199); alice's have expired."""
    data = columns(200)
    data["groups"] = np.arange(200) // 50
    rows = {name: slice(a, b) for name, a, b in (("a", 0, 100), ("b", 100, 150), ("c", 150, 200))}
    for name, some in rows.items():
        as_npz(here / f"{name}.npz", {column: values[some] for column, values in data.items()})
    Path("names.txt").write_text("cat\ndog\nowl\nfox\n")
    done("build", "crowd", "--data", "a.npz", "--owner", "alice", "--expires", PAST, "--class-names", "names.txt")
    done("add", "crowd", "--data", "b.npz", "--owner", "bob", "--tag", "eu", "--tag", "paid", "--expires", LATER)
    done("add", "crowd", "--data", "c.npz")
    return here / "crowd"


# ---------------------------------------------------------------------- coming in


def test_rows_are_marked_as_they_come_in(crowd: Path) -> None:
    held = rm.Memory.open(crowd).attributes(np.arange(200))
    assert held.owners == ["alice"] * 100 + ["bob"] * 50 + [""] * 50
    assert held.tags == [()] * 100 + [("eu", "paid")] * 50 + [()] * 50
    assert held.expires.tolist() == [moment_of("", PAST)] * 100 + [moment_of("", LATER)] * 50 + [NEVER] * 50


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_the_data_say_themselves_counts_more(here: Path, suffix: str) -> None:
    data = columns(4)
    with rm.Memory.create(dim=6, n_outputs=4) as source:
        source.append(
            data["keys"],
            data["labels"],
            data["predictions"],
            owners=["alice", "", "bob", ""],
            expires=[5, NEVER, 7, NEVER],
            tags=[["x"], [], [], ["y"]],
            snippets=["a cat", "", "", "an owl"],
        )
        rm.export_memory(source, f"rows{suffix}")
    done("build", "mem", "--data", f"rows{suffix}", "--owner", "carol", "--expires", "1970-01-02", "--tag", "eu")
    held = rm.Memory.open("mem").attributes(np.arange(4))
    assert held.owners == ["alice", "carol", "bob", "carol"]
    assert held.expires.tolist() == [5, 86_400, 7, 86_400]
    assert held.tags == [("x",), ("eu",), ("eu",), ("y",)]
    assert held.snippets == ["a cat", "", "", "an owl"]


def test_an_interrupted_build_goes_on_with_what_rows_carry(here: Path) -> None:
    done("build", "mem", "--data", "train.npz", "--owner", "alice")
    done("build", "mem", "--data", "train.npz", "--owner", "alice")
    assert rm.Memory.open("mem").inventory().owners == {"alice": 400}


def test_rows_that_a_model_adds_are_marked_too(net: Path) -> None:
    pytest.importorskip("torch")
    done("build", "mem", "--data", "net:train", "--model", "net:make_model")
    added = done("add", "mem", "--data", "net:held_out", "--model", "net:make_model", "--owner", "bob", "--json").json
    assert added["added"] == 80
    assert rm.Memory.open("mem").inventory().owners == {"": 150, "bob": 80}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-02", 86_400),
        ("1970-01-02T01:00", 90_000),
        ("1970-01-02 01:00:00+01:00", 86_400),
        ("1970-01-02T00:00:00Z", 86_400),
    ],
)
def test_moments_are_read(text: str, seconds: int) -> None:
    assert moment_of("--expires", text) == seconds
    assert moment_of("--expires", moment_text(seconds).replace(" UTC", "")) == seconds


@pytest.mark.parametrize(("text", "seconds"), [("30d", 30 * 86_400), ("12h", 43_200), ("0h", 0)])
def test_moments_from_now_are_read(text: str, seconds: int) -> None:
    assert abs(moment_of("--expires", text) - time.time() - seconds) < 5


def test_moments_of_any_size_are_shown() -> None:
    assert moment_text(0) == "1970-01-01 00:00 UTC"
    assert moment_text(NEVER - 1) == "9,223,372,036,854,775,806 s after 1970"


# ---------------------------------------------------------------------- counting


def test_an_inventory_counts_whose_rows_there_are(crowd: Path) -> None:
    found = done("inventory", crowd, "--json").json
    assert found["owners"] == {"alice": 100, "bob": 50, "": 50}
    assert found["tags"] == {"eu": 50, "paid": 50}
    assert sum(found["labels"].values()) == 200
    assert (found["expired"], found["next_expiry"], found["groups"]) == (100, moment_of("", LATER), 4)
    out = done("inventory", crowd).out
    for said in ("alice", "(nobody)", "paid", "cat", "100 rows have expired: resmem forget", "2100-01-01 00:00 UTC"):
        assert said in out, said


def test_an_inventory_lists_the_ids_of_an_owner_or_a_tag(crowd: Path) -> None:
    assert done("inventory", crowd, "--owner", "bob", "--json").json["ids"] == list(range(100, 150))
    both = done("inventory", crowd, "--owner", "alice", "--tag", "eu", "--json").json
    assert (both["rows"], both["ids"]) == (0, [])
    lines = done("inventory", crowd, "--tag", "eu").out.splitlines()
    assert lines == ["50 of 200 rows", *map(str, range(100, 150))]


def test_people_are_shown_the_first_twenty(here: Path) -> None:
    data = columns(50)
    data["owners"] = np.array([f"owner {n}" for n in range(50)])
    as_npz(here / "many.npz", data)
    done("build", "mem", "--data", "many.npz")
    out = done("inventory", "mem").out
    assert out.count("owner ") == 20 + 1, "and the header"
    assert "and 30 more" in out
    assert len(done("inventory", "mem", "--json").json["owners"]) == 50


def test_a_memory_whose_rows_carry_nothing_is_counted_too(memory: Path) -> None:
    out = done("inventory", memory).out
    assert out.startswith("400 rows")
    assert "owner" not in out


# ---------------------------------------------------------------------- forgetting


@pytest.mark.parametrize(
    ("words", "forgotten"),
    [
        (("--owner", "alice"), range(100)),
        (("--owner", "alice", "--owner", "bob"), range(150)),
        (("--tag", "eu"), range(100, 150)),
        (("--expired",), range(100)),
        (("--group", "0", "--group", "3"), [*range(50), *range(150, 200)]),
        (("--owner", "alice", "--group", "1"), range(50, 100)),
        (("--owner", "alice", "--tag", "eu"), []),
        (("3", "4", "3"), [3, 4]),
    ],
)
def test_rows_are_forgotten_by_what_they_carry(crowd: Path, words: tuple[str, ...], forgotten: Any) -> None:
    before = rm.Memory.open(crowd)
    dry = done("forget", crowd, *words, "--dry-run", "--json").json
    assert (dry["would_forget"], dry["rows"], dry["version"]) == (len(forgotten), 200, before.version)
    assert f"would forget {len(forgotten):,} of 200 rows" in done("forget", crowd, *words, "--dry-run").out
    assert rm.Memory.open(crowd).version == before.version
    ran = done("forget", crowd, *words, "--json").json
    assert (ran["forgotten"], ran["rows"]) == (len(forgotten), 200 - len(forgotten))
    assert rm.Memory.open(crowd).ids.tolist() == sorted(set(range(200)) - set(forgotten))


def test_a_label_is_named_or_numbered(crowd: Path) -> None:
    labels = columns(200)["labels"]
    assert done("forget", crowd, "--label", "dog", "--json").json["forgotten"] == (labels == 1).sum()
    assert (
        done("forget", crowd, "--label", "0", "--label", "fox", "--json").json["forgotten"]
        == ((labels == 0) | (labels == 3)).sum()
    )


def test_nobody_is_meant_and_someone_else_perhaps(crowd: Path) -> None:
    for words in (("forget", crowd), ("forget", crowd, "--dry-run"), ("inventory", crowd)):
        out = done(*words, "--owner", "alcie").out
        assert "did you mean 'alice'?" in out
    assert "did you mean" not in done("forget", crowd, "--owner", "zzz").out
    assert len(rm.Memory.open(crowd)) == 200


def test_what_is_left_to_do_is_said(crowd: Path) -> None:
    out = done("forget", crowd, "--owner", "alice").out
    assert "forgot 100 rows" in out
    assert "the bytes stay on disk until: resmem compact" in out
    assert "still remembers" in out


# ---------------------------------------------------------------------- erasing


def test_rows_are_forgotten_and_erased_with_a_certificate(crowd: Path) -> None:
    ran = done("forget", crowd, "--owner", "alice", "--erase", "--certificate", "alice.json", "--json").json
    assert (ran["forgotten"], ran["erased"], ran["certificate"]) == (100, 100, "alice.json")
    assert ran["search"]["found"] == 0
    assert ran["search"]["traces"] > 100
    certificate = rm.Certificate.load("alice.json")
    assert certificate.names(np.arange(100))
    assert (certificate.erased, certificate.rows, certificate.memory) == (100, 100, "crowd")
    assert rm.Memory.open(crowd).n_forgotten == 0


def test_erasing_without_a_certificate_searches_nothing(crowd: Path) -> None:
    ran = done("forget", crowd, "1", "2", "--erase", "--json").json
    assert ran["erased"] == 2
    assert "search" not in ran
    assert rm.Memory.open(crowd).n_forgotten == 0


def test_compact_writes_the_certificate_of_what_was_forgotten_before(crowd: Path) -> None:
    done("forget", crowd, "7", "8")
    out = done("compact", crowd, "--certificate", "two.json").out
    assert "erased 2 rows; the certificate is two.json" in out
    assert "none is there" in out
    assert "remains: the base model" in out
    assert rm.Certificate.load("two.json").names([7, 8])
    again = done("compact", crowd, "--certificate", "none.json")
    assert "nothing to erase: none.json is not written" in again.out
    assert done("compact", crowd, "--certificate", "none.json", "--json").json["certificate"] is None
    assert not Path("none.json").exists()


def test_bytes_that_are_found_end_in_1_and_are_in_the_certificate(crowd: Path) -> None:
    key = rm.Memory.open(crowd).snapshot.keys.take(np.array([7]))
    (crowd / "copy.bin").write_bytes(b"something " + key.tobytes())
    ran = resmem("forget", crowd, "7", "--erase", "--certificate", "found.json")
    assert ran.code == 1
    assert "FOUND 1 values of the erased rows" in ran.out
    found = rm.Certificate.load("found.json").search
    assert found is not None
    assert found.found == 1
    done("forget", crowd, "8")
    assert resmem("compact", crowd, "--certificate", "other.json", "--json").code == 0, "another row's"
    (crowd / "copy.bin").write_bytes(rm.Memory.open(crowd).snapshot.keys.take(np.array([9])).tobytes())
    done("forget", crowd, int(rm.Memory.open(crowd).ids[9]))
    ran = resmem("compact", crowd, "--certificate", "third.json", "--json")
    assert (ran.code, ran.json["search"]["found"]) == (1, 1)


def test_a_certificate_that_cannot_be_written_is_an_error_that_says_so(
    crowd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rm.Certificate, "save", full)
    ran = resmem("forget", crowd, "7", "--erase", "--certificate", "lost.json")
    assert ran.code == 1
    assert "remedy: the rows are erased, but their certificate is lost" in ran.err


# ---------------------------------------------------------------------- looking after


def test_a_damaged_memory_is_salvaged(memory: Path) -> None:
    with rm.Memory.open(memory, writable=True) as held:
        held.compact()
    segment = next(memory.glob("rows-*"))
    assert done("salvage", memory, "whole", "--json").json == {
        "memory": str(memory),
        "to": "whole",
        "rows": 400,
        "lost": 0,
        "problems": [],
    }
    segment.write_bytes(segment.read_bytes()[:-10])
    ran = resmem("salvage", memory, "saved")
    assert ran.code == 1
    assert "400 are lost" in ran.out
    assert segment.name[:20] in ran.out


def test_salvage_says_how_many_rows_are_lost(memory: Path) -> None:
    as_npz(Path("more.npz"), columns(30, 5))
    (segment,) = memory.glob("rows-*")
    done("add", memory, "--data", "more.npz")
    assert len(list(memory.glob("rows-*"))) == 2
    content = bytearray(segment.read_bytes())
    content[-1] ^= 1
    segment.write_bytes(content)
    ran = resmem("salvage", memory, "saved", "--json")
    assert ran.code == 1
    assert (ran.json["rows"], ran.json["lost"]) == (30, 400)
    assert [problem["file"] for problem in ran.json["problems"]] == [segment.name]
    assert rm.Memory.open("saved", verify=True).ids.tolist() == list(range(400, 430))
    assert "resmem salvage" in resmem("verify", memory).out


def test_forgotten_rows_that_nobody_knows_are_saved_on_demand(memory: Path) -> None:
    done("forget", memory, "1", "2")
    gone = next(memory.glob("gone-*"))
    content = bytearray(gone.read_bytes())
    content[-1] ^= 1
    gone.write_bytes(content)
    ran = resmem("salvage", memory, "saved")
    assert ran.code == 3
    assert "--keep-forgotten" in ran.err
    assert not Path("saved").exists()
    assert done("salvage", memory, "saved", "--keep-forgotten", "--json").json["rows"] == 400


def test_a_fast_check_reads_no_values(memory: Path) -> None:
    found = done("verify", memory, "--fast", "--json").json
    assert (found["ok"], found["full"]) == (True, False)
    assert "no value was read" in done("verify", memory, "--fast").out
    segment = next(memory.glob("rows-*"))
    content = bytearray(segment.read_bytes())
    content[-1] ^= 1
    segment.write_bytes(content)
    assert resmem("verify", memory, "--fast").code == 0
    assert resmem("verify", memory).code == 1
    segment.write_bytes(content[:-10])
    assert resmem("verify", memory, "--fast").code == 1


def test_a_copy_of_the_manifest_that_is_damaged_is_no_damage_of_the_memory(memory: Path) -> None:
    done("forget", memory, "1")
    (memory / "manifest.copy").write_bytes(b"half")
    ran = done("verify", memory)
    assert "the copy of the manifest is written anew" in ran.out
    assert "saved index" not in ran.out


def test_info_tells_the_last_changes_and_whose_rows_there_are(crowd: Path) -> None:
    for number in range(12):
        done("forget", crowd, number)
    found = done("info", crowd, "--json").json
    assert len(found["history"]) == 10
    last = found["history"][-1]
    assert (last["what"], last["rows"], last["version"]) == ("forget", 1, found["version"])
    assert found["carried"]["owners"] == {"alice": 88, "bob": 50, "": 50}
    out = done("info", crowd).out
    assert "2, 50 rows of nobody, 88 rows have expired, the next expire at 2100-01-01 00:00 UTC" in " ".join(
        out.split()
    )
    assert out.count("forget") == 10


def test_info_of_rows_that_carry_nothing_names_no_owners(memory: Path) -> None:
    assert done("info", memory, "--json").json["carried"] is None
    out = done("info", memory).out
    assert "owners" not in out
    assert "append" in out


# ---------------------------------------------------------------------- mistakes

CROWD = "crowd"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("forget", CROWD), "no ids are given"),
        (("forget", CROWD, "1", "--owner", "bob"), "rows are named by their ids and by conditions"),
        (("forget", CROWD, "--onwer", "bob"), "--owner"),
        (("forget", CROWD, "--tga", "eu"), "--tag"),
        (("forget", CROWD, "--gruop", "1"), "--group"),
        (("forget", CROWD, "--lable", "1"), "--label"),
        (("forget", CROWD, "--expird"), "--expired"),
        (("forget", CROWD, "1", "--dry-rnu"), "--dry-run"),
        (("forget", CROWD, "1", "--ersae"), "--erase"),
        (("forget", CROWD, "1", "--erase", "--certifcate", "x.json"), "--certificate"),
        (("forget", CROWD, "--group", "one"), "'one' is not a group of"),
        (("forget", CROWD, "--label", "dgo"), "did you mean 'dog'?"),
        (("forget", CROWD, "--label", "4"), "expected a number below 4 or the name of a class"),
        (("forget", CROWD, "seven"), "'seven' is not an id of"),
        (("forget", CROWD, "9999999999999999999"), "id"),
        (("forget", CROWD, "999"), "does not hold"),
        (("forget", CROWD, "999", "--dry-run"), "does not hold"),
        (("forget", CROWD, "1", "--dry-run", "--erase"), "leave --erase out"),
        (("forget", CROWD, "1", "--certificate", "x.json"), "add --erase"),
        (("forget", CROWD, "1", "--erase", "--certificate", "a.npz"), "is not overwritten"),
        (("forget", CROWD, "1", "--erase", "--certificate", "no/x.json"), "cannot be written"),
        (("compact", CROWD, "--certificate", "a.npz"), "is not overwritten"),
        (("compact", CROWD, "--certifcate", "x.json"), "--certificate"),
        (("inventory", "crwod"), "did you mean 'crowd'?"),
        (("inventory", CROWD, "--onwer", "bob"), "--owner"),
        (("inventoy", CROWD), "did you mean 'inventory'?"),
        (("salvage", "crwod", "new"), "did you mean 'crowd'?"),
        (("salvage", CROWD, CROWD), "not empty"),
        (("salvage", CROWD), "Missing argument 'TO'"),
        (("salvage", CROWD, "new", "--keep-forgoten"), "--keep-forgotten"),
        (("verify", CROWD, "--fats"), "--fast"),
        (("add", CROWD, "--data", "a.npz", "--owner", ""), "--owner is empty"),
        (("add", CROWD, "--data", "a.npz", "--tag", "a\nb"), "is no tag"),
        (("add", CROWD, "--data", "a.npz", "--tag", ""), "is no tag"),
        (("add", CROWD, "--data", "a.npz", "--expires", "tomorrow"), "such as 2027-01-31"),
        (("add", CROWD, "--data", "a.npz", "--expires", "30x"), "30d or 12h"),
        (("add", CROWD, "--data", "a.npz", "--expires", "1950-01-01"), "such as 2027-01-31"),
        (("add", CROWD, "--data", "a.npz", "--expires", "999999999999999d"), "such as 2027-01-31"),
        (("build", "new", "--data", "a.npz", "--owenr", "x"), "--owner"),
        (("build", "new", "--data", "a.npz", "--expires", "30"), "--expires is '30'"),
        (("build", "new", "--data", "net:train", "--model", "net:make_model", "--owner", "x"), "leave --owner out"),
        (
            ("build", "new", "--data", "text.txt", "--model", "x", "--tag", "x", "--expires", "1d"),
            "--expires and --tag",
        ),
    ],
)
def test_a_mistake_is_told_with_its_remedy_and_changes_nothing(
    crowd: Path, net: Path, words: tuple[str, ...], said: str
) -> None:
    Path("text.txt").write_text("some text\n")
    before = sorted(path.name for path in Path.cwd().iterdir())
    ran = resmem(*words)
    assert ran.code == 2, ran.err
    lines = [line for line in ran.err.splitlines() if "user's own print" not in line]
    assert [line.split(":")[0] for line in lines] == ["error", "remedy"]
    assert said in ran.err
    assert sorted(path.name for path in Path.cwd().iterdir() if path.name != "__pycache__") == before
    assert len(rm.Memory.open(crowd)) == 200


def test_a_regression_has_no_labels_and_some_memories_no_groups(memory: Path) -> None:
    as_npz(Path("values.npz"), regression(30))
    done("build", "values", "--data", "values.npz")
    ran = resmem("forget", "values", "--label", "0")
    assert (ran.code, "leave --label out" in ran.err) == (2, True)
    ran = resmem("forget", memory, "--group", "0")
    assert (ran.code, "have no group" in ran.err) == (2, True)


# ---------------------------------------------------------------------- hostile text

HOSTILE = ("\x1b[31mred\x1b[0m", "[bold]loud[/bold]", "two\nlines\r", "\u202eesrever :smile:")


@pytest.mark.parametrize(
    "words",
    [
        ("inventory", "mem"),
        ("inventory", "mem", "--owner", HOSTILE[0]),
        ("inventory", "mem", "--owner", "\x1b[31mrde\x1b[0m"),
        ("inventory", "mem", "--tag", "\x1b[2Jclaer"),
        ("info", "mem"),
        ("forget", "mem", "--owner", HOSTILE[3], "--dry-run"),
        ("forget", "mem", "--owner", "\x1b[31mrde"),
        ("forget", "mem", "--tag", "\x1b[2Jclear", "--erase", "--certificate", "\x1b[2J.json"),
        ("add", "mem", "--data", "held.npz", "--expires", "\x1b[2J"),
        ("add", "mem", "--data", "held.npz", "--tag", "a\n\x1b[2J"),
    ],
)
def test_what_rows_carry_does_nothing_to_a_terminal(here: Path, words: tuple[str, ...]) -> None:
    data = columns(40)
    with rm.Memory.create("mem", dim=6, n_outputs=4) as memory:
        memory.append(
            data["keys"],
            data["labels"],
            data["predictions"],
            owners=[HOSTILE[n % 4] for n in range(40)],
            tags=[["\x1b[2Jclear", "[red]x"]] * 40,
            snippets=["\x1b]0;title\x07"] * 40,
        )
    ran = resmem(*words)
    assert ran.code in (0, 2)
    for text in (ran.out, ran.err):
        assert not [character for character in text if character != "\n" and not character.isprintable()]
    if words == ("inventory", "mem"):
        assert "[bold]loud[/bold]" in ran.out
        assert "\\x1b[31mred" in ran.out
        assert "two\\nlines\\r" in ran.out
        assert "[red]x" in ran.out
    with_json = resmem(*words, "--json")
    assert with_json.out.isascii()
    assert "\x1b" not in with_json.out
