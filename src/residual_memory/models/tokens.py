"""A language model of transformers under observation: from sequences to predictions, keys and the tokens that came.

Tokens are shifted and padding is masked here, for building a memory and for using it alike.
"""

import base64
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64, Integer
from numpy import ndarray

from residual_memory.errors import InvalidInput, MissingExtra
from residual_memory.models.base import Side, Source
from residual_memory.models.watching import device_of, evaluating, fingerprint, places_of, watching
from residual_memory.validation import as_count

try:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel
except ImportError as error:
    raise MissingExtra("language models of transformers", "transformers") from error

AFTER_NORM, BEFORE_NORM = "post-attention", "post-attention-before-norm"
# Where the feed-forward of the last block is: the list of blocks, and inside a block the norm before it and itself.
ARCHITECTURES = {
    "gpt2": ("transformer.h", "ln_2", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "post_attention_layernorm", "mlp"),
    "llama": ("model.layers", "post_attention_layernorm", "mlp"),
    "mistral": ("model.layers", "post_attention_layernorm", "mlp"),
    "mt5": ("decoder.block", "layer.{last}", "layer.{last}.DenseReluDense"),
    "qwen2": ("model.layers", "post_attention_layernorm", "mlp"),
    "qwen3": ("model.layers", "post_attention_layernorm", "mlp"),
    "t5": ("decoder.block", "layer.{last}", "layer.{last}.DenseReluDense"),
}
RELATIVE_POSITIONS = {"t5", "mt5"}  # read sequences of any length, whatever their configuration says
IGNORED = -100  # a label that counts for nothing, in transformers

LOGIT_BYTES = 128 << 20  # of a batch when none is given

Items = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class TokenBatch:
    """What a model showed on the predicted tokens of some sequences, on its device.

    Attributes
    ----------
    logits : of the prediction, as the model gives them.
    keys : at the place that made the prediction, float32.
    labels : the token that came.
    offsets : its place in the stream.
    documents : its document.
    """

    logits: Float[Tensor, "b v"]
    keys: Float[Tensor, "b d"]
    labels: Int64[Tensor, " b"]
    offsets: Int64[ndarray, " b"]
    documents: Int64[ndarray, " b"]

    def __len__(self) -> int:
        return len(self.offsets)

    def of(self, rows: Int64[Tensor, " r"]) -> "TokenBatch":
        """Some of the tokens alone."""
        places = rows.cpu().numpy()
        return TokenBatch(
            self.logits[rows], self.keys[rows], self.labels[rows], self.offsets[places], self.documents[places]
        )

    def part(self, here: slice) -> "TokenBatch":
        """A stretch of the tokens."""
        return TokenBatch(
            self.logits[here], self.keys[here], self.labels[here], self.offsets[here], self.documents[here]
        )


@dataclass(frozen=True)
class _Sequence:
    """An item, without its padding: what the model reads, and which token comes at each place."""

    read: Int64[ndarray, " t"]
    labels: Int64[ndarray, " t"]
    offsets: Int64[ndarray, " t"]
    documents: Int64[ndarray, " t"]
    wanted: Bool[ndarray, " t"]
    source: Int64[ndarray, " s"] | None

    def __len__(self) -> int:
        return len(self.read)


class TokenWatch:
    """A language model with an eye on one of its layers: from sequences to predictions, keys and the tokens that came.

    Parameters
    ----------
    model, layer, side, autocast : as in `build_memory`.

    Attributes
    ----------
    projection : [d p] that turns what the layer gives into keys; None leaves it as it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layer: str = AFTER_NORM,
        side: Side = "input",
        *,
        autocast: "torch.dtype | None" = None,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise InvalidInput(f"the model is a {type(model).__name__}, expected a language model of transformers")
        head = model.get_output_embeddings()
        if head is None:
            raise InvalidInput(
                f"{type(model).__name__} has no output layer over a vocabulary, expected a language model; "
                "load it with AutoModelForCausalLM or AutoModelForSeq2SeqLM"
            )
        self.model, self.projection, self._autocast = model, None, autocast
        self.layer, self.side = (
            (place_named(model, layer), "input") if layer in (AFTER_NORM, BEFORE_NORM) else (layer, side)
        )
        places_of(model, self.layer, self.side)
        self.vocabulary: int = head.weight.shape[0]
        self.decodes: bool = bool(model.config.is_encoder_decoder)
        self.longest = _longest(model)

    projection: Float32[Tensor, "d p"] | None
    side: Side

    def source(self, data: Mapping[str, Any]) -> Source:
        """The fingerprint of model, layer and projection, with what is known of the data."""
        matrix = None if self.projection is None else written(self.projection)
        return Source(fingerprint(self.model), self.layer, self.side, 1, dict(data), projection=matrix)

    def probe(self, item: Mapping[str, Any]) -> int:
        """Numbers in a key, from a pass over the beginning of an item."""
        sequence = self._sequence(item, 0)
        if not len(sequence):
            short = torch.zeros((1, 1), dtype=torch.int64)
            return self._keys_and_logits(short, None, short)[0].shape[1]
        return self._observe([_cut(sequence, 2)]).keys.shape[1]

    def batches(
        self, items: Items, batch_size: int | None = None, *, after: int = 0, limit: int | None = None
    ) -> Iterator[TokenBatch]:
        """What the model shows on every predicted token, in the order of the text.

        Parameters
        ----------
        items, batch_size, limit : as in `build_memory`.
        after : items whose predictions all come before this place in the stream are not run.
        """
        waiting: list[_Sequence] = []
        place, left = 0, sys.maxsize if limit is None else limit
        size = None if batch_size is None else as_count("batch_size", batch_size)
        for number, item in enumerate(items):
            sequence = self._sequence(item, place, number)
            place = int(sequence.offsets[-1]) + 1 if len(sequence) else place + 1
            if len(sequence) and sequence.wanted.sum() > left:
                ends = np.flatnonzero(sequence.wanted)[left] if left else 0
                sequence = _cut(sequence, int(ends))
            left -= int(sequence.wanted.sum())
            if sequence.wanted.any() and sequence.offsets[sequence.wanted].max() >= after:
                waiting.append(sequence)
                longest = max(len(some) for some in waiting)
                fitting = size or max(1, LOGIT_BYTES // (4 * self.vocabulary * longest))
                if len(waiting) >= fitting:
                    yield self._observe(waiting)
                    waiting = []
            if left <= 0:
                break
        if waiting:
            yield self._observe(waiting)

    def observe_tokens(self, tokens: Int64[ndarray, " t"]) -> TokenBatch:
        """What the model shows on one sequence of tokens."""
        item = {"input_ids": tokens, "labels": tokens} if self.decodes else {"input_ids": tokens}
        return self._observe([self._sequence(item, 0)])

    def at_end(self, tokens: Int64[ndarray, " t"]) -> tuple[Float[Tensor, "1 d"], Float[Tensor, "1 v"]]:
        """Key and logits of the prediction of the token that comes after these."""
        device = device_of(self.model)
        read = torch.from_numpy(self.checked(tokens, "the text"))[None].to(device)
        self.check_length(len(tokens))
        with evaluating(self.model), torch.inference_mode(), watching(self.model, self.layer, self.side) as parts:
            with self.precision():
                logits = self.model(input_ids=read, use_cache=False).logits
            return self.keys(parts, lambda passed: passed[:, -1]), logits[:, -1]

    def keys(self, parts: Callable[[Callable[[Tensor], Tensor]], Tensor], kept: Callable[[Tensor], Tensor]) -> Tensor:
        """Keys [b d] from what passed through the layer, at the places that `kept` takes."""
        found = parts(lambda passed: kept(passed).float())
        return found if self.projection is None else found @ self.projection.to(found.device)

    def checked(self, tokens: Integer[ndarray, "*b"], what: str) -> Integer[ndarray, "*b"]:
        """Token numbers that the model knows.

        Raises
        ------
        InvalidInput : if one is beyond the vocabulary.
        """
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.vocabulary):
            bad = tokens[(tokens < 0) | (tokens >= self.vocabulary)]
            raise InvalidInput(
                f"{what} holds token {bad.flat[0]}, but the model's vocabulary has {self.vocabulary:,} tokens; "
                "was the text encoded by the model's own tokenizer?"
            )
        return tokens

    def check_length(self, length: int) -> None:
        """Refuse what is longer than the model reads."""
        if self.longest is not None and length > self.longest:
            raise InvalidInput(
                f"a sequence has {length:,} tokens, but the model reads at most {self.longest:,}; cut the text with "
                f"Windows(documents, length={self.longest})"
            )

    def _sequence(self, item: Mapping[str, Any], place: int, number: int = 0) -> _Sequence:
        """One item without its padding; place of its first token and number of its document where it names none."""
        if not isinstance(item, Mapping) or "input_ids" not in item:
            found = sorted(item) if isinstance(item, Mapping) else type(item).__name__
            raise InvalidInput(f"an item of the text is {found}, expected a mapping with 'input_ids'")
        tokens = _numbers(item["input_ids"], "input_ids")
        mask = _numbers(item.get("attention_mask", np.ones(len(tokens), np.int64)), "attention_mask") > 0
        if mask.shape != tokens.shape:
            raise InvalidInput(f"attention_mask has {len(mask)} places for {len(tokens)} input_ids, expected as many")
        tokens = self.checked(tokens[mask], "input_ids")
        start, skip = int(item.get("start", place)), int(item.get("skip", 0))
        if self.decodes:
            if "labels" not in item:
                raise InvalidInput("an item for a sequence-to-sequence model has 'labels': the tokens of the target")
            self.check_length(len(tokens))
            targets = _numbers(item["labels"], "labels")
            counted = targets != IGNORED
            targets = self.checked(targets[counted], "labels")
            begins = np.array([self.model.config.decoder_start_token_id], np.int64)
            read, labels, source = np.concatenate([begins, targets[:-1]])[: len(targets)], targets, tokens
            documents = _documents(item, number, counted)
            offsets = start + np.arange(len(targets))
        else:
            read, labels, source = tokens[:-1], tokens[1:], None
            documents = _documents(item, number, mask)[1:]
            offsets = start + 1 + np.arange(len(labels))
        self.check_length(len(read))
        return _Sequence(read, labels, offsets, documents, np.arange(len(labels)) >= skip, source)

    def _observe(self, sequences: Sequence[_Sequence]) -> TokenBatch:
        """One forward pass over sequences that are padded on the right."""
        device = device_of(self.model)
        read, present = _padded([sequence.read for sequence in sequences])
        wanted = _padded([sequence.wanted for sequence in sequences])[0].bool()
        source = None if not self.decodes else _padded([s.source for s in sequences if s.source is not None])
        everything = bool(wanted.all())
        places = wanted.to(device)

        def kept(passed: Tensor) -> Tensor:
            if passed.ndim != 3 or passed.shape[:2] != read.shape:
                raise InvalidInput(
                    f"the layer {self.layer!r} passes a tensor of shape {tuple(passed.shape)}, expected a vector for "
                    f"each of {read.shape[0]} × {read.shape[1]} tokens; name another layer"
                )
            return passed.flatten(0, 1) if everything else passed[places]

        keys, logits = self._keys_and_logits(read, present, source, kept)
        chosen = [sequence.wanted for sequence in sequences]
        pairs = list(zip(sequences, chosen, strict=True))
        labels = np.concatenate([sequence.labels[some] for sequence, some in pairs])
        return TokenBatch(
            kept(logits),
            keys,
            torch.from_numpy(labels).to(device),
            np.concatenate([sequence.offsets[some] for sequence, some in pairs]),
            np.concatenate([sequence.documents[some] for sequence, some in pairs]),
        )

    def _keys_and_logits(
        self,
        read: Tensor,
        present: Tensor | None,
        source: Any,
        kept: Callable[[Tensor], Tensor] = lambda x: x.flatten(0, 1),
    ) -> tuple[Tensor, Tensor]:
        device = device_of(self.model)
        if self.decodes:
            tokens, mask = (source, None) if isinstance(source, Tensor) else source
            options = {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": read}
        else:
            options = {"input_ids": read, "attention_mask": None if present is None or present.all() else present}
        given = {name: value.to(device) for name, value in options.items() if value is not None}
        with evaluating(self.model), torch.inference_mode(), watching(self.model, self.layer, self.side) as parts:
            with self.precision():
                logits = self.model(**given, use_cache=False).logits
            return self.keys(parts, kept), logits

    def precision(self) -> torch.autocast:
        """A context in which the model runs as it ran for the memory."""
        return torch.autocast(device_of(self.model).type, self._autocast, enabled=self._autocast is not None)


def place_named(model: PreTrainedModel, name: str) -> str:
    """The dotted name of a named place, on its input side.

    Raises
    ------
    InvalidInput : if the architecture is not known; the message lists those that are.
    """
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise InvalidInput(
            f"{name!r} is known for {', '.join(ARCHITECTURES)}, but the model is of type {kind!r}; "
            "name the layer by its dotted path, for example layer='model.layers.11.mlp'"
        )
    blocks, norm, feed_forward = ARCHITECTURES[kind]
    count = len(model.get_submodule(blocks))
    inside = norm if name == BEFORE_NORM else feed_forward
    block = f"{blocks}.{count - 1}"
    if "{last}" in inside:
        inside = inside.format(last=len(model.get_submodule(f"{block}.layer")) - 1)
    return f"{block}.{inside}"


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary: every token and its number."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0])))
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def written(matrix: Tensor) -> str:
    """A matrix as text, for a memory's source."""
    values = matrix.cpu().numpy().astype("<f4")
    return f"{values.shape[0]}x{values.shape[1]}:{base64.b64encode(values.tobytes()).decode()}"


def read_matrix(text: str) -> Float32[Tensor, "d p"]:
    """The matrix of `written`."""
    shape, _, content = text.partition(":")
    values = np.frombuffer(base64.b64decode(content), "<f4").reshape([int(size) for size in shape.split("x")])
    return torch.from_numpy(values.copy())


def _flattened(passed: Tensor) -> Tensor:
    return passed.flatten(0, 1)


def _longest(model: PreTrainedModel) -> int | None:
    known = model.config.to_dict()
    if known.get("model_type") in RELATIVE_POSITIONS:
        return None
    found = known.get("max_position_embeddings") or known.get("n_positions")
    return None if found is None else int(found)


def _numbers(values: Any, name: str) -> Int64[ndarray, " t"]:
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise InvalidInput(
            f"{name} have shape {array.shape} and type {array.dtype}, expected whole numbers on one axis"
        )
    return array.astype(np.int64)


def _cut(sequence: _Sequence, length: int) -> _Sequence:
    return _Sequence(
        sequence.read[:length],
        sequence.labels[:length],
        sequence.offsets[:length],
        sequence.documents[:length],
        sequence.wanted[:length],
        sequence.source,
    )


def _padded(rows: Sequence[ndarray]) -> tuple[Int64[Tensor, "b t"], Int64[Tensor, "b t"]]:
    """Rows filled up with zeros on the right, and where they have values."""
    width = max(len(row) for row in rows)
    values, present = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for place, row in enumerate(rows):
        values[place, : len(row)], present[place, : len(row)] = row, 1
    return torch.from_numpy(values), torch.from_numpy(present)


def _documents(item: Mapping[str, Any], number: int, counted: Bool[ndarray, " t"]) -> Int64[ndarray, " s"]:
    """The document of each token that counts; `number` where the item names none."""
    named = np.asarray(item.get("documents", number), np.int64)
    if named.shape not in ((), counted.shape):
        raise InvalidInput(
            f"documents have shape {named.shape} for {len(counted)} tokens, expected one number, or one a token"
        )
    return np.broadcast_to(named, counted.shape)[counted]
