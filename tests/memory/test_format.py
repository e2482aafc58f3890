import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from residual_memory.errors import CorruptFile, ResidualMemoryError, UnsupportedFormat
from residual_memory.memory import Memory, segments, verify
from residual_memory.memory.format import decoded_strings, encoded_strings
from tests.problems import LAYOUTS, Problem, classification, empty_memory, in_plain_python, memory_of, regression, told

Body = dict[str, Any]


@pytest.fixture(params=LAYOUTS)
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A closed memory of one segment, two of whose rows are forgotten."""
    return small_memory(tmp_path / "memory", LAYOUTS[request.param])


def small_memory(path: Path, options: Body) -> Path:
    with memory_of(classification(n=4, d=2, c=2), path, **options) as memory:
        memory.forget([0, 2])
    return path


def body_of(path: Path) -> Body:
    body: Body = json.loads((path / "manifest.json").read_bytes())["body"]
    return body


def write_body(path: Path, body: Any) -> None:
    """A manifest that was forged with care: its checksum is right."""
    inner = json.dumps(body, sort_keys=True, separators=(",", ":"))
    (path / "manifest.json").write_bytes(f'{{"crc32":{zlib.crc32(inner.encode())},\n"body":{inner}}}\n'.encode())


def rows_of(path: Path) -> Path:
    return path / body_of(path)["segments"][0]["file"]["name"]


def gone_of(path: Path) -> Path:
    return path / body_of(path)["forgotten"]["file"]["name"]


def parsed(path: Path) -> tuple[Body, bytes]:
    """Header and data of a segment."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def forge(path: Path, content: bytes) -> None:
    """Put other content into the segment, with a manifest that vouches for it."""
    rows_of(path).write_bytes(content)
    body = body_of(path)
    record = body["segments"][0]["file"]
    record.update(length=len(content), chunk=max(1 << 20, len(content)), crc32=[zlib.crc32(content)])
    write_body(path, body)


def with_header(text: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def damaged_files(path: Path) -> set[str]:
    report = verify(path)
    assert {problem.file for problem in report.ignored} <= {"manifest.copy"}
    return {problem.file for problem in report.problems or report.ignored}


def assert_refused(path: Path, culprit: str) -> None:
    """No verified open of it gives a wrong answer, and the damaged file is named."""
    report = verify(path)
    assert not report.ok
    assert culprit in {problem.file for problem in report.problems}
    with pytest.raises((CorruptFile, UnsupportedFormat), match=culprit):
        Memory.open(path, verify=True)


# ---------------------------------------------------------------------- what is written


@pytest.mark.parametrize("values", [["a"], ["", "ab"], ["ü", "日本語", "x" * 40], []])
def test_strings_come_back_from_their_bytes(values: list[str]) -> None:
    encoded = encoded_strings(np.array(values, np.str_))
    assert encoded.dtype == np.uint8
    assert decoded_strings(encoded).tolist() == values


@pytest.mark.parametrize(
    "options", [*LAYOUTS.values(), {"key_dtype": "float16", "prediction_dtype": "float32"}, {"groups": True}]
)
def test_segments_are_plain_safetensors_files(tmp_path: Path, options: dict[str, Any]) -> None:
    problem = classification(n=3)
    groups = ["x", "yy", "x"] if options == {"groups": True} else None
    options = {name: value for name, value in options.items() if name != "groups"}
    memory_of(problem, tmp_path / "memory", groups=groups, **options).close()
    columns = load_file(rows_of(tmp_path / "memory"))
    assert {"ids", "keys", "labels"} <= set(columns)
    np.testing.assert_array_equal(columns["keys"], problem.keys.astype(options.get("key_dtype", "float64")))
    np.testing.assert_array_equal(columns["labels"], problem.labels)
    assert columns["ids"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_every_column_starts_at_a_multiple_of_its_item_size(tmp_path: Path, options: Body) -> None:
    problem = classification(n=3, d=3, c=3)
    memory_of(problem, tmp_path / "memory", key_dtype="float16", groups=["a", "bb", "ccc"], **options).close()
    path = rows_of(tmp_path / "memory")
    header, data = parsed(path)
    start = path.stat().st_size - len(data)
    sizes = {"I64": 8, "I32": 4, "F64": 8, "F16": 2, "U16": 2, "U8": 1}
    said = {"indices", "probabilities", "rest"} if "residuals" in options else {"predictions"}
    assert set(header) == {"ids", "keys", "labels", "groups"} | said
    for entry in header.values():
        assert (start + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0


@pytest.mark.parametrize("problem", [classification(n=5), regression(n=5)], ids=["classification", "regression"])
def test_a_memory_comes_back_as_it_was(tmp_path: Path, problem: Problem) -> None:
    names = [f"class {number}" for number in range(problem.predictions.shape[1])]
    with empty_memory(problem, tmp_path / "m", class_names=names, source={"layer": "avgpool", "x": [1]}) as memory:
        memory.append(problem.keys, problem.labels, problem.predictions, ids=["e", "d", "c", "b", "a"], groups=range(5))
        memory.forget(["c"])
        memory.save_setting({"n_neighbors": 3})
    again = Memory.open(tmp_path / "m")
    assert (again.version, len(again), again.ids.tolist()) == (3, 4, ["e", "d", "b", "a"])
    assert (again.class_names, again.source) == (tuple(names), {"layer": "avgpool", "x": [1]})
    assert again.setting == {"n_neighbors": 3}
    assert again.layout == memory.layout
    rows = np.arange(5)
    np.testing.assert_array_equal(again.snapshot.keys.take(rows), problem.keys)
    np.testing.assert_array_equal(again.snapshot.targets(rows), problem.labels)
    np.testing.assert_array_equal(again.snapshot.predictions(rows), problem.predictions)
    assert again.snapshot.all_groups is not None
    assert again.snapshot.all_groups.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_on_disk_are_those_in_ram_in_every_layout(tmp_path: Path, options: Body) -> None:
    problem = classification(n=9)
    rows = np.array([[8, 0], [3, 3], [5, 1]])
    in_ram = memory_of(problem, **options)
    memory_of(problem, tmp_path / "m", **options).close()
    first, second = in_ram.snapshot, Memory.open(tmp_path / "m", verify=True).snapshot
    np.testing.assert_array_equal(first.targets(rows), problem.labels[rows])
    np.testing.assert_array_equal(second.targets(rows), problem.labels[rows])
    np.testing.assert_array_equal(first.predictions(rows.ravel()), second.predictions(rows.ravel()))


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_a_row_takes_the_bytes_that_its_layout_tells(tmp_path: Path, options: Body) -> None:
    memory = memory_of(classification(n=50), tmp_path / "m", **options)
    _, data = parsed(rows_of(tmp_path / "m"))
    assert len(data) == 50 * memory.layout.bytes_per_row(2 if "residuals" in options else None)


# ---------------------------------------------------------------------- damage


def every_byte(path: Path) -> Iterator[tuple[Path, bytes, int]]:
    for file in sorted(path.iterdir()):
        if file.name not in ("lock", "reserve"):  # neither holds anything
            content = file.read_bytes()
            for place in range(len(content)):
                yield file, content, place
            file.write_bytes(content)


def flipped(content: bytes, place: int, mask: int) -> bytes:
    return content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]


def test_every_flipped_byte_is_found_and_its_file_named(home: Path) -> None:
    n_files = set()
    for file, content, place in every_byte(home):
        n_files.add(file.name)
        file.write_bytes(flipped(content, place, 1 << place % 8))
        assert damaged_files(home) == {file.name}, f"byte {place} of {file.name}"
    assert len(n_files) == 4
    assert verify(home).ok


def test_every_truncation_is_found_and_its_file_named(home: Path) -> None:
    for file, content, place in every_byte(home):
        file.write_bytes(content[:place])
        assert damaged_files(home) == {file.name}, f"{file.name} cut to {place} bytes"
        if place % 16 == 0 and file.name != "manifest.copy":
            with pytest.raises(CorruptFile, match=file.name):
                Memory.open(home)


def test_every_byte_flipped_is_refused_by_a_verified_open(home: Path) -> None:
    for file, content, place in every_byte(home):
        if place % 7 == 0 and file.name != "manifest.copy":
            file.write_bytes(flipped(content, place, 0xFF))
            with pytest.raises(CorruptFile, match=file.name):
                Memory.open(home, verify=True)


def test_an_unverified_open_of_flipped_bytes_never_fails_in_a_foreign_way(home: Path) -> None:
    for file, content, place in every_byte(home):
        if place % 3 == 0:
            file.write_bytes(flipped(content, place, 1 << place % 7))
            with suppress(ResidualMemoryError):
                assert Memory.open(home).snapshot.alive.sum() == 2


@pytest.mark.parametrize("which", [rows_of, gone_of])
@pytest.mark.parametrize("grown", [1, 4096])
def test_a_file_with_bytes_added_is_refused(home: Path, which: Callable[[Path], Path], grown: int) -> None:
    file = which(home)
    file.write_bytes(file.read_bytes() + b"\0" * grown)
    assert_refused(home, file.name)
    with pytest.raises(CorruptFile, match=file.name):
        Memory.open(home)


@pytest.mark.parametrize("which", [rows_of, gone_of])
def test_a_missing_file_is_named(home: Path, which: Callable[[Path], Path]) -> None:
    file = which(home)
    file.unlink()
    assert_refused(home, file.name)
    with pytest.raises(CorruptFile, match=rf"{file.name} is missing"):
        Memory.open(home)


@pytest.mark.parametrize("which", [rows_of, gone_of])
def test_a_symbolic_link_in_the_place_of_a_file_is_not_followed(home: Path, which: Callable[[Path], Path]) -> None:
    file = which(home)
    os.rename(file, home.parent / "elsewhere")
    os.symlink(home.parent / "elsewhere", file)
    assert_refused(home, file.name)
    with pytest.raises(CorruptFile, match=file.name):
        Memory.open(home)


def test_a_folder_in_the_place_of_a_file_is_refused(home: Path) -> None:
    file = rows_of(home)
    file.unlink()
    file.mkdir()
    assert_refused(home, file.name)


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_swapped_segments_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Body) -> None:
    path = tmp_path / "memory"
    problem = classification(n=4)
    monkeypatch.setattr(segments, "MERGE_BYTES", 0)
    with memory_of(problem, path, **options) as memory:
        memory.append(problem.keys, problem.labels, told(memory, problem))
    names = [entry["file"]["name"] for entry in body_of(path)["segments"]]
    assert len(names) == 2
    first, second = (path / name for name in names[:2])
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)
    assert damaged_files(path) == {first.name, second.name}


def test_a_missing_manifest_is_damage_where_files_of_a_memory_are(home: Path) -> None:
    (home / "manifest.json").unlink()
    assert not verify(home).ok


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"manifest"',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"crc32":0,\n"body":{}}\n',
        b'{"crc32":1,"crc32":2,"body":{},"body":{}}',
        b'{"body":[]}',
        b'{"crc32":0,\n"body":NaN}\n',
    ],
)
def test_a_file_that_is_no_manifest_is_refused(home: Path, content: bytes) -> None:
    (home / "manifest.json").write_bytes(content)
    assert_refused(home, "manifest.json")


def test_a_duplicate_key_in_the_manifest_is_refused(home: Path) -> None:
    content = (home / "manifest.json").read_bytes()
    (home / "manifest.json").write_bytes(content.replace(b'"body":{', b'"body":{"version":9,', 1))
    assert_refused(home, "manifest.json")


def test_a_newer_format_is_refused_by_name(home: Path) -> None:
    write_body(home, {**body_of(home), "format": 3})
    with pytest.raises(UnsupportedFormat, match=r"format 3.*reads formats 1 to 2.*upgrade"):
        Memory.open(home)
    assert not verify(home).ok


@pytest.mark.parametrize("found", [None, 0, "1", 1.5, [1]])
def test_an_unknown_format_is_refused(home: Path, found: Any) -> None:
    write_body(home, {**body_of(home), "format": found})
    with pytest.raises((UnsupportedFormat, CorruptFile)):
        Memory.open(home)


def in_layout(**changes: Any) -> Callable[[Body], None]:
    return lambda body: body["layout"].update(changes)


def in_segment(**changes: Any) -> Callable[[Body], None]:
    return lambda body: body["segments"][0].update(changes)


def in_file(**changes: Any) -> Callable[[Body], None]:
    return lambda body: body["segments"][0]["file"].update(changes)


def in_body(**changes: Any) -> Callable[[Body], None]:
    return lambda body: body.update(changes)


FOREIGN_NAMES = ["../x", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\0b", "a\nb", "a b", "\\x", 5, None, ["a"]]

FORGERIES: dict[str, Callable[[Body], Any]] = {
    **{f"name {name!r}": in_file(name=name) for name in FOREIGN_NAMES},
    "file named twice": lambda body: body["segments"].append(body["segments"][0]),
    "segment and gone are one": lambda body: body.update(forgotten=body["segments"][0]),
    "negative length": in_file(length=-1),
    "text length": in_file(length="10"),
    "no chunk": in_file(chunk=0),
    "too few checksums": in_file(crc32=[]),
    "too many checksums": in_file(crc32=[1, 2]),
    "text checksum": in_file(crc32=["1"]),
    "unknown field of a file": in_file(mode=7),
    "negative rows": in_segment(n_rows=-1),
    "text rows": in_segment(n_rows="4"),
    "fewer rows": in_segment(n_rows=3),
    "2^62 rows": in_segment(n_rows=2**62),
    "no layout": lambda body: body.pop("layout"),
    "layout is a list": in_body(layout=[]),
    "no segments": lambda body: body.pop("segments"),
    "segments is a dict": in_body(segments={"a": 1}),
    "segments is a number": in_body(segments=1),
    "unknown field": in_body(surprise=1),
    "unknown key dtype": in_layout(key_dtype="object"),
    "unknown prediction dtype": in_layout(prediction_dtype="float128"),
    "unknown metric": in_layout(metric="hamming"),
    "unknown task": in_layout(task="ranking"),
    "unknown residuals": in_layout(residuals="sparse"),
    "negative dim": in_layout(dim=-2),
    "text dim": in_layout(dim="2"),
    "wider dim": in_layout(dim=3),
    "no outputs": in_layout(n_outputs=0),
    "another key dtype": in_layout(key_dtype="float32"),
    "another task": in_layout(task="regression"),
    "text version": in_body(version="2"),
    "unknown id kind": in_body(id_kind="float"),
    "other id kind": in_body(id_kind="string"),
    "another prediction dtype": in_layout(prediction_dtype="float32"),
    "log scale of another width": lambda body: in_layout(
        prediction_dtype="log16" if body["layout"]["prediction_dtype"] == "log8" else "log8"
    )(body),
    "other residuals": lambda body: in_layout(residuals="dense" if body["layout"]["residuals"] == "top-m" else "top-m")(
        body
    ),
    "classes of another width": lambda body: in_layout(
        n_outputs=70_000 if body["layout"]["n_outputs"] <= 65_536 else 65_536
    )(body),
    "more kept": in_body(top_m=3),
    "fewer kept": in_body(top_m=1),
    "none kept": in_body(top_m=0),
    "text kept": in_body(top_m="2"),
    "groups that are not there": in_body(group_kind="string"),
    "text next id": in_body(next_id="0"),
    "class names are a number": in_body(class_names=5),
    "forgotten is a list": in_body(forgotten=[1]),
}


def test_forgotten_rows_outside_the_memory_are_refused(home: Path) -> None:
    file = gone_of(home)
    header, _ = parsed(file)
    content = with_header(json.dumps(header).encode(), np.array([0, 99], "<i8").tobytes())
    file.write_bytes(content)
    body = body_of(home)
    body["forgotten"]["file"].update(length=len(content), chunk=1 << 20, crc32=[zlib.crc32(content)])
    write_body(home, body)
    with pytest.raises(CorruptFile):
        Memory.open(home)


def column(dtype: str, shape: Any, first: Any, last: Any) -> Body:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


HEADERS: dict[str, Any] = {
    "no column": {},
    "a list": [],
    "a number": 7,
    "deep": b"[" * 50_000,
    "not JSON": b"{keys}",
    "not UTF-8": b'{"\xff": 1}',
    "unknown dtype": {"keys": column("BF16", [4, 2], 0, 64)},
    "negative shape": {"keys": column("F64", [4, -2], 0, 64)},
    "no shape": {"keys": column("F64", [], 0, 64)},
    "text in the shape": {"keys": column("F64", [4, "2"], 0, 64)},
    "text repeated without end": {"keys": column("F64", ["2", 2**40], 0, 64)},
    "a fraction in the shape": {"keys": column("F64", [4, 2.0], 0, 64)},
    "infinity in the shape": b'{"keys":{"dtype":"F64","shape":[4,Infinity],"data_offsets":[0,64]}}',
    "1e999 in the shape": b'{"keys":{"dtype":"F64","shape":[4,1e999],"data_offsets":[0,64]}}',
    "a shape that overflows": {"keys": column("F64", [4, 2**62, 2**62], 0, 64)},
    "backward offsets": {"keys": column("F64", [4, 2], 64, 0)},
    "negative offsets": {"keys": column("F64", [4, 2], -64, 0)},
    "text offsets": {"keys": column("F64", [4, 2], "0", "64")},
    "offsets beyond the file": {"keys": column("F64", [4, 2], 1 << 40, (1 << 40) + 64)},
    "overlapping columns": {"keys": column("F64", [4, 2], 0, 64), "ids": column("I64", [4], 32, 64)},
    "a hole": {"keys": column("F64", [4, 2], 0, 64), "ids": column("I64", [4], 72, 104)},
    "only some columns": {"keys": column("F64", [4, 2], 0, 64)},
    "300,000 names": {f"column {number}": column("U8", [4, 0], 0, 0) for number in range(300_000)},
}


OPEN_ALL = """
import sys
from pathlib import Path
from residual_memory.memory import Memory, verify
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        verify(path)
        Memory.open(path)
    except Exception as error:
        outcome = type(error).__name__
    else:
        outcome = "opened"
    print(path.name, outcome, sep="\\t")
"""


@pytest.fixture(scope="module", params=LAYOUTS)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a process without type checks makes of each forgery."""
    homes = tmp_path_factory.mktemp("forged")
    folders = {}
    for number, (name, forgery) in enumerate([*FORGERIES.items(), *HEADERS.items()]):
        folders[f"{number:03}"] = name
        path = small_memory(homes / f"{number:03}", LAYOUTS[request.param])
        if name in HEADERS:
            forge(path, segment_under(forgery))
        else:
            body = body_of(path)
            forgery(body)
            write_body(path, body)
    lines = in_plain_python(OPEN_ALL, str(homes)).splitlines()
    return {folders[folder]: outcome for folder, outcome in (line.split("\t") for line in lines)}


def segment_under(header: Any) -> bytes:
    """A segment that is as long as the header's own offsets say."""
    if isinstance(header, bytes):
        return with_header(header, bytes(64))
    entries = header.values() if isinstance(header, dict) else []
    ends = [entry["data_offsets"][1] for entry in entries]
    return with_header(json.dumps(header).encode(), bytes(max((end for end in ends if end in range(1000)), default=0)))


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_manifest_is_refused_even_with_a_right_checksum(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "CorruptFile"


@pytest.mark.parametrize("name", HEADERS)
def test_a_forged_segment_header_is_refused_even_with_a_right_checksum(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "CorruptFile"


@pytest.mark.parametrize("length", [1 << 40, 1 << 63, (1 << 64) - 1, (1 << 20) + 1])
def test_a_header_longer_than_any_is_refused_before_it_is_read(home: Path, length: int) -> None:
    forge(home, with_header(b" " * ((1 << 20) + 1), b"", length))
    with pytest.raises(CorruptFile, match=r"header of [\d,]+ bytes"):
        Memory.open(home)


@pytest.mark.parametrize("content", [b"", b"\1", b"\0" * 7, b"\0" * 8])
def test_a_segment_shorter_than_its_header_is_refused(home: Path, content: bytes) -> None:
    forge(home, content)
    body = body_of(home)
    body["segments"][0]["file"]["crc32"] = [zlib.crc32(content)] if content else []
    write_body(home, body)
    with pytest.raises(CorruptFile):
        Memory.open(home)


def test_a_duplicate_column_is_refused(home: Path) -> None:
    header, data = parsed(rows_of(home))
    text = json.dumps(header)
    twice = text[:-1] + ',"keys":' + json.dumps(header["keys"]) + "}"
    forge(home, with_header(twice.encode(), data))
    with pytest.raises(CorruptFile):
        Memory.open(home)


def test_a_forged_header_that_says_the_same_is_read(home: Path) -> None:
    header, data = parsed(rows_of(home))
    wanted = Memory.open(home).snapshot.keys.take(np.arange(4)).tolist()
    forge(home, with_header(json.dumps(header, indent=1).encode(), data))
    assert Memory.open(home, verify=True).snapshot.keys.take(np.arange(4)).tolist() == wanted
