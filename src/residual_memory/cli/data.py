"""What the commands read: arrays on disk, block by block, or what a model says of a data set.

Either way it comes as `Rows`, whose blocks are small: a source larger than the RAM is no trouble.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray

from residual_memory.cli.images import ImageFolder
from residual_memory.cli.loading import FITTING, Examples, load_dataset, load_model, user_code
from residual_memory.cli.options import MODEL_BATCH, OUTPUTS, chosen, similar
from residual_memory.cli.text import text_at
from residual_memory.errors import DataNotFound, InvalidInput
from residual_memory.exchange import Block, Rows, open_rows
from residual_memory.exchange.reading import READERS
from residual_memory.exchange.rows import COLUMNS
from residual_memory.memory import Memory
from residual_memory.models.base import Source
from residual_memory.progress import progress_bar
from residual_memory.validation import as_count
from residual_memory.windows import TextFile

_EXPECTED = (
    f"{', '.join(READERS)} arrays, a folder with keys.npy and predictions.npy, a folder of images in class subfolders, "
    "MODULE:NAME of a data set, or text as .txt"
)


# ---------------------------------------------------------------------- a model and a data set


class ModelRows(Rows):
    """What a model says of the examples of a data set, in one pass.

    Parameters
    ----------
    name : of the data, for messages.
    watch : a `models.torch.Watch` on the layer that the memory was built from.
    dataset : items (x, y), or x alone where labels are not needed.
    labelled : whether the items have labels.
    batch_size : examples that the model sees at once; None takes 256.
    names : of the examples, as their ids; None numbers them.
    """

    def __init__(
        self,
        name: str,
        watch: Any,
        dataset: Examples,
        *,
        labelled: bool,
        batch_size: int | None,
        names: Sequence[str] | None = None,
    ) -> None:
        self._names = names
        self.name, self.dataset = name, dataset
        self._watch, self._labelled = watch, labelled
        self._batch_size = batch_of(batch_size)
        self.n_rows = len(dataset)
        self.columns = frozenset({"keys", "predictions", "labels"} if labelled else {"keys", "predictions"})

    def blocks(self, *, first: int = 0, size: int | None = None) -> Iterator[Block]:
        from torch.utils.data import DataLoader, Subset

        chosen_rows: Any = Subset(self.dataset, range(first, self.n_rows))  # type: ignore[arg-type]
        batches = iter(DataLoader(chosen_rows, size or self._batch_size))
        while True:
            with user_code(f"running the model on {self.name}", FITTING):
                batch = next(batches, None)
                if batch is None:
                    return
                block = self._observed(batch, first)
            yield block
            first += len(block)

    def _observed(self, batch: Any, first: int) -> Block:
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        if self._labelled and not pair:
            raise InvalidInput(f"an item of {self.name} is a {type(batch).__name__}, expected a pair (x, y)")
        raw, keys = self._watch.run(batch[0] if pair else batch)
        said = self._watch.predictions(raw).cpu().numpy()
        labels = np.asarray(batch[1].cpu()) if self._labelled else None
        ids = None if self._names is None else np.array(self._names[first : first + len(keys)])
        return Block(first, keys.cpu().numpy(), said, labels, ids)


def batch_of(batch_size: int | None) -> int:
    """Examples that the model sees at once."""
    return MODEL_BATCH if batch_size is None else as_count("--batch-size", batch_size)


# ---------------------------------------------------------------------- from what the user types


@dataclass(frozen=True)
class Reading:
    """How to turn `--data` into rows.

    Attributes
    ----------
    model : MODULE:NAME, for data that are examples.
    outputs : what the model gives.
    batch_size : examples that the model sees at once; None takes 256.
    image_size : side that images are resized to.
    """

    model: str | None = None
    outputs: str = "logits"
    batch_size: int | None = None
    image_size: int | None = None


def rows_for(text: str, memory: Memory, reading: Reading, *, labelled: bool = True, top_m: bool = False) -> Rows:
    """The rows that a user names, with keys and predictions as the memory's rows have them.

    Parameters
    ----------
    text : a path or MODULE:NAME.
    memory : whose layer a model is watched at.
    reading : the options.
    labelled : whether labels are needed.
    top_m : whether top-m predictions will do.

    Raises
    ------
    DataNotFound, InvalidInput, CorruptFile : if there are no such data, or not of a kind that can be read.
    FingerprintMismatch : if the model is not the one that the memory was built with.
    """
    found = open_data(text, image_size=reading.image_size, class_names=memory.class_names, labelled=labelled)
    if isinstance(found, TextFile):
        raise InvalidInput(
            f"{text} is text, with which resmem builds, tunes and evaluates; "
            "for the rest use residual_memory.ResMemForCausalLM from Python"
        )
    if isinstance(found, Rows):
        if reading.model is not None:
            raise InvalidInput(f"{text} holds keys and predictions already; leave --model out")
        if labelled:
            found.require("labels", "this command")
        if found.top_m and not top_m:
            raise InvalidInput(f"{text} holds top-m predictions, expected whole ones; give predictions of all classes")
        return found
    if reading.model is None:
        raise InvalidInput(f"{text} is a data set of examples; add --model MODULE:NAME, the model to run on it")
    watch = _watch(load_model(reading.model), memory, chosen("--outputs", reading.outputs, OUTPUTS))
    names = found.names if isinstance(found, ImageFolder) and not labelled else None
    return ModelRows(text, watch, found, labelled=labelled, batch_size=reading.batch_size, names=names)


def open_data(
    text: str, *, image_size: int | None = None, class_names: Sequence[str] | None = None, labelled: bool = True
) -> Rows | Examples | TextFile:
    """Arrays as `Rows`; images and MODULE:NAME as a data set of examples; text as its documents."""
    path = Path(text)
    if (documents := text_at(text)) is not None:
        return documents
    if path.is_dir():
        if any((path / f"{name}.npy").exists() for name in COLUMNS):
            return open_rows(path)
        return ImageFolder(path, size=image_size, class_names=class_names, labelled=labelled)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise InvalidInput(f"{text} is a file of type {path.suffix or 'unknown'!r}, expected {_EXPECTED}")
        return open_rows(path)
    if ":" in text and "/" not in text:
        return load_dataset(text)
    raise DataNotFound(f"there are no data at {text}{similar(path) or f'; expected {_EXPECTED}'}")


def _watch(model: Any, memory: Memory, outputs: str) -> Any:
    if memory.source is None:
        raise InvalidInput(
            f"the memory at {memory.path} was filled from arrays and does not say which layer its keys come from; "
            "give --data as arrays too"
        )
    from residual_memory.models.torch import Watch

    built = Source.from_dict(memory.source)
    if ":" in built.layer:
        raise InvalidInput(f"the keys come from the function {built.layer!r}; use this memory from Python")
    watch = Watch(model, built.layer, built.side, pool=built.pool, outputs=outputs, task=memory.layout.task)  # type: ignore[arg-type]
    built.check(watch.source(built.data), f"at {memory.path}", data=False)
    return watch


@dataclass(frozen=True)
class Queries:
    """All rows of a source at once, for what needs them at once."""

    keys: Float[ndarray, "q d"]
    predictions: Float[ndarray, "q c"]
    labels: Shaped[ndarray, "q ..."]
    groups: Shaped[ndarray, " q"] | None
    examples: Examples | None = None  # that a model saw


def read_all(rows: Rows, memory: Memory) -> Queries:
    """Read a labelled source to its end."""
    layout = memory.layout
    blocks = []
    with progress_bar("reading", rows.n_rows) as advance:
        for block in rows.blocks():
            blocks.append(rows.checked(block, layout.task, layout.n_outputs, layout.dim))
            advance(len(block))
    if not blocks:
        raise InvalidInput(f"{rows.name} holds no rows")
    groups = [block.groups for block in blocks if block.groups is not None]
    labels = [block.labels for block in blocks if block.labels is not None]
    return Queries(
        np.concatenate([block.keys for block in blocks]),
        np.concatenate([block.whole for block in blocks]),
        np.concatenate(labels),
        np.concatenate(groups) if groups else None,
        rows.dataset if isinstance(rows, ModelRows) else None,
    )


def examples_at(option: str, data: str, memory: Memory, image_size: int | None) -> Examples:
    """What the rows of a memory were made of, to be shown with them.

    Raises
    ------
    DataNotFound, InvalidInput : if there are no such data, or they are keys or text.
    """
    found = open_data(data, image_size=image_size, class_names=memory.class_names)
    if isinstance(found, Rows):
        raise InvalidInput(f"{option} is {data}, which holds keys and no examples; name what the keys are of")
    if isinstance(found, TextFile):
        raise InvalidInput(f"{option} is {data}, but the memory at {memory.path} is of no text; name its own data")
    return found
