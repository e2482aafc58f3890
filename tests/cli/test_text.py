"""Text at the command line: a language model's memory is built, tuned and measured from .txt files."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import residual_memory as rm
from tests.cli.workshop import Ran, as_npz, columns, done, resmem
from tests.reports.pages import read
from tests.tales import VOCABULARY, save_model, tale, tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

MODEL = ("--model", "gpt")
SERVE = ("serve", "mem", *MODEL)
TRAIN = ("build", "mem", "--data", "train.txt", *MODEL)

MODULE = """
import transformers
from transformers import AutoTokenizer, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration


class Stopping(GPT2LMHeadModel):
    passes = 0

    def forward(self, *inputs, **options):
        Stopping.passes += 1
        if Stopping.passes == 5:
            raise KeyboardInterrupt
        return super().forward(*inputs, **options)


def stopping():
    return Stopping.from_pretrained("gpt")

def tokens():
    return AutoTokenizer.from_pretrained("gpt")

def translator():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )

seven = 7
"""


@dataclass(frozen=True)
class Shop:
    """A directory with texts, the model `gpt` and its memory `mem`, and what the commands said that made it."""

    path: Path
    built: Ran
    tuned: Ran


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    path = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for name, n, seed in (("train", 60, 1), ("held", 20, 2), ("test", 20, 3)):
            Path(f"{name}.txt").write_text(tale(n, seed))
        Path("empty.txt").write_text("\n \n")
        Path("latin.txt").write_bytes(b"caf\xe9\n" * 3)
        Path("one.txt").write_text(tale(1, 4))
        Path("strange.txt").write_text("zq?;xz!\n\n" * 20)
        save_model(Path("gpt"))
        save_model(Path("bare"))
        tokenizer([tale(60, 1)]).save_pretrained("gpt")
        tokenizer(["quite other words, with other pieces in them, " * 9]).save_pretrained("other")
        Path("texts.py").write_text(MODULE)
        as_npz(path / "train.npz", columns(50, 3))
        built = resmem(*TRAIN, "--json")
        tuned = resmem("tune", "mem", "--data", "held.txt", *MODEL, "--json")
    return Shop(path, built, tuned)


@pytest.fixture
def shop(made: Shop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """The directory as the current one."""
    monkeypatch.chdir(made.path)
    sys.modules.pop("texts", None)
    yield made
    sys.modules.pop("texts", None)
    for name in ("new", "again"):
        shutil.rmtree(name, ignore_errors=True)


def n_tokens(text: str) -> int:
    """Tokens of a file of `tale`, with one after each document."""
    encode = transformers.AutoTokenizer.from_pretrained("gpt")
    return sum(len(encode(document.rstrip("\n")).input_ids) + 1 for document in text.split("\n\n"))


# ---------------------------------------------------------------------- build


def test_a_memory_holds_every_token_that_has_one_before_it(shop: Shop) -> None:
    assert shop.built.code == 0, shop.built.err
    said = shop.built.json
    assert said["rows"] == n_tokens(tale(60, 1)) - 1
    assert (said["dim"], said["n_outputs"], said["layer"]) == (16, VOCABULARY, "transformer.h.1.mlp")
    with rm.Memory.open("mem") as memory:
        assert (memory.layout.residuals, memory.layout.key_dtype) == ("top-m", "float16")
        assert memory.layout.prediction_dtype == "log8"
        assert set(np.asarray(memory.snapshot.all_groups).tolist()) == set(range(60))


def test_the_command_keeps_what_build_memory_keeps(shop: Shop) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained("gpt")
    own = transformers.AutoTokenizer.from_pretrained("gpt")
    windows = rm.Windows(rm.Encoded(rm.TextFile("train.txt"), lambda text: own(text).input_ids), 64, end=0)
    with rm.build_memory(model, windows, None, verbose=False) as wanted, rm.Memory.open("mem") as found:
        rows = np.arange(len(wanted))
        assert len(found) == len(wanted)
        np.testing.assert_array_equal(found.snapshot.keys.take(rows), wanted.snapshot.keys.take(rows))
        np.testing.assert_array_equal(found.ids, wanted.ids)


def test_an_interrupted_build_goes_on_to_the_same_memory(shop: Shop) -> None:
    model = ("--model", "texts:stopping", "--tokenizer", "gpt")
    words = ("build", "new", "--data", "train.txt", *model, "--batch-size", "2")
    assert resmem(*words).code == 130
    with rm.Memory.open("new") as memory:
        assert 0 < len(memory) < shop.built.json["rows"]
    assert done("info", "new", "--json").json["source"]["complete"] is False
    assert done(*words, "--json").json["rows"] == shop.built.json["rows"]
    with rm.Memory.open("new") as new, rm.Memory.open("mem") as memory:
        np.testing.assert_array_equal(new.ids, memory.ids)


def test_options_of_the_build_reach_the_memory(shop: Shop) -> None:
    options = ("--limit", "200", "--length", "32", "--top-m", "4", "--projection", "5", "--key-dtype", "float32")
    more = ("--prediction-dtype", "log16", "--layer", "post-attention-before-norm", "--autocast", "bfloat16")
    ran = done("build", "new", "--data", "train.txt", *MODEL, "--tokenizer", "texts:tokens", *options, *more)
    assert "next: resmem tune new --data HELD_OUT.txt" in ran.out
    info = done("info", "new", "--json").json
    assert (info["rows"], info["layout"]["dim"], info["layout"]["prediction_dtype"]) == (200, 5, "log16")
    assert (info["layout"]["key_dtype"], info["source"]["layer"]) == ("float32", "transformer.h.1.ln_2")
    assert info["source"]["projection"] == "16x5"
    with rm.Memory.open("new") as memory:
        assert memory.snapshot.manifest.top_m == 4


def test_tokens_that_the_model_knows_are_left_out(shop: Shop) -> None:
    assert done("build", "new", "--data", "train.txt", *MODEL, "--keep", "0.0001", "--json").json["rows"] == 0


# ---------------------------------------------------------------------- tune, evaluate


def test_tuning_saves_a_setting_that_helps(shop: Shop) -> None:
    assert shop.tuned.code == 0, shop.tuned.err
    said = shop.tuned.json
    assert said["helps"]
    assert said["perplexity_corrected"] < said["perplexity_base"]
    assert said["perplexity_corrected_low"] < said["perplexity_corrected"] < said["perplexity_corrected_high"]
    assert 0 < said["log_loss_gain_low"] < said["log_loss_gain"] < said["log_loss_gain_high"]
    with rm.Memory.open("mem") as memory:
        assert rm.LanguageSetting.from_dict(memory.setting or {}) == rm.LanguageSetting.from_dict(said["setting"])
    assert "n_neighbors" in done("info", "mem").out


def test_evaluation_is_what_scoring_says(shop: Shop) -> None:
    said = done("evaluate", "mem", "--data", "test.txt", *MODEL, "--stride", "32", "--limit", "300", "--json").json
    model = transformers.AutoModelForCausalLM.from_pretrained("gpt")
    own = transformers.AutoTokenizer.from_pretrained("gpt")
    texts = rm.Encoded(rm.TextFile("test.txt"), lambda text: own(text).input_ids)
    with rm.Memory.open("mem") as memory:
        scores = rm.ResMemForCausalLM(model, memory).score(rm.Windows(texts, 64, end=0, stride=32), limit=300)
    summary = scores.summary()
    assert {name: said[name] for name in summary} == pytest.approx(summary)
    assert (said["n_test"], said["length"], said["stride"]) == (300, 64, 32)
    assert said["base_low"] <= said["base"] <= said["base_high"]
    assert said["corrected"] > said["base"]


def test_people_see_three_methods_the_stride_and_the_verdict(shop: Shop) -> None:
    out = done("evaluate", "mem", "--data", "test.txt", *MODEL, "--limit", "300").out
    for text in ("base", "memory only", "corrected", "95 % interval", "perplexity", "gain +", "stride 64", "setting:"):
        assert text in out
    out = done("evaluate", "mem", "--data", "test.txt", *MODEL, "--limit", "300", "--stride", "48").out
    assert "stride 48, at least 16 tokens of context" in out


def test_no_gain_exits_with_1(shop: Shop) -> None:
    ran = resmem("evaluate", "mem", "--data", "test.txt", *MODEL, "--shrinkage", "0", "--json")
    assert ran.code == 1
    assert (ran.json["helps"], ran.json["verdict"]) == (False, "no gain: do not deploy")
    done("build", "new", "--data", "test.txt", *MODEL, "--limit", "5")
    ran = resmem("tune", "new", "--data", "strange.txt", *MODEL)
    assert ran.code == 1
    assert "no gain: do not deploy" in ran.out
    assert done("info", "new", "--json").json["setting"]["shrinkage"] == 0


def test_the_text_of_the_memory_itself_is_warned_of_in_the_report_too(shop: Shop) -> None:
    pytest.importorskip("matplotlib")
    words = ("--data", "train.txt", *MODEL, "--limit", "200", "--json")
    ran = resmem("evaluate", "mem", *words, "--out", "r.html")
    assert "so the figures are too good" in ran.err
    page = read(Path("r.html").read_text())
    assert "so the figures are too good" in page.text
    assert ran.json["verdict"] in page.text
    assert f"corrected {100 * ran.json['corrected']:.2f} ±" in page.text
    assert "so the figures are too good" not in resmem("evaluate", "mem", "--data", "test.txt", *MODEL).err


# ---------------------------------------------------------------------- mistakes

BUILD = ("build", "new", "--data", "train.txt")
TUNE = ("tune", "mem", "--data", "held.txt")
EVALUATE = ("evaluate", "mem", "--data", "test.txt")
ARRAYS = ("build", "new", "--data", "train.npz")
MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (BUILD, "train.txt is text, and no model is named"),
    ((*BUILD, "--model", "gtp"), "did you mean 'gpt'?"),
    ((*BUILD, "--model", "other"), "loading the model in other failed"),
    ((*BUILD, "--model", "texts:stoping", "--tokenizer", "gpt"), "did you mean 'texts:stopping'?"),
    ((*BUILD, "--model", "texts:tokens", "--tokenizer", "gpt"), "expected a torch.nn.Module"),
    ((*BUILD, "--model", "texts:stopping"), "add --tokenizer"),
    ((*BUILD, "--model", "texts:translator", "--tokenizer", "gpt"), "has no targets"),
    ((*BUILD, "--model", "bare"), "bare holds no tokenizer"),
    ((*BUILD, *MODEL, "--tokenizer", "othr"), "did you mean 'other'?"),
    ((*BUILD, *MODEL, "--tokenizer", "texts:seven"), "gives a int, expected a tokenizer"),
    ((*BUILD, *MODEL, "--layer", "post-atention"), "did you mean"),
    ((*BUILD, *MODEL, "--length", "65"), "the model reads at most 64 tokens"),
    ((*BUILD, *MODEL, "--length", "0"), "--length is 0"),
    ((*BUILD, *MODEL, "--limit", "0"), "--limit is 0"),
    ((*BUILD, *MODEL, "--top-m", "0"), "--top-m is 0"),
    ((*BUILD, *MODEL, "--keep", "1.5"), "--keep is 1.5"),
    ((*BUILD, *MODEL, "--projection", "17"), "the layer gives 16 numbers"),
    ((*BUILD, *MODEL, "--autocast", "bfloat"), "did you mean 'bfloat16'?"),
    ((*BUILD, *MODEL, "--key-dtype", "log8"), "expected 'float16'"),
    ((*BUILD, *MODEL, "--prediction-dtype", "log9"), "did you mean 'log8'?"),
    ((*BUILD, *MODEL, "--pool", "2", "--task", "regression"), "leave --pool and --task out"),
    ((*BUILD, *MODEL, "--held-out", "held.txt"), "leave --held-out out"),
    ((*BUILD, *MODEL, "--outputs", "probabilities", "--image-size", "8"), "leave --outputs and --image-size out"),
    ((*BUILD, *MODEL, "--class-names", "one.txt", "--predictions", "x.npy"), "--class-names and --predictions out"),
    ((*ARRAYS, "--tokenizer", "gpt", "--top-m", "4"), "leave --tokenizer and --top-m out"),
    ((*ARRAYS, "--length", "4", "--limit", "4"), "leave --length and --limit out"),
    ((*ARRAYS, "--keep", "0.5", "--projection", "4"), "leave --keep and --projection out"),
    ((*ARRAYS, "--prediction-dtype", "log8"), "expected 'float16'"),
    ((*ARRAYS, "--held-out", "held.txt"), "is of another kind"),
    (("build", "new", "--data", "empty.txt", *MODEL), "empty.txt is empty"),
    (("build", "new", "--data", "latin.txt", *MODEL), "latin.txt is not text in UTF-8"),
    (("build", "new", "--data", "trian.txt", *MODEL), "did you mean 'train.txt'?"),
    ((*TUNE, *MODEL, "--tokenizer", "other"), "tokens of another tokenizer"),
    ((*TUNE, *MODEL, "--metric", "accuracy", "--no-gate"), "leave --metric and --no-gate out"),
    ((*TUNE, *MODEL, "--kernel", "kriging"), "kernel"),
    ((*TUNE, *MODEL, "--index", "exat"), "did you mean 'exact'?"),
    (("tune", "mem", "--data", "one.txt", *MODEL), "documents"),
    (("tune", "mem", "--data", "train.npz", "--limit", "5"), "leave --limit out"),
    ((*EVALUATE, *MODEL, "--tokenizer", "other"), "tokens of another tokenizer"),
    ((*EVALUATE, *MODEL, "--stride", "65"), "--stride is 65, expected at most the length of a window, 64"),
    ((*EVALUATE, *MODEL, "--temperature", "2"), "leave --temperature out"),
    (("evaluate", "mem", "--data", "one.txt", *MODEL), "is one document"),
    (("evaluate", "mem", "--data", "train.npz", "--stride", "5"), "leave --stride out"),
    (("predict", "mem", "--data", "test.txt", *MODEL), "ResMemForCausalLM"),
    (("explain", "mem", "--data", "test.txt", "--row", "3", *MODEL), "ResMemForCausalLM"),
    (("add", "mem", "--data", "test.txt", *MODEL), "ResMemForCausalLM"),
    (("serve", "mem"), "is of text"),
    (("serve", "mem", "--model", "gtp"), "did you mean 'gpt'?"),
    (("serve", "mem", "--model", "bare"), "bare holds no tokenizer"),
    (("serve", "mem", "--model", "texts:seven", "--tokenizer", "gpt"), "expected a torch.nn.Module"),
    ((*SERVE, "--tokenizer", "other"), "tokens of another tokenizer"),
    ((*SERVE, "--data", "held.txt"), "give the text that the memory comes from"),
    ((*SERVE, "--data", "empty.txt"), "give the text that the memory comes from"),
    ((*SERVE, "--data", "latin.txt"), "latin.txt is not text in UTF-8"),
    ((*SERVE, "--data", "trian.txt"), "did you mean 'train.txt'?"),
    ((*SERVE, "--data", "train.npz"), "name its .txt file"),
    ((*SERVE, "--outputs", "probabilities", "--image-size", "8"), "leave --outputs and --image-size out"),
    ((*SERVE, "--outputs", "logit"), "did you mean 'logits'?"),
    ((*SERVE, "--autocast", "bfloat"), "did you mean 'bfloat16'?"),
    ((*SERVE, "--index", "exat"), "did you mean 'exact'?"),
    ((*SERVE, "--token-file", "tokens"), "there is no file tokens"),
    (("predict", "mem", "--data", "train.npz"), "setting of a language model's memory"),
    (("bench", "mem"), "setting of a language model's memory"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_exits_with_2_and_says_what_is_meant(shop: Shop, words: tuple[str, ...], said: str) -> None:
    ran = resmem(*words)
    assert ran.code == 2, ran.err
    assert said in ran.err
    assert "error: " in ran.err
    assert not ran.out
    assert not Path("new").exists()


def test_a_memory_of_another_model_or_of_arrays_is_refused(shop: Shop) -> None:
    done("build", "new", "--data", "train.npz")
    assert (
        "leave --tokenizer and --autocast out"
        in resmem("serve", "new", "--tokenizer", "gpt", "--autocast", "float16").err
    )
    assert "is of no text" in resmem("serve", "new", "--data", "train.txt").err
    assert "filled from arrays" in resmem("evaluate", "new", "--data", "test.txt", *MODEL).err
    save_model(Path("again"), positions=48)
    ran = resmem("tune", "mem", "--data", "held.txt", "--model", "again", "--tokenizer", "gpt")
    assert ran.code == 2
    assert "was built with model" in ran.err
    ran = resmem("build", "mem", "--data", "held.txt", *MODEL)
    assert ran.code == 2
    assert "was built with data" in ran.err


def test_a_tokenizer_beyond_the_vocabulary_is_refused(shop: Shop) -> None:
    wide = transformers.AutoTokenizer.from_pretrained("gpt")
    wide.add_tokens([f"<{number}>" for number in range(VOCABULARY)])
    wide.save_pretrained("again")
    Path("new.txt").write_text("the cat saw <319>.\n")
    ran = resmem("build", "new", "--data", "new.txt", *MODEL, "--tokenizer", "again")
    assert ran.code == 2
    assert "vocabulary" in ran.err


# ---------------------------------------------------------------------- serve


def test_a_text_is_served_with_the_model_that_it_was_built_with(shop: Shop) -> None:
    """The command as users run it; asked with OpenAI's client, and stopped as with Ctrl-C."""
    openai = pytest.importorskip("openai", reason="openai is not installed")
    Path("new.tokens").write_text("a-token-of-this-test\na-token-that-asks-only predict\n")
    words = ("serve", "mem", "--data", "train.txt", *MODEL, "--port", "0", "--token-file", "new.tokens")
    command = [sys.executable, "-c", "import sys; from residual_memory.cli.main import main; sys.exit(main())"]
    with subprocess.Popen([*command, *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if line.startswith("open "))
            address = line.split()[1]
            with openai.OpenAI(base_url=f"{address}/v1", api_key="a-token-that-asks-only", max_retries=0) as client:
                found = client.completions.create(model="mem", prompt="the cat saw", max_tokens=8, temperature=0)
            with rm.Client(address, "a-token-of-this-test") as client:
                (row,) = client._post("/rows", {"ids": [5]})["rows"]
        finally:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
    lm = rm.ResMemForCausalLM(
        transformers.AutoModelForCausalLM.from_pretrained("gpt"), rm.Memory.open("mem"), max_weight=0.1
    )
    own = transformers.AutoTokenizer.from_pretrained("gpt")
    tokens = own("the cat saw", return_tensors="pt").input_ids
    wanted = lm.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, tokens.shape[1] :]
    assert found.choices[0].text == own.decode(wanted, skip_special_tokens=True)
    shown = row["context"]
    assert (shown["before"] + shown["token"] + shown["after"]) in Path("train.txt").read_text()
    assert not out
    assert "the cat saw" not in err
    assert "Traceback" not in err
    assert process.returncode in (0, 130)


def test_a_setting_of_one_kind_is_not_read_as_the_other() -> None:
    with pytest.raises(rm.errors.InvalidInput, match="setting of a language model's memory"):
        rm.Setting.from_dict(rm.LanguageSetting().to_dict())
    with pytest.raises(rm.errors.InvalidInput, match="other predictions than a language model's"):
        rm.LanguageSetting.from_dict(rm.Setting().to_dict())
