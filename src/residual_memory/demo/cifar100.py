"""CIFAR-100 as its publisher packs it: found on this machine, or downloaded and checked.

Source of the data: A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

import hashlib
import http.client
import io
import os
import pickle
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, UInt8
from numpy import ndarray

from residual_memory.errors import CorruptFile, DataNotFound

Split = Literal["train", "test"]

N_IMAGES = {"train": 50_000, "test": 10_000}
N_CLASSES = 100
ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
ARCHIVE_MD5 = "03b5dce01913d631647c71ecec9e9cb8"
SPLIT_SEED = 20230208  # of the permutation whose last 5,000 training images are held out
# Of the pixels alone, as [n, 3, 32, 32] bytes: the same for the binary and the python version.
PIXELS_SHA256 = {
    "train": "de64658905c6b161606e3649ddafce7cf86c7634a0cf9116d518e64ef46a33c5",
    "test": "83c56492b2c11211ad1bb2dbd4f2eef4170a0441e41a41f3039c3144b1f5a511",
}
BINARY_FOLDER, PYTHON_FOLDER = "cifar-100-binary", "cifar-100-python"


@dataclass(frozen=True)
class Cifar100:
    """One split, in the publisher's order."""

    images: UInt8[ndarray, "n 3 32 32"]
    labels: Int64[ndarray, " n"]
    superclasses: Int64[ndarray, " n"]
    class_names: tuple[str, ...]
    superclass_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, n: int) -> "Cifar100":
        """The first n images alone."""
        return replace(self, images=self.images[:n], labels=self.labels[:n], superclasses=self.superclasses[:n])


def held_out_split(n: int = 50_000) -> tuple[Int64[ndarray, " n"], Int64[ndarray, " h"]]:
    """The fixed split of n training images: (rows to train on, a tenth held out), both ascending."""
    order = np.random.default_rng(SPLIT_SEED).permutation(n)
    return np.sort(order[: -(n // 10)]), np.sort(order[-(n // 10) :])


def user_cache() -> Path:
    """Where downloads and demo memories go: `$XDG_CACHE_HOME/residual-memory`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "residual-memory"


def find_cifar100() -> Path | None:
    """The folder that holds CIFAR-100: looked for in `$RESMEM_DATA`, then in the user cache."""
    roots = [Path(named)] if (named := os.environ.get("RESMEM_DATA")) else []
    for root in (*roots, user_cache()):
        for folder in (root, root / BINARY_FOLDER, root / PYTHON_FOLDER):
            if (folder / "train.bin").is_file() or (folder / "meta").is_file():
                return folder
    return None


def download_cifar100(*, timeout: float = 10.0, progress: Callable[[int, int], None] | None = None) -> Path:
    """Fetch the publisher's binary archive into the user cache and check it; returns the folder.

    Parameters
    ----------
    timeout : seconds without an answer after which the attempt is given up.
    progress : called with bytes done and bytes in all.

    Raises
    ------
    DataNotFound : if the publisher cannot be reached.
    CorruptFile : if the archive is not the one that was published.
    """
    cache = user_cache()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        archive = Path(scratch) / "archive.tar.gz"
        try:
            _fetch(ARCHIVE, archive, timeout, progress)
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise DataNotFound(
                f"CIFAR-100 is neither in $RESMEM_DATA nor in {cache}, and {ARCHIVE} gave no answer ({error}); "
                f"put the folder {BINARY_FOLDER} there by hand, or work from the keys that ship with the package"
            ) from error
        found = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
        if found != ARCHIVE_MD5:
            raise CorruptFile(f"{ARCHIVE} has md5 {found}, expected {ARCHIVE_MD5}; try the download again")
        with tarfile.open(archive) as packed:
            packed.extractall(scratch, filter="data")
        target = cache / BINARY_FOLDER
        shutil.rmtree(target, ignore_errors=True)  # of an interrupted copy by hand
        (Path(scratch) / BINARY_FOLDER).rename(target)
    return target


def _fetch(url: str, target: Path, timeout: float, progress: Callable[[int, int], None] | None) -> None:
    with urllib.request.urlopen(url, timeout=timeout) as answer, target.open("wb") as file:
        size = int(answer.headers.get("Content-Length", 0))
        while piece := answer.read(1 << 20):
            file.write(piece)
            if progress:
                progress(file.tell(), size)


def read_cifar100(folder: str | os.PathLike[str], split: Split) -> Cifar100:
    """One split from the official binary or python version, its pixels checked against the published ones.

    Raises
    ------
    DataNotFound : if the folder holds neither version.
    CorruptFile : if the file is cut, or a pixel differs.
    """
    folder = Path(folder)
    if not (folder / f"{split}.bin").is_file() and not (folder / split).is_file():
        raise DataNotFound(f"{folder} holds neither {split}.bin nor {split}: not a folder of CIFAR-100")
    read = _read_binary if (folder / f"{split}.bin").is_file() else _read_python
    try:
        data = read(folder, split)
    except FileNotFoundError as error:
        raise DataNotFound(f"{folder} is incomplete: {Path(error.filename or '').name} is missing") from error
    except (
        pickle.UnpicklingError,
        EOFError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise CorruptFile(f"{folder}: the {split} files are not those of CIFAR-100: {error!r}") from error
    found = hashlib.sha256(data.images.tobytes()).hexdigest()
    if found != PIXELS_SHA256[split]:
        raise CorruptFile(f"{folder}: the {split} images have sha256 {found}, expected {PIXELS_SHA256[split]}")
    return data


def _read_binary(folder: Path, split: Split) -> Cifar100:
    raw = np.fromfile(folder / f"{split}.bin", np.uint8)
    expected = N_IMAGES[split] * 3074
    if len(raw) != expected:
        raise CorruptFile(f"{folder / f'{split}.bin'} has {len(raw):,} bytes, expected {expected:,}")
    records = raw.reshape(-1, 3074)
    return Cifar100(
        images=records[:, 2:].reshape(-1, 3, 32, 32),
        labels=records[:, 1].astype(np.int64),
        superclasses=records[:, 0].astype(np.int64),
        class_names=tuple((folder / "fine_label_names.txt").read_text().split()),
        superclass_names=tuple((folder / "coarse_label_names.txt").read_text().split()),
    )


def _read_python(folder: Path, split: Split) -> Cifar100:
    data, meta = _unpickle(folder / split), _unpickle(folder / "meta")
    return Cifar100(
        images=np.asarray(data["data"], np.uint8).reshape(-1, 3, 32, 32),
        labels=np.asarray(data["fine_labels"], np.int64),
        superclasses=np.asarray(data["coarse_labels"], np.int64),
        class_names=tuple(meta["fine_label_names"]),
        superclass_names=tuple(meta["coarse_label_names"]),
    )


class _ArraysOnly(pickle.Unpickler):
    """Reads the publisher's pickles: plain containers and numpy arrays, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        raise CorruptFile(f"a pickle of CIFAR-100 names {module}.{name}, which no such file needs; not read")


def _unpickle(path: Path) -> dict[str, Any]:
    return dict(_ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load())
