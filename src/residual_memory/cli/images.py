"""A folder of images in class subfolders as a data set."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from residual_memory.errors import CorruptFile, InvalidInput, MissingExtra
from residual_memory.validation import as_count

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class ImageFolder:
    """Items (RGB image [3 h w] as float32 in 0 … 1, class index), in the order of class and file name.

    Parameters
    ----------
    folder : has one subfolder a class; for data without labels the images may lie in it directly.
    size : side that images are resized to; None takes them as they are, and then all must be of one size.
    class_names : the classes of a memory, so that indices mean the same there and here; None takes the subfolders'.
    labelled : False gives the images alone.

    Raises
    ------
    InvalidInput : if there is no image, or a subfolder is not among `class_names`.
    """

    def __init__(
        self, folder: Path, *, size: int | None = None, class_names: Sequence[str] | None = None, labelled: bool = True
    ) -> None:
        self._size = None if size is None else as_count("--image-size", size)
        self._labelled = labelled
        self._shape: tuple[int, int] | None = None
        subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        found = {path.name: images_under(path) for path in subfolders}
        if labelled:
            self.classes = list(class_names or found)
            _check_classes(folder, found, self.classes)
            self._items = [(path, self.classes.index(name)) for name, paths in found.items() for path in paths]
        else:
            self.classes = list(class_names or ())
            self._items = [(path, -1) for path in images_under(folder)]
        self.names = [str(path.relative_to(folder)) for path, _ in self._items]
        if not self._items:
            raise InvalidInput(
                f"{folder} holds neither keys.npy nor images in class subfolders; name another folder or file"
            )

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        path, label = self._items[index]
        image = self._read(path)
        return (image, label) if self._labelled else image

    def _read(self, path: Path) -> Any:
        try:
            from PIL import Image
        except ImportError as error:
            raise MissingExtra("reading images", "report") from error
        import torch

        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise CorruptFile(f"{path} cannot be read as an image: {error}; replace it or take it away") from error
        if self._size is not None:
            image = image.resize((self._size, self._size), Image.Resampling.BILINEAR)
        elif self._shape is None:
            self._shape = image.size
        elif image.size != self._shape:
            (w, h), (w0, h0) = image.size, self._shape
            raise InvalidInput(
                f"{path} is {w} × {h}, but the first image is {w0} × {h0}; bring all to one size with --image-size"
            )
        pixels = np.array(image, np.float32) / np.float32(255)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def images_under(folder: Path) -> list[Path]:
    """Image files however deep below a folder, sorted; behind links to folders too.

    A folder that is reached twice is read once, so links that lead round in circles end.
    """
    found, entered = [], set()
    for place, subfolders, files in os.walk(folder, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(place)) in entered:
            subfolders.clear()
            continue
        entered.add(real)
        subfolders.sort()  # so that it is the same one of two ways to a folder on every machine
        paths = (Path(place, file) for file in files if os.path.splitext(file)[1].lower() in SUFFIXES)
        found += [path for path in paths if path.is_file()]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _check_classes(folder: Path, found: dict[str, list[Path]], classes: list[str]) -> None:
    for name in found:
        if name not in classes:
            close = difflib.get_close_matches(name, classes, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InvalidInput(f"{folder / name} is a class that the memory does not know{hint}")
