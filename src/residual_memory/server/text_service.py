"""A language model's memory in use: the next token of a text, with and without the memory, and the tokens behind it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64, Integer, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from residual_memory.correction import ById
from residual_memory.errors import InvalidInput
from residual_memory.language import LanguageSetting
from residual_memory.memory import Memory
from residual_memory.models.base import joined_predictions
from residual_memory.models.transformers import ResMemForCausalLM, Seen, stored_keys
from residual_memory.models.vocabulary import top_m_of
from residual_memory.server.service import Answer, Names, Order, Query, Service, excluded, first, own_rows
from residual_memory.server.service import Seen as Observed
from residual_memory.sparse import Recalled
from residual_memory.surveying import Survey
from residual_memory.windows import Windows

BEFORE, AFTER = 32, 8  # tokens that are shown around one
MOST_TEXTS, MOST_CHARACTERS = 64, 1 << 18  # of a request
ROW_BYTES = 256 << 20  # of whole predictions of rows that are asked about together
MOST_READ = 1024  # tokens of a text that a model reads at once, if it has no limit of its own below
UNFINISHED = "\ufffd"  # stands for the bytes of a character that is not whole
FITTED = 1000  # rows by which a text is compared with a memory


class Stream:
    """The text of a memory as tokens, in the order of its ids.

    Parameters
    ----------
    documents : as tokens, packed end to end as `Windows` packs them.
    end : the token that closes each.
    n : tokens to read at most.
    """

    def __init__(self, documents: Iterable[Sequence[int]], end: int | None, n: int) -> None:
        parts, n_read = [np.zeros(0, np.int32)], 0
        for document in documents:
            parts.append(np.asarray([*document, *([] if end is None else [end])], np.int32))
            n_read += len(parts[-1])
            if n_read >= n:
                break
        self._tokens = np.concatenate(parts)

    def holds(self, places: Int64[ndarray, " p"], labels: Integer[ndarray, " p"]) -> Bool[ndarray, " p"]:
        """Whether these tokens lie at these places."""
        inside = (places >= 0) & (places < len(self._tokens))
        return inside & (self._tokens[np.where(inside, places, 0)] == labels) if len(self._tokens) else inside

    def around(self, place: int) -> tuple[list[int], list[int], list[int]]:
        """Tokens before a place, the one that lies there, and those after it."""
        before, here, after = max(0, place - BEFORE), place, place + 1
        tokens = self._tokens
        return tokens[before:here].tolist(), tokens[here:after].tolist(), tokens[after : after + AFTER].tolist()


class TextService(Service):
    """A memory of tokens, and the language model that it corrects.

    Parameters
    ----------
    lm : the model with one memory.
    tokenizer : of transformers, the model's own.
    stream : the text of the memory, to show tokens in their context; None shows the tokens alone.
    """

    def __init__(self, lm: ResMemForCausalLM, tokenizer: Any, stream: Stream | None = None) -> None:
        (memory,) = lm.memories
        super().__init__(memory)
        self.lm, self.tokenizer, self._stream = lm, tokenizer, stream
        told = lm.generation_config.eos_token_id
        ends = told if isinstance(told, list) else [told]
        self.ends = {token for token in (*ends, tokenizer.eos_token_id) if token is not None}
        self._anchor = self.encoded("a").tolist()  # some tokenizers drop the space at the beginning of a text
        self._names: dict[int, str] = {}

    def query(
        self,
        keys: ArrayLike | None = None,
        predictions: ArrayLike | None = None,
        inputs: Sequence[Any] | None = None,
        ids: Names | None = None,
    ) -> Query:
        if (inputs is None) == (ids is None) or keys is not None or predictions is not None:
            raise InvalidInput("a language model is asked by inputs, which are texts, or by ids of tokens")
        if ids is not None:
            most = max(1, ROW_BYTES // (4 * self.memory.layout.n_outputs))
            if len(ids) > most:
                raise InvalidInput(f"there are {len(ids):,} ids, expected at most {most:,}; ask for fewer at a time")
            return own_rows(self.memory, ids)
        assert inputs is not None
        if not all(isinstance(text, str) for text in inputs):
            raise InvalidInput("an input is no text; send strings")
        n_characters = sum(map(len, inputs))
        if not 0 < len(inputs) <= MOST_TEXTS or n_characters > MOST_CHARACTERS:
            raise InvalidInput(
                f"inputs are {len(inputs):,} texts of {n_characters:,} characters together, expected 1 to {MOST_TEXTS} "
                f"of at most {MOST_CHARACTERS:,}; send fewer at a time"
            )
        return Query(inputs=[self.encoded(text) for text in inputs])

    def encoded(self, text: str) -> Int64[ndarray, " t"]:
        """Tokens of a text; of an empty one, the token that texts begin with.

        Raises
        ------
        InvalidInput : if there is none.
        """
        tokens = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if not tokens:
            begins = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
            tokens = [token for token in begins if token is not None][:1]
        if not tokens:
            raise InvalidInput("a text has no token, expected one at least")
        return np.asarray(tokens, np.int64)

    def answers(self, queries: Sequence[Query]) -> list[Answer]:
        """Those of texts are searched together; each row of the memory passes over itself."""
        texts = [place for place, query in enumerate(queries) if query.own is None]
        found: dict[int, Answer] = {}
        if texts:
            answer = self._answer(Query(inputs=[text for place in texts for text in queries[place].inputs]))
            ends = np.cumsum([len(queries[place]) for place in texts])[:-1]
            parts = zip(np.split(answer.base, ends), np.split(answer.corrected, ends), strict=True)
            found = {place: Answer(*part) for place, part in zip(texts, parts, strict=True)}
        return [found[place] if place in found else self._answer(query) for place, query in enumerate(queries)]

    def neighbors(
        self, query: Query, n_neighbors: int | None = None, without: Names = ()
    ) -> list[list[dict[str, Any]]]:
        keys, logits = self._keys_and_logits(query)
        exclude = excluded(query, without)
        told = []
        for here, seen in self._seen(keys, logits, exclude):
            listed = [self._told(seen, row)[:n_neighbors] for row in range(len(seen.base))]
            if n_neighbors is not None and n_neighbors > self.lm.setting.n_neighbors:
                further = self.lm.recall(keys[here], n_neighbors, _part(exclude, here))
                for row, entries in enumerate(listed):
                    entries += self._named(further, row)[len(entries) :]
            told += listed
        return told

    def explain(
        self,
        query: Query,
        *,
        without: Names = (),
        n_neighbors: int = 10,
        n_outputs: int = 5,
        order: Order = "distance",
    ) -> list[dict[str, Any]]:
        entries = list[dict[str, Any]]()
        for _, seen in self._seen(*self._keys_and_logits(query), excluded(query, without)):
            base, corrected = self._base(seen), self._corrected(seen)
            for row in range(len(base)):
                entry: dict[str, Any] = {
                    "outputs": self._outputs(base[row], corrected[row], n_outputs),
                    **first(self._told(seen, row), n_neighbors, order, int(corrected[row].argmax())),
                    "amount": float(seen.amount[row]),
                }
                if query.own is None:
                    before = self.decoded(query.inputs[len(entries)][-BEFORE:])
                    entry["context"] = {"before": before.lstrip(UNFINISHED), "token": "…", "after": ""}
                entries.append(entry)
        return entries

    def observed(self, query: Query) -> Observed:
        keys, logits = self._keys_and_logits(query)
        return keys.numpy(), logits.float().softmax(1).numpy()

    def add(
        self,
        query: Query,
        labels: Sequence[Any] | None,
        ids: Names | None = None,
        groups: Names | None = None,
        **carried: Any,
    ) -> Shaped[ndarray, " b"]:
        """Every token of the texts but the first of each; a text is a document of its own."""
        if labels is not None or ids is not None or groups is not None or query.own is not None:
            raise InvalidInput("a text says itself which token comes next; send inputs alone")
        if carried.pop("snippets", None) is not None:
            raise InvalidInput("snippets are made of the texts; leave them out")
        return self._appended(query.inputs, {name: value for name, value in carried.items() if value is not None})

    def prepare(self) -> None:
        self.lm.prepare()

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "setting": self.lm.setting.to_dict(),
            "max_weight": self.lm.max_weight,
            "index": self.lm.description,
            "inputs": {"kind": "text"},
            "surveyed": False,
        }

    def name_of(self, label: int) -> str:
        """A token as it stands within a text; by its number, where it is a part of a character."""
        if label not in self._names:
            before = self.decoded(self._anchor)
            name = self.decoded([*self._anchor, label])[len(before) :]
            self._names[label] = f"token {label}" if UNFINISHED in name else name
        return self._names[label]

    def decoded(self, tokens: Sequence[int] | ndarray) -> str:
        """Text of tokens, special ones too."""
        return self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)

    def context(self, name: int | str, label: Any, snippet: str) -> dict[str, str] | None:
        token = self.name_of(label)
        if snippet:
            return {"before": snippet.removesuffix(token), "token": token, "after": ""}
        if self._stream is None or not isinstance(name, int):
            return None
        if not self._stream.holds(np.array([name]), np.array([label])).all():
            return None
        before, here, after = self._stream.around(name)
        told = self.decoded(before).rstrip(UNFINISHED)
        marked = self.decoded([*before, *here]).removeprefix(told)
        rest = self.decoded([*before, *here, *after]).removeprefix(told + marked)
        return {"before": told.lstrip(UNFINISHED), "token": marked or token, "after": rest.rstrip(UNFINISHED)}

    def survey(self, progress: Callable[[float], None]) -> Survey | None:
        return None

    # ------------------------------------------------------------------ inside

    def _keys_and_logits(self, query: Query) -> tuple[Tensor, Tensor]:
        """At the end of each text; of the memory's own rows, from what they keep."""
        if query.keys is not None:
            said = torch.from_numpy(np.ascontiguousarray(query.predictions)).float()
            return torch.from_numpy(np.ascontiguousarray(query.keys)).float(), said.clamp_min(1e-30).log()
        pairs = [self.lm.watch.at_end(tokens[-self._longest :]) for tokens in query.inputs]
        return torch.cat([keys for keys, _ in pairs]).cpu(), torch.cat([logits for _, logits in pairs]).cpu()

    @property
    def _longest(self) -> int:
        """Tokens that are read at once."""
        return min(self.lm.watch.longest or MOST_READ, MOST_READ)

    def _seen(self, keys: Tensor, logits: Tensor, exclude: ById | None) -> Iterator[tuple[slice, Seen]]:
        """What the memory says, some queries at a time."""
        below = self.lm.setting.search_below
        for here in self.lm.blocks(len(keys)):
            with torch.inference_mode():
                seen = self.lm.seen(logits[here], keys[here], always=True, exclude=_part(exclude, here))
            assert seen is not None
            if below < 1:  # where the base is sure of itself, its answer stands
                seen = replace(seen, amount=np.where(seen.cues["confidence"] < below, seen.amount, 0))
            yield here, seen

    def _answer(self, query: Query) -> Answer:
        found = [
            (self._base(seen), self._corrected(seen))
            for _, seen in self._seen(*self._keys_and_logits(query), excluded(query, ()))
        ]
        base, corrected = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
        return Answer(base, corrected)

    def _base(self, seen: Seen) -> Tensor:
        """The base's distributions, as wide as the memory's."""
        return functional.pad(seen.base, (0, self.memory.layout.n_outputs - seen.base.shape[1]))

    def _corrected(self, seen: Seen) -> Tensor:
        """Corrected distributions; the base's where no memory contributes."""
        corrected = self._base(seen)
        for rows in seen.changed():
            scores = seen.corrected(rows)
            corrected[rows, : scores.shape[1]] = scores
        return corrected

    def _outputs(self, base: Tensor, corrected: Tensor, n: int) -> list[dict[str, Any]]:
        """The tokens that matter before or after the correction, the likeliest first."""
        chosen = torch.maximum(base, corrected).topk(min(n, len(base))).indices
        chosen = chosen[corrected[chosen].argsort(descending=True, stable=True)]
        return [
            {
                "output": place,
                "name": self.name_of(place),
                "base": float(base[place]),
                "corrected": float(corrected[place]),
            }
            for place in chosen.tolist()
        ]

    def _named(self, recalled: Recalled, row: int) -> list[dict[str, Any]]:
        """The neighbours of a query that there are."""
        return [
            {
                "id": recalled.ids[row, place].item(),
                "label": (label := int(recalled.labels[row, place])),
                "name": self.name_of(label),
                "distance": float(recalled.distances[row, place]),
            }
            for place in np.flatnonzero(np.isfinite(recalled.distances[row]))
        ]

    def _told(self, seen: Seen, row: int) -> list[dict[str, Any]]:
        """Neighbours with weights; the share of each is that of |w (onehot(label) − what was said)|, 2 w (1 − p)."""
        recalled, weights = seen.recalled, seen.weights[row]
        labels, base = recalled.labels[row], seen.base[row].numpy()
        listed = recalled.indices[row] == labels[:, None]
        by_rows = (recalled.probabilities[row] * listed).sum(axis=1)
        by_base = np.pad(base, (0, self.memory.layout.n_outputs - len(base)))[labels]
        moved = weights * (1 - seen.share * by_rows - (1 - seen.share) * by_base)
        shares = moved / (moved.sum() or 1.0)
        entries = self._named(recalled, row)  # ascending by distance: those that are missing come last
        for place, entry in enumerate(entries):
            entry |= {"weight": float(weights[place]), "share": float(shares[place])}
        return entries

    def _appended(self, texts: Sequence[Int64[ndarray, " t"]], carried: dict[str, Any]) -> Shaped[ndarray, " b"]:
        """All tokens of the texts that have one before them, in one change of the memory."""
        windows = [
            window
            for number, tokens in enumerate(texts)
            for window in Windows([tokens], self._longest, first_document=number)
        ]
        batches = list(self.lm.watch.batches(windows))
        if not batches:
            return np.zeros(0, np.int64)
        m = self.memory.snapshot.manifest.top_m
        logs = [batch.logits.float().log_softmax(1) for batch in batches]
        said = joined_predictions([some.exp().cpu().numpy() if m is None else top_m_of(some, m) for some in logs])
        documents = np.concatenate([batch.documents for batch in batches])
        places = np.concatenate([batch.offsets for batch in batches])
        with self.writing:
            groups = self.memory.snapshot.all_groups
            return self.memory.append(
                np.concatenate([stored_keys(batch.keys, self.memory) for batch in batches]),
                np.concatenate([batch.labels.cpu().numpy() for batch in batches]),
                said,
                groups=None if groups is None else groups.max(initial=-1) + 1 + documents,
                snippets=[
                    self.decoded(texts[number][max(0, place - BEFORE) : place + 1]).lstrip(UNFINISHED)
                    for number, place in zip(documents, places, strict=True)
                ],
                **carried,
            )


def _part(exclude: ById | None, here: slice) -> ById | None:
    return None if exclude is None else ById(np.asarray(exclude.ids)[here])


def text_service(
    model: Any,
    memory: Memory,
    tokenizer: Any,
    text: Iterable[Sequence[int]] | None,
    *,
    setting: LanguageSetting | None,
    index: str,
    max_weight: float,
) -> TextService:
    """A service of a language model, or of a `ResMemForCausalLM`, over this memory.

    Parameters
    ----------
    text : the documents that the memory was built from, as tokens.
    setting, index, max_weight : as in `ResMemForCausalLM`; one that is given already keeps its own.

    Raises
    ------
    InvalidInput : if the model has other memories or turns a source into a target, there is no tokenizer, or the memory
        was built from another text.
    """
    if tokenizer is None:
        raise InvalidInput("a language model needs its tokenizer to be served; give tokenizer=")
    if isinstance(model, ResMemForCausalLM):
        lm = model
    else:
        lm = ResMemForCausalLM(model, memory, setting=setting, tokenizer=tokenizer, index=index, max_weight=max_weight)
    if lm.memories != (memory,):
        raise InvalidInput("the language model has another memory, or several; serve it with its one memory")
    if lm.watch.decodes:
        raise InvalidInput("the model turns a source into a target, expected one that goes on with a text")
    stream = None if text is None else Stream(text, tokenizer.eos_token_id, memory.next_id + AFTER)
    if stream is not None:
        _check_fits(stream, memory)
    return TextService(lm, tokenizer, stream)


def _check_fits(stream: Stream, memory: Memory) -> None:
    """Refuse a text that a memory was not built from: other tokens than the memory's lie at the places of its rows."""
    snapshot = memory.snapshot
    rows = np.flatnonzero(snapshot.alive)[:FITTED]
    ids, labels = snapshot.id_column.take(rows), snapshot.targets(rows)
    fits = stream.holds(ids, labels) if ids.dtype.kind in "iu" else np.zeros(len(rows), bool)
    if len(rows) and fits.mean() <= 0.5:
        raise InvalidInput(
            f"the text has the memory's token at {fits.sum():,} of {len(rows):,} places; give the text that the memory "
            "comes from, or none"
        )
