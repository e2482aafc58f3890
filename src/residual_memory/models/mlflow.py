"""A model with its memory in MLflow, as code and files, without a pickle: `log_model`, and what is run to load it."""

import os
import re
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy import ndarray

from residual_memory._version import __version__
from residual_memory.errors import InvalidInput, MissingExtra
from residual_memory.models.pretrained import BASE, Saved

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns of type hints of its own
        import mlflow
        import pandas as pd
        from mlflow.models import ModelSignature
        from mlflow.pyfunc.model import PythonModel
        from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
except ImportError as error:
    raise MissingExtra("logging to MLflow", "mlflow") from error

FOLDER = "folder"
CODE = """from mlflow.models import set_model

from residual_memory.models.mlflow import {name}

set_model({name}({arguments}))
"""
MODULE, LANGUAGE = "ResMemModule", "ResMemForCausalLM"
EXTRAS = {MODULE: "faiss,mlflow", LANGUAGE: "faiss,mlflow,transformers"}
BATCH = 256  # examples that pass through a module at a time
NEW_TOKENS = 32


def log_model(
    folder: str | os.PathLike[str], name: str = "model", *, model: str | None = None, **options: Any
) -> mlflow.models.model.ModelInfo:
    """Log what `save_pretrained` made, in the run that is active.

    `mlflow.pyfunc.load_model` then gives a model that takes, for a `ResMemModule`, an array of inputs, and gives a data
    frame: `label` (the class's name, where it has one) and `probability`, or a column a target. For a
    `ResMemForCausalLM` it takes texts and gives what comes next, greedily; `max_new_tokens` is a parameter, 32 by
    default, or as many as the model has room for.

    Parameters
    ----------
    folder : that `save_pretrained` made; of a language model with its tokenizer.
    name : of the logged model.
    model : MODULE:FUNCTION that makes the architecture of a `ResMemModule`. Give the files that it is in as
        `code_paths`.
    options : of `mlflow.pyfunc.log_model`: `code_paths`, `input_example`, `signature`, `registered_model_name`, … Where
        no requirements are given they are this library's, of this version; MLflow does not guess any.

    Returns
    -------
    What MLflow says of it.

    Raises
    ------
    DataNotFound : if there is no such folder.
    InvalidInput : if the architecture is needed and not named, or a language model has no tokenizer.
    """
    saved = Saved.at(folder)
    if saved.kind == MODULE and not (model and re.fullmatch(r"[\w.]+:\w+", model)):
        raise InvalidInput(
            f"model is {model!r}, expected the function that makes the architecture, since {folder} holds weights "
            "alone; name it as model='MODULE:FUNCTION'"
        )
    if saved.kind == LANGUAGE:
        if not any(file.startswith(f"{BASE}/tokenizer") for file in saved.files):
            raise InvalidInput(f"{folder} holds no tokenizer; save it again with save_pretrained(…, tokenizer=…)")
        options = {"signature": _text_signature(), **options}
    if options.get("conda_env") is None and options.get("pip_requirements") is None:
        own = f"residual-memory[{EXTRAS[saved.kind]}]=={__version__}"
        options["pip_requirements"] = [own, *(options.pop("extra_pip_requirements", None) or [])]
    code = CODE.format(name=CLASSES[saved.kind].__name__, arguments=repr(model) if saved.kind == MODULE else "")
    with TemporaryDirectory() as place:
        file = Path(place) / "residual_memory_model.py"
        file.write_text(code, encoding="utf-8")
        return mlflow.pyfunc.log_model(
            name=name, python_model=str(file), artifacts={FOLDER: str(saved.path.resolve())}, **options
        )


def _text_signature() -> ModelSignature:
    text = Schema([ColSpec(DataType.string)])
    params = ParamSchema([ParamSpec("max_new_tokens", DataType.long, NEW_TOKENS)])
    return ModelSignature(inputs=text, outputs=text, params=params)


class ModuleModel(PythonModel):
    """A `ResMemModule` as MLflow calls it.

    Parameters
    ----------
    model : as in `log_model`.
    """

    def __init__(self, model: str) -> None:
        self._model = model

    def load_context(self, context: Any) -> None:
        self._answer = _of_module(_folder_of(context), self._model)

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> pd.DataFrame:
        del context, params
        return self._answer(model_input)


class LanguageModel(PythonModel):
    """A `ResMemForCausalLM` as MLflow calls it."""

    def load_context(self, context: Any) -> None:
        self._answer = _of_language_model(_folder_of(context))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        del context
        n_tokens = int((params or {}).get("max_new_tokens", NEW_TOKENS))
        return [self._answer(text, n_tokens) for text in model_input.iloc[:, 0]]


CLASSES: dict[str, type[PythonModel]] = {MODULE: ModuleModel, LANGUAGE: LanguageModel}


def _folder_of(context: Any) -> Path:
    return Path(context.artifacts[FOLDER])


def _of_module(folder: Path, reference: str) -> Callable[[Any], pd.DataFrame]:
    import torch

    from residual_memory.models.torch import ResMemModule

    place, _, name = reference.partition(":")
    module = ResMemModule.from_pretrained(folder, getattr(import_module(place), name)())
    names = module.memory.class_names

    def answer(inputs: Any) -> pd.DataFrame:
        examples = torch.from_numpy(_numbers(inputs))
        batches = (examples[start : start + BATCH] for start in range(0, max(len(examples), 1), BATCH))
        said = np.concatenate([module(batch).cpu().numpy() for batch in batches])
        if module.memory.layout.task == "regression":
            return pd.DataFrame(said, columns=[f"target_{target}" for target in range(said.shape[1])])
        labels = said.argmax(axis=1)
        shown = labels if names is None else [names[label] for label in labels]
        return pd.DataFrame({"label": shown, "probability": np.exp(said.max(axis=1))})

    return answer


def _numbers(inputs: Any) -> ndarray:
    """Inputs as an array: numbers with a point in single precision, as networks take them."""
    values = np.ascontiguousarray(inputs)
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def _of_language_model(folder: Path) -> Callable[[str, int], str]:
    from transformers import AutoTokenizer

    from residual_memory.models.transformers import ResMemForCausalLM

    lm = ResMemForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / BASE, local_files_only=True, trust_remote_code=False)

    def answer(text: str, n_tokens: int) -> str:
        prompt = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        length = 0 if lm.watch.decodes else prompt["input_ids"].shape[1]
        room = n_tokens if lm.watch.longest is None else min(n_tokens, lm.watch.longest - length)
        if room == 0:
            return ""
        made = lm.generate(**prompt, max_new_tokens=room, do_sample=False)
        return tokenizer.decode(made[0, length:], skip_special_tokens=True)

    return answer
