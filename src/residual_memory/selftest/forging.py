"""Files that were damaged or forged: flips, cuts and inventions, of which none may be taken for what was written."""

import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from residual_memory.errors import ResidualMemoryError
from residual_memory.memory import Memory, verify
from residual_memory.memory.format import COPY, MANIFEST, Manifest, Segment, canonical
from residual_memory.memory.reading import rows_of
from residual_memory.memory.storage import LOCK, RESERVE, Directory, FileRecord
from residual_memory.selftest.workload import add, create, folder_in_ram, state_of

_ODD_NUMBERS = (0, 1, -1, 7, 2**31, 2**40, 2**63, -(2**63), 2**64, 1e308, 0.5, float("nan"))
_ODD_TEXTS = ("", "x", "../x", "/etc/passwd", "a\0b", "\ud800", "9" * 5000)
_ODD_VALUES: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"a": 1}, *_ODD_TEXTS)


@dataclass(frozen=True)
class DamageReport:
    """What was made of damaged files.

    Attributes
    ----------
    trials : damages that were done, one at a time.
    undetected : those that `verify` did not find.
    misnamed : those that it found in another file.
    wrong_answers : those after which a verified open gave rows.
    violations : places of all these, and of errors that are not the library's own.
    """

    trials: int
    undetected: int
    misnamed: int
    wrong_answers: int
    violations: tuple[str, ...]


def damages(folder: Path, *, every: int = 1) -> DamageReport:
    """Flip each byte of a small memory, and cut each of its files at each place.

    Parameters
    ----------
    every : try each so many-th place alone.
    """
    path = folder / "memory"
    _small_memory(path)
    trials = undetected = misnamed = wrong = 0
    violations: list[str] = []
    for file in sorted(path.iterdir()):
        if file.name in (LOCK, RESERVE):  # neither holds anything
            continue
        content = file.read_bytes()
        for place in range(0, len(content), every):
            cut, flipped = content[:place], bytearray(content)
            flipped[place] ^= 1 << place % 8
            for what, changed in (("cut", cut), ("flipped", bytes(flipped))):
                file.write_bytes(changed)
                trials += 1
                found = _named(path)
                undetected += not found
                misnamed += bool(found) and file.name not in found
                wrong += file.name != COPY and _opens(path)
                if file.name not in found:
                    violations.append(f"{file.name} {what} at {place}: found in {sorted(found)}")
        file.write_bytes(content)
    return DamageReport(trials, undetected, misnamed, wrong, tuple(violations[:100]))


def _small_memory(path: Path) -> None:
    with create(str(path)) as memory:
        add(memory, range(8))
        add(memory, range(8, 11))
        memory.forget([1, 9])


def _named(path: Path) -> set[str]:
    report = verify(path)
    return {problem.file for problem in (*report.problems, *report.ignored)}


def _opens(path: Path) -> bool:
    try:
        state_of(Memory.open(path, verify=True))
    except ResidualMemoryError:
        return False
    return True


# ---------------------------------------------------------------------- forged files


@dataclass(frozen=True)
class FuzzReport:
    """What was made of forged files.

    Attributes
    ----------
    manifests, segments : inputs of each kind.
    accepted : of them, those that were read, as nothing in them contradicts the rest.
    violations : errors that are not the library's own, with the input; none where all is well.
    """

    manifests: int
    segments: int
    accepted: int
    violations: tuple[str, ...]


def fuzz(n_inputs: int, *, seed: int = 0, share_of_segments: float = 0.3) -> FuzzReport:
    """Read manifests and segments that were changed at random, most of them under right checksums."""
    with folder_in_ram() as folder:
        return _fuzz(folder / "memory", n_inputs, seed, int(n_inputs * share_of_segments))


def _fuzz(path: Path, n_inputs: int, seed: int, n_segments: int) -> FuzzReport:
    _small_memory(path)
    directory = Directory(path)
    manifest_bytes = (path / MANIFEST).read_bytes()
    manifest = Manifest.from_bytes(manifest_bytes, MANIFEST)
    segment = manifest.segments[0]
    original = (path / segment.file.name).read_bytes()
    chance = random.Random(seed)
    accepted = 0
    violations: list[str] = []
    for number in range(n_inputs):
        if number < n_segments:
            content = _changed_segment(original, chance)
            (path / segment.file.name).write_bytes(content)
            record = FileRecord(segment.file.name, len(content), 1 << 20, (0,))
            claimed = Segment(record, chance.choice((segment.n_rows, 0, 1, 2**40)))
            read: Callable[[], object] = partial(rows_of, directory, manifest, claimed)
        else:
            content = _changed_manifest(manifest_bytes, chance)
            read = partial(Manifest.from_bytes, content, MANIFEST)
        try:
            read()
            accepted += 1
        except ResidualMemoryError:
            pass
        except Exception as error:
            violations.append(f"{type(error).__name__}: {error} for {content[:2000]!r}")
            if len(violations) >= 10:
                break
    return FuzzReport(n_inputs - n_segments, n_segments, accepted, tuple(violations))


def _changed_manifest(content: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return _changed_bytes(content, chance)
    body = json.loads(content)["body"]
    for _ in range(chance.randint(1, 3)):
        _change_somewhere(body, chance)
    try:
        return canonical(body)
    except (UnicodeEncodeError, ValueError):
        return content


def _changed_segment(content: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return _changed_bytes(content, chance)
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    for _ in range(chance.randint(1, 3)):
        _change_somewhere(header, chance)
    text = json.dumps(header).encode()
    length = chance.choice((len(text), len(text), len(text), len(text) + 1, 0, 2**40, 2**64 - 1))
    return struct.pack("<Q", length) + text + content[8 + size :]


def _changed_bytes(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.randint(1, 8)):
        kind, place = chance.randrange(4), chance.randrange(len(changed) + 1)
        if kind == 0 and changed:
            changed[place % len(changed)] = chance.randrange(256)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            changed[place:place] = chance.randbytes(chance.randint(1, 40))
        else:
            start = chance.randrange(len(changed) + 1)
            changed[place:place] = changed[start : start + 200]
    return bytes(changed)


def _change_somewhere(value: Any, chance: random.Random) -> None:
    """Put something odd in the place of a part of a JSON value."""
    places = list(_places(value))
    if not places:
        return
    holder, key = chance.choice(places)
    kind = chance.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = chance.choice(_ODD_VALUES)
    elif kind == 2:
        holder[key] = chance.choice(_ODD_NUMBERS)
    elif kind == 3:
        other, place = chance.choice(places)
        holder[key] = json.loads(json.dumps(other[place]))
    elif isinstance(holder, dict):
        holder[chance.choice(("x", "__metadata__", str(key) * 2))] = holder[key]
    else:
        holder.append(holder[key])


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(entries):
        yield value, key
        yield from _places(entry)
