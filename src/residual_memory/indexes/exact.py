"""Exact search by faiss, torch on any device, or numpy. All give the same answer."""

import importlib.util
import sys
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64
from numpy import ndarray

from residual_memory.errors import InvalidInput
from residual_memory.indexes.base import Candidates, Engine, Index, IndexSpec, Pieces, Stored, Usable, require
from residual_memory.indexes.distances import KeySource, squared_error
from residual_memory.indexes.footprint import BuildTime, ExampleKeys, Footprint, extrapolated

BACKENDS = ("faiss", "torch", "numpy")
KEYS_PER_BLOCK = 1 << 16
QUERIES_PER_BLOCK = 1 << 8
GROUP = 64  # keys of which the nearest is looked at first
PROBE_BYTES = 64 << 20  # of keys that are indexed to tell how long more will take


class ExactEngine(Engine):
    """All distances. What stands behind the colon is the library that computes them; none is the best one here."""

    def check(self, spec: IndexSpec, width: int) -> None:
        backend = spec.build or _best_backend()
        if backend not in BACKENDS:
            raise InvalidInput(f"exact search by {backend!r} is not known, expected {', '.join(BACKENDS)}")
        if unknown := set(spec.options) - ({"device"} if backend == "torch" else set()):
            raise InvalidInput(f"exact search by {backend} has no option {min(unknown)!r}")
        require(backend, backend)

    def required_rows(self, spec: IndexSpec) -> int:
        return 0

    def footprint(self, spec: IndexSpec, width: int, n_rows: int) -> Footprint:
        backend = spec.build or _best_backend()
        ram = 4 * n_rows * width
        return Footprint(ram, 0, 2 * ram if backend == "faiss" else ram)  # faiss's array is copied as it grows

    def build_time(self, spec: IndexSpec, width: int, n_rows: int) -> BuildTime:
        def build(keys: ExampleKeys, n: int) -> Index:
            return self.build(spec, keys, 0, n)

        return extrapolated(build, width, n_rows, max(2, min(n_rows, PROBE_BYTES // (4 * width))))

    def build(self, spec: IndexSpec, keys: KeySource, first: int, n_rows: int, like: Index | None = None) -> Index:
        backend = spec.build or _best_backend()
        if backend == "torch":
            return ExactTorch(keys, first, n_rows, spec.options.get("device", _torch_device()))
        return (ExactFaiss if backend == "faiss" else ExactNumpy)(keys, first, n_rows)

    def saved_name(self, spec: IndexSpec) -> None:
        return None

    def load(self, spec: IndexSpec, keys: KeySource, first: int, n_rows: int, stored: Stored) -> Index:
        raise InvalidInput("of exact search nothing is saved")


def _best_backend() -> str:
    """A GPU that torch already uses, else faiss where it is installed: the fastest for many queries at once."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return "torch"
    return "numpy" if importlib.util.find_spec("faiss") is None else "faiss"


def _torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class _Centred:
    """Keys moved to their centre, where float32 inner products lose the least, and the bound on what they lose."""

    def __init__(self, keys: KeySource, first: int, n_rows: int) -> None:
        self._keys, self._first, self._n_rows = keys, first, n_rows
        sample = next(keys.blocks(4096, first), np.zeros((0, keys.width)))
        self.centre = sample.mean(axis=0, dtype=np.float64) if len(sample) else np.zeros(keys.width)
        self._largest = 0.0

    def blocks(self) -> Any:
        """Centred float32 blocks, in order; the largest norm is known once all were read."""
        left = self._n_rows
        for block in self._keys.blocks(KEYS_PER_BLOCK, self._first):
            centred = (block[:left] - self.centre).astype(np.float32)
            left -= len(centred)
            if len(centred):
                self._largest = max(self._largest, float(np.sqrt((centred.astype(np.float64) ** 2).sum(1).max())))
                yield centred
            if left <= 0:
                return

    def queries(self, queries: Float[ndarray, "q d"]) -> Float[ndarray, "q d"]:
        return (queries - self.centre).astype(np.float32)

    def slack(self, centred: Float[ndarray, "q d"]) -> Float[ndarray, " q"]:
        """Possible error of each query's squared distances."""
        norms = np.sqrt(np.einsum("qd,qd->q", centred, centred, dtype=np.float64))
        return squared_error(centred.shape[1], (norms + self._largest) ** 2)


def _promise(rows: ndarray, squared: ndarray, slack: Float[ndarray, " q"], n_rows: int, first: int) -> Candidates:
    """Candidates of a float32 search: the last distance listed, less the rounding, bounds all that is left out."""
    complete = rows.shape[1] >= n_rows
    bounds = np.full(len(rows), np.inf) if complete else squared.max(axis=1).astype(np.float64) - slack
    return Candidates(np.where(rows >= 0, rows + first, -1), bounds)


class ExactFaiss(Index):
    """All distances by faiss's Flat index; it holds a float32 copy of the keys in RAM."""

    def __init__(self, keys: KeySource, first: int, n_rows: int) -> None:
        import faiss

        self.first, self.n_rows = first, n_rows
        self._centred = _Centred(keys, first, n_rows)
        self._flat = faiss.IndexFlatL2(keys.width)
        for block in self._centred.blocks():
            self._flat.add(block)

    def candidates(self, queries: Float[ndarray, "q d"], n_neighbors: int, usable: Usable | None = None) -> Candidates:
        centred = self._centred.queries(queries)
        squared, rows = self._flat.search(centred, min(n_neighbors, self.n_rows))
        return _promise(rows, squared, self._centred.slack(centred), self.n_rows, self.first)

    @property
    def saved_as(self) -> None:
        return None  # it is the keys themselves, which the memory has

    def saved(self) -> Pieces:
        return {}

    def measured(self) -> None:
        return None

    @property
    def description(self) -> str:
        return "exact (faiss Flat)"


class ExactTorch(Index):
    """All distances by blocked matrix products on a torch device; the keys live there in float32."""

    def __init__(self, keys: KeySource, first: int, n_rows: int, device: str = "cpu") -> None:
        import torch

        self.first, self.n_rows = first, n_rows
        self._device = _device_named(device)
        self._centred = _Centred(keys, first, n_rows)
        self._blocks = [torch.from_numpy(block).to(self._device) for block in self._centred.blocks()]
        self._norms = [block.square().sum(1) for block in self._blocks]

    def candidates(self, queries: Float[ndarray, "q d"], n_neighbors: int, usable: Usable | None = None) -> Candidates:
        import torch

        centred = self._centred.queries(queries)
        k = min(n_neighbors, self.n_rows)
        answers = []
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            for some in torch.split(torch.from_numpy(centred).to(self._device), QUERIES_PER_BLOCK):
                answers.append(self._nearest(some, k))
        rows = np.concatenate([rows.cpu().numpy() for _, rows in answers]) if answers else np.zeros((0, k), np.int64)
        squared = np.concatenate([s.cpu().numpy() for s, _ in answers]) if answers else np.zeros((0, k), np.float32)
        slack = self._centred.slack(centred) * _matmul_coarseness()
        return _promise(rows, squared, slack, self.n_rows, self.first)

    def _nearest(self, queries: Any, k: int) -> tuple[Any, Any]:
        """The k nearest rows of one block of queries, merged over the blocks of keys."""
        import torch

        norms = queries.square().sum(1, keepdim=True)
        best = torch.empty((len(queries), 0), device=self._device)
        rows = torch.empty((len(queries), 0), dtype=torch.int64, device=self._device)
        start = 0
        for block, block_norms in zip(self._blocks, self._norms, strict=True):
            squared = torch.addmm(block_norms, queries, block.T, alpha=-2.0)
            values, places = squared.topk(min(k, len(block)), dim=1, largest=False, sorted=False)
            places += start
            start += len(block)
            values, places = torch.cat([best, values], 1), torch.cat([rows, places], 1)
            best, chosen = values.topk(min(k, values.shape[1]), dim=1, largest=False, sorted=False)
            rows = places.gather(1, chosen)
        return best + norms, rows

    @property
    def saved_as(self) -> None:
        return None  # it is the keys themselves, which the memory has

    def saved(self) -> Pieces:
        return {}

    def measured(self) -> None:
        return None

    @property
    def description(self) -> str:
        return f"exact (torch on {self._device})"


class ExactNumpy(Index):
    """All distances by blocked matrix products in numpy; it holds a float32 copy of the keys in RAM, transposed."""

    def __init__(self, keys: KeySource, first: int, n_rows: int) -> None:
        self.first, self.n_rows = first, n_rows
        self._centred = _Centred(keys, first, n_rows)
        self._blocks = [np.ascontiguousarray(block.T) for block in self._centred.blocks()]
        self._norms = [np.einsum("db,db->b", block, block) for block in self._blocks]

    def candidates(self, queries: Float[ndarray, "q d"], n_neighbors: int, usable: Usable | None = None) -> Candidates:
        centred = self._centred.queries(queries)
        k = min(n_neighbors, self.n_rows)
        squared, rows = np.full((len(centred), k), np.inf, np.float32), np.full((len(centred), k), -1, np.int64)
        for begin in range(0, len(centred), QUERIES_PER_BLOCK):
            some, start = slice(begin, begin + QUERIES_PER_BLOCK), 0
            for block, norms in zip(self._blocks, self._norms, strict=True):
                with np.errstate(invalid="ignore"):  # a BLAS may raise the flag for what it reads beyond a small table
                    distances = centred[some] @ block
                distances *= -2
                distances += norms
                _keep_smallest(squared[some], rows[some], distances, start)
                start += len(norms)
        squared += np.einsum("qd,qd->q", centred, centred)[:, None]
        return _promise(rows, squared, self._centred.slack(centred), self.n_rows, self.first)

    @property
    def saved_as(self) -> None:
        return None  # it is the keys themselves, which the memory has

    def saved(self) -> Pieces:
        return {}

    def measured(self) -> None:
        return None

    @property
    def description(self) -> str:
        return "exact (numpy)"


def _keep_smallest(
    squared: Float32[ndarray, "q k"], rows: Int64[ndarray, "q k"], distances: Float32[ndarray, "q b"], start: int
) -> None:
    """Put the k smallest of those kept so far and of one more block in their place."""
    k = squared.shape[1]
    for query, limit in enumerate(_limits(squared, distances)):
        near = np.flatnonzero(~(distances[query] > limit))  # NaN, of keys beyond float32, is near: others measure it
        if len(near):
            values = np.concatenate([squared[query], distances[query, near]])
            places = np.concatenate([rows[query], near + start])
            chosen = np.argpartition(values, k - 1)[:k]
            squared[query], rows[query] = values[chosen], places[chosen]


def _limits(squared: Float32[ndarray, "q k"], distances: Float32[ndarray, "q b"]) -> Float32[ndarray, " q"]:
    """What the k-th smallest of both does not exceed: the k-th smallest of the smallest in each group of a block."""
    k, n_groups = squared.shape[1], distances.shape[1] // GROUP
    known = squared.max(axis=1)
    if n_groups < k:
        return known
    groups = distances[:, : n_groups * GROUP].reshape(len(distances), n_groups, GROUP).min(axis=2)
    return np.minimum(known, np.partition(groups, k - 1, axis=1)[:, k - 1])


def _device_named(name: str) -> Any:
    """A torch device that is there.

    Raises
    ------
    InvalidInput : if torch does not know it, or this machine does not have it.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"torch cannot use device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def _matmul_coarseness() -> float:
    """How much coarser than float32 torch multiplies, where the user allowed it to (TF32 or bfloat16)."""
    import torch

    return {"highest": 1.0, "high": 2.0**13, "medium": 2.0**16}[torch.get_float32_matmul_precision()]
