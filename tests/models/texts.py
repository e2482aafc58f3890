"""Tiny language models made from configurations, texts of random tokens, and keys found with a plain hook."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from experiments.language.model import T5DecoderLM, decoder_config
from residual_memory.memory import Memory
from tests.models.nets import rows_of

VOCABULARY = 50
LONGEST = 32
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LONGEST,
    **SPECIAL,
}
T5_LIKE = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}


def _from(config: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config)


def _gpt2() -> PreTrainedModel:
    return _from(
        GPT2Config(vocab_size=VOCABULARY, n_positions=LONGEST, n_embd=16, n_layer=2, n_head=2, n_inner=24, **SPECIAL)
    )


def _t5_decoder() -> PreTrainedModel:
    config = decoder_config("tiny", VOCABULARY)
    config.update({**T5_LIKE, "num_decoder_layers": 2})
    return T5DecoderLM(config)


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, dropout_rate=0.1, decoder_start_token_id=0, **T5_LIKE, **SPECIAL)
    )


Place = Callable[[Any], tuple[nn.Module, nn.Module]]  # the last feed-forward, and what reads the same before the norm
_llama_place: Place = lambda model: (model.model.layers[-1].mlp, model.model.layers[-1].post_attention_layernorm)  # noqa: E731
_neox_place: Place = lambda model: (  # noqa: E731
    model.gpt_neox.layers[-1].mlp,
    model.gpt_neox.layers[-1].post_attention_layernorm,
)
_t5_place: Place = lambda model: (  # noqa: E731
    model.decoder.block[-1].layer[-1].DenseReluDense,
    model.decoder.block[-1].layer[-1],
)

CASES: dict[str, tuple[Callable[[], PreTrainedModel], Place]] = {
    "gpt2": (_gpt2, lambda model: (model.transformer.h[-1].mlp, model.transformer.h[-1].ln_2)),
    "llama": (lambda: _from(LlamaConfig(num_key_value_heads=1, **LLAMA_LIKE)), _llama_place),
    "neox": (lambda: _from(GPTNeoXConfig(use_parallel_residual=True, **LLAMA_LIKE)), _neox_place),
    "neox in sequence": (lambda: _from(GPTNeoXConfig(use_parallel_residual=False, **LLAMA_LIKE)), _neox_place),
    "t5 decoder": (_t5_decoder, _t5_place),
    "qwen2": (lambda: _from(Qwen2Config(num_key_value_heads=1, **LLAMA_LIKE)), _llama_place),
    "mistral": (lambda: _from(MistralConfig(num_key_value_heads=1, **LLAMA_LIKE)), _llama_place),
    "t5": (_t5, _t5_place),
}
CAUSAL = [name for name in CASES if name != "t5"]


def model_of(name: str, seed: int = 0) -> PreTrainedModel:
    """A model with opinions: weights so large that its predictions differ from place to place; in training mode."""
    torch.manual_seed(seed)
    model = CASES[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.4)
    return model.train()


def texts(n: int = 6, seed: int = 0, longest: int = 12) -> list[list[int]]:
    """Documents of 3 to `longest` tokens."""
    random = np.random.default_rng(seed)
    return [random.integers(1, VOCABULARY, random.integers(3, longest + 1)).tolist() for _ in range(n)]


def items_of(documents: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """An item a document."""
    return [{"input_ids": document, "documents": number} for number, document in enumerate(documents)]


def pairs(n: int = 5) -> list[dict[str, Any]]:
    """Sources and targets for a sequence-to-sequence model."""
    sources, targets = texts(n, 1), texts(n, 2)
    return [
        {"input_ids": source, "labels": target, "documents": number}
        for number, (source, target) in enumerate(zip(sources, targets, strict=True))
    ]


def data_for(name: str) -> list[dict[str, Any]]:
    return pairs() if name == "t5" else items_of(texts())


def seen_by_hand(name: str, model: Any, before_norm: bool = False, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [b t d] and logits [b t v] of a plain forward pass."""
    caught: list[Tensor] = []
    place = CASES[name][1](model)[before_norm]
    handle = place.register_forward_pre_hook(lambda _module, arguments: caught.append(arguments[0].clone()))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
    finally:
        handle.remove()
        model.train(training)
    (keys,) = caught
    return keys, logits


def observed_by_hand(name: str, model: Any, item: Mapping[str, Any], before_norm: bool = False) -> tuple[Any, ...]:
    """Keys, labels and probabilities of every prediction of one item without padding."""
    tokens = torch.tensor([item["input_ids"]])
    if name == "t5":
        target = torch.tensor([item["labels"]])
        read = torch.cat([torch.zeros((1, 1), dtype=torch.int64), target[:, :-1]], 1)
        keys, logits = seen_by_hand(name, model, before_norm, input_ids=tokens, decoder_input_ids=read)
        return keys[0].numpy(), target[0].numpy(), logits[0].softmax(1).numpy()
    keys, logits = seen_by_hand(name, model, before_norm, input_ids=tokens)
    return keys[0, :-1].numpy(), tokens[0, 1:].numpy(), logits[0, :-1].softmax(1).numpy()


COLUMNS = ("keys", "labels", "groups")


def same_memories(first: Memory, second: Memory, atol: float = 1e-5) -> None:
    """Assert that two memories hold the same rows in the same order."""
    np.testing.assert_array_equal(first.ids, second.ids)
    predicted = ("predictions",) if first.layout.residuals == "dense" else ("probabilities", "rest")
    for name in (*COLUMNS, *predicted):
        one, other = sorted_lists(first, name), sorted_lists(second, name)
        np.testing.assert_allclose(one, other, rtol=0, atol=atol, err_msg=name)


def sorted_lists(memory: Memory, name: str) -> ndarray:
    """A column; the probabilities of top-m rows, which have no order of their own, from small to large."""
    values = rows_of(memory, name) if name != "groups" else memory.snapshot.all_groups
    assert values is not None
    return np.sort(values, axis=1) if name == "probabilities" else values


class Stream:
    """Items that can be read again from the beginning and only so; may fail at one of them."""

    def __init__(self, items: Sequence[Any], *, fails_at: int | None = None, error: Any = KeyboardInterrupt) -> None:
        self.items, self.fails_at, self.error = items, fails_at, error

    def __iter__(self) -> Iterator[Any]:
        for number, item in enumerate(self.items):
            if number == self.fails_at:
                raise self.error
            yield item


class Tokenizer:
    """All that a memory asks of a tokenizer."""

    def __init__(self, words: Sequence[str]) -> None:
        self._numbers = {word: number for number, word in enumerate(words)}

    def get_vocab(self) -> dict[str, int]:
        return self._numbers
