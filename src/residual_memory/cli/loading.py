"""The user's own code: MODULE:NAME of a model or a data set, and what happens when it fails."""

import contextlib
import difflib
import importlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from residual_memory.errors import InvalidInput, MissingExtra, ResidualMemoryError

FITTING = "do the model and the data fit each other?"


@runtime_checkable
class Examples(Protocol):
    """A data set: a length, and items (x, y)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@contextlib.contextmanager
def user_code(doing: str, remedy: str = "does it work in Python by itself?") -> Iterator[None]:
    """Failures inside as an `InvalidInput` that names the place; what is printed inside goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (ResidualMemoryError, GeneratorExit):
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        lines = str(error).strip().splitlines() or ["no message"]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        raise InvalidInput(f"{doing} failed with {type(error).__name__}: {lines[0]} ({where}); {remedy}") from error


def load_model(reference: str) -> Any:
    """The torch module that MODULE:NAME is, or that it makes when it is called.

    Raises
    ------
    InvalidInput : if there is no such name, or it gives something else.
    MissingExtra : if torch is not installed.
    """
    try:
        from torch import nn
    except ImportError as error:
        raise MissingExtra("running a model", "torch") from error
    found = load_named(reference)
    if not isinstance(found, nn.Module) and callable(found):
        with user_code(f"making the model {reference}"):
            found = found()
    if not isinstance(found, nn.Module):
        raise InvalidInput(f"{reference} gives a {type(found).__name__}, expected a torch.nn.Module")
    return found


def load_dataset(reference: str) -> Examples:
    """The data set that MODULE:NAME is, or that it makes when it is called."""
    found = load_named(reference)
    if isinstance(found, type) or not isinstance(found, Examples):
        if not callable(found):
            raise InvalidInput(
                f"{reference} is a {type(found).__name__}, expected a data set with a length and items (x, y)"
            )
        with user_code(f"making the data set {reference}"):
            found = found()
    if not isinstance(found, Examples):
        raise InvalidInput(
            f"{reference} gives a {type(found).__name__}, expected a data set with a length and items (x, y)"
        )
    return found


def as_torch_dataset(examples: Examples) -> Any:
    """The same items as a torch data set; one that is such a data set is returned as it is."""
    from torch.utils.data import Dataset

    class Adapted(Dataset[Any]):
        def __len__(self) -> int:
            return len(examples)

        def __getitem__(self, index: int) -> Any:
            return examples[index]

    return examples if isinstance(examples, Dataset) else Adapted()


def load_named(reference: str) -> Any:
    """The object that MODULE:NAME is.

    Raises
    ------
    InvalidInput : naming the close one, if there is no such module or name.
    """
    module_name, _, path = reference.partition(":")
    if not module_name or not path:
        raise InvalidInput(f"{reference!r} is not of the form MODULE:NAME; an example: train:make_model")
    found: Any = _module(module_name)
    for name in path.split("."):
        known = vars(found) if isinstance(found, type(sys)) else {key: None for key in dir(found)}
        if name not in dir(found):
            close = difflib.get_close_matches(name, [key for key in known if not key.startswith("_")], 1)
            hint = f"; did you mean {module_name + ':' + close[0]!r}?" if close else ""
            raise InvalidInput(f"{module_name} has no {name!r}{hint}")
        found = getattr(found, name)
    return found


def _module(name: str) -> Any:
    with _current_directory_first():
        try:
            with user_code(f"importing {name}"):
                return importlib.import_module(name)
        except InvalidInput as error:
            cause = error.__cause__
            missing = isinstance(cause, ModuleNotFoundError) and (f"{name}.").startswith(f"{cause.name}.")
            if not missing:
                raise
    here = [path.stem for path in Path.cwd().glob("*.py")]
    close = difflib.get_close_matches(name, here, 1)
    hint = f"; did you mean {close[0]!r}?" if close else "; run the command where the module's file is"
    raise InvalidInput(f"there is no module {name!r}, neither in the current directory nor installed{hint}")


@contextlib.contextmanager
def _current_directory_first() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
