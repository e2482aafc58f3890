"""What is printed: JSON for programs, tables for people, and nothing that data could do to a terminal."""

import json
from pathlib import Path

import numpy as np
import pytest

import residual_memory as rm
from residual_memory._version import __version__
from residual_memory.cli.output import plain
from residual_memory.display import shown
from tests.cli.workshop import as_npz, columns, done, resmem

HOSTILE = ("\x1b[31mred\x1b[0m", "[bold]loud[/bold]", "two\nlines\r", "\u202eesrever :smile:")

COMMANDS: list[tuple[str, ...]] = [
    ("build", "mem", "--data", "train.npz"),
    ("tune", "mem", "--data", "held.npz"),
    ("evaluate", "mem", "--data", "held.npz"),
    ("audit", "privacy", "mem", "--data", "held.npz"),
    ("predict", "mem", "--data", "held.npz"),
    ("predict", "mem", "--data", "held.npz", "--out", "out.csv"),
    ("explain", "mem", "--data", "held.npz", "--row", "3"),
    ("add", "mem", "--data", "held.npz"),
    ("forget", "mem", "4"),
    ("forget", "mem", "5", "--erase", "--certificate", "five.json"),
    ("compact", "mem"),
    ("compact", "mem", "--certificate", "none.json"),
    ("inventory", "mem"),
    ("inventory", "mem", "--owner", "alice"),
    ("salvage", "mem", "saved"),
    ("verify", "mem", "--fast"),
    ("index", "mem", "--index", "faiss:IVF4,Flat"),
    ("verify", "mem"),
    ("info", "mem"),
    ("estimate", "--rows", "1000", "--dim", "8", "--outputs", "4"),
    ("bench", "mem", "--queries", "5", "--batch", "2"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=[words[0] for words in COMMANDS])
def test_json_is_one_object_and_nothing_else(memory: Path, words: tuple[str, ...]) -> None:
    found = done(*words, "--json").json
    assert isinstance(found, dict)
    assert found.get("memory", "mem") == "mem"


@pytest.mark.parametrize("words", COMMANDS, ids=[words[0] for words in COMMANDS])
def test_people_get_lines_of_at_most_80_columns(
    memory: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = done(*words).out.splitlines()
    assert lines
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("words", [(), ("--help",), *((words[0], "--help") for words in COMMANDS), ("demo", "-h")])
def test_help_says_what_there_is(words: tuple[str, ...]) -> None:
    ran = resmem(*words)
    assert ran.code == (0 if words else 2)
    assert "Usage: resmem" in ran.out


def test_the_version_is_printed() -> None:
    assert done("--version").out == f"resmem {__version__}\n"


# ---------------------------------------------------------------------- hostile names


@pytest.fixture
def hostile(here: Path) -> Path:
    """A memory whose class names and ids would do things to a terminal."""
    data = columns(200)
    memory = rm.Memory.create(here / "mem", dim=6, n_outputs=4, class_names=HOSTILE)
    ids = np.array([f"{HOSTILE[n % 4]} {n}" for n in range(200)])
    memory.append(data["keys"], data["labels"], data["predictions"], ids=ids)
    memory.close()
    held = columns(60, 4)
    held["ids"] = np.array([f"\x1b]0;title\x07 {n}" for n in range(60)])
    as_npz(here / "named.npz", held)
    return here / "mem"


@pytest.mark.parametrize(
    "words",
    [
        ("info", "mem"),
        ("predict", "mem", "--data", "named.npz"),
        ("explain", "mem", "--data", "named.npz", "--row", "1"),
        ("forget", "mem", "\x1b[2J"),
        ("tune", "mem", "--data", "\x1b[2Jname.npz"),
        ("tune\x1b[2J",),
        ("info", "\x1b[2J[red]"),
    ],
)
def test_names_from_data_only_appear(hostile: Path, words: tuple[str, ...]) -> None:
    ran = resmem(*words)
    for text in (ran.out, ran.err):
        assert not [character for character in text if character != "\n" and not character.isprintable()]
    assert ran.code in (0, 2)


def test_markup_in_names_is_text(hostile: Path) -> None:
    out = done("info", hostile).out
    assert "[bold]loud[/bold]" in out
    assert "\\x1b[31mred" in out
    assert "two\\nlines\\r" in out
    assert ":smile:" in out


def test_json_keeps_hostile_names_and_is_ascii(hostile: Path) -> None:
    ran = done("info", hostile, "--json")
    assert tuple(ran.json["class_names"]) == HOSTILE
    assert ran.out.isascii()
    assert "\x1b" not in ran.out


def test_long_names_are_cut_for_people(here: Path) -> None:
    assert shown("x" * 100, 10) == "x" * 9 + "…"
    assert shown("naïve 猫") == "naïve 猫"
    assert shown("\ud800\u2028") == "\\ud800\\u2028"


def test_json_knows_no_infinity() -> None:
    found = plain({"a": np.float32("inf"), "b": np.arange(2), "c": Path("x"), 3: (True, None, float("nan"))})
    assert found == {"a": None, "b": [0, 1], "c": "x", "3": [True, None, None]}
    json.dumps(found, allow_nan=False)
