"""A small language model with a memory of a text, to be served."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from residual_memory.language import LanguageSetting
from residual_memory.memory import Memory
from residual_memory.models.transformers import ResMemForCausalLM, build_memory
from residual_memory.server import create_app
from residual_memory.windows import Windows
from tests.server.conftest import TOKEN
from tests.tales import model, tale, tokenizer

LENGTH = 48  # tokens a window


@dataclass(frozen=True)
class Library:
    """The language model as the library uses it, and what it was made from."""

    lm: ResMemForCausalLM
    tokenizer: Any
    documents: list[list[int]]

    @property
    def memory(self) -> Memory:
        return self.lm.memories[0]

    def app(self, **options: Any) -> Any:
        """The application over it."""
        return create_app(
            self.memory, self.lm, **{"token": TOKEN, "tokenizer": self.tokenizer, "text": self.documents, **options}
        )

    def tokens(self, text: str) -> torch.Tensor:
        return torch.tensor([self.tokenizer(text).input_ids])


def library(path: Any = None, *, positions: int = 256, more: Sequence[str] = ()) -> Library:
    """A GPT-2 with large weights, so that its predictions differ, and a memory of 40 documents and of more."""
    texts = tale(40, 1).split("\n\n")
    own = tokenizer(texts)
    texts += more
    network = model(positions=positions)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    documents = [own(text.rstrip("\n")).input_ids for text in texts]
    memory = build_memory(network, Windows(documents, LENGTH, end=0), path, tokenizer=own, verbose=False)
    setting = LanguageSetting(n_neighbors=8, shrinkage=0.6)
    return Library(ResMemForCausalLM(network, memory, setting=setting, tokenizer=own), own, documents)
