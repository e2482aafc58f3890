"""What the rows of a memory were made of, to be shown with them: images, or rows of a table."""

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from residual_memory.errors import InvalidInput, MissingExtra

SMALLEST_SIDE = 64  # of a picture that is sent: smaller images are enlarged
MOST_PIXELS = 1 << 24  # of an upload

Id = int | str


class Examples(ABC):
    """Finds the example of a row."""

    @property
    @abstractmethod
    def pictures(self) -> bool:
        """Whether they are images."""

    @abstractmethod
    def find(self, name: Id, group: Id | None) -> int | None:
        """The place of the example that a row was made of; None where it came from elsewhere."""

    @abstractmethod
    def picture(self, place: int) -> bytes | None:
        """A PNG; None where there is none."""

    @abstractmethod
    def cells(self, place: int) -> Mapping[str, Any] | None:
        """Columns and values; None where there are none."""

    @abstractmethod
    def uploaded(self, content: bytes) -> Any:
        """An input for the model from a file.

        Raises
        ------
        InvalidInput : if it is of no kind that can be read.
        """


def examples_for(examples: Any) -> Examples | None:
    """What shows the examples of the user's: a data frame, or a data set of (image, label).

    Raises
    ------
    InvalidInput : if it is neither.
    """
    if examples is None or isinstance(examples, Examples):
        return examples
    if hasattr(examples, "__len__") and not len(examples):
        raise InvalidInput("the examples are empty, expected those that the memory was built from")
    if hasattr(examples, "iloc"):
        return TableExamples(examples)
    if hasattr(examples, "__len__") and hasattr(examples, "__getitem__"):
        return ImageExamples(examples)
    raise InvalidInput(
        f"the examples are a {type(examples).__name__}, expected a data frame or a data set of (image, label)"
    )


class ImageExamples(Examples):
    """A data set of (image [3 h w] or [h w], label), in the order of the memory's ids.

    A memory with copies of each image, such as mirrored ones, counts on, and they are of the image's group.

    Parameters
    ----------
    dataset : floats in 0 … 1, or bytes; `names` gives its ids where they are strings.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._places = {name: place for place, name in enumerate(getattr(dataset, "names", ()))}
        self._size = np.asarray(self._item(0)).shape[-2:]

    @property
    def pictures(self) -> bool:
        return True

    def find(self, name: Id, group: Id | None) -> int | None:
        if isinstance(name, str):
            return self._places.get(name)
        place = name % len(self._dataset)
        return place if place in (name, group) else None

    def picture(self, place: int) -> bytes | None:
        image = _as_pixels(np.asarray(self._item(place)))
        return None if image is None else as_png(image)

    def cells(self, place: int) -> Mapping[str, Any] | None:
        return None

    def uploaded(self, content: bytes) -> Any:
        try:
            from PIL import Image
        except ImportError as error:
            raise MissingExtra("reading images", "serve") from error
        try:
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "GIF", "BMP", "WEBP")) as file:
                if file.width * file.height > MOST_PIXELS:
                    raise InvalidInput(f"the image is {file.width} × {file.height}, expected at most 16 million pixels")
                h, w = self._size
                image = file.convert("RGB").resize((w, h), Image.Resampling.BICUBIC)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput("the file is no image that can be read; send a PNG, JPEG, GIF, BMP or WebP") from None
        return np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(255)

    def _item(self, place: int) -> Any:
        item = self._dataset[place]
        return item[0] if isinstance(item, tuple | list) else item


class TableExamples(Examples):
    """A data frame whose rows are in the order of the memory's ids."""

    def __init__(self, frame: Any) -> None:
        self._frame = frame

    @property
    def pictures(self) -> bool:
        return False

    def find(self, name: Id, group: Id | None) -> int | None:
        return name if isinstance(name, int) and name < len(self._frame) else None

    def picture(self, place: int) -> bytes | None:
        return None

    def cells(self, place: int) -> Mapping[str, Any] | None:
        return {str(column): _plain(value) for column, value in self._frame.iloc[place].items()}

    def uploaded(self, content: bytes) -> Any:
        raise InvalidInput("the model reads rows of a table; paste them as JSON")


def as_png(image: UInt8[ndarray, "h w 3"]) -> bytes:
    """Encoded, small images enlarged."""
    from PIL import Image

    picture = Image.fromarray(image)
    times = -(-SMALLEST_SIDE // max(1, min(picture.size)))
    if times > 1:
        picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def _as_pixels(image: ndarray) -> UInt8[ndarray, "h w 3"] | None:
    """An image for the eye; what lies outside of 0 … 1, such as normalised pixels, is brought there."""
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        return None
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        if low < 0 or high > 1:
            image = (image - low) / ((high - low) or 1.0)
        image = np.rint(255 * image).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0))


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int | float | str | bool | None) and value == value else str(value)
