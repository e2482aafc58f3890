"""The table of language models: gain, sizes of memory, of the base and of a row, epochs, and a memory added later.

    python -m experiments language

Networks are trained first (experiments/runs/language.sh); memories are built in the user cache and kept there.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray

import residual_memory as rm
from experiments.language.corpus import WINDOW, Tokens, tokens_of
from experiments.language.measuring import (
    chosen_methods,
    dense_scores,
    dense_tokens,
    measured,
    methods_of,
    rows_of,
)
from experiments.language.model import T5DecoderLM
from experiments.language.train import Training, train
from experiments.results_file import RESULTS, ResultFile
from residual_memory.demo.cifar100 import user_cache
from residual_memory.language import TokenScores
from residual_memory.memory import Memory
from residual_memory.models.transformers import ResMemForCausalLM, held_out_tokens

ALIKE = "resmem-whole-constant"  # the method by which memories of different rows are compared: the paper's, no gate
ID_BYTES = 8  # of a row in faiss's inverted lists
EXACT_UP_TO = 500_000  # rows


@dataclass(frozen=True)
class Plan:
    """What is measured, and on how much.

    Attributes
    ----------
    base, larger, epochs : trained networks; a memory holds tokens that its base was trained on.
    held_out : split and number of tokens that settings are chosen by.
    test : tokens that figures are measured on.
    larger_rows : of the larger base's memory, the first of the text.
    sizes : smaller memories of the base.
    n_neighbors : values of k to choose from.
    single : values of k to measure one by one.
    dense : rows, and test tokens, of the comparison with a memory of whole predictions.
    listed, codes, kept : of that comparison: m of the lists; numbers in a code of an index; largest base probabilities
        of tokens that are kept.
    """

    base: Training
    larger: Training | None
    larger_rows: int
    epochs: Training | None
    held_out: tuple[str, int]
    test: int
    sizes: tuple[int, ...]
    n_neighbors: tuple[int, ...]
    single: tuple[int, ...]
    dense: tuple[int, int]
    listed: tuple[int, ...]
    codes: tuple[int, ...]
    kept: tuple[float, ...]
    added: int | None = None  # tokens of the other corpus; None takes all


FULL = Plan(
    base=Training(),
    larger=Training(shape="twice", tokens=5_000_000),
    larger_rows=3_000_000,
    epochs=Training(tokens=1_000_000, epochs=8),
    held_out=("valid", 20_000),
    test=40_000,
    sizes=(1_000_000, 3_000_000),
    n_neighbors=(64, 256),
    single=(1, 4, 16, 64, 256),
    dense=(500_000, 20_000),
    listed=(2, 8),
    codes=(32,),
    kept=(0.7, 0.1),
)
QUICK = Plan(
    base=Training("micro", 1_024, "c4", "valid", 20_000),
    larger=None,
    larger_rows=0,
    epochs=None,
    held_out=("train", 3_000),
    test=2_000,
    sizes=(2_000,),
    n_neighbors=(16,),
    single=(),
    dense=(600, 2_000),
    listed=(8,),
    codes=(),
    kept=(0.7,),
    added=2_000,
)


def index_for(n_rows: int) -> str:
    """Exact for small memories; beyond, inverted files with 16 bytes a row, re-ranked from the memory's keys."""
    if n_rows <= EXACT_UP_TO:
        return "exact"
    cells = 1024 if n_rows <= 4_000_000 else 2048
    return f"faiss:IVF{cells},PQ32x4fs?nprobe=16&k_factor=8"


def windows(tokens: Tokens) -> rm.Windows:
    """The text as the base reads it: windows of 256 predictions, one after the other."""
    return rm.Windows(np.split(tokens.numbers.astype(np.int64), tokens.starts[1:]), WINDOW)


def memory_path(name: str) -> Path:
    """Where `built` keeps a memory."""
    return user_cache() / "language" / "memories" / name


def built(network: T5DecoderLM, tokens: Tokens, name: str, **options: Any) -> Memory:
    """The memory of these tokens, from the user cache where an earlier run built it."""
    path = memory_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    began = path.exists()
    memory = rm.build_memory(network, windows(tokens), path, autocast=torch.bfloat16, **options)
    if not began:
        memory.compact()  # into few segments, which are read faster; later it would take the saved index away
    return memory


def with_memory(network: T5DecoderLM, memory: Memory | list[Memory], index: str | None = None) -> ResMemForCausalLM:
    """The network with a memory behind the index that suits its size, saved for the next run."""
    first = memory[0] if isinstance(memory, list) else memory
    spec = index or index_for(len(first))
    lm = rm.ResMemForCausalLM(network, memory, autocast=torch.bfloat16, index=spec)
    if isinstance(memory, Memory) and memory.path is not None and not spec.startswith("exact"):
        lm.save_indexes()
    return lm


def some_rows(memory: Memory, rows: Int64[ndarray, " r"], m: int | None = None) -> Memory:
    """A memory in RAM of some rows of another one, with whole predictions cut to the m largest classes."""
    layout, snapshot, ids = memory.layout, memory.snapshot, memory.ids
    small = Memory.create(
        None,
        dim=layout.dim,
        n_outputs=layout.n_outputs,
        residuals="top-m",
        key_dtype=layout.key_dtype,
        prediction_dtype="log8",
        source=memory.source,
    )
    for some in np.array_split(rows, max(1, len(rows) // 20_000)):
        said = snapshot.top_m(some) if m is None else rm.top_m(_normalised(snapshot.predictions(some)), m)
        groups = snapshot.all_groups
        small.append(
            snapshot.keys.take(some),
            snapshot.targets(some).astype(np.int64),
            said,
            ids=ids[some],
            groups=None if groups is None else groups[some],
        )
    return small


class Recipe:
    """One run: the texts, the result file, and what is measured on them."""

    def __init__(self, plan: Plan, file: ResultFile) -> None:
        self.plan, self.file, base = plan, file, plan.base
        self.train = tokens_of(base.corpus, base.split, base.vocabulary, limit=base.tokens)
        self.held_out = tokens_of(base.corpus, plan.held_out[0], base.vocabulary)
        self.test = tokens_of(base.corpus, "test", base.vocabulary)
        self.counts = np.bincount(self.train.numbers, minlength=base.vocabulary)

    def compare(
        self,
        setting: str,
        lm: ResMemForCausalLM,
        *,
        ks: tuple[int, ...] = (),
        n_test: int = 0,
        texts: tuple[Tokens, Tokens] | None = None,
        **more: Any,
    ) -> dict[str, TokenScores]:
        """Rows of every method for one network and memory, chosen on held-out text and measured on test text."""
        held_out, test = texts or (self.held_out, self.test)
        plan = self.plan
        if self.file.holds(f"{setting}, resmem", 0):
            return {}
        ks = ks or plan.n_neighbors
        methods = chosen_methods(lm, windows(held_out), n_neighbors=ks, limit=plan.held_out[1])
        scores = measured(lm, windows(test), methods, limit=n_test or plan.test)
        more = {"rows": sum(len(memory) for memory in lm.memories), "index": lm.description, **more}
        for name, row in rows_of(scores, methods, self.counts, **more).items():
            self.file.row(f"{setting}, {name}", 0, partial(dict, row))
        print("\n".join(self.file.table().splitlines()[-len(methods) :]), flush=True)
        return scores

    def sizes(self) -> None:
        """All the base's training tokens in memory, then fewer of them."""
        base = self.plan.base
        network, memory = base.load(), self.base_memory()
        for size in self.plan.sizes:
            if not self.file.holds(f"{base.shape}, {_short(size)} in memory, resmem", 0):
                lm = with_memory(network, some_rows(memory, np.arange(size)))
                self.compare(f"{base.shape}, {_short(size)} in memory", lm)
        lm = with_memory(network, memory)
        self.compare(f"{base.shape}, {_short(base.tokens)} in memory", lm)
        self.scann(network, memory)
        self.neighbors(lm)
        memory.close()

    def scann(self, network: T5DecoderLM, memory: Memory) -> None:
        """The paper's engine, on the smallest of the memories."""
        size, shape = self.plan.sizes[0], self.plan.base.shape
        setting = f"{shape}, {_short(size)} in memory, scann"
        if importlib.util.find_spec("scann") and not self.file.holds(f"{setting}, resmem", 0):
            small = some_rows(memory, np.arange(size))
            self.compare(setting, with_memory(network, small, "scann"), ks=(min(64, max(self.plan.n_neighbors)),))

    def neighbors(self, lm: ResMemForCausalLM) -> None:
        """One k after the other, from the same search."""
        plan, base = self.plan, self.plan.base
        settings = {k: f"{base.shape}, {_short(base.tokens)} in memory, k = {k}" for k in plan.single}
        if all(self.file.holds(f"{setting}, resmem", 0) for setting in settings.values()):
            return
        tokens = held_out_tokens(lm, windows(self.held_out), max(plan.single), limit=plan.held_out[1])
        methods = {
            f"{setting}, {name}": method
            for k, setting in settings.items()
            for name, method in methods_of(tokens, (k,)).items()
            if name in ("resmem", "knn-lm")
        }
        scores = measured(lm, windows(self.test), methods, limit=plan.test)
        for setting in settings.values():
            some = {name: f"{setting}, {name}" for name in ("resmem", "knn-lm")}
            rows = rows_of(
                {name: scores[full] for name, full in some.items()},
                {name: methods[full] for name, full in some.items()},
                None,
                rows=len(lm.memories[0]),
                index=lm.description,
            )
            for name, row in rows.items():
                self.file.row(some[name], 0, partial(dict, row))

    def added_later(self) -> None:
        """A memory of web text for the base that was trained on Wikipedia, alone and beside its own; then forgotten."""
        base, other = self.plan.base, "c4" if self.plan.base.corpus == "enwiki" else "enwiki"
        texts = {split: tokens_of(other, split, base.vocabulary) for split in ("train", "valid", "test")}
        if self.plan.added:
            texts["train"] = texts["train"].first(self.plan.added)
        setting = f"{base.shape} on {other}"
        if self.file.holds(f"{setting}, both memories, resmem", 0):
            return
        network, own = base.load(), self.base_memory()
        tried: dict[str, Any] = {"texts": (texts["valid"], texts["test"]), "ks": (min(64, max(self.plan.n_neighbors)),)}
        tried["n_test"] = self.plan.dense[1]
        added = rm.build_memory(network, windows(texts["train"]), None, autocast=torch.bfloat16, verbose=False)
        self.compare(f"{setting}, memory of {base.corpus}", with_memory(network, own), **tried)
        self.compare(f"{setting}, memory of {other}", with_memory(network, added), **tried)
        self.compare(f"{setting}, both memories", with_memory(network, [own, added]), **tried)
        probe = torch.from_numpy(next(iter(windows(texts["test"])))["input_ids"][None, :-1])
        alone, both = with_memory(network, added), with_memory(network, [own, added])
        with torch.inference_mode():
            before = with_memory(network, own)(probe).logits
            added.forget(added.ids)
            with torch.autocast("cpu", torch.bfloat16):
                bare = network(probe).logits
            same = torch.equal(alone(probe).logits, bare), torch.equal(both(probe).logits, before)
        for name, identical in zip((other, "both"), same, strict=True):
            place = f"{setting}, memory of {other}" if name == other else f"{setting}, both memories"
            self.file.change(f"{place}, resmem", 0, identical_after_forgetting=identical)
        own.close()

    def base_memory(self) -> Memory:
        """All tokens that the base was trained on."""
        base = self.plan.base
        return built(base.load(), self.train, base.weights().stem)

    def larger(self) -> None:
        """A larger base, with tokens that it was trained on."""
        other, rows = self.plan.larger, self.plan.larger_rows
        if other is None or self.file.holds(f"{other.shape}, {_short(rows)} in memory, resmem", 0):
            return
        memory = built(other.load(), self.train.first(rows + 1), f"{other.weights().stem}-{rows}")
        self.compare(f"{other.shape}, {_short(rows)} in memory", with_memory(other.load(), memory))
        memory.close()

    def epochs(self) -> None:
        """The same tokens passed once, twice, …: what is left to memorize."""
        if (training := self.plan.epochs) is None:
            return
        tokens = tokens_of(training.corpus, training.split, training.vocabulary, limit=training.tokens)
        for epoch in (2**power for power in range(training.epochs.bit_length())):
            setting = f"{training.shape}, {_short(training.tokens)} in memory, {epoch} epochs"
            if not self.file.holds(f"{setting}, resmem", 0):
                network = training.load(epoch)
                memory = rm.build_memory(network, windows(tokens), None, autocast=torch.bfloat16, verbose=False)
                self.compare(setting, with_memory(network, memory), n_test=self.plan.dense[1])

    def bytes(self) -> None:
        """What a row may cost: whole predictions, then fewer classes of them, coarser codes, fewer rows."""
        (n, n_test), base = self.plan.dense, self.plan.base
        name, k = f"{base.shape}, {_short(n)} in memory", min(64, max(self.plan.n_neighbors))
        if self.file.holds(f"{name}, dense, {ALIKE}", 0):  # measured last
            return
        network = base.load()
        whole = built(network, self.train.first(n + 1), f"{base.weights().stem}-dense-{n}", residuals="dense")
        everything = np.arange(len(whole))
        top = cache(lambda m: some_rows(whole, everything, m))
        for m in self.plan.listed:
            self.sized(f"{name}, top {m}", network, partial(top, m), "exact", ks=(k,), n_test=n_test)
        for code in self.plan.codes:
            spec = f"faiss:IVF{max(4, int(n**0.5)) // 4 * 4},PQ{code}x4fs?nprobe=32&k_factor=8"
            self.sized(
                f"{name}, top 8, PQ{code}x4fs", network, partial(top, 8), spec, code=code / 2, ks=(k,), n_test=n_test
            )
        for keep in self.plan.kept:
            setting = f"{name}, top 8, keep {keep:g}"
            if not self.file.holds(f"{setting}, resmem", 0):
                rows = np.flatnonzero(_label_probabilities(whole) <= keep)
                memory, part = partial(some_rows, whole, rows, 8), len(rows) / len(whole)
                self.sized(setting, network, memory, "exact", ks=(k,), n_test=n_test, kept_fraction=part)
        self.dense(f"{name}, dense", with_memory(network, whole, "exact"), k, n_test)
        gain = next(row["log_loss_gain"] for row in self.file.rows if row["setting"] == f"{name}, dense, {ALIKE}")
        for row in self.file.rows:
            if row["setting"].startswith(f"{name}, top") and row["method"] == ALIKE:
                self.file.change(row["setting"], 0, share_of_dense_gain=row["log_loss_gain"] / gain)
        whole.close()

    def sized(
        self,
        setting: str,
        network: T5DecoderLM,
        made: Callable[[], Memory],
        index: str,
        *,
        code: float = 0,
        **more: Any,
    ) -> None:
        """Rows that say what a token costs in RAM: its code and id in an inverted list, its label and prediction."""
        if self.file.holds(f"{setting}, resmem", 0):
            return
        memory = made()
        layout = memory.layout
        row_bytes = layout.bytes_per_row(memory.snapshot.manifest.top_m) - 8 - 2 * layout.dim  # id and key are on disk
        resident = row_bytes + (code + ID_BYTES if code else 0)
        self.compare(setting, with_memory(network, memory, index), bytes_per_token=resident, **more)

    def dense(self, setting: str, lm: ResMemForCausalLM, k: int, n_test: int) -> None:
        """The row of a memory of whole predictions, searched exactly."""
        tokens = dense_tokens(lm, windows(self.held_out), k, limit=self.plan.held_out[1])
        method = methods_of(tokens, (k,))[ALIKE]
        scores = dense_scores(lm, windows(self.test), method, limit=n_test)
        row = rows_of({ALIKE: scores}, {ALIKE: method}, self.counts, rows=len(lm.memories[0]), index="exact")
        layout = lm.memories[0].layout
        self.file.row(f"{setting}, {ALIKE}", 0, lambda: row[ALIKE] | {"bytes_per_token": 2 + 2 * layout.n_outputs})


def _label_probabilities(dense: Memory) -> Float[ndarray, " n"]:
    """What the base gave each row's own token."""
    snapshot, parts = dense.snapshot, []
    for some in np.array_split(np.arange(len(dense)), max(1, len(dense) // 5_000)):
        parts.append(snapshot.predictions(some)[np.arange(len(some)), snapshot.targets(some)])
    return np.concatenate(parts)


def _normalised(predictions: Float[ndarray, "b c"]) -> Float[ndarray, "b c"]:
    """Half precision loses a little of the sum."""
    return predictions / predictions.sum(axis=1, keepdims=True)


def _short(n: int) -> str:
    if n < 1_000:
        return str(n)
    return f"{n / 1e6:g}M" if n >= 1_000_000 else f"{n / 1e3:g}k"


def run(*, quick: bool, fresh: bool) -> None:
    """Measure what the result file does not hold yet, and print the table."""
    plan, folder = (QUICK, Path(tempfile.mkdtemp())) if quick else (FULL, RESULTS)
    data = (
        f"{plan.base.corpus}: settings from the first {plan.held_out[1]:,} tokens of its {plan.held_out[0]} split, "
        f"figures on the first {plan.test:,} of its test split, windows of {WINDOW} predictions; intervals by document"
    )
    file = ResultFile("language", "python -m experiments language", data, folder=folder, fresh=fresh)
    if quick and not plan.base.weights().exists():
        train(plan.base)
    recipe = Recipe(plan, file)
    recipe.sizes()
    recipe.bytes()
    recipe.larger()
    recipe.epochs()
    recipe.added_later()
    print(file.table())
