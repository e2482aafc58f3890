"""Gain against bytes: what is left of a memory's gain when its rows become fewer and shorter, on images and on text.

    python -m experiments shrinking

Every memory is made smaller twice in the same way: the one of a network that never saw the held-out images, on which a
setting is chosen anew, and the final one, which the test images measure with it. Text has one memory, and held-out and
test text. Beside the new setting stands the one that the whole memory chose. The language model is trained first:
python -m experiments.language.train --tokens 2000000
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

import residual_memory as rm
from experiments.cifar100.comparisons import Seen
from experiments.cifar100.measuring import opened, see, see_held_out
from experiments.cifar100.samples import SAMPLES
from experiments.language.corpus import WINDOW, tokens_of
from experiments.language.measuring import measured
from experiments.language.table import built, windows, with_memory
from experiments.language.train import train
from experiments.privacy import FULL_TEXT, QUICK_TEXT, TextPlan
from experiments.results_file import ResultFile, Row
from residual_memory.demo.assets import shipped_network
from residual_memory.demo.cifar100 import Cifar100
from residual_memory.demo.run import FINE, PLAIN
from residual_memory.evaluation import Evaluation, Setting, evaluate
from residual_memory.language import LanguageSetting, tune_tokens
from residual_memory.memory import Memory
from residual_memory.models.base import KeyChoice
from residual_memory.models.transformers import held_out_tokens
from residual_memory.tuning import tune

NAME = "shrinking"
WHOLE = "whole"
N_NEIGHBORS = (20, 50, 100)
TEMPERATURES = (1.0, 1.4, 2.0)
TEST_TOKENS = 80 * WINDOW
DATA = (
    "CIFAR-100: settings from 5,000 held-out training images, figures on the 10,000 test images; enwiki: settings from "
    f"the first 20,000 tokens of its valid split, figures on the first {TEST_TOKENS:,} of its test split"
)


@dataclass(frozen=True)
class Way:
    """One way of making a memory smaller.

    Attributes
    ----------
    name : in tables.
    share : of the rows that stays.
    drop : which rows go: those that are not "drawn", those that are not in a "random" choice (which all is compared
        with), or those of "small" residuals.
    options : of `shrink` beside those, for twins and for shorter rows.
    """

    name: str
    share: float = 1.0
    drop: str = "drawn"
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, memory: Memory, seed: int) -> Memory:
        """The smaller memory, in RAM; a whole one is the memory itself."""
        if self.drop == "random":
            return some_rows(memory, self.share, seed)
        options = dict(self.options)
        if self.drop == "small":
            options["smallest_residual"] = float(np.quantile(sizes_of(memory), 1 - self.share))
        elif self.share < 1:
            options["keep_rows"] = self.share
        return rm.shrink(memory, seed=seed, **options).memory if options else memory


SHORT = {"key_dtype": "float16"}
IMAGE_ROWS = (
    Way("keys in half precision", options=SHORT),
    *(Way(f"top {m}", options={**SHORT, "top_m": m}) for m in (16, 8, 4)),
)
TEXT_ROWS = (Way("top 2", options={"top_m": 2}),)
TWINS = tuple(Way(f"twins within {within:g}", options={"twins_within": within}) for within in (0.5, 1.0))
IN_DOCUMENTS = Way("twins within 1, of one document", options={"twins_within": 1.0, "within_groups": True})
SHARES = (0.5, 0.25)


def fewer(shares: Sequence[float]) -> tuple[Way, ...]:
    """Every way to leave so many of the rows."""
    names = {"drawn": "drawn", "small": "small residuals dropped", "random": "at random"}
    return tuple(Way(f"{share:.0%}, {name}", share, drop) for share in shares for drop, name in names.items())


IMAGE_BOTH = tuple(Way(f"{share:.0%}, drawn, top 8", share, options={**SHORT, "top_m": 8}) for share in SHARES)
TEXT_BOTH = Way("twins within 1, top 2", options={"twins_within": 1.0, "top_m": 2})
IMAGE_WAYS = (*IMAGE_ROWS, *fewer(SHARES), *TWINS, *IMAGE_BOTH)
TEXT_WAYS = (*TEXT_ROWS, *fewer(SHARES), *TWINS, IN_DOCUMENTS, TEXT_BOTH)
QUICK_WAYS = (*IMAGE_ROWS[2:3], *fewer((0.5,)))
DRAWS = 2  # seeds of a draw from image keys


def run(*, quick: bool, fresh: bool) -> None:
    """Measure every row that the result file does not hold yet, and print the table."""
    training, test, results = opened(NAME, DATA, quick=quick, fresh=fresh)
    for choice in (PLAIN,) if quick else (PLAIN, FINE):
        images(results, choice, training, test, QUICK_WAYS if quick else IMAGE_WAYS, 1 if quick else DRAWS)
    plan = QUICK_TEXT if quick else FULL_TEXT
    if quick and not plan.training.weights().exists():
        train(plan.training)
    if plan.training.weights().exists():
        text(results, plan, TEXT_ROWS if quick else TEXT_WAYS, 2_000 if quick else TEST_TOKENS)
    else:
        print("the language model is not trained, so text is not measured: see the top of experiments/shrinking.py")
    print(results.table())


# ---------------------------------------------------------------------- images


def images(
    results: ResultFile, choice: KeyChoice, training: Cifar100, test: Cifar100, ways: Sequence[Way], draws: int
) -> None:
    """The memories of the network that never saw the held-out images, and of the final one, whole and smaller."""
    name = f"cifar100 {choice.name}"
    wanted = [(way, seed) for way in (Way(WHOLE), *ways) for seed in range(draws if is_drawn(way) else 1)]
    if all(results.holds(f"{name}, {way.name}", seed) for way, seed in wanted):
        return
    choosing = see_held_out(shipped_network("resnet8-45000"), training, SAMPLES["90%"](training), choice)
    final = see(shipped_network("resnet8-50000"), training, np.arange(len(training)), test, choice)
    usual = chosen(choosing)
    for way, seed in wanted:
        row = results.row(f"{name}, {way.name}", seed, partial(smaller, way, seed, choosing, final, usual))
        print(f"{row['setting']}, seed {seed}: {row['rows']:,} rows, gain {100 * row['gain']:+.2f}", flush=True)


def is_drawn(way: Way) -> bool:
    """Whether it is measured with several draws."""
    return way.share < 1 and way.drop in ("drawn", "random") and not way.options


def smaller(way: Way, seed: int, choosing: Seen, final: Seen, usual: Setting) -> Row:
    """A row of the result file: the setting of the smaller memory, and that of the whole one, on test images."""
    setting = chosen(Seen(way(choosing.memory, seed), choosing.queries))
    memory = way(final.memory, seed)
    figures = tested(Seen(memory, final.queries), setting)
    unusable = memory.layout.residuals == "top-m" and usual.temperature != 1
    old = None if unusable else tested(Seen(memory, final.queries), usual)
    return {
        "method": "resmem",
        **figures.to_dict(),
        **bytes_of(memory, final.memory),
        "gain_old_setting": None if old is None else old.gain.value,
        "chosen": setting.to_dict(),
    }


def chosen(seen: Seen) -> Setting:
    """The best setting on held-out images, all of it chosen anew."""
    queries = seen.queries
    rows = seen.memory, queries.keys, queries.labels, np.asarray(queries.predictions)
    return tune(*rows, n_neighbors=N_NEIGHBORS, temperatures=TEMPERATURES, index="exact").best


def tested(seen: Seen, setting: Setting) -> Evaluation:
    """A setting on test images."""
    queries = seen.queries
    said = np.asarray(queries.predictions)
    return evaluate(seen.memory, queries.keys, queries.labels, said, setting, index="exact")


# ---------------------------------------------------------------------- text


def text(results: ResultFile, plan: TextPlan, ways: Sequence[Way], n_test: int) -> None:
    """A memory of tokens, whole and smaller."""
    base = plan.training
    name = f"{base.corpus} {base.shape}"
    if all(results.holds(f"{name}, {way.name}", 0) for way in (Way(WHOLE), *ways)):
        return
    stored = tokens_of(base.corpus, base.split, base.vocabulary, limit=base.tokens).first(plan.rows + 1)
    held_out, test = (tokens_of(base.corpus, split, base.vocabulary) for split in (plan.held_out[0], "test"))
    network = base.load()
    whole = built(network, stored, f"{base.weights().stem}-{plan.rows}")
    usual: dict[str, LanguageSetting] = {}

    def measure(way: Way) -> Row:
        memory = way(whole, 0)
        lm = with_memory(network, memory)
        tokens = held_out_tokens(lm, windows(held_out), max(plan.n_neighbors), limit=plan.held_out[1])
        settings = {"new": tune_tokens(tokens, n_neighbors=plan.n_neighbors).best, **usual}
        scores = measured(lm, windows(test), settings, limit=n_test)
        new, old = scores["new"].summary(), scores.get("old", scores["new"]).summary()
        return {
            "method": "resmem",
            "metric": "accuracy",
            **new,
            **bytes_of(memory, whole),
            "gain_old_setting": old["gain"],
            "log_loss_gain_old_setting": old["log_loss_gain"],
            "index": lm.description,
            "chosen": settings["new"].to_dict(),
        }

    for way in (Way(WHOLE), *ways):
        row = results.row(f"{name}, {way.name}", 0, partial(measure, way))
        usual.setdefault("old", LanguageSetting.from_dict(row["chosen"]))
        print(f"{row['setting']}: {row['rows']:,} rows, {row['log_loss_gain']:+.4f} nats", flush=True)
    whole.close()


# ---------------------------------------------------------------------- what both need


def some_rows(memory: Memory, share: float, seed: int) -> Memory:
    """A memory in RAM of some of the rows, whatever they hold."""
    copy = rm.merge_memories([memory])
    ids = np.random.default_rng(seed).permutation(copy.ids)
    copy.forget(ids[int(np.ceil(share * len(ids))) :])
    copy.compact()
    return copy


def sizes_of(memory: Memory) -> Float[ndarray, " n"]:
    """How large the residual of each row is."""
    return memory.snapshot.residual_sizes(np.flatnonzero(memory.snapshot.alive))


def bytes_of(memory: Memory, whole: Memory) -> Row:
    """What the rows take, by the layout: headers and what a disk holds in reserve are left out."""
    sizes = [some.layout.bytes_per_row(some.snapshot.manifest.top_m) for some in (memory, whole)]
    keys = memory.layout.dim * np.dtype(memory.layout.key_dtype).itemsize
    return {
        "rows": len(memory),
        "bytes_per_row": sizes[0],
        "value_bytes": sizes[0] - keys - 8,  # prediction and label, without the key and the id
        "share_of_rows": len(memory) / len(whole),
        "share_of_bytes": len(memory) * sizes[0] / (len(whole) * sizes[1]),
    }


# ---------------------------------------------------------------------- what is shown


def averaged(rows: Sequence[Row], name: str) -> dict[str, Row]:
    """The ways of one memory in their order, the figures of several draws as their mean."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        memory, _, way = row["setting"].partition(", ")
        if memory == name:
            found.setdefault(way, []).append(row)
    return {way: {**some[0], **_means(some)} for way, some in found.items()}


def _means(rows: Sequence[Row]) -> Row:
    """Of the numbers of several rows, where all have one."""
    numbers = [key for key in rows[0] if all(isinstance(row[key], int | float) for row in rows)]
    return {key: float(np.mean([row[key] for row in rows])) for key in numbers}


def image_table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The table of docs/shrinking.md of image keys: what is left of the bytes, and gains in points."""
    found = [averaged(rows, name) for name in names]
    heads = [f"{name.removeprefix('cifar100 ')}: bytes | gain | old setting" for name in names]
    lines = ["| what stays | " + " | ".join(heads) + " |", "|---|" + "---|---|---|" * len(names)]
    for way in found[0]:
        cells = []
        for row in (memory[way] for memory in found):
            old = "–" if row["gain_old_setting"] is None else f"{100 * row['gain_old_setting']:+.2f}"
            margin = 50 * (row["gain_high"] - row["gain_low"])
            cells.append(f"{100 * row['share_of_bytes']:.0f} % | {100 * row['gain']:+.2f} ± {margin:.2f} | {old}")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text_table(rows: Sequence[Row], name: str) -> str:
    """The table of docs/shrinking.md of text: gains in nats a token, with the old setting too, and in points."""
    lines = [
        "| what stays | rows | value, bytes | gain, nats | old setting | gain, points |",
        "|---|---|---|---|---|---|",
    ]
    for way, row in averaged(rows, name).items():
        margin = (row["log_loss_gain_high"] - row["log_loss_gain_low"]) / 2
        points = 50 * (row["gain_high"] - row["gain_low"])
        lines.append(
            f"| {way} | {100 * row['share_of_rows']:.0f} % | {row['value_bytes']:.0f} "
            f"| {row['log_loss_gain']:.3f} ± {margin:.3f} | {row['log_loss_gain_old_setting']:.3f} "
            f"| {100 * row['gain']:+.2f} ± {points:.2f} |"
        )
    return "\n".join(lines)
