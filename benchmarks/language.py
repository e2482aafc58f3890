"""What a memory of text costs: building over the bare forward pass, its peak memory, scoring over the bare model.

    python -m benchmarks language

Needs the text (`make data`); scoring is measured with the network and the memory of `experiments/runs/language.sh`,
where they are in the user cache.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import residual_memory as rm
from benchmarks.core import Row, in_turns, row_of
from experiments.language.corpus import tokens_of
from experiments.language.model import T5DecoderLM, decoder_config
from experiments.language.table import FULL, Recipe, memory_path, windows
from experiments.results_file import ResultFile, stamped
from residual_memory.language import LanguageSetting
from residual_memory.memory import Memory
from residual_memory.models.transformers import tune_language

RESULTS = Path(__file__).parent / "results" / "language.json"
BUILT, SCORED = 40_000, 10_240  # tokens
PEAKS = (250_000, 1_000_000)
SCORED_K = 16
SPECS = ("nprobe=16&k_factor=8", "nprobe=8&k_factor=2", "nprobe=4&k_factor=1")
SEARCHED = (1.0, 0.5)  # the base's confidence below which the memory is searched


def run() -> None:
    """Measure everything, write the result file and print it."""
    rows = [building(), *peaks()]
    if FULL.base.weights().exists() and memory_path(FULL.base.weights().stem).exists():
        rows += scoring()
    else:
        print("scoring is left out: experiments/runs/language.sh makes the network and the memory that it needs")
    RESULTS.parent.mkdir(exist_ok=True)
    head = stamped("language", "python -m benchmarks language", "enwiki text, decoder-only T5 with 6.3 M parameters")
    RESULTS.write_text(json.dumps({**head, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
    for row in rows:
        print(f"{row['setting']}: {row['ratio']:.3f} of {row['against']} (goal {row['goal']:g})")


def network() -> T5DecoderLM:
    """The tiny decoder: trained where its weights are, else as it is made."""
    base = FULL.base
    return base.load() if base.weights().exists() else T5DecoderLM(decoder_config(base.shape, base.vocabulary)).eval()


def building() -> Row:
    """A build on disk over the bare forward pass of the same batches."""
    model, text = network(), tokens_of("enwiki", "valid", FULL.base.vocabulary).first(BUILT + 1)
    batch = 16

    def bare() -> None:
        items = torch.from_numpy(text.windows())
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for some in torch.split(items, batch):
                model(some[:, :-1], use_cache=False)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "memory"
            rm.build_memory(
                model, windows(text), path, autocast=torch.bfloat16, batch_size=batch, verbose=False
            ).close()

    return row_of(f"build of {BUILT:,} tokens on disk", "bare forward pass", 1.2, *in_turns(ours, bare))


def peaks() -> list[Row]:
    """Peak memory above the loaded model, for two lengths of text, and the size of a row."""
    rows = []
    for n in PEAKS:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "memory"
            command = [sys.executable, "-m", "benchmarks.language_peak", str(target), str(n)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            measured = json.loads(answer.stdout.splitlines()[-1])
            with Memory.open(target) as memory:
                per_row = memory.n_bytes / len(memory)
                estimated = memory.layout.bytes_per_row(memory.snapshot.manifest.top_m)
        name = f"peak memory of a streamed build, {n:,} tokens"
        peak = row_of(name, "1.5 GiB", 1.0, measured["peak_bytes"], 1.5 * 2**30)
        rows.append(peak | {"unit": "bytes", "build_seconds": measured["seconds"]})
    bytes_ = row_of(f"bytes a row on disk, {PEAKS[-1]:,} tokens", "resmem estimate", 1.1, per_row, estimated)
    return [*rows, bytes_ | {"unit": "bytes"}]


def scoring() -> list[Row]:
    """Accuracy and log-loss of a text with the memory over the same without, and the gain that remains."""
    recipe = Recipe(FULL, ResultFile("language", "", "", folder=Path(tempfile.mkdtemp())))
    model, memory = network(), recipe.base_memory()
    text = recipe.test
    code = "faiss:IVF2048,PQ32x4fs"
    rows = []
    for spec in SPECS:
        lm = rm.ResMemForCausalLM(model, memory, autocast=torch.bfloat16, index=f"{code}?{spec}")
        chosen = tune_language(lm, windows(recipe.held_out), n_neighbors=(SCORED_K,), limit=10_000).best
        bare = partial(lm.with_setting(LanguageSetting(shrinkage=0.0)).score, windows(text), limit=SCORED)
        for below in SEARCHED:
            ours = partial(lm.with_setting(replace(chosen, search_below=below)).score, windows(text), limit=SCORED)
            found, times = ours().summary(), in_turns(ours, bare)
            row = row_of(f"scoring {SCORED:,} tokens, {spec}, searched below {below:g}", "bare model", 2.0, *times)
            more = {"tokens_per_second_ratio": times[1] / times[0], "rows": len(memory), "n_neighbors": SCORED_K}
            rows.append(row | found | more)
    return rows
