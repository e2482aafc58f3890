"""One door for all frameworks: a memory from a model and its data."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from residual_memory.errors import InvalidInput
from residual_memory.memory import Memory


def build_memory(model: Any, dataset: Any, path: str | os.PathLike[str] | None, **options: Any) -> Memory:
    """Run a model once over its data and keep what it could not learn.

    A build that was interrupted, by Ctrl-C or by a kill, goes on where it was when it is called again with the same
    arguments; a finished one is opened.

    Parameters
    ----------
    model : a torch classifier or regressor, or a language model of transformers.
    dataset : items (x, y), or items {"input_ids": …} for a language model.
    path : directory of the memory; None keeps it in RAM.
    options : of `models.torch.build_memory` or `models.transformers.build_memory`.

    Returns
    -------
    The memory, open for writing.

    Raises
    ------
    InvalidInput : if the data are empty or no items of either kind, or an option does not fit.
    FingerprintMismatch : if `path` holds a memory of another model, layer or data set.
    """
    if is_text(dataset):
        from residual_memory.models import transformers

        return transformers.build_memory(model, dataset, path, **options)
    from residual_memory.models import torch

    return torch.build_memory(model, dataset, path, **options)


def is_text(dataset: Any) -> bool:
    """Whether the first item is a mapping with `input_ids`; streams are text, since examples (x, y) come by number."""
    if isinstance(dataset, Mapping):
        raise InvalidInput(
            f"the data set is a {type(dataset).__name__}, expected a list or a stream of items; "
            "for a text that is [{'input_ids': tokens}, …]"
        )
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        try:
            first = dataset[0] if len(dataset) else None
        except (KeyError, IndexError):
            return False
        return isinstance(first, Mapping) and "input_ids" in first
    if not isinstance(dataset, Iterable):
        raise InvalidInput(f"the data set is a {type(dataset).__name__}, expected items by number or a stream of them")
    if iter(dataset) is dataset:
        return True  # its first item can be read once
    first = next(iter(dataset), {})
    if not isinstance(first, Mapping):
        raise InvalidInput(
            f"the data set is a stream of {type(first).__name__}, expected items {{'input_ids': …}}; "
            "examples (x, y) come by number, from a data set with a length"
        )
    return True
