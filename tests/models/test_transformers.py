"""Language models of transformers with a memory: what is stored, and logits corrected wherever they are read."""

import inspect
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import IterableDataset

import residual_memory as rm
from residual_memory.errors import DimensionMismatch, FingerprintMismatch, InvalidInput
from residual_memory.language import FLOOR, LanguageSetting
from residual_memory.memory import Memory
from residual_memory.windows import Windows
from tests import reference
from tests.models.nets import Mlp, mlp_data, rows_of

transformers = pytest.importorskip("transformers", reason="transformers missing: pip install transformers")

from transformers import LlamaForCausalLM  # noqa: E402

from residual_memory.models.tokens import ARCHITECTURES, IGNORED, TokenWatch, place_named  # noqa: E402
from residual_memory.models.transformers import ResMemForCausalLM, build_memory, tune_language  # noqa: E402
from residual_memory.models.vocabulary import top_m_of  # noqa: E402
from tests.models.texts import (  # noqa: E402
    CASES,
    CAUSAL,
    LONGEST,
    VOCABULARY,
    Stream,
    Tokenizer,
    data_for,
    items_of,
    model_of,
    observed_by_hand,
    pairs,
    same_memories,
    seen_by_hand,
    texts,
)

GENERATORS = ["gpt2", "llama", "t5 decoder"]
SETTING = LanguageSetting(n_neighbors=5, bandwidth=0.5, shrinkage=0.6)
PLAIN: dict[str, Any] = {"key_dtype": "float32", "prediction_dtype": "float32"}


def build(model: Any, items: Any, path: Path | None = None, **options: Any) -> Memory:
    return build_memory(model, items, path, **{"verbose": False, **PLAIN, **options})


def lm_of(name: str = "gpt2", *, setting: LanguageSetting = SETTING, **options: Any) -> ResMemForCausalLM:
    """A model in training mode and a memory of its texts."""
    model = model_of(name)
    return ResMemForCausalLM(model, build(model, data_for(name), **options), setting=setting, index="exact")


def base_logits(lm: ResMemForCausalLM, **inputs: Any) -> Tensor:
    lm.model.eval()
    with torch.no_grad():
        logits = lm.model(**inputs).logits
    lm.model.train()
    return logits


def inputs_for(name: str, n: int = 2, seed: int = 9) -> dict[str, Tensor]:
    """Sequences of equal length that no memory has seen."""
    random = np.random.default_rng(seed)
    tokens = torch.from_numpy(random.integers(1, VOCABULARY, (n, 7)))
    return {"input_ids": tokens, "decoder_input_ids": tokens[:, :4]} if name == "t5" else {"input_ids": tokens}


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


# ---------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("layer", ["post-attention", "post-attention-before-norm"])
@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_a_pass_by_hand(name: str, layer: str) -> None:
    model, items = model_of(name), data_for(name)
    memory = build(model, items, layer=layer, residuals="dense")
    by_hand = [observed_by_hand(name, model, item, "before" in layer) for item in items]
    keys, labels, predictions = (np.concatenate(column) for column in zip(*by_hand, strict=True))
    np.testing.assert_allclose(rows_of(memory, "keys"), keys, atol=2e-5, rtol=1e-5)
    np.testing.assert_array_equal(rows_of(memory, "labels"), labels)
    np.testing.assert_allclose(rows_of(memory, "predictions"), predictions, atol=1e-5, rtol=0)


def test_ids_are_places_in_the_text_and_groups_its_documents() -> None:
    model, documents = model_of("gpt2"), texts()
    memory = build(model, items_of(documents))
    places = np.cumsum([0] + [len(document) for document in documents])
    expected = [
        (places[number] + within, number)
        for number, document in enumerate(documents)
        for within in range(1, len(document))
    ]
    assert memory.snapshot.all_groups is not None
    assert list(zip(memory.ids.tolist(), memory.snapshot.all_groups.tolist(), strict=True)) == expected
    stream = np.concatenate(documents)
    np.testing.assert_array_equal(rows_of(memory, "labels"), stream[memory.ids])


def test_items_without_a_document_are_documents_of_their_own() -> None:
    documents = texts()
    memory = build(model_of("gpt2"), [{"input_ids": document} for document in documents])
    same_memories(memory, build(model_of("gpt2"), items_of(documents)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "t5 decoder"])
def test_padding_on_either_side_is_dropped(name: str, side: str) -> None:
    model, items = model_of(name), items_of(texts())
    padded = []
    for item in items:
        n = 12 - len(item["input_ids"])
        around = (n, 0) if side == "left" else (0, n)
        ids = np.pad(item["input_ids"], around)
        mask = np.pad(np.ones(12 - n, int), around)
        padded.append({**item, "input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)})
    same_memories(build(model, padded), build(model, items))


def test_ignored_places_of_a_target_are_dropped() -> None:
    model, items = model_of("t5"), pairs()
    padded = [{**item, "labels": item["labels"] + [IGNORED] * 3} for item in items]
    same_memories(build(model, padded), build(model, items))
    owned = [{**item, "documents": [number] * len(item["labels"])} for number, item in enumerate(padded)]
    same_memories(build(model, owned), build(model, items))


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_the_size_of_batches_changes_nothing(batch_size: int | None) -> None:
    model = model_of("llama")
    same_memories(build(model, items_of(texts()), batch_size=batch_size), build(model, items_of(texts()), batch_size=2))


def test_windows_give_the_rows_of_the_same_contexts() -> None:
    model, documents = model_of("gpt2"), texts(8)
    stream = np.concatenate(documents)
    memory = build(model, Windows(documents, length=10))
    by_hand = [
        observed_by_hand("gpt2", model, {"input_ids": stream[start : start + 11].tolist()})
        for start in range(0, len(stream) - 1, 10)
    ]
    np.testing.assert_allclose(rows_of(memory, "keys"), np.concatenate([keys for keys, _, _ in by_hand]), atol=1e-5)
    np.testing.assert_array_equal(memory.ids, np.arange(1, len(stream)))
    owners = np.repeat(np.arange(8), [len(document) for document in documents])
    np.testing.assert_array_equal(memory.snapshot.all_groups, owners[1:])


def test_windows_with_a_stride_store_every_token_once() -> None:
    model, documents = model_of("gpt2"), texts(8)
    memory = build(model, Windows(documents, length=10, stride=4))
    assert memory.ids.tolist() == list(range(1, sum(map(len, documents))))


def test_top_m_rows_are_the_largest_of_the_dense_ones() -> None:
    model, items = model_of("gpt2"), items_of(texts())
    dense, top = build(model, items, residuals="dense"), build(model, items, top_m=3)
    predictions = rows_of(dense, "predictions")
    np.testing.assert_allclose(
        np.sort(rows_of(top, "probabilities"), axis=1), np.sort(predictions, axis=1)[:, -3:], atol=1e-6
    )
    np.testing.assert_allclose(rows_of(top, "rest"), 1 - rows_of(top, "probabilities").sum(axis=1), atol=1e-6)


@pytest.mark.parametrize("width", [50, 64, 256, 1000, 1024])
def test_the_top_m_are_found_whatever_the_width(width: int) -> None:
    logits = 3 * torch.randn(7, width)
    found = top_m_of(logits.log_softmax(1), 3)
    values, places = logits.softmax(1).topk(3)
    order = np.argsort(-found.probabilities, axis=1)
    np.testing.assert_array_equal(np.take_along_axis(found.indices, order, 1), places.numpy())
    np.testing.assert_allclose(np.take_along_axis(found.probabilities, order, 1), values.numpy(), atol=1e-6)
    np.testing.assert_allclose(found.rest, 1 - values.sum(1).numpy(), atol=1e-6)


def test_a_dotted_name_is_a_place_too() -> None:
    model, items = model_of("gpt2"), items_of(texts())
    same_memories(build(model, items, layer="transformer.h.1.mlp", side="input"), build(model, items))
    other = build(model, items, layer="transformer.h.0", side="output")
    assert other.source is not None
    assert (other.source["layer"], other.source["side"]) == ("transformer.h.0", "output")


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_left_as_it_was_found(name: str) -> None:
    model = model_of(name)
    model.get_output_embeddings().eval()
    modes, hooks = [module.training for module in model.modules()], n_hooks(model)
    build(model, data_for(name))
    assert [module.training for module in model.modules()] == modes
    assert n_hooks(model) == hooks


def test_a_limit_stops_after_so_many_predictions() -> None:
    model, items = model_of("gpt2"), items_of(texts())
    whole = build(model, items)
    for limit in (1, 7, len(whole), 10_000):
        memory = build(model, items, limit=limit)
        assert memory.ids.tolist() == whole.ids[:limit].tolist()


def test_tokens_that_the_base_knows_are_left_out() -> None:
    model, items = model_of("gpt2"), items_of(texts())
    whole = build(model, items, residuals="dense")
    said = rows_of(whole, "predictions")[np.arange(len(whole)), rows_of(whole, "labels")]
    memory = build(model, items, keep=0.01)
    assert 0 < len(memory) < len(whole)
    assert memory.ids.tolist() == whole.ids[said <= 0.01].tolist()


def test_projected_keys_are_the_first_principal_components() -> None:
    model, items = model_of("gpt2"), items_of(texts())
    whole, memory = build(model, items), build(model, items, projection=4)
    keys = rows_of(whole, "keys").astype(np.float64)
    _, _, directions = np.linalg.svd(keys - keys.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(rows_of(memory, "keys")), np.abs(keys @ directions[:4].T), atol=1e-3)
    lm = ResMemForCausalLM(model, memory, setting=SETTING)
    assert not torch.equal(lm(**inputs_for("gpt2")).logits, base_logits(lm, **inputs_for("gpt2")))


# ---------------------------------------------------------------------- building on


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "keep": {"keep": 0.02},
    "projection": {"projection": 4},
    "limit": {"limit": 50},
}


class Interrupted(Stream):
    """Fails at an item, but not in its first readings."""

    def __init__(self, items: Any, fails_at: int, *, good_readings: int) -> None:
        super().__init__(items)
        self._place, self._good = fails_at, good_readings

    def __iter__(self) -> Iterator[Any]:
        self._good -= 1
        self.fails_at = self._place if self._good < 0 else None
        return super().__iter__()


READINGS = 2  # before the one that stores: whether it is a stream that can be read again, and the first item


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_an_interrupted_build_goes_on_where_it_was(options: dict[str, Any], fails_at: int, tmp_path: Path) -> None:
    model, items = model_of("gpt2"), items_of(texts(9))
    options = {"batch_size": 2, **options}
    whole = build(model, items, **options)
    broken = Interrupted(items, fails_at, good_readings=READINGS + ("projection" in options))
    with pytest.raises(KeyboardInterrupt):
        build(model, broken, tmp_path / "memory", **options)
    memory = build(model, Stream(items), tmp_path / "memory", **options)
    same_memories(memory, whole)
    assert memory.source is not None
    assert memory.source["complete"]


def test_what_was_stored_before_an_interruption_is_not_run_again(tmp_path: Path) -> None:
    model, items = model_of("gpt2"), items_of(texts(9))
    with pytest.raises(KeyboardInterrupt):
        build(model, Interrupted(items, 6, good_readings=READINGS), tmp_path / "memory", batch_size=2)
    seen: list[int] = []
    handle = model.register_forward_hook(lambda _module, _inputs, output: seen.append(len(output.logits)))
    build(model, items, tmp_path / "memory", batch_size=2)
    handle.remove()
    assert seen == [1, 2, 1]  # a look at the width of a key, and the last three of nine items


def test_a_stream_that_can_be_read_once_is_read_from_its_beginning() -> None:
    model, items = model_of("gpt2"), items_of(texts())
    same_memories(build(model, (item for item in items)), build(model, items))
    same_memories(build(model, iter(items), projection=4), build(model, items, projection=4))


def test_a_complete_memory_is_opened_and_the_text_not_read_through(tmp_path: Path) -> None:
    model, items = model_of("gpt2"), items_of(texts())
    build(model, items, tmp_path / "memory").close()
    with build(model, Stream(items, fails_at=1), tmp_path / "memory") as memory:
        same_memories(memory, build(model, items))


def test_an_empty_directory_is_a_place_for_a_memory(tmp_path: Path) -> None:
    model, items = model_of("gpt2"), items_of(texts())
    with build(model, items, tmp_path) as memory:
        same_memories(memory, build(model, items))


def test_a_failed_build_lets_go_of_its_memory(tmp_path: Path) -> None:
    model, items = model_of("gpt2"), items_of(texts())
    with pytest.raises(ZeroDivisionError):
        build(model, Stream(items, fails_at=3, error=ZeroDivisionError), tmp_path / "memory")
    Memory.open(tmp_path / "memory", writable=True).close()
    assert n_hooks(model) == 0
    assert model.training


# ---------------------------------------------------------------------- logits


@pytest.mark.parametrize("name", CASES)
def test_all_classes_listed_gives_the_logits_of_the_dense_memory(name: str) -> None:
    lm, listed = lm_of(name, residuals="dense"), lm_of(name, top_m=VOCABULARY)
    inputs = inputs_for(name)
    torch.testing.assert_close(lm(**inputs).logits, listed(**inputs).logits, atol=2e-4, rtol=0)
    assert not torch.allclose(lm(**inputs).logits, base_logits(lm, **inputs), atol=0.1)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_base_normaliser_and_the_log_of_the_corrected_distribution(name: str) -> None:
    lm, inputs = lm_of(name, residuals="dense"), inputs_for(name)
    keys, logits = (values.flatten(0, 1).double().numpy() for values in seen_by_hand(name, lm.model, False, **inputs))
    said = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    (memory,) = lm.memories
    residuals = reference.residuals(rows_of(memory, "labels"), rows_of(memory, "predictions"))
    added = reference.correction(rows_of(memory, "keys"), residuals, keys, 5, 0.5, "exponential")
    scores = np.maximum(said + 0.6 * added, FLOOR * said)
    expected = np.log(scores / scores.sum(axis=1, keepdims=True)) + np.logaddexp.reduce(logits, axis=1, keepdims=True)
    corrected = lm(**inputs).logits.flatten(0, 1).numpy()
    np.testing.assert_allclose(corrected, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("why", ["shrinkage", "empty", "forgotten", "compacted", "two forgotten", "sure"])
def test_where_no_memory_contributes_logits_are_the_bases_bit_for_bit(why: str) -> None:
    model, items = model_of("gpt2"), items_of(texts())
    memories = [build(model, items), build(model, items[::-1], top_m=4)][: 2 if "two" in why else 1]
    setting = replace(SETTING, shrinkage=0.0) if why == "shrinkage" else SETTING
    if why == "empty":
        memories = [Memory.create(dim=16, n_outputs=VOCABULARY, residuals="top-m")]
    if why == "sure":
        setting = replace(SETTING, search_below=0.0)
    lm = ResMemForCausalLM(model, memories, setting=setting)
    inputs = inputs_for("gpt2")
    if why in ("forgotten", "compacted", "two forgotten"):
        for memory in memories:
            memory.forget(memory.ids)
            if why == "compacted":
                memory.compact()
    base = base_logits(lm, **inputs)
    assert same_bits(lm(**inputs).logits, base)
    assert same_bits(lm(**inputs, labels=inputs["input_ids"]).logits, base)


@pytest.mark.parametrize("how", ["never filled", "forgotten", "compacted"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_second_memory_without_rows_changes_no_bit(how: str, order: int) -> None:
    model, items = model_of("gpt2"), items_of(texts())
    memory, inputs = build(model, items), inputs_for("gpt2")
    other = build(model, items_of(texts(3, seed=5)))
    if how == "never filled":
        other = Memory.create(dim=16, n_outputs=VOCABULARY, residuals="top-m")
    auto = replace(SETTING, bandwidth="auto")
    alone = ResMemForCausalLM(model, memory, setting=auto)(**inputs).logits
    if len(other):
        other.forget(other.ids)
    if how == "compacted":
        other.compact()
    both = ResMemForCausalLM(model, [memory, other][::order], setting=auto)
    assert same_bits(both(**inputs).logits, alone)


def test_forgetting_one_of_two_memories_takes_back_what_it_added() -> None:
    model = model_of("gpt2")
    first, second = build(model, items_of(texts())), build(model, items_of(texts(4, seed=5)))
    inputs = inputs_for("gpt2")
    alone = ResMemForCausalLM(model, first, setting=SETTING)(**inputs).logits
    lm = ResMemForCausalLM(model, [first, second], setting=SETTING)
    assert not torch.equal(lm(**inputs).logits, alone)
    second.forget(second.ids)
    assert same_bits(lm(**inputs).logits, alone)


def test_two_memories_are_one_that_holds_both_texts() -> None:
    model, documents = model_of("gpt2"), texts(8)
    parts = [build(model, items_of(some)) for some in (documents[:3], documents[3:])]
    both = build(model, items_of(documents))
    inputs = inputs_for("gpt2")
    logits = [
        ResMemForCausalLM(model, memory, setting=SETTING)(**inputs).logits for memory in (both, parts, parts[::-1])
    ]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[2], logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("residuals", ["dense", "top-m"])
def test_classes_that_only_a_memory_knows_have_logits_too(residuals: str) -> None:
    model = model_of("gpt2")
    memory = build(model, items_of(texts()), residuals=residuals, n_outputs=VOCABULARY + 3)
    lm, inputs = ResMemForCausalLM(model, memory, setting=SETTING), inputs_for("gpt2")
    plain = ResMemForCausalLM(model, build(model, items_of(texts()), residuals=residuals), setting=SETTING)
    logits = lm(**inputs).logits
    assert logits.shape[2] == VOCABULARY + 3
    torch.testing.assert_close(logits[..., :VOCABULARY], plain(**inputs).logits, atol=1e-5, rtol=0)
    key, _ = seen_by_hand("gpt2", model, False, **inputs)
    said = np.full((1, 8), 0.125) if residuals == "top-m" else np.full((1, VOCABULARY), 1 / VOCABULARY)
    rows = rm.TopM(np.arange(8)[None], said, np.zeros(1)) if residuals == "top-m" else said
    memory.append(key[0, -1:].numpy(), [VOCABULARY + 1], rows, groups=[0])
    assert lm(**inputs).logits[0, -1].argmax() == VOCABULARY + 1


def test_a_memory_filled_by_hand_is_used_at_the_layer_that_is_named() -> None:
    model, items = model_of("gpt2"), items_of(texts())
    built = build(model, items, residuals="dense", layer="post-attention-before-norm")
    memory = Memory.create(dim=16, n_outputs=VOCABULARY)
    memory.append(rows_of(built, "keys"), rows_of(built, "labels"), rows_of(built, "predictions"))
    lms = [
        ResMemForCausalLM(model, memory, setting=SETTING, layer="post-attention-before-norm"),
        ResMemForCausalLM(model, built, setting=SETTING),
    ]
    first, second = (lm(**inputs_for("gpt2")).logits for lm in lms)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_the_setting_kept_with_the_memory_is_the_default() -> None:
    model = model_of("gpt2")
    memory = build(model, items_of(texts()))
    memory.save_setting(SETTING.to_dict())
    assert ResMemForCausalLM(model, memory).setting == SETTING


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5 decoder", "t5"])
def test_models_in_half_precision_answer_in_their_own_type(name: str) -> None:
    model = model_of(name).bfloat16()
    lm = ResMemForCausalLM(model, build(model, data_for(name)), setting=SETTING)
    inputs = inputs_for(name)
    logits = lm(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert not torch.equal(logits, base_logits(lm, **inputs))
    assert torch.isfinite(logits.float()).all()
    if name != "t5":
        assert lm.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False).shape[1] <= 10


def test_a_search_is_skipped_where_the_base_is_sure() -> None:
    lm, inputs = lm_of(), inputs_for("gpt2")
    base, corrected = base_logits(lm, **inputs), lm(**inputs).logits
    confidence = base.softmax(2).amax(2)
    middle = float(confidence.median())
    skipped = lm.with_setting(replace(SETTING, search_below=middle))(**inputs).logits
    sure = confidence >= middle
    assert torch.equal(skipped[sure], base[sure])
    torch.testing.assert_close(skipped[~sure], corrected[~sure], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- what transformers asks of an output


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5 decoder", "t5"])
@pytest.mark.parametrize("keep", [None, 3, torch.tensor([1, 4, 6])], ids=["all", "last", "some"])
def test_the_loss_is_that_of_the_corrected_logits(name: str, keep: Any) -> None:
    lm, inputs = lm_of(name), inputs_for(name)
    if name == "t5":
        if keep is not None:
            pytest.skip("sequence-to-sequence models of transformers give all logits")
        labels = inputs.pop("decoder_input_ids").clone()
    else:
        labels = inputs["input_ids"].clone()
    labels[0, 2] = IGNORED
    options = {} if keep is None else {"logits_to_keep": keep}
    output = lm(**inputs, labels=labels, **options)
    if name == "t5":
        targets = labels
    else:
        targets = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        targets = targets if keep is None else targets[:, -keep:] if isinstance(keep, int) else targets[:, keep]
    chances = output.logits.log_softmax(2)
    by_hand = [chances[place][token] for place, token in np.ndenumerate(targets.numpy()) if token != IGNORED]
    assert output.loss == pytest.approx(-float(torch.stack(by_hand).mean()), rel=1e-5)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([1, 4])], ids=["last", "three", "some"])
@pytest.mark.parametrize("name", GENERATORS)
def test_logits_to_keep_are_those_of_all_logits(name: str, keep: Any) -> None:
    lm, inputs = lm_of(name), inputs_for(name)
    whole, kept = lm(**inputs).logits, lm(**inputs, logits_to_keep=keep).logits
    torch.testing.assert_close(kept, whole[:, -keep:] if isinstance(keep, int) else whole[:, keep], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("with_labels", [False, True])
def test_outputs_as_tuples_hold_the_same(name: str, with_labels: bool) -> None:
    lm, inputs = lm_of(name), inputs_for(name)
    labels = inputs["decoder_input_ids" if name == "t5" else "input_ids"].clone()
    options = {"labels": labels} if with_labels else {}
    output, plain = lm(**inputs, **options), lm(**inputs, **options, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == len(output.to_tuple())
    if with_labels:
        torch.testing.assert_close(plain[0], output.loss)
    torch.testing.assert_close(plain[int(with_labels)], output.logits)


def test_the_loss_of_a_step_over_several_batches_is_its_share() -> None:
    lm, inputs = lm_of(), inputs_for("gpt2")
    one = lm(**inputs, labels=inputs["input_ids"])
    share = lm(**inputs, labels=inputs["input_ids"], num_items_in_batch=torch.tensor(24))
    torch.testing.assert_close(share.loss, one.loss / 2)


def test_it_looks_like_a_model_of_transformers() -> None:
    lm = lm_of()
    assert lm.config is lm.model.config
    assert lm.generation_config is lm.model.generation_config
    assert (lm.device, lm.dtype, lm.can_generate()) == (torch.device("cpu"), torch.float32, True)
    lm.tie_weights()


# ---------------------------------------------------------------------- generate


def greedy_by_hand(lm: ResMemForCausalLM, prompt: Tensor, steps: int, with_cache: bool) -> list[int]:
    """One forward pass a token."""
    named = inspect.signature(LlamaForCausalLM.forward).parameters
    name = "cache" if "cache" in named else "past_key_values"  # in older versions of transformers
    tokens, read, cache = prompt, prompt, None
    for _ in range(steps):
        output = lm(input_ids=read, use_cache=True, **{name: cache}) if with_cache else lm(input_ids=tokens)
        token = output.logits[:, -1:].argmax(2)
        tokens = torch.cat([tokens, token], 1)
        if with_cache:
            cache, read = output.past_key_values, token
        if token.item() == 0:
            break
    return tokens[0].tolist()


@pytest.mark.parametrize("with_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_generation_is_step_by_step_forward(name: str, with_cache: bool) -> None:
    lm = lm_of(name)
    differ = 0
    for prompt in texts(4, seed=7, longest=6):
        tokens = torch.tensor([prompt])
        by_hand = greedy_by_hand(lm, tokens, 8, with_cache)
        made = lm.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=with_cache)
        assert made[0].tolist() == by_hand
        lm.model.eval()
        differ += lm.model.generate(tokens, max_new_tokens=8, do_sample=False)[0].tolist() != by_hand
    assert differ > 0, "the memory changed nothing, so this shows nothing"


@pytest.mark.parametrize("with_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("name", GENERATORS)
def test_prompts_padded_on_the_left_go_on_as_they_do_alone(name: str, with_cache: bool) -> None:
    lm, prompts = lm_of(name), texts(4, seed=7, longest=6)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    alone = [lm.generate(torch.tensor([prompt]), **options)[0, len(prompt) :] for prompt in prompts]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    made = lm.generate(ids, attention_mask=mask, use_cache=with_cache, **options)[:, width:]
    for one, row in zip(alone, made, strict=True):
        assert row[: len(one)].tolist() == one.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_places_that_are_padding_are_not_searched(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, prompts = lm_of("llama"), texts(3, seed=7, longest=6)
    width = max(map(len, prompts))
    around = [((width - len(p), 0) if side == "left" else (0, width - len(p))) for p in prompts]
    ids = torch.tensor([np.pad(prompt, some).tolist() for prompt, some in zip(prompts, around, strict=True)])
    mask = torch.tensor([np.pad(np.ones(len(p), int), some).tolist() for p, some in zip(prompts, around, strict=True)])
    searched: list[int] = []
    recall = lm.recall

    def counted(keys: Tensor, **options: Any) -> Any:
        searched.append(len(keys))
        return recall(keys, **options)

    monkeypatch.setattr(lm, "recall", counted)
    logits = lm(ids, attention_mask=mask).logits
    assert sum(searched) == sum(map(len, prompts)) < ids.numel()
    bare = lm.model(ids, attention_mask=mask).logits
    assert torch.equal(logits[mask == 0], bare[mask == 0])
    alone = torch.cat([lm(torch.tensor([prompt])).logits[0] for prompt in prompts])
    torch.testing.assert_close(logits[mask == 1], alone, rtol=1e-4, atol=1e-4)


def test_a_target_is_generated_step_by_step() -> None:
    lm = lm_of("t5")
    for source in texts(3, seed=7):
        tokens = torch.tensor([source])
        made = lm.generate(tokens, max_new_tokens=6, do_sample=False)
        target = torch.zeros((1, 1), dtype=torch.int64)
        for _ in range(6):
            token = lm(input_ids=tokens, decoder_input_ids=target).logits[:, -1:].argmax(2)
            target = torch.cat([target, token], 1)
            if token.item() == 0:
                break
        assert made.tolist() == target.tolist()


DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 0},
    "sampling, cooler": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "beams and sampling": {"do_sample": True, "num_beams": 2, "top_k": 0},
}


@pytest.mark.parametrize("options", DECODINGS.values(), ids=DECODINGS)
@pytest.mark.parametrize("name", [*GENERATORS, "t5"])
def test_the_three_ways_to_generate_agree(name: str, options: dict[str, Any]) -> None:
    lm, tokens = lm_of(name), inputs_for(name)["input_ids"]
    options = {"max_new_tokens": 5, **options}
    lm.model.eval()

    def seeded(generate: Callable[[], Tensor]) -> list[list[int]]:
        torch.manual_seed(3)
        return generate().tolist()

    own = seeded(lambda: lm.generate(tokens, **options))
    assert seeded(lambda: lm.model.generate(tokens, custom_generate=lm.custom_generate, **options)) == own
    with lm.logits_processor() as processor:
        assert seeded(lambda: lm.model.generate(tokens, logits_processor=[processor], **options)) == own
    if name != "t5":
        with lm.attached() as model:
            assert seeded(lambda: model.generate(tokens, **options)) == own
    assert n_hooks(lm.model) == 0
    bare = seeded(lambda: lm.model.generate(tokens, **options))
    assert bare != own


def test_a_processor_outside_its_block_is_refused() -> None:
    lm, tokens = lm_of(), inputs_for("gpt2")["input_ids"]
    processor = lm.logits_processor()
    with pytest.raises(InvalidInput, match="outside its `with` block, so it saw no key of this step"):
        lm.model.generate(tokens, logits_processor=[processor], max_new_tokens=2)


def test_custom_generate_is_for_its_own_model() -> None:
    lm, other = lm_of(), model_of("gpt2", seed=1)
    with pytest.raises(InvalidInput, match="another model than the memory's"):
        other.generate(inputs_for("gpt2")["input_ids"], custom_generate=lm.custom_generate, max_new_tokens=2)


# ---------------------------------------------------------------------- hooks, modes, threads


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_hooks_and_modes_are_as_before_after_use(name: str) -> None:
    lm, inputs = lm_of(name), inputs_for(name)
    lm.model.get_output_embeddings().eval()
    modes = [module.training for module in lm.modules()]
    lm(**inputs)
    lm.generate(inputs["input_ids"], max_new_tokens=2)
    lm.score(data_for(name), limit=5)
    if name != "t5":
        lm.explain(inputs["input_ids"])
    assert n_hooks(lm.model) == 0
    assert [module.training for module in lm.modules()] == modes


def test_hooks_come_off_on_errors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, inputs = lm_of(), inputs_for("gpt2")

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    uses: list[tuple[nn.Module, Callable[[], Any]]] = [
        (lm.model.transformer.ln_f, lambda: lm(**inputs)),
        (lm.model.lm_head, lambda: lm.generate(inputs["input_ids"], max_new_tokens=2)),
        (lm.model.lm_head, lambda: lm.score(data_for("gpt2"))),
        (lm.model.lm_head, lambda: lm.explain(inputs["input_ids"])),
    ]
    for place, use in uses:
        with monkeypatch.context() as broken:
            broken.setattr(place, "forward", fail)
            with pytest.raises(ZeroDivisionError):
                use()
        assert n_hooks(lm.model) == 0
        assert lm.model.training


def test_a_pass_that_failed_leaves_no_key_for_the_next_one() -> None:
    lm, inputs = lm_of(), inputs_for("gpt2")
    expected, head = lm(**inputs).logits, lm.model.lm_head
    with lm.attached() as model:
        forward = head.forward
        head.forward = None
        with pytest.raises(TypeError):
            model(**inputs)
        head.forward = forward
        assert same_bits(model(**inputs).logits, expected)


def test_another_thread_that_uses_the_bare_model_meanwhile_gets_its_logits() -> None:
    lm, inputs = lm_of(), inputs_for("gpt2")
    lm.model.eval()
    with torch.no_grad():
        base = lm.model(**inputs).logits
    found: list[Tensor] = []

    def plain() -> None:
        with torch.no_grad():
            found.append(lm.model(**inputs).logits)

    with lm.attached() as model:
        thread = threading.Thread(target=plain)
        thread.start()
        thread.join()
        corrected = model(**inputs).logits
    assert same_bits(found[0], base)
    assert not torch.equal(corrected, base)


def test_threads_that_use_the_memory_at_once_get_what_one_gets() -> None:
    lm, inputs = lm_of(), [inputs_for("gpt2", seed=seed) for seed in range(8)]
    expected = [lm(**one).logits for one in inputs]
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda place=place, one=one: found.update({place: lm(**one).logits}))
        for place, one in enumerate(inputs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[place], logits) for place, logits in enumerate(expected))
    assert n_hooks(lm.model) == 0
    assert lm.model.training


# ---------------------------------------------------------------------- measuring, tuning, explaining


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_scores_are_those_of_the_logits(name: str) -> None:
    lm, items = lm_of(name), (pairs(3) if name == "t5" else items_of(texts(3, seed=5)))
    scores = lm.score(items)
    base, corrected, labels = [], [], []
    for item in items:
        tokens = torch.tensor([item["input_ids"]])
        if name == "t5":
            target = torch.tensor([item["labels"]])
            inputs = {"input_ids": tokens, "decoder_input_ids": functional.pad(target[:, :-1], (1, 0))}
        else:
            target, inputs = tokens[:, 1:], {"input_ids": tokens[:, :-1]}
        base.append(base_logits(lm, **inputs)[0])
        corrected.append(lm(**inputs).logits[0])
        labels.append(target[0])
    target = torch.cat(labels)
    np.testing.assert_array_equal(scores.labels, target.numpy())
    for logits, loss, hit in [
        (torch.cat(base), scores.base_loss, scores.base_hit),
        (torch.cat(corrected), scores.corrected_loss, scores.corrected_hit),
    ]:
        np.testing.assert_allclose(loss, functional.cross_entropy(logits, target, reduction="none"), atol=2e-4)
        np.testing.assert_array_equal(hit, logits.argmax(1) == target)
    assert scores.searched.all()


def test_a_memory_of_the_text_itself_makes_it_likelier() -> None:
    lm = lm_of()
    scores = lm.score(items_of(texts()))
    assert scores.corrected_loss.mean() < scores.base_loss.mean() - 0.3
    assert scores.memory_hit.mean() > 0.9
    assert scores.verdict.startswith("gain +")


def test_tuning_finds_that_a_memory_of_the_same_text_helps() -> None:
    lm = lm_of()
    found = tune_language(lm, items_of(texts()), n_neighbors=(1, 4, 10_000))
    assert found.helps
    tuned = lm.with_setting(found.best)
    assert tuned.score(items_of(texts())).corrected_loss.mean() < lm.score(items_of(texts())).base_loss.mean()
    assert n_hooks(lm.model) == 0


def test_tuning_finds_that_a_memory_of_noise_does_not_help() -> None:
    """Random tokens have nothing in common with other random tokens."""
    found = tune_language(lm_of(), items_of(texts(60, seed=5)), n_neighbors=(4,), limit=300)
    assert not found.helps
    assert found.best.shrinkage == 0


def test_an_explanation_names_the_rows_that_corrected_the_next_token() -> None:
    lm, documents = lm_of(), texts()
    tokens = torch.tensor([documents[2][:3]])
    recalled, weights, amount = lm.explain(tokens)
    place = sum(len(document) for document in documents[:2]) + 3
    assert recalled.ids[0, 0] == place
    assert recalled.labels[0, 0] == np.concatenate(documents)[place]
    assert weights.sum() == pytest.approx(1)
    assert amount.tolist() == [0.6]


# ---------------------------------------------------------------------- one door


def test_one_door_takes_examples_and_text() -> None:
    memory = rm.build_memory(Mlp(), mlp_data(), None, verbose=False)
    assert memory.layout.n_outputs == 3
    model, items = model_of("gpt2"), items_of(texts())
    expected = build(model, items)
    for dataset in (items, tuple(items), Stream(items), iter(items)):
        same_memories(rm.build_memory(model, dataset, None, verbose=False, **PLAIN), expected)


class Examples(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        data = mlp_data()
        return (data[row] for row in range(len(data)))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            Examples(),
            r"the data set is a stream of tuple, expected items \{'input_ids': …\}; examples \(x, y\) come",
        ),
        ({"input_ids": [[1, 2], [3, 4]]}, "the data set is a dict, expected a list or a stream of items; "),
        (3, "the data set is a int, expected items by number or a stream of them"),
    ],
)
def test_one_door_refuses_what_is_neither(dataset: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        rm.build_memory(Mlp(), dataset, None)


# ---------------------------------------------------------------------- refusals


def one(**item: Any) -> list[dict[str, Any]]:
    return [item]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "the text is empty: there is nothing to memorize"),
        (one(input_ids=[5]), "the text has no token with another one before it"),
        (one(input_ids=[]), "the text has no token with another one before it"),
        (one(input_ids=[1, 50]), "input_ids holds token 50, but the model's vocabulary has 50 tokens; was the text"),
        (one(input_ids=[1, -3, 4]), "input_ids holds token -3, but the model's vocabulary has 50 tokens"),
        (one(input_ids=list(range(1, 35))), "a sequence has 33 tokens, but the model reads at most 32; cut the text"),
        (one(tokens=[1, 2]), r"an item of the text is \['tokens'\], expected a mapping with 'input_ids'"),
        ([[1, 2, 3]], "an item of the text is list, expected a mapping with 'input_ids'"),
        (one(input_ids="text"), "input_ids have shape"),
        (one(input_ids=[[1, 2], [3, 4]]), r"input_ids have shape \(2, 2\)"),
        (one(input_ids=[1, 2, 3], attention_mask=[1, 1]), "attention_mask has 2 places for 3 input_ids"),
        (one(input_ids=[1, 2, 3], documents=[0, 0]), "documents have shape .* for 3 tokens, expected one number"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(items: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message):
        build(model_of("gpt2"), items, tmp_path / "memory")
    if (tmp_path / "memory").exists():
        Memory.open(tmp_path / "memory", writable=True).close()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is 0, expected at least 1"),
        ({"keep": 0}, "keep is 0, expected a number above 0, up to 1"),
        ({"top_m": 0}, "top_m is 0, expected at least 1"),
        ({"top_m": 51}, "top_m is 51, expected at most 50, the size of the vocabulary"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"projection": 0}, "projection is 0, expected at least 1"),
        ({"projection": 17}, "projection is 17, but the layer gives 16 numbers"),
        ({"n_outputs": 49}, "n_outputs is 49, expected at least 50, the size of the vocabulary"),
        ({"residuals": "sparse"}, "residuals"),
        ({"layer": "transformer.h.9.mlp"}, "the model has no layer 'transformer.h.9.mlp'; did you mean"),
        ({"layer": "transformer.h.1.mlp", "side": "inside"}, "side"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_a_memory_is_made(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=message):
        build(model_of("gpt2"), items_of(texts()), tmp_path / "memory", **options)
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize("message", ["does not go forward", "twice"])
def test_a_text_whose_places_go_back_is_refused(message: str) -> None:
    """A build that is interrupted could not go on in it."""
    items = [{"input_ids": [1, 2, 3], "start": start} for start in ((10, 0) if "forward" in message else (0, 1))]
    with pytest.raises(InvalidInput, match=r"the text goes back to place \d+ after place \d+; give the items in"):
        build(model_of("gpt2"), items)


def test_a_target_is_needed_for_a_sequence_to_sequence_model() -> None:
    with pytest.raises(InvalidInput, match="has 'labels': the tokens of the target"):
        build(model_of("t5"), items_of(texts()))


@pytest.mark.usefixtures("unchecked")
def test_models_that_are_no_language_models_are_refused() -> None:
    with pytest.raises(InvalidInput, match="the model is a Mlp, expected a language model of transformers"):
        build(Mlp(), items_of(texts()))
    with pytest.raises(InvalidInput, match="GPT2Model has no output layer over a vocabulary"):
        build(model_of("gpt2").transformer, items_of(texts()))


def test_named_places_of_unknown_architectures_are_refused_with_the_list() -> None:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=LONGEST, word_embed_proj_dim=16,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config)
    with pytest.raises(InvalidInput, match=f"known for {re.escape(', '.join(ARCHITECTURES))}, but .* of type 'opt'"):
        place_named(model, "post-attention")
    with pytest.raises(InvalidInput, match=r"passes a tensor of shape \(2, 16\), expected a vector for each of 1 × 2"):
        build(model, items_of(texts()), layer="model.decoder.layers.0.fc1")
    memory = build(model, items_of(texts()), layer="model.decoder.layers.0", side="output")
    lm = ResMemForCausalLM(model, memory, setting=SETTING)
    assert not torch.equal(lm(**inputs_for("gpt2")).logits, base_logits(lm, **inputs_for("gpt2")))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda build, model, items: build(model_of("gpt2", seed=1), items), "was built with model"),
        (lambda build, model, items: build(model, items, layer="post-attention-before-norm"), "was built with layer"),
        (lambda build, model, items: build(model, items[1:]), "was built with data"),
        (lambda build, model, items: build(model, items, keep=0.5), "was built with data"),
        (lambda build, model, items: build(model, items, limit=5), "was built with data"),
        (lambda build, model, items: build(model, items, tokenizer=Tokenizer("ba")), "was built with tokenizer"),
        (lambda build, model, items: build(model, items, top_m=3), "was built with top_m"),
        (lambda build, model, items: build(model, items, residuals="dense"), "was built with residuals"),
        (lambda build, model, items: build(model, items, projection=None), "was built with dim"),
        (lambda build, model, items: build(model, items, projection=5), "keeps 4 components, but projection is 5"),
    ],
    ids=["model", "layer", "text", "keep", "limit", "tokenizer", "top_m", "residuals", "no projection", "projection"],
)
@pytest.mark.parametrize("complete", [True, False], ids=["complete", "begun"])
def test_a_memory_built_otherwise_is_not_built_on(
    change: Callable[..., Memory], found: str, complete: bool, tmp_path: Path
) -> None:
    model, items = model_of("gpt2"), items_of(texts(9))

    def built(model: Any, items: Any, **options: Any) -> Memory:
        options = {"tokenizer": Tokenizer("ab"), "projection": 4, "top_m": 8, "batch_size": 2, **options}
        return build(model, items, tmp_path / "memory", **options)

    if complete:
        built(model, items).close()
    else:
        with pytest.raises(KeyboardInterrupt):
            built(model, Interrupted(items, 6, good_readings=READINGS + 1))
    with pytest.raises(FingerprintMismatch, match=found):
        change(built, model, items)
    Memory.open(tmp_path / "memory", writable=True).close()


def test_a_memory_that_was_filled_by_hand_is_not_built_on(tmp_path: Path) -> None:
    Memory.create(tmp_path / "memory", dim=16, n_outputs=VOCABULARY).close()
    with pytest.raises(InvalidInput, match="holds a memory that was not built from a model; name another path"):
        build(model_of("gpt2"), items_of(texts()), tmp_path / "memory")


def test_a_memory_of_another_model_layer_or_tokenizer_is_not_used() -> None:
    model, items = model_of("gpt2"), items_of(texts())
    memory = build(model, items, tokenizer=Tokenizer("ab"))
    ResMemForCausalLM(model, memory, tokenizer=Tokenizer("ab"))
    with pytest.raises(FingerprintMismatch, match="another tokenizer, whose numbers mean other words; use"):
        ResMemForCausalLM(model, memory, tokenizer=Tokenizer("ba"))
    with pytest.raises(FingerprintMismatch, match=r"was built with model .* but this is .*; use the model"):
        ResMemForCausalLM(model_of("gpt2", seed=1), memory)
    with pytest.raises(FingerprintMismatch, match="was built with layer"):
        ResMemForCausalLM(model, [memory, build(model, items, layer="post-attention-before-norm")])
    with pytest.raises(FingerprintMismatch, match="another projection of its keys than the first one"):
        ResMemForCausalLM(model, [memory, build(model, items, projection=4)])


def test_memories_of_other_things_are_not_used() -> None:
    model, items = model_of("gpt2"), items_of(texts())
    with pytest.raises(InvalidInput, match="there is no memory, expected one or several"):
        ResMemForCausalLM(model, [])
    with pytest.raises(InvalidInput, match="is of regression with 50 outputs, but the model's vocabulary has 50"):
        ResMemForCausalLM(model, Memory.create(dim=16, n_outputs=VOCABULARY, task="regression"))
    with pytest.raises(InvalidInput, match="is of classification with 7 outputs, but the model's vocabulary has 50"):
        ResMemForCausalLM(model, Memory.create(dim=16, n_outputs=7))
    narrow = Memory.create(dim=12, n_outputs=VOCABULARY)
    narrow.append(np.zeros((1, 12)), [3], np.full((1, VOCABULARY), 1 / VOCABULARY))
    with pytest.raises(DimensionMismatch, match="12"):
        ResMemForCausalLM(model, narrow, setting=SETTING)(**inputs_for("gpt2"))
    with pytest.raises(InvalidInput, match="the memories keep the top 3 and 8, expected the same m in all"):
        ResMemForCausalLM(model, [build(model, items), build(model, items, top_m=3)], setting=SETTING)(
            **inputs_for("gpt2")
        )


def test_tokens_that_the_model_cannot_read_are_refused_in_use() -> None:
    lm = lm_of()
    with pytest.raises(InvalidInput, match="input_ids holds token 50"):
        lm(torch.tensor([[1, 50]]))
    with pytest.raises(InvalidInput, match="input_ids holds token -1"):
        lm.generate(torch.tensor([[1, -1]]), max_new_tokens=2)
    with pytest.raises(InvalidInput, match="a sequence has 33 tokens, but the model reads at most 32"):
        lm(torch.ones((1, 33), dtype=torch.int64))
    assert n_hooks(lm.model) == 0
    lm_of("t5 decoder")(torch.ones((1, 50), dtype=torch.int64))


@pytest.mark.parametrize("use", [lambda lm, items: lm.score(items), lambda lm, items: tune_language(lm, items)])
@pytest.mark.parametrize("items", [[], [{"input_ids": [4]}]])
def test_an_empty_text_measures_and_tunes_nothing(use: Callable[..., Any], items: list[Any]) -> None:
    with pytest.raises(InvalidInput, match="text is empty: there is nothing to"):
        use(lm_of(), items)


def test_a_watch_gives_what_it_saw_in_the_order_of_the_text() -> None:
    model, items = model_of("gpt2"), items_of(texts())
    batches = list(TokenWatch(model).batches(items, 2))
    labels: ndarray = np.concatenate([batch.labels.numpy() for batch in batches])
    np.testing.assert_array_equal(labels, np.concatenate([item["input_ids"][1:] for item in items]))
    assert [len(batch) for batch in batches] == [len(batch.logits) for batch in batches]
