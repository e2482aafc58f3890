"""A language model and its memory in a folder: read, it says the same; nothing is run; a card says what it is worth."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residual_memory as rm
from residual_memory.errors import FingerprintMismatch, InvalidInput
from residual_memory.language import N_FEATURES, N_WEIGHTS, LanguageSetting, TokenGate
from residual_memory.models.pretrained import OPTIONS, Saved, write_options
from tests.models.test_pretrained import each_damage, files_of

transformers = pytest.importorskip("transformers", reason="transformers missing: pip install transformers")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers missing: pip install tokenizers")

from residual_memory.models.transformers import ResMemForCausalLM  # noqa: E402
from residual_memory.models.transformers import build_memory as build_text_memory  # noqa: E402
from tests.models.texts import VOCABULARY, data_for, items_of, model_of, texts  # noqa: E402

PLAIN = LanguageSetting(n_neighbors=5, bandwidth=0.5, shrinkage=0.6)


def lm_of(name: str = "gpt2", *, dtype: torch.dtype = torch.float32, **options: Any) -> ResMemForCausalLM:
    model = model_of(name).to(dtype)
    tokens = options.pop("tokenizer", None)
    memory = build_text_memory(model, data_for(name), None, tokenizer=tokens, verbose=False)
    return ResMemForCausalLM(model, memory, **{"setting": PLAIN, **options})


def words(n: int = VOCABULARY) -> Any:
    """A tokenizer of words w0, w1, …"""
    level = tokenizers.models.WordLevel({f"w{number}": number for number in range(n)}, unk_token="w0")
    made = tokenizers.Tokenizer(level)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", eos_token="w0")


def same_text(first: ResMemForCausalLM, second: ResMemForCausalLM) -> bool:
    """Logits, what is generated, and what corrected it."""
    prompt = torch.tensor([[3, 7, 11, 13], [5, 5, 1, 2]])
    inputs = {"input_ids": prompt, **({"decoder_input_ids": prompt[:, :3]} if first.watch.decodes else {})}
    logits = [lm(**inputs).logits for lm in (first, second)]
    said = [lm.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0) for lm in (first, second)]
    assert not torch.equal(logits[0], first.model.eval()(**inputs).logits)
    return logits[0].dtype == logits[1].dtype and torch.equal(*logits) and torch.equal(*said)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_a_language_model_that_was_saved_says_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    lm = lm_of(name)
    lm.save_pretrained(tmp_path / "saved")
    again = ResMemForCausalLM.from_pretrained(tmp_path / "saved")
    assert same_text(lm, again)
    assert same_text(lm, ResMemForCausalLM.from_pretrained(tmp_path / "saved", lm.model))
    assert type(again.model) is type(lm.model)
    assert not again.memories[0].writable


def test_gate_cap_engine_and_precision_of_a_language_model_survive(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    numbers = [tuple(random.normal(0, 0.3, n).tolist()) for n in (N_WEIGHTS, N_FEATURES, N_FEATURES)]
    gate = TokenGate(numbers[0], numbers[1], tuple(1 + abs(number) for number in numbers[2]))
    tuned = replace(PLAIN, gate=gate, residual_share=0.5, search_below=0.9)
    options: dict[str, Any] = {"max_weight": 0.4, "index": "faiss:Flat", "autocast": torch.bfloat16}
    lm = lm_of(dtype=torch.bfloat16, setting=tuned, **options)
    lm.save_pretrained(tmp_path / "saved")
    again = ResMemForCausalLM.from_pretrained(tmp_path / "saved")
    assert same_text(lm, again)
    assert (again.setting, again.max_weight, again.description) == (tuned, 0.4, lm.description)
    measured = lm_of(setting=LanguageSetting(n_neighbors=4))
    measured.save_pretrained(tmp_path / "measured")
    assert same_text(measured, ResMemForCausalLM.from_pretrained(tmp_path / "measured"))


def test_files_of_a_language_model_that_are_damaged_are_named(tmp_path: Path) -> None:
    lm_of(tokenizer=words()).save_pretrained(tmp_path / "saved", tokenizer=words())
    files = {path.relative_to(tmp_path / "saved").as_posix() for path in files_of(tmp_path / "saved")}
    assert {"base/config.json", "base/model.safetensors", "base/tokenizer.json", "resmem.json"} < files
    each_damage(tmp_path / "saved", lambda: ResMemForCausalLM.from_pretrained(tmp_path / "saved"))


def test_a_tokenizer_goes_along_and_another_one_does_not(tmp_path: Path) -> None:
    lm = lm_of(tokenizer=words())
    with pytest.raises(FingerprintMismatch, match="another tokenizer"):
        lm.save_pretrained(tmp_path / "saved", tokenizer=words(40))
    assert list(tmp_path.iterdir()) == []
    lm.save_pretrained(tmp_path / "saved", tokenizer=words())
    kept = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved" / "base")
    assert kept("w3 w7").input_ids == [3, 7]
    ResMemForCausalLM(lm.model, lm.memories, tokenizer=kept)
    assert 'from_pretrained(f"{folder}/base")' in (tmp_path / "saved" / "README.md").read_text()


def test_an_interrupted_save_leaves_nothing(tmp_path: Path) -> None:
    class Stopping:
        def save_pretrained(self, folder: Path) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lm_of().save_pretrained(tmp_path / "saved", tokenizer=Stopping())
    assert list(tmp_path.iterdir()) == []


def test_another_base_is_refused(tmp_path: Path) -> None:
    lm = lm_of()
    lm.save_pretrained(tmp_path / "saved")
    for other in (model_of("gpt2", seed=1), model_of("llama")):
        with pytest.raises(FingerprintMismatch, match="use the model that it was saved with"):
            ResMemForCausalLM.from_pretrained(tmp_path / "saved", other)
    with pytest.raises(FingerprintMismatch, match="sha256"):
        ResMemForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)


def test_several_memories_are_refused(tmp_path: Path) -> None:
    lm = lm_of()
    both = ResMemForCausalLM(lm.model, [*lm.memories, *lm.memories], setting=PLAIN)
    with pytest.raises(InvalidInput, match="there are 2 memories, expected one to save; merge_memories"):
        both.save_pretrained(tmp_path / "saved")
    assert callable(rm.merge_memories)


def test_a_base_that_transformers_does_not_know_is_given(tmp_path: Path) -> None:
    lm = lm_of("t5 decoder")
    lm.save_pretrained(tmp_path / "saved")
    with pytest.raises(InvalidInput, match=r"give the base itself: from_pretrained\(folder, model\)"):
        ResMemForCausalLM.from_pretrained(tmp_path / "saved")
    assert same_text(lm, ResMemForCausalLM.from_pretrained(tmp_path / "saved", lm.model))


def resigned(folder: Path) -> None:
    """Whoever forges a folder can make its checksums fit."""
    saved = Saved.at(folder)
    (folder / OPTIONS).unlink()
    shutil.move(folder / "README.md", folder.parent / "README.md")
    write_options(folder, saved.kind, saved.options)


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_folder_is_run(tmp_path: Path) -> None:
    """Neither code that a configuration names, nor a pickle in the place of the weights."""
    folder, ran = tmp_path / "saved", tmp_path / "ran"
    lm_of().save_pretrained(folder)
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "base" / "config.json").read_text())
    for name in ("model_type", "architectures"):
        config.pop(name)
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    (folder / "base" / "evil.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    resigned(folder)
    with pytest.raises(InvalidInput, match="transformers cannot load"):
        ResMemForCausalLM.from_pretrained(folder)
    with pytest.raises(TypeError, match="trust_remote_code"):
        ResMemForCausalLM.from_pretrained(folder, trust_remote_code=True)

    (tmp_path / "other" / "base" / "model.safetensors").unlink()
    (tmp_path / "other" / "base" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(ran)))
    resigned(tmp_path / "other")
    with pytest.raises(InvalidInput, match="transformers cannot load"):
        ResMemForCausalLM.from_pretrained(tmp_path / "other")
    assert not ran.exists()
    pickle.loads(pickle.dumps(Evil(ran)))
    assert ran.exists()


def test_the_card_of_a_language_model_has_accuracy_and_log_loss(tmp_path: Path) -> None:
    lm = lm_of()
    scores = lm.score(items_of(texts(8, seed=0)))
    lm.save_pretrained(tmp_path / "saved", card=rm.Card(evaluations={"held out": scores}))
    text = (tmp_path / "saved" / "README.md").read_text()
    found = [line.split("|")[2:8] for line in text.splitlines() if line.startswith("| held out")]
    rows = {cells[0].strip(): [cell.split("±")[0].strip() for cell in cells[1:]] for cells in found}
    summary = scores.summary()
    for cell, name in zip(rows["accuracy, %"], ("base", "memory_only", "corrected", "gain"), strict=False):
        assert float(cell) == pytest.approx(100 * summary[name], rel=1e-3)
    base, alone, corrected = rows["log-loss, nats"][:3]
    assert np.exp(float(base)) == pytest.approx(summary["perplexity_base"], rel=0.01)
    assert alone == "–"
    assert np.exp(float(corrected)) == pytest.approx(summary["perplexity_corrected"], rel=0.01)
    assert f"- On held out: {scores.verdict}" in text
