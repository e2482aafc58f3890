"""From a spec string to an index.

For example "auto", "exact", "exact:torch?device=cuda", "faiss:IVF1024,PQ64x4fs,RFlat?nprobe=16", "scann", "ray:8". A
name that is none of ours is looked for among the engines that other packages bring.
"""

import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from dataclasses import replace
from typing import Any

from residual_memory.errors import BrokenPlugin, InvalidInput
from residual_memory.indexes.base import Engine, Index, IndexSpec, Stored, numbers_of
from residual_memory.indexes.calibration import as_recall
from residual_memory.indexes.distances import KeySource
from residual_memory.indexes.footprint import Footprint
from residual_memory.machine import free_ram_bytes

AUTO = "auto"
EXACT_UP_TO = 1_000_000  # rows; beyond, "auto" takes inverted files with product quantisation
AUTO_RECALL = "0.95"
MOST_NUMBERS, LEAST_NUMBERS, ID_BYTES = 128, 16, 8
GRAPH_FROM = 1 << 14  # cells; from here on "auto" finds the nearest ones in a graph
EXACT_TAIL = 1 << 14  # rows that were appended and are searched exactly, before they are encoded like the others
# Each engine's class; its module is imported when the engine is named.
ENGINES: dict[str, str] = {
    "exact": "residual_memory.indexes.exact:ExactEngine",
    "faiss": "residual_memory.indexes.faiss:FaissEngine",
    "ray": "residual_memory.indexes.ray:RayEngine",
    "scann": "residual_memory.indexes.scann:ScannEngine",
}
PLUGINS = "residual_memory.indexes"  # entry points of other packages: a name, and the class of its engine
EXACT = IndexSpec("exact")
_EXPECTED = "expected a class that implements residual_memory.indexes.base.Engine"
_registered: dict[str, type[Engine]] = {}


def parse_spec(text: str) -> IndexSpec:
    """Read a spec.

    Raises
    ------
    InvalidInput : if the engine is unknown, or an option is not name=value.
    """
    head, _, query = str(text).partition("?")
    engine, _, build = head.partition(":")
    if engine not in (AUTO, *ENGINES, *_registered) and not _entry_points(name=engine):
        known = engine_names()
        close = difflib.get_close_matches(engine, known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InvalidInput(f"index is {text!r}, expected to begin with one of {', '.join(known)}{hint}")
    pairs = [option.partition("=") for option in query.split("&") if option]
    if bad := [name for name, equals, value in pairs if not (name and equals and value)]:
        raise InvalidInput(f"index option {bad[0]!r} in {text!r} is not of the form name=value")
    return IndexSpec(engine, build, {name: value for name, _, value in pairs})


def engine_names() -> list[str]:
    """What a spec may begin with: ours, and then those of other packages."""
    others = {*_registered, *(point.name for point in _entry_points())} - {AUTO, *ENGINES}
    return [AUTO, *ENGINES, *sorted(others)]


def register_index(name: str, engine: type[Engine]) -> None:
    """Let specs of this process begin with a name. A package says it once and for all by an entry point instead.

    Parameters
    ----------
    name : letters, digits, "-" and "_". A name that was registered before gets the new engine.
    engine : a class that is made without arguments.

    Raises
    ------
    InvalidInput : if the name is one of ours, or none, or the class is no engine.
    """
    if not re.fullmatch(r"[A-Za-z][\w-]*", name) or name in (AUTO, *ENGINES):
        raise InvalidInput(
            f"name is {name!r}, expected letters, digits, '-' or '_', and none of {AUTO}, {', '.join(ENGINES)}"
        )
    if not _is_engine(engine):
        raise InvalidInput(f"engine is {engine!r}, {_EXPECTED}")
    _registered[name] = engine


def engine_named(name: str) -> Engine:
    """The engine of a spec that was resolved.

    Raises
    ------
    BrokenPlugin : if it is another package's and cannot be imported, or is no engine.
    """
    if name in ENGINES:
        module, _, kind = ENGINES[name].partition(":")
        engine: Engine = getattr(importlib.import_module(module), kind)()
        return engine
    return _registered[name]() if name in _registered else _plugin(name)


def _plugin(name: str) -> Engine:
    """The engine that an entry point names."""
    points = _entry_points(name=name)
    said = sorted(f"{point.value} of {point.dist.name if point.dist else 'a package'}" for point in points)
    if len({point.value for point in points}) != 1:
        raise BrokenPlugin(f"index engine {name!r} is {' and '.join(said) or 'not there'}; keep one of these packages")
    try:
        kind = next(iter(points)).load()
        engine: Any = kind() if _is_engine(kind) else None
    except Exception as error:  # whatever the other package does when it is imported
        raise BrokenPlugin(f"index engine {name!r}, {said[0]}, cannot be imported: {error!r}") from error
    if engine is None:
        raise BrokenPlugin(f"index engine {name!r}, {said[0]}, is no engine, {_EXPECTED}")
    return engine


def _is_engine(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Engine) and not inspect.isabstract(kind)


def _entry_points(name: str | None = None) -> importlib.metadata.EntryPoints:
    points = importlib.metadata.entry_points(group=PLUGINS)
    return points if name is None else points.select(name=name)


def check_index(text: str, width: int) -> None:
    """Refuse a spec that cannot be built for keys of so many numbers, before there are rows.

    Raises
    ------
    InvalidInput : if the engine is unknown, or does not know the build string or an option.
    MissingExtra : if the engine is not installed.
    """
    spec = parse_spec(text)
    if spec.engine == AUTO:
        if spec.build or set(spec.options) - {"recall"}:
            raise InvalidInput(f"index is {text!r}, but 'auto' takes a recall alone; name an engine")
        as_recall(numbers_of(spec.options).get("recall", 1.0))
    else:
        engine_named(spec.engine).check(spec, width)


def planned(text: str, width: int, n_rows: int, ram_bytes: int | None = None) -> tuple[IndexSpec, Footprint]:
    """What an index of so many rows will be, and what it will take.

    Parameters
    ----------
    ram_bytes : what may be had; None is what this machine has left.

    Raises
    ------
    InvalidInput, MissingExtra : as `check_index`, or if its bytes are not known.
    """
    spec = resolved(parse_spec(text), width, n_rows, ram_bytes)
    engine = engine_named(spec.engine)
    engine.check(spec, width)
    if n_rows < engine.required_rows(spec):
        spec, engine = EXACT, engine_named("exact")
    return spec, engine.footprint(spec, width, n_rows)


def resolved(spec: IndexSpec, width: int, n_rows: int, ram_bytes: int | None = None) -> IndexSpec:
    """What "auto" comes to for a memory of so many rows; every other spec as it is."""
    if spec.engine != AUTO:
        return spec
    if n_rows <= EXACT_UP_TO or importlib.util.find_spec("faiss") is None:
        return EXACT
    factory = auto_factory(width, n_rows, free_ram_bytes() if ram_bytes is None else ram_bytes)
    return IndexSpec("faiss", factory, {"recall": AUTO_RECALL, **spec.options})


def for_few_queries(text: str, n_rows: int) -> str:
    """What "auto" comes to where a few queries are asked at a time, as by the clients of a server.

    Exact search in numpy takes 0.4 of faiss's time for 16 queries (benchmarks/results/serve.json), and more than
    faiss's for thousands.
    """
    return "exact:numpy" if text == AUTO and n_rows <= EXACT_UP_TO else text


def auto_factory(width: int, n_rows: int, ram_bytes: int) -> str:
    """What "auto" asks of faiss beyond `EXACT_UP_TO` rows: about 4 sqrt(n) cells, and half a byte for each number.

    Keys are rotated to their principal directions, of which the first ones are kept, and among these at random, so that
    each number tells as much as the next: of a million keys of text, 256 numbers long, the shortlist that held 0.95 of
    the neighbours was then 4 times as short as with half a byte for every two numbers as they come.

    Parameters
    ----------
    ram_bytes : what may be had; codes take no more than half of it, if they can be that short.
    """
    kept = min(width, MOST_NUMBERS)
    while kept > LEAST_NUMBERS and n_rows * (kept // 2 + ID_BYTES) > ram_bytes // 2:
        kept = max(kept // 2, LEAST_NUMBERS)
    return compressed(kept, usual_cells(n_rows))


def usual_cells(n_rows: int) -> int:
    """About 4 sqrt(n), a power of 2."""
    return 1 << max(10, (4 * int(n_rows**0.5)).bit_length() - 1)


def compressed(kept: int, cells: int) -> str:
    """The factory of an index with so many cells, and codes of half a byte for each of the numbers that are kept."""
    graph = "_HNSW32" if cells >= GRAPH_FROM else ""
    return f"PCAR{kept},IVF{cells}{graph},PQ{kept}x4fs"


def build_index(spec: IndexSpec, keys: KeySource, first: int, n_rows: int, like: Index | None = None) -> Index:
    """Build the index that a spec names over some rows; too few for it are searched exactly.

    Parameters
    ----------
    like : an index of this spec over earlier rows: what it learned of them may serve again.

    Raises
    ------
    InvalidInput : if the engine does not know the build string or an option.
    MissingExtra : if the engine is not installed.
    """
    spec = resolved(spec, keys.width, n_rows)
    engine = engine_named(spec.engine)
    engine.check(spec, keys.width)  # a mistyped spec is refused now, not when the memory has grown
    required = engine.required_rows(spec)
    if n_rows < (required if like is None else min(required, EXACT_TAIL)):
        spec, engine, like = EXACT, engine_named("exact"), None
    return engine.build(spec, keys, first, n_rows, like)


def saved_spec(spec: IndexSpec, name: str, width: int, n_rows: int) -> IndexSpec | None:
    """The spec by which an index saved under a name can serve where `spec` is asked for; None where it cannot.

    Where a memory of `n_rows` is large enough for "auto" to take faiss, any faiss index serves it.
    """
    if spec.engine == AUTO and (spec := resolved(spec, width, n_rows)) != EXACT:
        spec = replace(spec, build=name.partition(":")[2])
    return spec if engine_named(spec.engine).saved_name(spec) == name else None


def load_index(spec: IndexSpec, keys: KeySource, first: int, n_rows: int, stored: Stored) -> Index:
    """The index over some rows, from what was kept of it; the spec is that of `saved_spec`.

    Raises
    ------
    InvalidInput : if an option does not fit.
    CorruptFile : if the engine cannot read it.
    """
    return engine_named(spec.engine).load(spec, keys, first, n_rows, stored)
