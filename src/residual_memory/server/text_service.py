"""A language model's memory in use: the next token of a text, with and without the memory, and the tokens behind it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike
from torch import Tensor

from residual_memory.correction import ById
from residual_memory.errors import InvalidInput
from residual_memory.language import LanguageSetting
from residual_memory.memory import Memory
from residual_memory.models.transformers import ResMemForCausalLM, Seen, stored_keys
from residual_memory.models.vocabulary import top_m_of
from residual_memory.server.service import Answer, Names, Query, Service, excluded, own_rows
from residual_memory.server.service import Seen as Observed
from residual_memory.survey import Survey

BEFORE, AFTER = 32, 8  # tokens that are shown around one
MOST_TEXTS = 64  # of a request


class Stream:
    """The tokens that a memory was built from, in the order of its ids."""

    def __init__(self, tokens: Int64[ndarray, " t"]) -> None:
        self._tokens = tokens

    @staticmethod
    def of(documents: Iterable[Sequence[int]], end: int | None) -> "Stream":
        """Packed end to end, as `Windows` packs them."""
        closed = ([*document, *([] if end is None else [end])] for document in documents)
        parts = [np.asarray(document, np.int64) for document in closed]
        return Stream(np.concatenate(parts) if parts else np.zeros(0, np.int64))

    def around(self, place: int, label: int) -> tuple[list[int], list[int]] | None:
        """The tokens before and after a place; None where another token lies there than the memory says."""
        if not 0 <= place < len(self._tokens) or self._tokens[place] != label:
            return None
        before = self._tokens[max(0, place - BEFORE) : place].tolist()
        return before, self._tokens[place + 1 : place + 1 + AFTER].tolist()


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
            return own_rows(self.memory, ids)
        assert inputs is not None
        if len(inputs) > MOST_TEXTS or not all(isinstance(text, str) for text in inputs):
            raise InvalidInput(f"inputs are {len(inputs)} values, expected at most {MOST_TEXTS} texts")
        return Query(inputs=[self.encoded(text) for text in inputs])

    def encoded(self, text: str) -> Int64[ndarray, " t"]:
        """Tokens of a text.

        Raises
        ------
        InvalidInput : if it has none.
        """
        tokens = np.asarray(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids, np.int64)
        if not len(tokens):
            start = (
                self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
            )
            if start is None:
                raise InvalidInput("the text is empty, expected at least one token")
            tokens = np.array([start], np.int64)
        return tokens

    def answers(self, queries: Sequence[Query]) -> list[Answer]:
        found = []
        for query in queries:
            seen = self._seen(query, excluded(query, ()))
            found.append(Answer(seen.base.numpy(), self._corrected(seen).numpy()))
        return found

    def neighbors(
        self, query: Query, n_neighbors: int | None = None, without: Names = ()
    ) -> list[list[dict[str, Any]]]:
        seen = self._seen(query, excluded(query, without))
        return [self._told(seen, row)[:n_neighbors] for row in range(len(query))]

    def explain(
        self, query: Query, *, without: Names = (), n_neighbors: int = 10, n_outputs: int = 5
    ) -> list[dict[str, Any]]:
        seen = self._seen(query, excluded(query, without))
        base, corrected = seen.base, self._corrected(seen)
        entries = []
        for row in range(len(query)):
            listed = self._told(seen, row)
            rest = listed[n_neighbors:]
            entry: dict[str, Any] = {
                "outputs": self._outputs(base[row], corrected[row], n_outputs),
                "neighbors": listed[:n_neighbors],
                "n_more": len(rest),
                "share_of_more": sum(entry["share"] for entry in rest),
                "amount": float(seen.amount[row]),
            }
            if query.own is None:
                entry["context"] = {"before": self.decoded(query.inputs[row][-BEFORE:]), "token": "…", "after": ""}
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
        snippets = carried.pop("snippets", None)
        if snippets is not None:
            raise InvalidInput("snippets are made of the texts; leave them out")
        added = []
        with self.writing:
            for tokens in query.inputs:
                added += [
                    self._append(batch, tokens, carried) for batch in self.lm.watch.batches([{"input_ids": tokens}])
                ]
        return np.concatenate(added) if added else np.zeros(0, np.int64)

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
        return self.decoded([label])

    def decoded(self, tokens: Sequence[int] | ndarray) -> str:
        """Text of tokens, special ones too."""
        return self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)

    def context(self, name: int | str, label: Any) -> dict[str, str] | None:
        found = self._stream.around(name, label) if self._stream is not None and isinstance(name, int) else None
        if found is None:
            return None
        before, after = found
        return {"before": self.decoded(before), "token": self.name_of(label), "after": self.decoded(after)}

    def survey(self, progress: Callable[[float], None]) -> Survey | None:
        return None

    # ------------------------------------------------------------------ inside

    def _keys_and_logits(self, query: Query) -> tuple[Tensor, Tensor]:
        """At the end of each text; of the memory's own rows, from what they keep."""
        if query.keys is not None:
            said = torch.from_numpy(np.ascontiguousarray(query.predictions)).float()
            return torch.from_numpy(np.ascontiguousarray(query.keys)).float(), said.clamp_min(1e-30).log()
        longest = self.lm.watch.longest
        pairs = [self.lm.watch.at_end(tokens if longest is None else tokens[-longest:]) for tokens in query.inputs]
        return torch.cat([keys for keys, _ in pairs]).cpu(), torch.cat([logits for _, logits in pairs]).cpu()

    def _seen(self, query: Query, exclude: ById | None) -> Seen:
        keys, logits = self._keys_and_logits(query)
        with torch.inference_mode():
            seen = self.lm.seen(logits, keys, always=True, exclude=exclude)
        assert seen is not None
        return seen

    @staticmethod
    def _corrected(seen: Seen) -> Tensor:
        """Whole corrected distributions; the base's where no memory contributes."""
        corrected = seen.base.clone()
        for rows in seen.changed():
            scores = seen.corrected(rows)
            if scores.shape[1] > corrected.shape[1]:
                corrected = torch.nn.functional.pad(corrected, (0, scores.shape[1] - corrected.shape[1]))
            corrected[rows, : scores.shape[1]] = scores
        return corrected

    def _outputs(self, base: Tensor, corrected: Tensor, n: int) -> list[dict[str, Any]]:
        width = len(corrected)
        before = torch.nn.functional.pad(base, (0, width - len(base)))
        chosen = torch.maximum(before, corrected).topk(min(n, width)).indices
        chosen = chosen[corrected[chosen].argsort(descending=True, stable=True)]
        return [
            {
                "output": place,
                "name": self.name_of(place),
                "base": float(before[place]),
                "corrected": float(corrected[place]),
            }
            for place in chosen.tolist()
        ]

    def _told(self, seen: Seen, row: int) -> list[dict[str, Any]]:
        """Neighbours of a query; the share of each is that of |w (onehot(label) − prediction)|, 2 w (1 − p)."""
        recalled, weights = seen.recalled, seen.weights[row]
        listed = recalled.indices[row] == recalled.labels[row][:, None]
        said = (recalled.probabilities[row] * listed).sum(axis=1)
        moved = np.abs(weights) * (1 - np.clip(said, 0, 1))
        shares = moved / (moved.sum() or 1.0)
        return [
            {
                "id": recalled.ids[row, place].item(),
                "label": (label := int(recalled.labels[row, place])),
                "name": self.name_of(label),
                "distance": float(recalled.distances[row, place]),
                "weight": float(weights[place]),
                "share": float(shares[place]),
            }
            for place in np.flatnonzero(np.isfinite(recalled.distances[row]))
        ]

    def _append(self, batch: Any, tokens: Int64[ndarray, " t"], carried: dict[str, Any]) -> Shaped[ndarray, " b"]:
        snapshot = self.memory.snapshot
        said = batch.logits.float().log_softmax(1)
        m = snapshot.manifest.top_m
        predictions = said.exp().cpu().numpy() if m is None else top_m_of(said, m)
        groups = snapshot.all_groups
        document = None if groups is None else np.full(len(batch), groups.max(initial=-1) + 1)
        snippets = [self.decoded(tokens[max(0, place - BEFORE) : place + 1]) for place in batch.offsets]
        return self.memory.append(
            stored_keys(batch.keys, self.memory),
            batch.labels.cpu().numpy(),
            predictions,
            groups=document,
            snippets=snippets,
            **{name: value for name, value in carried.items() if value is not None},
        )


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
    InvalidInput : if the model has other memories or turns a source into a target, or there is no tokenizer.
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
    return TextService(lm, tokenizer, None if text is None else Stream.of(text, tokenizer.eos_token_id))
