"""From a spec string to an index.

For example "auto", "exact", "exact:torch?device=cuda", "faiss:IVF1024,PQ64x4fs,RFlat?nprobe=16", "scann".
"""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from residual_memory.errors import InvalidInput, MissingExtra
from residual_memory.indexes.base import Index, Pieces
from residual_memory.indexes.distances import KeySource

EXACT_UP_TO = 1_000_000  # rows; beyond, "auto" takes inverted files with product quantisation


@dataclass(frozen=True)
class IndexSpec:
    """An engine, what to build, and how to query.

    Attributes
    ----------
    engine : "auto", "exact", "faiss" or "scann".
    build : what stands behind the colon: a backend of "exact", a factory string of faiss, options of scann.
    options : what stands behind the question mark.
    """

    engine: str
    build: str = ""
    options: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def parse(text: str) -> "IndexSpec":
        """Read a spec.

        Raises
        ------
        InvalidInput : if the engine is unknown, or an option is not name=value.
        """
        head, _, query = str(text).partition("?")
        engine, _, build = head.partition(":")
        if engine not in ENGINES:
            close = difflib.get_close_matches(engine, ENGINES, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InvalidInput(f"index is {text!r}, expected to begin with one of {', '.join(ENGINES)}{hint}")
        pairs = [option.partition("=") for option in query.split("&") if option]
        if bad := [name for name, equals, value in pairs if not (name and equals and value)]:
            raise InvalidInput(f"index option {bad[0]!r} in {text!r} is not of the form name=value")
        return IndexSpec(engine, build, {name: value for name, _, value in pairs})


def build_index(spec: IndexSpec, keys: KeySource, first: int, n_rows: int) -> Index:
    """Build the index that a spec names over some rows.

    Raises
    ------
    InvalidInput : if the engine does not know the build string or an option.
    MissingExtra : if the engine is not installed.
    """
    return ENGINES[spec.engine](spec, keys, first, n_rows)


def load_index(spec: IndexSpec, keys: KeySource, first: int, n_rows: int, stored: Pieces) -> Index:
    """The index that a spec names over some rows, from what `Index.saved` gave under the same `saved_name`.

    Raises
    ------
    InvalidInput : if an option does not fit.
    CorruptFile : if the engine cannot read it.
    """
    spec = _decided(spec, keys.width, n_rows)
    return LOADERS[spec.engine](spec, keys, first, n_rows, stored)


def saved_name(spec: IndexSpec, width: int, n_rows: int) -> str | None:
    """What an index of so many rows is, with the engine's version but without the options of its queries.

    None is exact search, of which there is nothing to save.
    """
    spec = _decided(spec, width, n_rows)
    if spec.engine not in LOADERS or not _installed(spec.engine):
        return None
    engine: Any = importlib.import_module(f"residual_memory.indexes.{spec.engine}")
    if n_rows < engine.required_rows(spec.build):
        return None
    return f"{spec.engine} {engine.version()}:{spec.build.removesuffix(',RFlat')}"


def _decided(spec: IndexSpec, width: int, n_rows: int) -> IndexSpec:
    """What "auto" comes to for so many rows; every other spec as it is."""
    if spec.engine != "auto":
        return spec
    if n_rows <= EXACT_UP_TO or not _installed("faiss"):
        return replace(spec, engine="exact")
    return replace(spec, engine="faiss", build=auto_factory(width, n_rows))


def _auto(spec: IndexSpec, keys: KeySource, first: int, n_rows: int) -> Index:
    return build_index(_decided(spec, keys.width, n_rows), keys, first, n_rows)


def auto_factory(width: int, n_rows: int) -> str:
    """What "auto" asks of faiss beyond `EXACT_UP_TO` rows: about 4 sqrt(n) cells, half a byte for every two numbers."""
    cells = 1 << max(10, (4 * int(n_rows**0.5)).bit_length() - 1)
    codes = next((m for m in range(width // 2, 1, -1) if width % m == 0), 1)
    return f"IVF{cells},PQ{codes}x4fs"


def _exact(spec: IndexSpec, keys: KeySource, first: int, n_rows: int) -> Index:
    from residual_memory.indexes import exact

    backend = spec.build or _best_exact()
    allowed = {"device"} if backend == "torch" else set()
    if unknown := set(spec.options) - allowed:
        raise InvalidInput(f"exact search by {backend} has no option {min(unknown)!r}")
    if backend == "faiss":
        _require("faiss", "faiss")
        return exact.ExactFaiss(keys, first, n_rows)
    if backend == "torch":
        _require("torch", "torch")
        return exact.ExactTorch(keys, first, n_rows, spec.options.get("device", _torch_device()))
    if backend == "numpy":
        return exact.ExactNumpy(keys, first, n_rows)
    raise InvalidInput(f"exact search by {backend!r} is not known, expected faiss, torch or numpy")


def _faiss(spec: IndexSpec, keys: KeySource, first: int, n_rows: int, stored: Pieces | None = None) -> Index:
    _require("faiss", "faiss")
    from residual_memory.indexes.faiss import Faiss, empty_index, required_rows

    if not spec.build:
        raise InvalidInput("index 'faiss' needs a factory string, for example 'faiss:IVF1024,PQ64x4fs'")
    options = {name: _number(name, value) for name, value in spec.options.items()}
    if n_rows < required_rows(spec.build):
        empty_index(keys.width, spec.build, options)  # a mistyped spec is refused now, not when the memory has grown
        return _exact(IndexSpec("exact"), keys, first, n_rows)
    return Faiss(keys, first, n_rows, factory=spec.build, options=options, stored=stored)


def _scann(spec: IndexSpec, keys: KeySource, first: int, n_rows: int, stored: Pieces | None = None) -> Index:
    _require("scann", "scann")
    from residual_memory.indexes.scann import Scann, check_query_options, required_rows

    options = {name: _number(name, value) for name, value in spec.options.items()}
    check_query_options(options)
    if n_rows < required_rows(spec.build):
        return _exact(IndexSpec("exact"), keys, first, n_rows)
    return Scann(keys, first, n_rows, build=spec.build, options=options, stored=stored)


ENGINES: dict[str, Callable[[IndexSpec, KeySource, int, int], Index]] = {
    "auto": _auto,
    "exact": _exact,
    "faiss": _faiss,
    "scann": _scann,
}
# Engines whose building takes long enough that what they built is worth keeping.
LOADERS: dict[str, Callable[[IndexSpec, KeySource, int, int, Pieces], Index]] = {"faiss": _faiss, "scann": _scann}


def _best_exact() -> str:
    """A GPU that torch already uses, else faiss, else torch, else numpy."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return "torch"
    return next((name for name in ("faiss", "torch") if _installed(name)), "numpy")


def _torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _require(module: str, extra: str) -> None:
    if not _installed(module):
        raise MissingExtra(f"index engine {module!r}", extra)


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise InvalidInput(f"index option {name}={value!r} is not a number") from None
