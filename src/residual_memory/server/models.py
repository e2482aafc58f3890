"""Models behind a server: torch modules and scikit-learn estimators, each as a `service.Model`."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy import ndarray

from residual_memory.errors import FingerprintMismatch, InvalidInput
from residual_memory.indexes.registry import for_few_queries
from residual_memory.memory import Memory
from residual_memory.server.service import MAX_WEIGHT, ArrayService, Model, Seen, Service


def service_for(
    memory: Memory,
    model: Any = None,
    *,
    setting: Any = None,
    index: str = "auto",
    max_weight: float = MAX_WEIGHT,
    tokenizer: Any = None,
    text: Any = None,
) -> Service:
    """A memory in use with a model of the user's; the parameters are those of `create_app`.

    Raises
    ------
    InvalidInput : if the model is of no kind that is known, or an option is not for it.
    FingerprintMismatch : if the memory was built with another model.
    """
    index = for_few_queries(index, len(memory))
    kinds = {kind.__module__.split(".")[0] for kind in type(model).__mro__}
    if "transformers" in kinds or type(model).__name__ == "ResMemForCausalLM":
        from residual_memory.server.text_service import text_service

        return text_service(model, memory, tokenizer, text, setting=setting, index=index, max_weight=max_weight)
    if tokenizer is not None or text is not None:
        raise InvalidInput("a tokenizer or a text was given, but the model is no language model; leave them out")
    served: Model | None
    if model is None or isinstance(model, Model):
        served = model
    elif "torch" in kinds:
        served = TorchModel.of(model, memory)
    elif "sklearn" in kinds:
        served = TableModel(model, memory)
    else:
        raise InvalidInput(
            f"the model is a {type(model).__name__}, expected a torch module, a fitted ResMemClassifier or "
            "ResMemRegressor, a language model of transformers, or a residual_memory.server.service.Model"
        )
    return ArrayService(memory, served, setting=setting, index=index, max_weight=max_weight)


class TorchModel(Model):
    """A torch module, watched at the layer that the memory was built from.

    Parameters
    ----------
    watch : a `models.torch.Watch`.
    """

    def __init__(self, watch: Any) -> None:
        self._watch = watch
        self._shape: tuple[int, ...] | None = None

    @staticmethod
    def of(model: Any, memory: Memory) -> "TorchModel":
        """Of a module, or of a `ResMemModule`."""
        from residual_memory.models.torch import ResMemModule

        module = model if isinstance(model, ResMemModule) else ResMemModule(model, memory)
        return TorchModel(module.watch)

    def batch(self, inputs: Sequence[Any]) -> ndarray:
        try:
            batch = np.asarray(inputs, np.float32)
        except (ValueError, TypeError, OverflowError):
            raise InvalidInput("inputs are no array of numbers; send examples of one shape") from None
        if not batch.size or not np.isfinite(batch).all():
            raise InvalidInput("inputs are empty, or hold NaN or infinite numbers; send finite ones")
        return batch

    def observe(self, batches: Sequence[Any]) -> Sequence[Seen]:
        seen: list[Seen] = []
        for _, alike in groupby(batches, key=lambda batch: batch.shape[1:]):
            together = list(alike)
            seen += self._observed(together)
        return seen

    def _observed(self, batches: Sequence[ndarray]) -> list[Seen]:
        import torch

        try:
            raw, keys = self._watch.run(torch.from_numpy(np.concatenate(batches)))
        except (RuntimeError, ValueError, IndexError) as error:
            shape = list(batches[0].shape[1:])
            raise InvalidInput(f"the model cannot take inputs of shape {shape}: {type(error).__name__}") from error
        said = self._watch.predictions(raw).cpu().numpy()
        ends = np.cumsum([len(batch) for batch in batches])[:-1]
        return list(zip(np.split(keys.cpu().numpy(), ends), np.split(said, ends), strict=True))

    @property
    def takes(self) -> Mapping[str, Any]:
        return {"kind": "arrays"}


class TableModel(Model):
    """A fitted `ResMemClassifier` or `ResMemRegressor`: rows of a table, as lists or as objects by column."""

    def __init__(self, estimator: Any, memory: Memory) -> None:
        from residual_memory.models.sklearn import ResMemClassifier, ResMemRegressor

        if not isinstance(estimator, ResMemClassifier | ResMemRegressor):
            raise InvalidInput(
                f"the model is a {type(estimator).__name__}, expected a fitted ResMemClassifier or ResMemRegressor"
            )
        own = estimator.memory_
        if (own.layout, own.class_names) != (memory.layout, memory.class_names):
            raise FingerprintMismatch(
                "the memory is not the one that the estimator was fitted with; serve estimator.memory_"
            )
        self._estimator = estimator
        names = getattr(estimator, "feature_names_in_", None)
        self._columns = None if names is None else [str(name) for name in names]

    def batch(self, inputs: Sequence[Any]) -> Any:
        import pandas as pd

        if self._columns is None:
            try:
                return np.asarray(inputs, np.float64)
            except (ValueError, TypeError, OverflowError):
                raise InvalidInput("inputs are no table of numbers; send as many in each row") from None
        rows = [row if isinstance(row, Mapping) else dict(zip(self._columns, row, strict=False)) for row in inputs]
        for row in rows:
            if set(row) != set(self._columns):
                missing, unknown = set(self._columns) - set(row), set(row) - set(self._columns)
                found = f"lacks {min(missing)!r}" if missing else f"has {min(unknown)!r}"
                raise InvalidInput(f"a row {found}; the columns are {', '.join(self._columns)}")
        return pd.DataFrame(rows, columns=self._columns)

    def observe(self, batches: Sequence[Any]) -> Sequence[Seen]:
        return [self._estimator.observe(batch) for batch in batches]

    @property
    def takes(self) -> Mapping[str, Any]:
        return {"kind": "table", "columns": self._columns}
