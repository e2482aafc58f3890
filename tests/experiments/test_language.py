"""The language recipe: text is encoded once and read back the same, the decoder is a T5, and the quick slice runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.language import corpus, table, words
from experiments.language.corpus import END, Tokens, find_text, tokens_of
from experiments.language.model import SHAPES, T5DecoderLM, decoder_config
from experiments.language.train import Training, learning_rate, train
from experiments.results_file import RESULTS
from residual_memory.demo.cifar100 import user_cache

TEXTS = ["The rose is red.\nIt has thorns.", "The poppy is red too.", "A cup stands on a plate."]


def has_text() -> bool:
    try:
        return all(find_text(name, split) for name in ("c4", "enwiki") for split in ("train", "valid", "test"))
    except FileNotFoundError:
        return False


needs_text = pytest.mark.skipif(not has_text(), reason="the text corpora are not on this machine: run `make data`")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small corpus of our own, and a user cache that nobody else sees."""
    for name in ("enwiki", "c4"):
        folder = tmp_path / "residual-memory" / "text" / name
        folder.mkdir(parents=True)
        for split in ("train", "valid", "test"):
            (folder / f"{split}.txt").write_text("\n\n".join(TEXTS * 40) + "\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RESMEM_DATA", raising=False)
    return tmp_path


@pytest.mark.usefixtures("cache")
def test_text_comes_back_as_it_was_document_by_document() -> None:
    tokens = tokens_of("enwiki", "test", 300)
    tokenizer = corpus.tokenizer_of(300)
    parts = np.split(tokens.numbers, tokens.starts[1:])
    assert [tokenizer.decode(part[:-1].tolist()) for part in parts] == TEXTS * 40
    assert {tokenizer.id_to_token(int(part[-1])) for part in parts} == {END}
    assert tokens.documents[[0, int(tokens.starts[1]), -1]].tolist() == [0, 1, 119]


@pytest.mark.usefixtures("cache")
def test_a_limit_takes_the_first_tokens_and_a_second_call_reads_them_back() -> None:
    whole, first = tokens_of("enwiki", "test", 300), tokens_of("enwiki", "test", 300, limit=50)
    np.testing.assert_array_equal(first.numbers, whole.numbers[:50])
    np.testing.assert_array_equal(tokens_of("enwiki", "test", 300, limit=50).starts, first.starts)


def test_training_windows_share_one_token_with_the_next() -> None:
    windows = Tokens(np.arange(600, dtype=np.uint16), np.array([0])).windows()
    assert windows.shape == (2, 257)
    assert windows[0, -1] == windows[1, 0] == 256


def test_the_decoder_reads_only_what_came_before_and_has_one_table_of_tokens() -> None:
    torch.manual_seed(0)
    model = T5DecoderLM(decoder_config("micro", 50)).eval()
    assert model.lm_head.weight is model.decoder.embed_tokens.weight
    tokens = torch.randint(0, 50, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 50
    with torch.inference_mode():
        before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_shapes_are_as_large_as_they_say() -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in T5DecoderLM(decoder_config(name, 8_192)).parameters()) for name in SHAPES}
    assert 6e6 < sizes["tiny"] < 8e6
    assert 1.9 < sizes["twice"] / sizes["tiny"] < 2.1
    assert sizes["large"] > 3 * sizes["small"]


def test_the_learning_rate_rises_and_falls_or_stays() -> None:
    falling = [learning_rate(step, 1000, decays=True) for step in range(1000)]
    assert falling[0] < falling[99]
    assert falling[-1] == pytest.approx(0.05, abs=0.01)
    assert learning_rate(999, 1000, decays=False) == 1


@pytest.mark.usefixtures("cache")
def test_training_goes_on_from_its_checkpoint_and_keeps_the_weights_of_each_doubling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("experiments.language.train.BATCH", 1)
    training = Training("micro", 300, "enwiki", "train", 1_100, epochs=2)
    train(training)
    whole = training.load(2).state_dict()
    assert training.weights(1).exists()
    training.weights(2).unlink()
    train(training)  # the checkpoint holds all steps
    monkeypatch.setattr("experiments.language.train.ROUND", 4)
    training.weights(2).with_suffix(".pt").unlink()
    train(training)
    for name, value in training.load(2).state_dict().items():
        torch.testing.assert_close(value, whole[name])


def test_a_page_of_words_escapes_what_the_text_says() -> None:
    example = words.Example("a <b>", " <i>", " rose", 0.1, 0.6, 0.8, (words.Memorized("x & y", " rose", 0.5),))
    shown = words.page([example], "T", "Wikipedia, CC BY-SA")
    assert "a &lt;b&gt;" in shown
    assert "x &amp; y" in shown
    assert "10% → 60%" in shown


@needs_text
def test_the_quick_slice_runs_and_leaves_the_results_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in RESULTS.glob("language*")}
    monkeypatch.setenv("RESMEM_DATA", str(user_cache()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    table.run(quick=True, fresh=True)
    rows = json.loads((tmp_path / "language.json").read_text())["rows"]
    names = {row["setting"] for row in rows}
    assert {
        "micro, 2k in memory, resmem",
        "micro, 20k in memory, knn-lm",
        "micro, 600 in memory, top 8, resmem",
    } <= names
    assert all(row["perplexity_base"] > 1 and row["perplexity_corrected"] > 1 for row in rows)
    forgotten = [row["identical_after_forgetting"] for row in rows if "identical_after_forgetting" in row]
    assert forgotten == [True, True]
    assert "micro, 20k in memory, resmem" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in RESULTS.glob("language*")} == before
