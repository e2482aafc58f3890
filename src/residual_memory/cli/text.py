"""Text: a file of documents, and the language model and tokenizer that read it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residual_memory.cli.loading import FITTING, load_model, load_named, user_code
from residual_memory.cli.options import AUTOCASTS, chosen, similar
from residual_memory.cli.output import note
from residual_memory.errors import DataNotFound, InvalidInput, MissingExtra
from residual_memory.validation import as_count
from residual_memory.windows import Encoded, TextFile, Windows

POST_ATTENTION = "post-attention"  # where the keys of a text come from, unless the user says otherwise
LENGTH = 256  # predictions of a window, where the model reads so many tokens
_SAVED = "is it a folder that save_pretrained made?"


def text_at(data: str) -> TextFile | None:
    """The text that `--data` names; None where it is something else, or not there."""
    path = Path(data)
    return TextFile(path) if path.suffix.lower() == ".txt" and path.is_file() else None


@dataclass(frozen=True)
class TextReading:
    """How to turn a text into what a language model shows of it.

    Attributes
    ----------
    model : a folder that `save_pretrained` made, or MODULE:NAME.
    tokenizer : likewise; None takes that of the model's folder.
    length, stride : of the windows, as in `Windows`; None is 256, or what the model can read.
    limit : predictions after which to stop.
    batch_size : windows that the model sees at once; None takes as many as have 128 MiB of logits.
    autocast : a faster type to run the model in.
    """

    model: str | None = None
    tokenizer: str | None = None
    length: int | None = None
    stride: int | None = None
    limit: int | None = None
    batch_size: int | None = None
    autocast: str | None = None

    @property
    def given(self) -> dict[str, bool]:
        """Options that are for text alone, and whether each is given."""
        names = ("tokenizer", "length", "stride", "limit")  # the model, the batch and its type are for others too
        return {f"--{name}": getattr(self, name) is not None for name in names}

    def load(self, file: TextFile) -> tuple[Any, Any]:
        """The model and the tokenizer.

        Raises
        ------
        InvalidInput : if one is not named, not there or something else, or the text is empty.
        """
        if self.model is None:
            raise InvalidInput(
                f"{file.path} is text, and no model is named to run on it; add --model, a folder or MODULE:NAME"
            )
        for name in ("length", "stride", "limit", "batch_size"):
            if getattr(self, name) is not None:
                as_count(f"--{name.replace('_', '-')}", getattr(self, name))
        if next(iter(file), None) is None:
            raise InvalidInput(f"{file.path} is empty: there is nothing to read")
        tokenizer = load_tokenizer(self.model, self.tokenizer)
        if tokenizer.eos_token_id is None:
            note("the tokenizer has no end-of-text token, so nothing stands between two documents")
        return load_language_model(self.model), tokenizer

    def windows(self, file: TextFile, watch: Any, tokenizer: Any) -> Windows:
        """The text in windows that the model of a `TokenWatch` can read."""
        if watch.decodes:
            raise InvalidInput(
                "the model turns a source into a target, and a text file has no targets; "
                "use residual_memory.build_memory from Python"
            )
        length, longest = self.length or LENGTH, watch.longest
        if longest is not None and length > longest:
            if self.length is not None:
                raise InvalidInput(f"--length is {length:,}, but the model reads at most {longest:,} tokens")
            length = longest
        stride = self.stride or length
        if stride > length:
            raise InvalidInput(f"--stride is {stride:,}, expected at most the length of a window, {length:,}")
        return Windows(encoded(file, tokenizer), length, end=tokenizer.eos_token_id, stride=stride)

    @property
    def precision(self) -> Any:
        """The torch type of `--autocast`."""
        return autocast_named(self.autocast)


def autocast_named(name: str | None) -> Any:
    """The torch type to run a model in; None leaves it as it is."""
    if name is None:
        return None
    import torch

    return getattr(torch, chosen("--autocast", name, AUTOCASTS))


@contextmanager
def reading(file: TextFile) -> Iterator[None]:
    """While a model runs on a text: its failures as errors that say where."""
    with user_code(f"running the model on {file.path}", FITTING):
        yield


def load_language_model(reference: str) -> Any:
    """The model in a folder, or that MODULE:NAME is or makes; one from a folder goes to the GPU where there is one.

    Raises
    ------
    InvalidInput : if there is none.
    MissingExtra : if transformers is not installed.
    """
    if _is_folder("--model", reference):
        with user_code(f"loading the model in {reference}", _SAVED):
            import torch

            with _bar_for_people():
                model = _transformers().AutoModelForCausalLM.from_pretrained(reference, local_files_only=True)
            return model.to("cuda") if torch.cuda.is_available() else model
    return load_model(reference)


def load_tokenizer(model: str, reference: str | None) -> Any:
    """The tokenizer in a folder, or that MODULE:NAME is or makes.

    Parameters
    ----------
    model : whose folder is looked into where there is no reference.
    reference : what the user says.
    """
    if reference is None and not _is_folder("--model", model):
        raise InvalidInput(f"--model {model} does not come with a tokenizer; add --tokenizer, a folder or MODULE:NAME")
    folder = model if reference is None else reference
    kind = _transformers().PreTrainedTokenizerBase
    if _is_folder("--tokenizer", folder):
        with user_code(f"loading the tokenizer in {folder}", _SAVED):
            found = _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if set(found.get_vocab()) <= set(found.all_special_tokens):  # made where there are no files to load it from
            raise InvalidInput(f"{folder} holds no tokenizer; add --tokenizer, a folder or MODULE:NAME")
        return found
    found = load_named(folder)
    if not isinstance(found, kind) and callable(found):
        with user_code(f"making the tokenizer {folder}"):
            found = found()
    if not isinstance(found, kind):
        raise InvalidInput(f"{folder} gives a {type(found).__name__}, expected a tokenizer of transformers")
    return found


def _is_folder(option: str, reference: str) -> bool:
    path = Path(reference)
    if not path.is_dir() and ":" not in reference:
        raise DataNotFound(
            f"{option} {reference}: there is no such folder{similar(path) or '; expected a folder or MODULE:NAME'}"
        )
    return path.is_dir()


def encoded(file: TextFile, tokenizer: Any) -> Encoded:
    """The documents as token numbers."""
    return Encoded(file, lambda text: tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


@contextmanager
def _bar_for_people() -> Iterator[None]:
    """While the context lasts, transformers shows its progress only where a person watches."""
    from transformers.utils import logging

    hidden = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hidden:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            logging.enable_progress_bar()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("language models", "transformers") from error
    return transformers
