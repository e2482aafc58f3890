"""The words that changed: test contexts where the memory put the next token right, with the memories' own contexts.

python -m experiments language-words
"""

import html
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from experiments.language.corpus import Tokens, tokenizer_of
from experiments.language.measuring import chosen_methods
from experiments.language.table import FULL, QUICK, Recipe, windows, with_memory
from experiments.results_file import RESULTS, ResultFile, stamped
from residual_memory.models.tokens import TokenBatch
from residual_memory.models.transformers import ResMemForCausalLM

BEFORE = 24  # tokens of context that are shown
SHOWN, MEMORIES = 16, 3
SOURCES = {"enwiki": "Wikipedia, CC BY-SA", "c4": "C4, ODC-BY"}
LEAST_SHARE = 0.5  # of the weight that agrees with the right token


@dataclass(frozen=True)
class Memorized:
    """A memory that moved a prediction: where it stood in the training text, and what it weighs."""

    context: str
    word: str
    weight: float


@dataclass(frozen=True)
class Example:
    """A test context, what the base said, what the memory made of it, and the memories that did.

    Attributes
    ----------
    context : the text before.
    said, right : the base's likeliest token, and the true one, which the corrected model finds.
    before, after : probability of the true one without and with the memory.
    share : of the neighbours' weight that agrees with the true one.
    memories : the three that weigh most.
    """

    context: str
    said: str
    right: str
    before: float
    after: float
    share: float
    memories: tuple[Memorized, ...]


def changed(
    lm: ResMemForCausalLM, batch: TokenBatch, test: Tokens, train: Tokens, tokenizer: Tokenizer
) -> list[Example]:
    """Those of a batch where the base is wrong, the corrected model right, and the memories agree on a whole word."""
    with torch.inference_mode():
        seen = lm.seen(batch.logits, batch.keys, always=True)
        assert seen is not None
        scores = seen.corrected(torch.arange(len(batch)))
        base, best, labels = seen.base.argmax(1).numpy(), scores.argmax(1).numpy(), batch.labels.numpy()
        agreeing = (seen.weights * (seen.recalled.labels == labels[:, None])).sum(axis=1)
        found = np.flatnonzero((base != labels) & (best == labels) & (agreeing > LEAST_SHARE))
        examples = []
        for row in found:
            said, right = (tokenizer.decode([int(token)]) for token in (base[row], labels[row]))
            if not (_is_word(said) and _is_word(right)):
                continue
            order = np.argsort(-seen.weights[row])[:MEMORIES]
            memories = tuple(
                Memorized(
                    _context(train, int(seen.recalled.ids[row, place]), tokenizer),
                    tokenizer.decode([int(seen.recalled.labels[row, place])]),
                    float(seen.weights[row, place]),
                )
                for place in order
            )
            examples.append(
                Example(
                    _context(test, int(batch.offsets[row]), tokenizer),
                    said,
                    right,
                    float(seen.base[row, labels[row]]),
                    float(scores[row, labels[row]]),
                    float(agreeing[row]),
                    memories,
                )
            )
        return examples


def page(examples: list[Example], title: str, source: str) -> str:
    """A page that needs nothing else: every example with its memories."""
    parts = []
    for example in examples:
        memories = "".join(
            f"<li><span>{memory.weight:.0%}</span> … {html.escape(memory.context)}"
            f"<b>{html.escape(memory.word)}</b></li>"
            for memory in example.memories
        )
        parts.append(
            f"<section><p>… {html.escape(example.context)}<b>{html.escape(example.right)}</b> "
            f"<i>(base:{html.escape(example.said)}; {example.before:.0%} → {example.after:.0%})</i></p>"
            f"<ul>{memories}</ul></section>"
        )
    return PAGE.format(title=html.escape(title), source=html.escape(source), body="\n".join(parts))


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 Georgia, serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
h1 {{ font-size: 1.4rem }} section {{ border-top: 1px solid #ddd; padding: .6rem 0 }} p {{ margin: .2rem 0 }}
b {{ color: #0a6b3d }} i {{ color: #9a3412; font-style: normal; white-space: nowrap }}
ul {{ margin: .2rem 0; padding-left: 1rem; list-style: none; color: #555; font-size: .88rem }}
span {{ display: inline-block; width: 3em; color: #888 }} small {{ color: #666 }}
</style>
<h1>{title}</h1>
<p><small>Green is the word that came and that the memory put right. In brackets: what the base had said, and the
probability of the right word before and after. Below, the three places of the training text that moved the prediction
most, with their weights. Excerpts from {source}.</small></p>
{body}
</html>
"""


def run(*, quick: bool, fresh: bool) -> None:
    """Look for examples in the first test tokens, write them and their page."""
    del fresh
    plan, folder = (QUICK, Path(tempfile.mkdtemp())) if quick else (FULL, RESULTS)
    recipe = Recipe(plan, ResultFile("language", "", "", folder=folder))
    lm = with_memory(plan.base.load(), recipe.base_memory())
    chosen = chosen_methods(lm, windows(recipe.held_out), n_neighbors=(min(plan.n_neighbors),), limit=plan.held_out[1])
    lm = lm.with_setting(chosen["resmem"])
    tokenizer, found = tokenizer_of(plan.base.vocabulary), list[Example]()
    for batch in lm.watch.batches(windows(recipe.test), limit=plan.test // 2):
        for here in lm.blocks(len(batch)):
            found += changed(lm, batch.part(here), recipe.test, recipe.train, tokenizer)
    found.sort(key=lambda example: -example.share)
    different = list({example.right: example for example in reversed(found)}.values())[::-1][:SHOWN]
    head = stamped("language-words", "python -m experiments language-words", "enwiki test text")
    folder.mkdir(parents=True, exist_ok=True)
    content = {**head, "found": len(found), "rows": [asdict(example) for example in different]}
    (folder / "language-words.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    Path(folder / "language-words.html").write_text(
        page(different, "Words that the memory put right", SOURCES[plan.base.corpus])
    )
    print(f"{len(found):,} words put right where the memories agree; {len(different)} of them in language-words.html")


def _context(tokens: Tokens, place: int, tokenizer: Tokenizer) -> str:
    """The text before a token, back to the beginning of its document."""
    start = max(place - BEFORE, int(tokens.starts[np.searchsorted(tokens.starts, place, side="right") - 1]))
    return tokenizer.decode(tokens.numbers[start:place].tolist()).replace("\n", " ")


def _is_word(text: str) -> bool:
    """A token that begins a word of its own, not a piece of one or a stop."""
    return text.startswith(" ") and len(text) > 3 and text[1:].isalpha()
