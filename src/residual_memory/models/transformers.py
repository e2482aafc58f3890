"""Language models of transformers: a memory of every token of a text, and a model that uses it in all its logits.

How tokens are read, shifted and masked is in `models.tokens`, for building and for use alike.
"""

import copy
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, tee
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64
from numpy import ndarray

from residual_memory.correction import Exclude, ResidualKNN
from residual_memory.errors import FewerNeighbors, FingerprintMismatch, InvalidInput, MissingExtra
from residual_memory.language import (
    HeldOutTokens,
    LanguageSetting,
    LanguageTuning,
    TokenScores,
    tune_tokens,
)
from residual_memory.memory import Memory
from residual_memory.memory.format import MANIFEST
from residual_memory.models.base import Builder, Side, Source, opened, place_of_memory
from residual_memory.models.pretrained import BASE, CARD, Card, Saved, save_memory, saving, with_measured, write_options
from residual_memory.models.tokens import (
    AFTER_NORM,
    IGNORED,
    Items,
    TokenBatch,
    TokenWatch,
    read_matrix,
    tokenizer_digest,
)
from residual_memory.models.vocabulary import (
    Said,
    corrected_probabilities,
    likeliest,
    likeliest_label,
    rows_in_cache,
    top_m_of,
)
from residual_memory.models.watching import (
    device_of,
    digest_of,
    evaluating,
    fingerprint,
    watching,
)
from residual_memory.models.weights import precision_name, precision_named
from residual_memory.progress import progress_bar
from residual_memory.sparse import Recalled, merged, residual_at
from residual_memory.types import Metric, Observations
from residual_memory.validation import as_count, as_fraction

try:
    import torch
    from safetensors import SafetensorError
    from torch import Tensor, nn
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LogitsProcessor, PreTrainedModel
    from transformers.generation.utils import GENERATION_MODES_MAPPING
except ImportError as error:
    raise MissingExtra("language models of transformers", "transformers") from error


ROWS_AT_A_TIME = 1024  # tokens that are corrected together, fewer where the lists of their neighbours are long
LIST_BYTES = 64 << 20  # of those lists
PROJECTION_SAMPLE = 20_000  # keys that principal components are found from

Residuals = Literal["top-m", "dense"]


def build_memory(
    model: PreTrainedModel,
    dataset: Items,
    path: str | os.PathLike[str] | None,
    *,
    layer: str = AFTER_NORM,
    side: Side = "input",
    residuals: Residuals = "top-m",
    top_m: int = 8,
    keep: float = 1.0,
    projection: int | None = None,
    n_outputs: int | None = None,
    tokenizer: Any = None,
    limit: int | None = None,
    metric: Metric = "euclidean",
    key_dtype: str = "float16",
    prediction_dtype: str | None = None,
    class_names: Sequence[str] | None = None,
    batch_size: int | None = None,
    autocast: "torch.dtype | None" = None,
    verbose: bool = True,
) -> Memory:
    """Run a language model once over a text and keep, for every token, what it could not learn.

    The text streams through and is never held whole. A build that was interrupted goes on where it was when it is
    called again with the same arguments; a finished one is opened.

    Parameters
    ----------
    model : a causal or sequence-to-sequence language model; put into eval mode for the time of the build.
    dataset : items with `input_ids` [t], read once from the beginning: a list, a `datasets` stream, `Windows`. They may
        have `attention_mask` [t] (padding on either side is dropped), `documents` (one number, or one a token; by
        default every item is a document), `start` (the place of the first token in the stream; by default the items
        follow each other) and `skip` (how many predictions are not to be stored). For a sequence-to-sequence model:
        `input_ids` of the source and `labels` of the target, −100 ignored.
    path : directory of the memory; None keeps it in RAM.
    layer : "post-attention" is the input of the last block's feed-forward, after the norm, the best key by published
        measurements; "post-attention-before-norm" is the same before the norm. Or any dotted name, as in the
        `build_memory` of other torch models.
    side : "input" or "output", of a dotted name.
    residuals : "top-m" keeps the m largest probabilities of each prediction and the mass of the others; "dense" keeps
        whole predictions, for small vocabularies.
    top_m : m.
    keep : tokens that the model gives more than this probability are left out: it knows them without a memory.
    projection : principal components to keep of the keys, found from the first 20,000; None keeps the keys whole.
    n_outputs : more classes than the model's vocabulary.
    tokenizer : what made the tokens; kept as a digest, so that another one is refused later.
    limit : predictions after which to stop.
    metric, key_dtype, class_names : as in `Memory.create`.
    prediction_dtype : None is "log8" for top-m (a probability in 8 bits on a log scale), "float16" for dense.
    batch_size : items that pass at a time; None takes as many as have 128 MiB of logits.
    autocast : torch.bfloat16 or torch.float16 for a faster pass.
    verbose : say what was chosen, and show progress, on stderr.

    Returns
    -------
    The memory, open for writing. A row's id is the place of its token in the stream; its group is the document.

    Raises
    ------
    InvalidInput : if the text is empty, a token is beyond the vocabulary, a sequence is longer than the model reads, or
        the layer is not there.
    FingerprintMismatch : if `path` holds a memory of another model, layer, tokenizer or text.

    References
    ----------
    Yang et al., "ResMem: Learn what you can and memorize the rest", NeurIPS 2023, section 4.2 on language models.
    Khandelwal et al., "Generalization through memorization", ICLR 2020, on the choice of the key.
    """
    known = as_fraction("keep", keep, above_zero=True)
    wanted = None if limit is None else as_count("limit", limit)
    watch = TokenWatch(model, layer, side, autocast=autocast)
    width = watch.vocabulary
    m = None if residuals == "dense" else as_count("top_m", top_m)
    if m is not None and m > width:
        raise InvalidInput(f"top_m is {m}, expected at most {width}, the size of the vocabulary")
    if n_outputs is not None and n_outputs < width:
        raise InvalidInput(f"n_outputs is {n_outputs}, expected at least {width}, the size of the vocabulary")
    size = None if batch_size is None else as_count("batch_size", batch_size)
    first, sample, dataset = _readings(dataset, 3)
    head = list(islice(iter(first), 1))
    if not head:
        raise InvalidInput("the text is empty: there is nothing to memorize")
    data: dict[str, Any] = {"first_item": digest_of(_plain(head[0])), "keep": known, "limit": wanted}
    if isinstance(dataset, Sequence) and digest_of(_plain(dataset[0])) != data["first_item"]:
        raise InvalidInput("item 0 of the text differs when it is read twice: switch random augmentation off")
    if projection is not None:
        components = as_count("projection", projection)
        held = _held_projection(path, components)
        watch.projection = held if held is not None else _principal(watch, sample, components)
    del first, sample  # what nobody reads any more need not be kept
    source = replace(watch.source(data), tokenizer=None if tokenizer is None else tokenizer_digest(tokenizer))
    memory = opened(
        path,
        source,
        dim=watch.probe(head[0]),
        n_outputs=width if n_outputs is None else n_outputs,
        task="classification",
        metric=metric,
        residuals=residuals,
        class_names=class_names,
        key_dtype=key_dtype,
        prediction_dtype=prediction_dtype or ("log8" if residuals == "top-m" else "float16"),
    )
    try:
        _check_begun(memory, source, m)
        if Source.from_dict(memory.source or {}).complete:
            return memory
        if verbose:
            print(f"keys: {watch.side} of {watch.layer!r}, {memory.layout.dim} numbers", file=sys.stderr)
        _fill(memory, watch, dataset, m, known, wanted, size, verbose)
        memory.save_source(replace(source, complete=True).to_dict())
    except BaseException:
        memory.close()  # another call may go on where this one stopped
        raise
    return memory


def _readings(dataset: Items, n: int) -> Sequence[Items]:
    """The data set, to be read n times: what can be read only once is kept until all have read it."""
    return tee(dataset, n) if iter(dataset) is dataset else (dataset,) * n


def _check_begun(memory: Memory, source: Source, m: int | None) -> None:
    """Refuse to go on in a memory whose tokens, keys or lists are of another kind."""
    begun = Source.from_dict(memory.source or {})
    kinds = {
        "tokenizer": (begun.tokenizer, source.tokenizer or begun.tokenizer),
        "projection": (begun.projection and memory.layout.dim, source.projection and memory.layout.dim),
        "top_m": (memory.snapshot.manifest.top_m, m),
    }
    for name, (was, now) in kinds.items():
        if was is not None and was != now:
            raise FingerprintMismatch(
                f"the memory {place_of_memory(memory)} was built with {name} {was!r}, but this is {now!r}; "
                "build with the same, or name another path"
            )


def _fill(
    memory: Memory,
    watch: "TokenWatch",
    dataset: Items,
    m: int | None,
    known: float,
    limit: int | None,
    batch_size: int | None,
    verbose: bool,
) -> None:
    """Store the tokens that come after those that the memory holds."""
    done, n_seen, last = memory.next_id, 0, -1
    with progress_bar("building", limit or 0, shown=verbose) as advance, Builder(memory) as builder:
        for batch in watch.batches(dataset, batch_size, after=done, limit=limit):
            n_seen += len(batch)
            advance(len(batch))
            steps = np.diff(batch.offsets, prepend=last)
            if len(back := np.flatnonzero(steps <= 0)):
                place = batch.offsets[back[0]]
                raise InvalidInput(
                    f"the text goes back to place {place:,} after place {place - steps[back[0]]:,}; give the items in "
                    "order, so that a build that was interrupted can go on"
                )
            last = int(batch.offsets[-1]) if len(batch) else last
            for start in range(0, len(batch), step := rows_in_cache(batch.logits)):
                some = batch.part(slice(start, start + step))
                said = some.logits.float().log_softmax(1)
                chosen = torch.from_numpy(some.offsets >= done).to(said.device)
                if known < 1:
                    chosen &= said.gather(1, some.labels[:, None])[:, 0].exp() <= known
                rows = chosen.nonzero()[:, 0]
                if not len(rows):
                    continue
                if len(rows) < len(some):
                    some, said = some.of(rows), said[rows]
                builder.add(
                    Observations(
                        some.offsets,
                        stored_keys(some.keys, memory),
                        some.labels.cpu().numpy(),
                        said.exp().cpu().numpy() if m is None else top_m_of(said, m),
                        groups=some.documents,
                    )
                )
    if n_seen == 0 and done == 0:
        raise InvalidInput("the text has no token with another one before it: there is nothing to predict or memorize")


class ResMemForCausalLM(nn.Module):
    """A language model and its memory: logits are corrected wherever they are read, in `generate` too.

    A corrected logit is the base's log-normaliser plus the log of the corrected probability. Where no memory
    contributes, the row is the base's own, bit for bit.

    Parameters
    ----------
    model : the one that the memory was built with; causal or sequence-to-sequence. It is not changed.
    memory : from `build_memory`; or several, whose rows are searched together.
    setting : by default the one that tuning saved with the (first) memory; failing that k = 64 and lambda = 0.25.
    layer, side : only for a memory that was filled by hand.
    tokenizer : refused where the memory was built with another.
    autocast : as in `build_memory`.
    index, max_weight : as in `ResidualKNN`.

    Raises
    ------
    FingerprintMismatch : if a memory was built with another model, layer or tokenizer.

    References
    ----------
    Yang et al., "ResMem: Learn what you can and memorize the rest", NeurIPS 2023.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        memory: Memory | Sequence[Memory],
        *,
        setting: LanguageSetting | None = None,
        layer: str = AFTER_NORM,
        side: Side = "input",
        tokenizer: Any = None,
        autocast: "torch.dtype | None" = None,
        index: str = "auto",
        max_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.memories = (memory,) if isinstance(memory, Memory) else tuple(memory)
        if not self.memories:
            raise InvalidInput("there is no memory, expected one or several")
        self.watch = _watch_of(model, self.memories, layer, side, tokenizer, autocast)
        self.setting = setting or LanguageSetting.from_dict(self.memories[0].setting or {})
        self.max_weight, self._index, self._autocast = max_weight, index, autocast
        self._knns = _regressors(self.memories, self.setting, index, max_weight)

    @property
    def description(self) -> str:
        """The engines that search, for people."""
        return ", ".join(dict.fromkeys(knn.description for knn in self._knns))

    def prepare(self) -> None:
        """Make the indexes fit the memories as they are now, so that the next query need not."""
        for knn in self._knns:
            knn.prepare()

    def save_indexes(self) -> None:
        """Keep the indexes with their memories on disk, so that they need not be built again."""
        for knn in self._knns:
            knn.save_index()

    @property
    def _measure(self) -> ResidualKNN:
        """The one whose rows tell the bandwidth: the first that has some."""
        return next((knn for knn in self._knns if len(knn.memory) > 1), self._knns[0])

    def with_setting(self, setting: LanguageSetting) -> "ResMemForCausalLM":
        """The same model, memories and indexes, used in another way."""
        other = copy.copy(self)
        other.setting = setting
        sigma = self._measure.bandwidth if isinstance(setting.bandwidth, str) else setting.bandwidth
        other._knns = tuple(
            knn.with_kernel(n_neighbors=setting.n_neighbors, kernel=setting.kernel, bandwidth=sigma)
            for knn in self._knns
        )
        return other

    # ------------------------------------------------------------------ on disk

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, tokenizer: Any = None, card: Card | None = None
    ) -> None:
        """Keep the base, the memory, the setting and a model card in a folder, for `from_pretrained`.

        What is kept of the memory are the rows that are not forgotten. An interrupted call leaves nothing under the
        folder's name.

        Parameters
        ----------
        folder : new, or empty.
        tokenizer : kept with the base, in the folder's `base/`.
        card : what the model card should say beside what the memory says itself.

        Raises
        ------
        InvalidInput : if the folder holds something, or there are several memories.
        FingerprintMismatch : if the memory was built with another tokenizer.
        StorageFailure : if the disk refuses.
        """
        if len(self.memories) > 1:
            raise InvalidInput(
                f"there are {len(self.memories)} memories, expected one to save; merge_memories makes one of them"
            )
        (memory,) = self.memories
        if tokenizer is not None:
            _check_tokenizer(memory, tokenizer)
        base = fingerprint(self.model)
        options = {
            "model": base,
            "setting": with_measured(self.setting, self._measure.bandwidth, len(memory)).to_dict(),
            "layer": self.watch.layer,
            "side": self.watch.side,
            "decodes": self.watch.decodes,
            "index": self._index,
            "max_weight": self.max_weight,
            "autocast": precision_name(self._autocast),
        }
        example = "lm = rm.ResMemForCausalLM.from_pretrained(folder)"
        if tokenizer is not None:
            example += f'\ntokenizer = transformers.AutoTokenizer.from_pretrained(f"{{folder}}/{BASE}")'
        with saving(folder) as part:
            self.model.save_pretrained(part / BASE)
            if tokenizer is not None:
                tokenizer.save_pretrained(part / BASE)
            write_options(part, "ResMemForCausalLM", options)
            kept = save_memory(memory, part)
            text = (card or Card()).text(kept, self.setting, base_class=base["class"], example=example)
            (part / CARD).write_text(text, encoding="utf-8")

    @staticmethod
    def from_pretrained(
        folder: str | os.PathLike[str],
        model: PreTrainedModel | None = None,
        *,
        index: str | None = None,
        writable: bool = False,
        verify: bool = True,
        **options: Any,
    ) -> "ResMemForCausalLM":
        """What `save_pretrained` kept: the same logits, bit for bit. Nothing in the folder is run.

        Parameters
        ----------
        folder : that `save_pretrained` made, or a copy of it.
        model : the base, where it is at hand, or of a class that transformers' Auto classes do not know.
        index : another engine than the one that was in use, as in `ResidualKNN`.
        writable : open the memory for changes, as its one writer; others may be reading it on a shared disk.
        verify : read every byte of weights and memory and compare it with what was written.
        options : of the base's own `from_pretrained`, where it is read from the folder.

        Raises
        ------
        DataNotFound : if there is no such folder.
        CorruptFile : if a file is missing, cut or changed; the message names it.
        UnsupportedFormat : if a newer version of the library wrote it.
        InvalidInput : if another class wrote it, or transformers does not know the base's class.
        FingerprintMismatch : if the base is another one than was saved.
        """
        saved = Saved.by("ResMemForCausalLM", folder, verify=verify)
        kept = saved.options
        if model is None:
            model = _base_in(saved.path / BASE, seq2seq=kept["decodes"], options=options)
        saved.check_base(fingerprint(model))
        memory = saved.memory(writable=writable, verify=verify)
        place = {name: kept[name] for name in ("layer", "side")} if memory.source is None else {}
        try:
            return ResMemForCausalLM(
                model,
                memory,
                setting=LanguageSetting.from_dict(kept["setting"]),
                autocast=precision_named(kept["autocast"]),
                index=kept["index"] if index is None else index,
                max_weight=kept["max_weight"],
                **place,
            )
        except BaseException:
            memory.close()
            raise

    # ------------------------------------------------------------------ what transformers asks of a model

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def generation_config(self) -> Any:
        return self.model.generation_config

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def can_generate(self) -> bool:
        return bool(self.model.can_generate())

    def tie_weights(self, **_: Any) -> None:
        """Nothing: the base's weights are as they are."""

    # ------------------------------------------------------------------ use

    def forward(self, input_ids: Tensor | None = None, **options: Any) -> Any:
        """What the model gives, with corrected logits; with `labels` the loss is that of the corrected logits.

        Parameters
        ----------
        input_ids : [b t].
        options : as the model takes them: attention_mask, labels, logits_to_keep, a cache, …

        Raises
        ------
        InvalidInput : if a token is beyond the vocabulary or the sequence longer than the model reads.
        """
        if input_ids is not None:
            self._check(input_ids)
            options["input_ids"] = input_ids
        to_keep, labels = options.get("logits_to_keep", 0), None
        if isinstance(to_keep, Tensor) or to_keep != 0:
            labels = options.pop("labels", None)  # the model itself would hold a part of the logits against all labels
        with self.attached():
            result = self.model(**options)
        return result if labels is None else self._with_loss(result, labels, options)

    def _check(self, input_ids: Tensor) -> None:
        self.watch.checked(input_ids.detach().cpu().numpy(), "input_ids")
        self.watch.check_length(input_ids.shape[1])

    def generate(self, *inputs: Any, **options: Any) -> Any:
        """The model's own `generate`, every step of it with corrected logits: greedy, sampling or beams.

        Raises
        ------
        InvalidInput : if a token is beyond the vocabulary or the prompt longer than the model reads.
        """
        prompt = inputs[0] if inputs else options.get("input_ids", options.get("inputs"))
        if isinstance(prompt, Tensor):
            self._check(prompt)
        with self.attached(), torch.inference_mode():
            return self.model.generate(*inputs, **options)

    @contextmanager
    def attached(self) -> Iterator[PreTrainedModel]:
        """While the context lasts, the model itself gives corrected logits on this thread, whoever calls it."""
        thread = threading.get_ident()

        def correct(module: nn.Module, inputs: tuple[Any, ...], options: Any, result: Any = None) -> Any:
            # Another thread may meet the hook while torch registers or removes it, and then gives it no options.
            del module, inputs
            if threading.get_ident() != thread:
                return None
            logits = _logits_in(result, options)
            b, kept = logits.shape[:2]
            to_keep = options.get("logits_to_keep", 0)

            def vectors(passed: Tensor) -> Tensor:
                chosen = passed[:, to_keep] if isinstance(to_keep, Tensor) else passed[:, passed.shape[1] - kept :]
                return chosen.flatten(0, 1)

            with torch.inference_mode(), torch.autocast(logits.device.type, enabled=False):
                keys = self.watch.keys(parts, vectors)
                corrected = self._corrected_where(self._present(options, kept), logits.detach().flatten(0, 1), keys)
            if corrected is None:
                return result
            result = _with_logits(result, corrected.view(b, kept, -1), options)
            labels = options.get("labels")
            return result if labels is None else self._with_loss(result, labels, options)

        with evaluating(self.model), watching(self.model, self.watch.layer, self.watch.side) as parts:
            handle = self.model.register_forward_hook(correct, with_kwargs=True)
            try:
                with self.watch.precision():
                    yield self.model
            finally:
                handle.remove()

    def _present(self, options: Mapping[str, Any], kept: int) -> Bool[Tensor, " n"] | None:
        """Which of the last places hold tokens and no padding; None where all do, or no mask says."""
        mask = options.get("decoder_attention_mask" if self.watch.decodes else "attention_mask")
        if mask is None or mask.ndim != 2 or mask.shape[1] < kept or isinstance(options.get("logits_to_keep"), Tensor):
            return None
        present = mask[:, mask.shape[1] - kept :].flatten() > 0
        return None if present.all() else present

    def _corrected_where(
        self, present: Bool[Tensor, " n"] | None, logits: Float[Tensor, "n v"], keys: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n w"] | None:
        """As `correct`, without a search for places that are padding."""
        if present is None:
            return self.correct(logits, keys)
        rows = present.nonzero()[:, 0]
        corrected = self.correct(logits[rows], keys[rows])
        return None if corrected is None else _roomy(logits, self.memories).index_copy_(0, rows, corrected)

    def logits_processor(self) -> "ResMemLogitsProcessor":
        """A processor for `model.generate(logits_processor=[…])`, paired with its hook: use it in a `with` block."""
        return ResMemLogitsProcessor(self)

    def custom_generate(self, model: PreTrainedModel, input_ids: Tensor, **options: Any) -> Any:
        """For `model.generate(…, custom_generate=lm.custom_generate)`: the usual decoding with corrected logits."""
        if model is not self.model:
            raise InvalidInput("custom_generate was given to another model than the memory's")
        mode = options["generation_config"].get_generation_mode()
        decode = getattr(type(model), GENERATION_MODES_MAPPING[mode])
        with self.attached():
            return decode(model, input_ids, **options)

    def correct(self, logits: Float[Tensor, "n v"], keys: Float[Tensor, "n d"]) -> Float[Tensor, "n w"] | None:
        """Corrected logits from the base's and the keys of their places; None where no row changes.

        They are as wide as the memories' outputs, where these have room for more classes than the model's.

        Parameters
        ----------
        logits : any floating type, which the result has too.
        keys : float32.
        """
        changed: Tensor | None = None
        for here in self.blocks(len(logits)):
            seen = self.seen(logits[here], keys[here])
            if seen is None:
                continue
            for rows in seen.changed():
                scores = seen.corrected(rows)
                changed = _roomy(logits, self.memories) if changed is None else changed
                places = here.start + seen.rows[rows]
                changed[places, : scores.shape[1]] = (scores.log() + seen.log_normaliser[rows]).to(logits.dtype)
        return changed

    def recall(self, keys: Float[Tensor, "n d"], n_neighbors: int | None = None, exclude: Exclude = None) -> Recalled:
        """What the nearest rows of all memories hold; `exclude` is as in `ResidualKNN.__call__`."""
        queries = keys.detach().cpu().numpy()
        found = [knn.recall(queries, n_neighbors, exclude) for knn in self._knns]
        return found[0] if len(found) == 1 else merged(found, n_neighbors or self.setting.n_neighbors)

    def explain(
        self, input_ids: Tensor, **options: Any
    ) -> tuple[Recalled, Float[ndarray, "b k"], Float[ndarray, " b"]]:
        """What corrects the prediction of the token after each sequence [b t] (padded on the left).

        Returns
        -------
        The neighbours, whose ids are places in the text of the memory; their weights; and the shrinkage.
        """
        with evaluating(self.model), torch.inference_mode():
            with watching(self.model, self.watch.layer, self.watch.side) as parts, self.watch.precision():
                logits = self.model(input_ids=input_ids, **options).logits
                keys = self.watch.keys(parts, lambda passed: passed[:, -1])
            seen = self.seen(logits[:, -1], keys, always=True)
            assert seen is not None
            return seen.recalled, seen.weights, seen.amount

    def score(self, dataset: Items, *, limit: int | None = None, batch_size: int | None = None) -> TokenScores:
        """Base, memory-only and corrected on every token of a text.

        Parameters
        ----------
        dataset, limit, batch_size : as in `build_memory`; `Windows` with a stride give every token its context.

        Raises
        ------
        InvalidInput : if the text is empty.
        """
        parts = []
        for batch in self.watch.batches(dataset, batch_size, limit=limit):
            parts += [self._scored(batch.part(here)) for here in self.blocks(len(batch))]
        if not parts:
            raise InvalidInput("the text is empty: there is nothing to score")
        return TokenScores.joined(parts)

    def blocks(self, n: int) -> Iterator[slice]:
        """Tokens that are corrected together."""
        layout = self.memories[0].layout
        listed = layout.n_outputs if layout.residuals == "dense" else self.memories[0].snapshot.manifest.top_m or 1
        step = max(1, min(ROWS_AT_A_TIME, LIST_BYTES // (4 * listed * self.setting.n_neighbors * len(self.memories))))
        return (slice(start, min(start + step, n)) for start in range(0, n, step))

    def _scored(self, batch: TokenBatch) -> TokenScores:
        with torch.inference_mode():
            said = Said.of(batch.logits)
            return token_scores(batch, said, self.seen(batch.logits, batch.keys, said))

    def seen(
        self,
        logits: Tensor,
        keys: Tensor,
        said: Said | None = None,
        *,
        always: bool = False,
        exclude: Exclude = None,
    ) -> "Seen | None":
        """What the memory says of some predictions: of those that the base is not sure of, unless `always`.

        Parameters
        ----------
        exclude : as in `ResidualKNN.__call__`, with `always` alone.
        """
        off = self.setting.gate is None and self.setting.shrinkage == 0
        rows = torch.arange(len(logits), device=logits.device)
        if not always and (off or not any(len(memory) for memory in self.memories)):
            return None
        said = Said.of(logits) if said is None else said
        if not always and self.setting.search_below < 1:
            rows = (said.confidence < self.setting.search_below).nonzero()[:, 0]
            if not len(rows):
                return None
            logits, keys, said = logits[rows], keys[rows], said.rows(rows)
        recalled = self.recall(keys, exclude=exclude)
        weights = self._measure.weights(recalled.distances)
        cues = {
            "agrees": recalled.labels == recalled.labels[:, :1],
            "confidence": said.confidence.cpu().numpy(),
            "entropy": said.entropy.cpu().numpy(),
            "nearest": said.probabilities_at(logits, recalled.labels[:, :1])[:, 0],
        }
        amount = self.setting.amount(recalled.distances, weights, cues)
        share = self.setting.residual_share
        return Seen(rows, logits, said.log_normaliser, recalled, weights, amount, share, cues)

    def _with_loss(self, result: Any, labels: Tensor, options: Mapping[str, Any]) -> Any:
        """A model's output with the loss of its logits, as transformers reckons it."""
        logits, to_keep = _logits_in(result, options), options.get("logits_to_keep", 0)
        wanted = labels if self.watch.decodes else functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        wanted = wanted[:, to_keep] if isinstance(to_keep, Tensor) else wanted[:, wanted.shape[1] - logits.shape[1] :]
        n_items = options.get("num_items_in_batch")  # of a step that takes several batches
        loss = functional.cross_entropy(
            logits.float().flatten(0, 1),
            wanted.to(logits.device).flatten(),
            ignore_index=IGNORED,
            reduction="mean" if n_items is None else "sum",
        )
        loss = loss if n_items is None else loss / n_items
        if isinstance(result, tuple):
            return (loss, *result[int(options.get("labels") is not None) :])
        result["loss"] = loss
        return result


def _logits_in(result: Any, options: Mapping[str, Any]) -> Tensor:
    """The logits in a model's output; in a tuple they come after the loss, where labels were given."""
    return result[int(options.get("labels") is not None)] if isinstance(result, tuple) else result.logits


def _with_logits(result: Any, logits: Tensor, options: Mapping[str, Any]) -> Any:
    """A model's output with other logits."""
    if isinstance(result, tuple):
        place = int(options.get("labels") is not None)
        return (*result[:place], logits, *result[place + 1 :])
    result["logits"] = logits
    return result


@dataclass(frozen=True)
class Seen:
    """Some predictions of the base and what the memory says of each.

    Attributes
    ----------
    rows : of the logits that were looked at.
    logits : of the base, as it gives them.
    log_normaliser : their log-sum-exp.
    recalled, weights : the neighbours, and what they count.
    amount : the shrinkage; 0 where there is no neighbour.
    share : how much of the neighbours' own predictions counts.
    cues : what a gate looks at beside the distances and weights, by the names of `HeldOutTokens`.
    """

    rows: Int64[Tensor, " r"]
    logits: Float[Tensor, "r v"]
    log_normaliser: Float[Tensor, "r 1"]
    recalled: Recalled
    weights: Float[ndarray, "r k"]
    amount: Float[ndarray, " r"]
    share: float
    cues: dict[str, ndarray]

    @property
    def base(self) -> Float[Tensor, "r v"]:
        """The base's probabilities."""
        return (self.logits.float() - self.log_normaliser).exp()

    def changed(self) -> Iterator[Int64[Tensor, " s"]]:
        """The rows that a memory contributes to, in stretches whose probabilities stay in a processor's cache."""
        rows = torch.from_numpy(np.flatnonzero(self.amount)).to(self.logits.device)
        step = rows_in_cache(self.logits)
        return (rows[start : start + step] for start in range(0, len(rows), step))

    def corrected(self, chosen: Int64[Tensor, " s"]) -> Float[Tensor, "s w"]:
        """Valid distributions of some of the rows."""
        places = chosen.cpu().numpy()
        return corrected_probabilities(
            (self.logits[chosen].float() - self.log_normaliser[chosen]).exp(),
            self.recalled.of(places),
            self.weights[places],
            self.amount[places],
            share=self.share,
        )

    def memory_only(self) -> Int64[ndarray, " r"]:
        """The likeliest token by the neighbours' labels alone."""
        return likeliest_label(self.recalled, self.weights)


def token_scores(batch: TokenBatch, said: Said, seen: Seen | None) -> TokenScores:
    """Base, memory-only and corrected on every token of a batch; where the memory was not asked, all are the base."""
    labels = batch.labels[:, None]
    base_loss = said.log_normaliser[:, 0] - batch.logits.gather(1, labels)[:, 0].float()
    loss, best, alone = base_loss.clone(), said.best.clone(), said.best.clone()
    searched = torch.zeros(len(batch), dtype=torch.bool)
    if seen is not None:
        searched[seen.rows.cpu()] = True
        alone[seen.rows] = torch.from_numpy(seen.memory_only()).to(alone.device)
        for rows in seen.changed():
            scores, places = seen.corrected(rows), seen.rows[rows]
            loss[places] = -scores.gather(1, labels[places])[:, 0].log()
            best[places] = likeliest(scores)
    base_hit, memory_hit, hit = ((some == batch.labels).cpu().numpy() for some in (said.best, alone, best))
    return TokenScores(
        batch.labels.cpu().numpy(),
        batch.documents,
        batch.offsets,
        base_loss.cpu().numpy(),
        loss.cpu().numpy(),
        base_hit,
        memory_hit,
        hit,
        searched.numpy(),
    )


class ResMemLogitsProcessor(LogitsProcessor):
    """Corrects the scores of each generation step by the key that the same step left at the layer.

    Made by `ResMemForCausalLM.logits_processor`. Its hook is on the model inside the `with` block only:

        with lm.logits_processor() as processor:
            model.generate(..., logits_processor=[processor])
    """

    def __init__(self, lm: ResMemForCausalLM) -> None:
        self._lm = lm
        self._open: Any = None
        self._parts: Any = None

    def __enter__(self) -> "ResMemLogitsProcessor":
        watch = self._lm.watch
        self._open = watching(self._lm.model, watch.layer, watch.side)
        self._parts = self._open.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        context, self._open, self._parts = self._open, None, None
        context.__exit__(*failure)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        if self._parts is None:
            raise InvalidInput("the processor is used outside its `with` block, so it saw no key of this step")
        with torch.inference_mode(), torch.autocast(scores.device.type, enabled=False):
            keys = self._lm.watch.keys(self._parts, lambda passed: passed[:, -1])
            corrected = self._lm.correct(scores, keys)
        return scores if corrected is None else corrected.clone()


def tune_language(
    lm: ResMemForCausalLM,
    dataset: Items,
    *,
    n_neighbors: Sequence[int] = (16, 64, 256),
    limit: int | None = 20_000,
    batch_size: int | None = None,
    **options: Any,
) -> LanguageTuning:
    """Choose how to use the memory on held-out text: k, kernel, bandwidth and a gate by token.

    Parameters
    ----------
    lm : model and memory; its own setting has no effect.
    dataset : text that neither the model nor the memory has seen, as in `build_memory`.
    n_neighbors : values of k to try; one search, at the largest.
    limit : held-out tokens to use.
    batch_size : as in `build_memory`.
    options : further ones of `tune_tokens`.

    Returns
    -------
    `best` is for ``lm.with_setting(…)`` or ``memory.save_setting(result.best.to_dict())``.

    Raises
    ------
    InvalidInput : if the text is empty.
    """
    held = sum(len(memory) for memory in lm.memories)
    counts = [k for k in n_neighbors if k <= held] or [max(1, held)]
    tokens = held_out_tokens(lm, dataset, max(counts), limit=limit, batch_size=batch_size)
    return tune_tokens(tokens, n_neighbors=counts, **options)


def held_out_tokens(
    lm: ResMemForCausalLM,
    dataset: Items,
    n_neighbors: int,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
) -> HeldOutTokens:
    """What `tune_tokens` chooses by, from one search.

    Parameters
    ----------
    lm, dataset, limit, batch_size : as in `tune_language`.
    n_neighbors : the largest k.

    Raises
    ------
    InvalidInput : if the text is empty.
    """
    wide = lm.with_setting(replace(lm.setting, n_neighbors=n_neighbors, search_below=1.0))
    parts: list[HeldOutTokens] = []
    for batch in wide.watch.batches(dataset, batch_size, limit=limit):
        parts += [_held_out(wide, batch.part(here)) for here in wide.blocks(len(batch))]
    if not parts:
        raise InvalidInput("the held-out text is empty: there is nothing to choose by")
    return HeldOutTokens.joined(parts)


def _held_out(lm: ResMemForCausalLM, batch: TokenBatch) -> HeldOutTokens:
    with torch.inference_mode():
        said = Said.of(batch.logits)
        seen = lm.seen(batch.logits, batch.keys, said, always=True)
        assert seen is not None
        recalled = seen.recalled
        probability = said.probabilities_at(batch.logits, batch.labels[:, None].cpu().numpy())[:, 0]
        at = said.probabilities_at(batch.logits, recalled.indices)
        hit, residual = residual_at(recalled, at, batch.labels.cpu().numpy(), probability)
        return HeldOutTokens(
            recalled.distances, hit, residual, probability=probability, documents=batch.documents, **seen.cues
        )


def predictions_from_keys(
    model: PreTrainedModel, memory: Memory, rows: Int64[ndarray, " r"]
) -> Float32[ndarray, "r v"]:
    """The base's whole predictions of stored rows, computed again from their keys by the head: for offline retuning.

    Only where the keys are what the head reads: ``build_memory(..., layer=…)`` with the name of the output layer.

    Parameters
    ----------
    model : the one that the memory was built with.
    memory : from `build_memory`.
    rows : of the memory's snapshot.

    Raises
    ------
    InvalidInput : if the keys are not the head's exact input: taken elsewhere, projected or scaled to length 1; or if
        the model does more to its logits than its head.
    """
    source = Source.from_dict(memory.source or {})
    watch = _watch_of(model, (memory,), AFTER_NORM, "input", None, None)
    head = model.get_output_embeddings()
    place = next(name for name, module in model.named_modules() if module is head)
    if (source.layer, source.side) != (place, "input") or source.projection or memory.layout.metric == "cosine":
        raise InvalidInput(
            f"the keys are the {source.side} of {source.layer!r} ({memory.layout.metric}, "
            f"{'projected' if source.projection else 'not projected'}), but predictions follow from the input of "
            f"{place!r} alone; build a memory with layer= that name, or keep more classes a row (top_m=)"
        )
    probe = watch.observe_tokens(np.arange(min(watch.vocabulary, 8)))
    with torch.inference_mode():
        again = head(probe.keys.to(head.weight.dtype)).float()
        if not torch.allclose(again, probe.logits.float(), rtol=1e-3, atol=1e-3):
            raise InvalidInput(f"the model does more to its logits than {place!r}, so keys do not tell its predictions")
        keys = torch.from_numpy(memory.snapshot.keys.take(rows).astype(np.float32)).to(head.weight)
        return head(keys).float().softmax(1).cpu().numpy()


def _watch_of(
    model: PreTrainedModel,
    memories: Sequence[Memory],
    layer: str,
    side: Side,
    tokenizer: Any,
    autocast: "torch.dtype | None",
) -> TokenWatch:
    """A watch on the layer that the rows of all memories come from, after making sure that the model is theirs."""
    sources = [None if memory.source is None else Source.from_dict(memory.source) for memory in memories]
    built = sources[0]
    watch = TokenWatch(
        model, layer if built is None else built.layer, side if built is None else built.side, autocast=autocast
    )
    if built is not None and built.projection is not None:
        watch.projection = read_matrix(built.projection)
    for memory, source in zip(memories, sources, strict=True):
        where = place_of_memory(memory)
        if memory.layout.task != "classification" or memory.layout.n_outputs < watch.vocabulary:
            raise InvalidInput(
                f"the memory {where} is of {memory.layout.task} with {memory.layout.n_outputs:,} outputs, "
                f"but the model's vocabulary has {watch.vocabulary:,} tokens"
            )
        if source is None:
            continue
        source.check(watch.source(source.data), where, data=False)
        if source.projection != (None if built is None else built.projection):
            raise FingerprintMismatch(f"the memory {where} has another projection of its keys than the first one")
        if tokenizer is not None:
            _check_tokenizer(memory, tokenizer)
    return watch


def _check_tokenizer(memory: Memory, tokenizer: Any) -> None:
    built = None if memory.source is None else Source.from_dict(memory.source).tokenizer
    if built is not None and built != tokenizer_digest(tokenizer):
        raise FingerprintMismatch(
            f"the memory {place_of_memory(memory)} was built from tokens of another tokenizer, whose numbers mean "
            "other words; use the tokenizer that it was built with, or build a new memory"
        )


def _base_in(folder: Path, *, seq2seq: bool, options: Mapping[str, Any]) -> PreTrainedModel:
    """The base in a folder, from safetensors and by a class of transformers alone."""
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    try:
        return auto.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            **{"dtype": "auto", **options},
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        said = str(error).partition("\n")[0]
        raise InvalidInput(
            f"transformers cannot load {folder}: {said}; give the base itself: from_pretrained(folder, model)"
        ) from error


def _regressors(
    memories: Sequence[Memory], setting: LanguageSetting, index: str, max_weight: float
) -> tuple[ResidualKNN, ...]:
    import warnings

    knns: list[ResidualKNN] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewerNeighbors)  # a memory that fills up while it serves starts small
        for memory in memories:
            knns.append(
                ResidualKNN(
                    memory,
                    n_neighbors=setting.n_neighbors,
                    bandwidth=setting.bandwidth,
                    kernel=setting.kernel,
                    index=index,
                    max_weight=max_weight,
                )
            )
    return tuple(knns)


def _roomy(logits: Tensor, memories: Sequence[Memory]) -> Tensor:
    """A copy of the logits, with −inf for classes that only a memory knows."""
    more = max(memory.layout.n_outputs for memory in memories) - logits.shape[1]
    return functional.pad(logits, (0, more), value=-torch.inf) if more else logits.clone()


def _principal(watch: TokenWatch, dataset: Items, n_components: int) -> Float32[Tensor, "d p"]:
    """The directions in which the first keys of a text vary most."""
    keys = torch.cat([batch.keys.cpu() for batch in watch.batches(dataset, limit=PROJECTION_SAMPLE)]).double()
    if n_components > keys.shape[1]:
        raise InvalidInput(f"projection is {n_components}, but the layer gives {keys.shape[1]} numbers")
    centred = keys - keys.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return vectors.flip(1)[:, :n_components].float().contiguous()


def _held_projection(path: str | os.PathLike[str] | None, width: int) -> Float32[Tensor, "d p"] | None:
    """The projection of a memory that an earlier call began."""
    if path is None or not os.path.exists(os.path.join(path, MANIFEST)):
        return None
    with Memory.open(path) as memory:
        if memory.source is None:
            return None  # `opened` says what is wrong with it
        found = Source.from_dict(memory.source).projection
    matrix = None if found is None else read_matrix(found)
    if matrix is None or matrix.shape[1] != width:
        was = "the keys whole" if matrix is None else f"{matrix.shape[1]} components"
        raise FingerprintMismatch(
            f"the memory at {path} keeps {was}, but projection is {width}; build with the same, or name another path"
        )
    return matrix


def stored_keys(keys: Tensor, memory: Memory) -> Float[ndarray, "b d"]:
    """Keys in the memory's own precision, where they fit into it."""
    half = memory.layout.key_dtype == "float16" and memory.layout.metric == "euclidean"
    return (keys.half() if half and bool(keys.abs().max() < torch.finfo(torch.float16).max) else keys).cpu().numpy()


def _plain(item: Any) -> Any:
    return dict(item) if isinstance(item, Mapping) else item
