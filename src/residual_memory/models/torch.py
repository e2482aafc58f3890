"""Any torch model: its memory built from a data set, its corrected predictions, and a form that can be exported."""

import copy
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int64, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory.display import html_table
from residual_memory.errors import DimensionMismatch, InvalidInput, MissingExtra
from residual_memory.evaluation import Setting
from residual_memory.explanation import Explanation, explain
from residual_memory.memory import Memory
from residual_memory.models.base import (
    Builder,
    KeyChoice,
    Side,
    Source,
    opened,
    part_of_rows,
    place_of_memory,
    warn_if_in_sample,
)
from residual_memory.models.pretrained import (
    CARD,
    WEIGHTS,
    Card,
    Saved,
    save_memory,
    saving,
    with_measured,
    write_options,
)
from residual_memory.models.watching import (
    device_of,
    digest_of,
    evaluating,
    fingerprint,
    first_tensor,
    moved_to,
    name_of,
    places_of,
    pooled,
    watching,
)
from residual_memory.models.weights import load_weights, precision_name, precision_named, save_weights
from residual_memory.progress import progress_bar
from residual_memory.tuning import TuningResult, tune
from residual_memory.types import Metric, Observations, Task
from residual_memory.validation import as_count, as_ids, as_labels, as_predictions

try:
    import torch
    from torch import Tensor, nn
    from torch.utils.data import DataLoader, Dataset, Subset
except ImportError as error:
    raise MissingExtra("torch models", "torch") from error

Outputs = Literal["logits", "probabilities", "log-probabilities"]
Layer = str | Callable[[Any], Tensor] | None

HELD_OUT_ROWS = 2_000


def build_memory(
    model: nn.Module,
    dataset: "Dataset[Any]",
    path: str | os.PathLike[str] | None,
    *,
    layer: Layer = None,
    side: Side = "input",
    pool: int = 1,
    predictions: ArrayLike | None = None,
    copies: Sequence[Callable[[Any], Any]] = (),
    ids: ArrayLike | None = None,
    held_out: "Dataset[Any] | None" = None,
    task: Task | None = None,
    outputs: Outputs = "logits",
    n_outputs: int | None = None,
    class_names: Sequence[str] | None = None,
    metric: Metric = "euclidean",
    key_dtype: str = "float32",
    prediction_dtype: str = "float32",
    batch_size: int = 256,
    autocast: "torch.dtype | None" = None,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    part: range | None = None,
    verbose: bool = True,
) -> Memory:
    """Run a model once over its data and keep what it could not learn.

    A build that was interrupted, by Ctrl-C or by a kill, goes on where it was when it is called again with the same
    arguments; a finished one is opened.

    Parameters
    ----------
    model : any classifier or regressor; put into eval mode for the time of the build, on whatever device it is.
    dataset : items (x, y), the same whenever they are read: no random augmentation. Rows get their index as id.
    path : directory of the memory; None keeps it in RAM.
    layer : dotted name of the module whose `side` gives the keys, or a function from the batch's inputs to keys [b d].
        Names joined by "+" give keys side by side, each part scaled to length 1; "name@input" and "name@output" say
        their own side. None takes the input of the last Linear that runs, and says so.
    side : "input" or "output" of the layer.
    pool : cells a side to which feature maps [b c h w] are averaged: 1 gives c numbers, 2 gives 4 c, … Sequences
        [b t d] are averaged over t.
    predictions : out-of-fold predictions [n c] (probabilities, or values) to keep in place of the model's own: right
        when the model knows its training data much better than other data.
    copies : functions from an item's x to another view of it, always the same, such as its mirror image: every item
        is also stored as each of them sees it. With n items, copy j of item i has id i + j n; all are of group i, so
        that ``exclude=i`` leaves all of them out. A copy costs as much as a row.
    ids : a name or number for each item, such as its file; None takes its index. Not with copies.
    held_out : data that the model was not trained on; a sample of it tells whether the residuals mean anything.
    task : None reads it off: integer labels and several outputs are a classification.
    outputs : what the model gives for a classification.
    n_outputs : more classes than the model's leave room for ones that it never saw.
    class_names : by default those of `dataset.classes`.
    metric, key_dtype, prediction_dtype : as in `Memory.create`.
    batch_size : has no effect on the result beyond rounding.
    autocast : torch.bfloat16 or torch.float16 for a faster pass.
    num_workers, collate_fn : of the data loader.
    part : which rows to observe, by number, for a memory that others help to build: `join_parts` makes one of all
        parts. None observes all.
    verbose : say what was chosen, and show progress, on stderr.

    Returns
    -------
    The memory, open for writing.

    Raises
    ------
    InvalidInput : if the data set changes between reads, the layer is not there or does not run exactly once, or the
        labels do not fit.
    FingerprintMismatch : if `path` holds a memory of another model, layer or data set.

    References
    ----------
    Yang et al., "ResMem: Learn what you can and memorize the rest", NeurIPS 2023.
    """
    n_items, batch_size = len(dataset), as_count("batch_size", batch_size)  # type: ignore[arg-type]
    if n_items == 0:
        raise InvalidInput("the data set is empty: there is nothing to memorize")
    first = _same_item(dataset, 0, "item 0 of the data set")
    collate = collate_fn or torch.utils.data.default_collate
    watch = Watch(model, layer, side, pool=pool, outputs=outputs, task=task, autocast=autocast)
    probe = watch.observe(*_inputs_and_labels(collate([first])))
    chosen_task = watch.task
    if verbose:
        print(f"keys: {watch.side} of {watch.layer_name!r}, {probe.keys.shape[1]} numbers", file=sys.stderr)
    known: dict[str, Any] = {"n_rows": n_items, "first_item": digest_of(first)}
    rows = _WithCopies(dataset, copies) if copies else dataset
    if copies:
        names = [name_of(function) for function in copies]
        firsts = [
            digest_of(_same_item(rows, place * n_items, f"item 0 as {name} sees it"))
            for place, name in enumerate(names, 1)
        ]
        known |= {"copies": names, "first_copies": firsts}
    if part is not None:
        known |= {"part": part_of_rows(part, len(rows))}  # type: ignore[arg-type]
    source = watch.source(known)
    own = _out_of_fold(predictions, chosen_task, n_items)
    own_ids = None if ids is None else as_ids(ids, n_items)
    if own_ids is not None and (copies or len(np.unique(own_ids)) < n_items):
        raise InvalidInput("ids must differ from item to item, and cannot be given with copies")
    width = probe.predictions.shape[1] if own is None else own.shape[1]  # type: ignore[union-attr]
    memory = opened(
        path,
        source,
        dim=probe.keys.shape[1],
        n_outputs=as_count("n_outputs", width if n_outputs is None else n_outputs),
        task=chosen_task,
        metric=metric,
        class_names=class_names or getattr(dataset, "classes", None),
        key_dtype=key_dtype,
        prediction_dtype=prediction_dtype,
    )
    if Source.from_dict(memory.source or {}).complete:
        return memory
    try:
        wanted = np.arange(len(rows)) if part is None else np.asarray(part)  # type: ignore[arg-type]
        losses = _build(memory, watch, rows, wanted, n_items, own, own_ids, batch_size, num_workers, collate, verbose)
        memory.save_source(replace(source, complete=True).to_dict())
    except BaseException:
        memory.close()  # another call may go on where this one stopped
        raise
    if len(losses):
        _warn(watch, losses, held_out, batch_size, collate)
    return memory


def _build(
    memory: Memory,
    watch: "Watch",
    dataset: "Dataset[Any]",
    wanted: Int64[ndarray, " w"],
    n_items: int,
    own: Float[ndarray, "n c"] | None,
    names: Shaped[ndarray, " n"] | None,
    batch_size: int,
    num_workers: int,
    collate: Callable[[list[Any]], Any],
    verbose: bool,
) -> Float[ndarray, " r"]:
    """Observe those of the rows that the memory does not hold yet.

    Returns
    -------
    The base's losses on them, none if out of fold.
    """
    layout = memory.layout
    held = np.isin(wanted if names is None else names[wanted], memory.ids)
    missing, n_done = wanted[~held], int(held.sum())
    losses = [np.zeros(0)]
    with progress_bar("building", len(wanted), done=n_done, shown=verbose) as advance, Builder(memory) as builder:
        for seen in _observed(watch, dataset, missing, batch_size, num_workers, collate):
            as_labels(seen.labels, layout.task, layout.n_outputs, len(seen))
            if own is not None:
                seen = replace(seen, predictions=own[seen.ids % n_items])
            else:
                losses.append(_losses(seen, layout.task))
            if len(dataset) > n_items:  # type: ignore[arg-type]
                seen = replace(seen, groups=seen.ids % n_items)
            builder.add(seen if names is None else replace(seen, ids=names[seen.ids]))
            advance(len(seen))
    return np.concatenate(losses)


@dataclass(frozen=True)
class ChosenKeys:
    """Which keys gained most on held-out rows.

    Attributes
    ----------
    best : the choice with the largest cross-fitted gain.
    results : what tuning found for each choice, by its name; `results[best.name].best` is the setting to use.
    """

    best: KeyChoice
    results: dict[str, TuningResult]

    def _repr_html_(self) -> str:
        rows = [(name, *(row[1] for row in found.table[1:]), found.verdict) for name, found in self.results.items()]
        metric = self.results[self.best.name].table[0][1]
        header = ("keys", *(f"{name}, {metric}" for name in ("base", "memory only", "corrected")), "verdict")
        return html_table(f"Best keys: {self.best.name}", rows, header)


def choose_keys(
    model: nn.Module,
    dataset: "Dataset[Any]",
    held_out: "Dataset[Any]",
    choices: Sequence[KeyChoice] | None = None,
    *,
    outputs: Outputs = "logits",
    batch_size: int = 256,
    autocast: "torch.dtype | None" = None,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    verbose: bool = True,
    **tuning: Any,
) -> ChosenKeys:
    """Try several kinds of keys and keep the one that gains most on held-out rows.

    A memory is built in RAM for each choice, tuned, and dropped.

    Parameters
    ----------
    model, outputs, batch_size, autocast, num_workers, collate_fn, verbose : as in `build_memory`.
    dataset : what the memories hold; a part of the training data tells the choices apart as well.
    held_out : rows that neither the model nor the memories have seen.
    choices : None tries those of `key_choices`.
    tuning : further arguments of `tune`.

    Raises
    ------
    InvalidInput : if a choice names a layer that is not there, two have one name, or the rows do not fit.
    """
    reading: dict[str, Any] = {
        "outputs": outputs,
        "batch_size": batch_size,
        "autocast": autocast,
        "num_workers": num_workers,
        "collate_fn": collate_fn,
        "verbose": verbose,
    }
    if choices is None:
        collate = collate_fn or torch.utils.data.default_collate
        choices = key_choices(model, _inputs_and_labels(collate([dataset[0]]))[0])
    if not choices:
        raise InvalidInput("choices is empty, expected at least one kind of keys to try")
    names = [choice.name for choice in choices]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InvalidInput(f"choices have {', '.join(map(repr, sorted(twice)))} more than once; give each its own name")
    results = {}
    for choice in choices:
        memory = build_memory(model, dataset, None, **choice.options, **reading)
        seen = observe(model, held_out, memory, **reading)
        said = np.asarray(seen.predictions)
        found = tune(memory, seen.keys, seen.labels, said, **{"kernel": choice.kernels, **tuning})
        results[choice.name] = found
        if verbose:
            print(f"{choice.name}: {found.verdict}", file=sys.stderr)
    best = max(choices, key=lambda choice: results[choice.name].gain.value)
    return ChosenKeys(best, results)


def key_choices(model: nn.Module, inputs: Any) -> tuple[KeyChoice, ...]:
    """Kinds of keys worth trying: the last Linear's input and, in a convolutional network, its last feature maps.

    Parameters
    ----------
    model : any classifier or regressor.
    inputs : a batch of one input, to see which layers run.
    """
    watch = Watch(model)
    linear = _last_linear(model, lambda: watch.forward(inputs))
    plain = KeyChoice("last linear", linear)
    maps, convolution = _last_maps(model, lambda: watch.forward(inputs))
    if maps is None:
        return plain, KeyChoice("last linear, unit length", linear, metric="cosine")
    finer = [KeyChoice(f"last maps {pool}x{pool}", maps, "output", pool, "cosine", "float16") for pool in (2, 4)]
    both = f"{convolution}@input+{maps}@output"
    kernels = ("exponential", "kriging")
    return (plain, *finer, KeyChoice("two layers 4x4", both, "input", 4, "cosine", "float16", kernels=kernels))


def observe(
    model: nn.Module,
    dataset: "Dataset[Any]",
    memory: Memory,
    *,
    layer: Layer = None,
    outputs: Outputs = "logits",
    batch_size: int = 256,
    autocast: "torch.dtype | None" = None,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    verbose: bool = True,
) -> Observations:
    """Keys, labels and predictions of labelled data, seen as the memory's rows were: what `tune` and `evaluate` take.

    Parameters
    ----------
    model : the one that the memory was built with.
    dataset : items (x, y), for example held-out ones.
    memory : from `build_memory`.
    layer : only for a memory whose keys come from a function: that function.
    outputs, batch_size, autocast, num_workers, collate_fn, verbose : as in `build_memory`.

    Raises
    ------
    FingerprintMismatch : if the memory was built with another model or layer.
    """
    watch = _watch_of(model, memory, layer, outputs=outputs, autocast=autocast)
    rows = np.arange(len(dataset))  # type: ignore[arg-type]
    collate = collate_fn or torch.utils.data.default_collate
    seen = []
    with progress_bar("observing", len(rows), shown=verbose) as advance:
        for batch in _observed(watch, dataset, rows, as_count("batch_size", batch_size), num_workers, collate):
            seen.append(batch)
            advance(len(batch))
    if not seen:
        raise InvalidInput("the data set is empty: there is nothing to observe")
    columns = ("ids", "keys", "labels", "predictions")
    joined: dict[str, Any] = {name: np.concatenate([getattr(batch, name) for batch in seen]) for name in columns}
    return Observations(**joined)


class Watch:
    """A model with an eye on one of its layers: from a batch to predictions and keys, in one pass.

    The hook lives only while a batch is observed; it and the training mode are put back on errors too.

    Parameters
    ----------
    model, layer, side, pool, outputs, task, autocast : as in `build_memory`.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: Layer = None,
        side: Side = "input",
        *,
        pool: int = 1,
        outputs: Outputs = "logits",
        task: Task | None = None,
        autocast: "torch.dtype | None" = None,
    ) -> None:
        for name, found, allowed in (("side", side, Side), ("outputs", outputs, Outputs)):
            if found not in get_args(allowed):
                raise InvalidInput(f"{name} is {found!r}, expected one of {', '.join(map(repr, get_args(allowed)))}")
        self.model, self.side, self.pool = model, side, as_count("pool", pool)
        self._layer, self.outputs, self._task, self._autocast = layer, outputs, task, autocast
        if isinstance(layer, str):
            places_of(model, layer, side)

    @property
    def task(self) -> Task:
        """Known once a labelled batch was observed, or given."""
        if self._task is None:
            raise InvalidInput("the task is not known yet: give task='classification' or 'regression'")
        return self._task

    @property
    def layer_name(self) -> str:
        """Dotted name of the layer, or the name of the function that gives keys."""
        return name_of(self._layer) if callable(self._layer) else self._layer or ""

    def source(self, data: Mapping[str, Any]) -> Source:
        """The fingerprint of model and layer, with what is known of the data."""
        return Source(fingerprint(self.model), self.layer_name, self.side, self.pool, dict(data))

    def observe(self, inputs: Any, labels: Any) -> Observations:
        """Keys and predictions of a labelled batch; ids are left to the caller."""
        raw, keys = self.run(inputs)
        targets = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
        if self._task is None:
            discrete = targets.dtype.kind in "iu" and targets.ndim == 1 and raw.shape[1] > 1
            self._task = "classification" if discrete else "regression"
        predictions = self.predictions(raw).cpu().numpy()
        return Observations(np.arange(len(keys)), keys.cpu().numpy(), targets, predictions)

    def run(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Outputs [b c] and keys [b d] of a batch, float32, on the model's device."""
        if self._layer is None:
            self._layer = _last_linear(self.model, lambda: self.forward(inputs))
        if callable(self._layer):
            raw = self.forward(inputs)
            with evaluating(self.model), torch.inference_mode():
                keys = self._layer(moved_to(inputs, device_of(self.model)))
        else:
            with watching(self.model, self._layer, self.side) as seen:
                raw = self.forward(inputs)
            return _tensor_of(raw), seen(partial(pooled, pool=self.pool))
        return _tensor_of(raw), pooled(keys, self.pool)

    def predictions(self, raw: Tensor) -> Tensor:
        """Probabilities [b c], or values [b c], from the model's outputs."""
        if self.task == "regression" or self.outputs == "probabilities":
            return raw
        return raw.softmax(1) if self.outputs == "logits" else raw.exp()

    def forward(self, inputs: Any) -> Any:
        """The model's raw outputs of a batch, in eval mode and without gradients."""
        device = device_of(self.model)
        moved = moved_to(inputs, device)
        with evaluating(self.model), torch.inference_mode():
            with torch.autocast(device.type, self._autocast, enabled=self._autocast is not None):
                if isinstance(moved, Mapping):
                    return self.model(**moved)
                return self.model(*moved) if isinstance(moved, tuple | list) else self.model(moved)


class ResMemModule(nn.Module):
    """A model and its memory as one module: forward gives corrected log-probabilities, or corrected values.

    Parameters
    ----------
    model : the one that the memory was built with.
    memory : from `build_memory`.
    setting : by default the one that tuning saved with the memory; failing that the paper's method with k = 50.
    layer : only for a memory whose keys come from a function, or that was filled by hand.
    side, pool : only for a memory that was filled by hand.
    outputs, autocast : as in `build_memory`.
    index, max_weight : as in `ResidualKNN`.

    Raises
    ------
    FingerprintMismatch : if the memory was built with another model or layer.

    References
    ----------
    Yang et al., "ResMem: Learn what you can and memorize the rest", NeurIPS 2023.
    """

    def __init__(
        self,
        model: nn.Module,
        memory: Memory,
        *,
        setting: Setting | None = None,
        layer: Layer = None,
        side: Side = "input",
        pool: int = 1,
        outputs: Outputs = "logits",
        autocast: "torch.dtype | None" = None,
        index: str = "auto",
        max_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.model, self.memory = model, memory
        self._layer, self._index, self._autocast = layer, index, autocast
        self.watch = _watch_of(model, memory, layer, side, pool, outputs=outputs, autocast=autocast)
        self.setting = setting or Setting.from_dict(memory.setting or {})
        self.knn = self.setting.knn(memory, index=index, max_weight=max_weight)

    def forward(self, inputs: Any) -> Float[Tensor, "b c"]:
        """Log-probabilities [b c] of a classification, values [b c] of a regression, on the model's device."""
        raw, keys = self.watch.run(inputs)
        said = self.setting.predict(self.knn, keys.cpu().numpy(), self._said(raw))
        if self.memory.layout.task == "classification":
            said = np.log(np.maximum(said, np.finfo(said.dtype).tiny))
        return torch.from_numpy(said).to(raw.device)

    def explain(self, inputs: Any) -> Explanation:
        """Which memories correct each prediction, and by how much, before a gate weighs the correction."""
        raw, keys = self.watch.run(inputs)
        said = self._said(raw)
        setting, base = self.setting, self.setting.tempered(said, self.memory.layout.task)
        shares = {"shrinkage": setting.shrinkage, "residual_share": setting.residual_share}
        return explain(self.knn, keys.cpu().numpy(), base, **shares)

    def save_pretrained(self, folder: str | os.PathLike[str], *, card: Card | None = None) -> None:
        """Keep weights, memory, setting and a model card in a folder, for `from_pretrained`.

        What is kept of the memory are the rows that are not forgotten. An interrupted call leaves nothing under the
        folder's name.

        Parameters
        ----------
        folder : new, or empty.
        card : what the model card should say beside what the memory says itself.

        Raises
        ------
        InvalidInput : if the folder holds something, keys come from a function, or the weights are no plain tensors.
        StorageFailure : if the disk refuses.
        """
        if callable(self._layer):
            raise InvalidInput(
                f"the keys come from the function {self.watch.layer_name!r}, which no file can hold; "
                "build the memory with the name of a layer"
            )
        base, n_rows = fingerprint(self.model), len(self.memory)
        options = {
            "model": base,
            "setting": with_measured(self.setting, self.knn.bandwidth, n_rows).to_dict(),
            "outputs": self.watch.outputs,
            "layer": self.watch.layer_name or None,
            "side": self.watch.side,
            "pool": self.watch.pool,
            "index": self._index,
            "max_weight": self.knn.max_weight,
            "autocast": precision_name(self._autocast),
        }
        example = "module = rm.ResMemModule.from_pretrained(folder, model)  # model: a new one, for its architecture"
        with saving(folder) as part:
            save_weights(self.model, part / WEIGHTS)
            write_options(part, "ResMemModule", options)
            memory = save_memory(self.memory, part)
            text = (card or Card()).text(memory, self.setting, base_class=base["class"], example=example)
            (part / CARD).write_text(text, encoding="utf-8")

    @staticmethod
    def from_pretrained(
        folder: str | os.PathLike[str],
        model: nn.Module,
        *,
        index: str | None = None,
        writable: bool = False,
        verify: bool = True,
    ) -> "ResMemModule":
        """What `save_pretrained` kept: the same predictions, bit for bit. Nothing in the folder is run.

        Parameters
        ----------
        folder : that `save_pretrained` made, or a copy of it.
        model : of the same class and architecture; it gets the kept weights.
        index : another engine than the one that was in use, as in `ResidualKNN`.
        writable : open the memory for changes, as its one writer; others may be reading it on a shared disk.
        verify : read every byte of weights and memory and compare it with what was written.

        Raises
        ------
        DataNotFound : if there is no such folder.
        CorruptFile : if a file is missing, cut or changed; the message names it.
        UnsupportedFormat : if a newer version of the library wrote it.
        InvalidInput : if another class wrote it, or the weights do not fit the model, which then is as it was.
        FingerprintMismatch : if the model is of another class, which then is as it was.
        """
        saved = Saved.by("ResMemModule", folder, verify=verify)
        saved.check_base(fingerprint(model), names=("class",))
        kept, memory = saved.options, saved.memory(writable=writable, verify=verify)
        place = {name: kept[name] for name in ("layer", "side", "pool")} if memory.source is None else {}
        try:
            load_weights(model, saved.path / WEIGHTS)
            return ResMemModule(
                model,
                memory,
                setting=Setting.from_dict(kept["setting"]),
                outputs=kept["outputs"],
                autocast=precision_named(kept["autocast"]),
                index=kept["index"] if index is None else index,
                max_weight=kept["max_weight"],
                **place,
            )
        except BaseException:
            memory.close()
            raise

    def _said(self, raw: Tensor) -> Float[ndarray, "b c"]:
        layout = self.memory.layout
        return np.asarray(as_predictions(self.watch.predictions(raw).cpu().numpy(), layout.task, layout.n_outputs))


class Exportable(nn.Module):
    """A copy of a model whose forward gives (outputs, keys): see `exportable`."""

    def __init__(self, model: nn.Module, layer: str, side: Side, pool: int) -> None:
        super().__init__()
        self.model, self._layer, self._side, self._pool = copy.deepcopy(model).eval(), layer, side, pool

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        with watching(self.model, self._layer, self._side) as seen:
            raw = self.model(*inputs)
        return _tensor_of(raw), seen(partial(pooled, pool=self._pool))


def exportable(model: nn.Module, memory: Memory) -> Exportable:
    """A module for torch.export, ONNX and the like: forward(x) gives (outputs [b c], keys [b d]) in one graph.

    Exporters drop the hooks that a module carries, so this one sets its own while it runs, which torch.export traces
    with strict=False (the default from torch 2.7 on). At the other end:
    `correct(temper(softmax(outputs), T), knn(keys), shrinkage)`.

    Raises
    ------
    InvalidInput : if the memory's keys come from a function: export that function by itself.
    FingerprintMismatch : if the memory was built with another model.
    """
    if memory.source is None:
        raise InvalidInput("the memory does not say which layer its keys come from; build it with build_memory")
    built = Source.from_dict(memory.source)
    if ":" in built.layer:
        raise InvalidInput(f"the keys come from the function {built.layer!r}, not from a layer: export it by itself")
    _watch_of(model, memory)
    return Exportable(model, built.layer, built.side, built.pool)


def _watch_of(
    model: nn.Module,
    memory: Memory,
    layer: Layer = None,
    side: Side = "input",
    pool: int = 1,
    **options: Any,
) -> Watch:
    """A watch on the layer that the memory's rows come from, after making sure that the model is theirs."""
    built = None if memory.source is None else Source.from_dict(memory.source)
    if built is not None:
        if layer is None and ":" in built.layer:
            raise InvalidInput(f"the memory's keys come from the function {built.layer!r}: pass it as layer=")
        layer = built.layer if layer is None else layer
        side, pool = built.side, built.pool
    watch = Watch(model, layer, side, pool=pool, task=memory.layout.task, **options)
    if built is not None:
        built.check(watch.source(built.data), place_of_memory(memory), data=False)
    return watch


def _observed(
    watch: Watch,
    dataset: "Dataset[Any]",
    rows: Int64[ndarray, " r"],
    batch_size: int,
    num_workers: int,
    collate: Callable[[list[Any]], Any],
) -> Iterator[Observations]:
    """These rows of a data set, batch by batch, identified by their index."""
    loader = DataLoader(Subset(dataset, rows.tolist()), batch_size, num_workers=num_workers, collate_fn=collate)
    start = 0
    for batch in loader:
        seen = watch.observe(*_inputs_and_labels(batch))
        yield replace(seen, ids=rows[start : start + len(seen)])
        start += len(seen)


class _WithCopies(Dataset[Any]):
    """The items of a data set, then all of them as the first function sees them, then as the second does, …"""

    def __init__(self, dataset: "Dataset[Any]", copies: Sequence[Callable[[Any], Any]]) -> None:
        self._dataset, self._copies = dataset, copies

    def __len__(self) -> int:
        return len(self._dataset) * (1 + len(self._copies))  # type: ignore[arg-type]

    def __getitem__(self, item: int) -> tuple[Any, Any]:
        copy, original = divmod(item, len(self._dataset))  # type: ignore[arg-type]
        x, y = self._dataset[original]
        return (self._copies[copy - 1](x) if copy else x), y


def _last_linear(model: nn.Module, forward: Callable[[], Any]) -> str:
    """The Linear that runs last in a forward pass."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ran: list[str] = []
    thread = threading.get_ident()

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any) -> None:
            if threading.get_ident() == thread:
                ran.append(name)

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in linears.items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    if not ran:
        known = ", ".join(name for name, _ in model.named_children())
        raise InvalidInput(f"the model runs no Linear, so the layer must be named; its parts are: {known or 'none'}")
    return ran[-1]


def _last_maps(model: nn.Module, forward: Callable[[], Any]) -> tuple[str | None, str | None]:
    """The module that gives the last feature maps wider than 1 x 1, and the last convolution that looks around."""
    ran: list[tuple[str, nn.Module]] = []
    thread = threading.get_ident()

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _inputs: Any, result: Any) -> None:
            if threading.get_ident() != thread:
                return
            if isinstance(result, Tensor) and result.ndim == 4 and min(result.shape[2:]) > 1:
                ran.append((name, module))

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _ in ran]
    ran = [(name, module) for name, module in ran if names.count(name) == 1]  # others can give no keys
    convolutions = [name for name, module in ran if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1]
    return (ran[-1][0], convolutions[-1]) if convolutions else (None, None)


def _tensor_of(raw: Any) -> Float[Tensor, "b c"]:
    """The outputs in what a model gave: a tensor, something with .logits, or the first tensor of a tuple."""
    tensor = raw.logits if hasattr(raw, "logits") else first_tensor(raw)
    tensor = tensor.float()
    tensor = tensor[:, None] if tensor.ndim == 1 else tensor
    if tensor.ndim != 2:
        raise InvalidInput(
            f"the model's output has shape {tuple(tensor.shape)}, expected one row of outputs an example"
        )
    return tensor


def _inputs_and_labels(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise InvalidInput(f"an item of the data set is a {type(batch).__name__}, expected a pair (x, y)")
    return batch[0], batch[1]


def _same_item(dataset: "Dataset[Any]", row: int, name: str) -> Any:
    """An item, after making sure that it is the same when read again."""
    first, again = dataset[row], dataset[row]
    if digest_of(first) != digest_of(again):
        raise InvalidInput(f"{name} differs when it is read twice: switch random augmentation off for the build")
    return first


def _out_of_fold(predictions: ArrayLike | None, task: Task, n_rows: int) -> Float[ndarray, "n c"] | None:
    if predictions is None:
        return None
    checked = np.asarray(as_predictions(predictions, task))
    if len(checked) != n_rows:
        raise DimensionMismatch(f"there are {len(checked):,} out-of-fold predictions for {n_rows:,} examples")
    return checked


def _losses(seen: Observations, task: Task) -> Float[ndarray, " b"]:
    predictions = np.asarray(seen.predictions, np.float64)
    if task == "classification":
        unseen = max(int(seen.labels.max()) + 1 - predictions.shape[1], 0)
        predictions = np.pad(predictions, ((0, 0), (0, unseen)))
        return -np.log(np.maximum(predictions[np.arange(len(seen)), seen.labels], 1e-12))
    return ((predictions - seen.labels.reshape(predictions.shape)) ** 2).mean(axis=1)


def _warn(
    watch: Watch, losses: ndarray, held_out: "Dataset[Any] | None", batch_size: int, collate: Callable[[list[Any]], Any]
) -> None:
    other = None
    if held_out is not None:
        n = len(held_out)  # type: ignore[arg-type]
        rows = np.unique(np.linspace(0, n - 1, min(n, HELD_OUT_ROWS)).astype(int))
        seen = _observed(watch, held_out, rows, batch_size, 0, collate)
        other = float(np.concatenate([_losses(some, watch.task) for some in seen]).mean())
    floor = 1e-2 if watch.task == "classification" else 0.0
    warn_if_in_sample(float(losses.mean()), other, floor)
