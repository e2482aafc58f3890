"""A model with its memory in MLflow, as code and files, without a pickle: `log_model`, and what is run to load it."""

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from residual_memory.errors import InvalidInput, MissingExtra
from residual_memory.models.pretrained import kind_of

try:
    import mlflow
    import pandas as pd
    from mlflow.pyfunc.model import PythonModel
except ImportError as error:
    raise MissingExtra("logging to MLflow", "mlflow") from error

FOLDER = "folder"
CODE = Path(__file__).with_name("mlflow_code.py")


def log_model(
    folder: str | os.PathLike[str],
    name: str = "model",
    *,
    model: str | None = None,
    code_paths: Sequence[str] | None = None,
    **options: Any,
) -> Any:
    """Log what `save_pretrained` made, in the run that is active.

    Loaded by `mlflow.pyfunc.load_model`, a `ResMemModule` takes an array of inputs and gives a data frame with the
    columns `label` and `probability`, or a column a target; a `ResMemForCausalLM` takes texts and gives what comes next
    (`max_new_tokens` is a parameter).

    Parameters
    ----------
    folder : that `save_pretrained` made.
    name : of the logged model.
    model : MODULE:NAME of a function that makes the architecture, for a `ResMemModule`.
    code_paths : files and folders that its module is in; they are logged too.
    options : of `mlflow.pyfunc.log_model`.

    Returns
    -------
    What MLflow says of it.

    Raises
    ------
    InvalidInput : if the architecture is needed and not named.
    """
    if kind_of(folder) == "ResMemModule" and (model is None or ":" not in model):
        raise InvalidInput(f"{folder} holds weights alone, without their architecture; name it: model='MODULE:NAME'")
    return mlflow.pyfunc.log_model(
        name=name,
        python_model=str(CODE),
        artifacts={FOLDER: str(folder)},
        model_config={"model": model},
        code_paths=None if code_paths is None else list(code_paths),
        **options,
    )


class MemoryModel(PythonModel):
    """What MLflow calls: loads the folder, and answers."""

    def load_context(self, context: Any) -> None:
        folder = Path(context.artifacts[FOLDER])
        self._answer = (
            _text_model(folder)
            if kind_of(folder) == "ResMemForCausalLM"
            else _module(folder, context.model_config["model"])
        )

    def predict(self, context: Any, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        return self._answer(model_input, dict(params or {}))


def _module(folder: Path, reference: str) -> Any:
    import torch

    from residual_memory.models.torch import ResMemModule

    place, _, name = reference.partition(":")
    module = ResMemModule.from_pretrained(folder, getattr(import_module(place), name)())

    def answer(inputs: Any, _: Mapping[str, Any]) -> pd.DataFrame:
        batch = torch.from_numpy(np.asarray(inputs, np.float32))
        said = module(batch).cpu().numpy()
        if module.memory.layout.task == "regression":
            return pd.DataFrame(said, columns=[f"target_{place}" for place in range(said.shape[1])])
        labels = said.argmax(axis=1)
        names = module.memory.class_names
        return pd.DataFrame(
            {
                "label": labels if names is None else [names[label] for label in labels],
                "probability": np.exp(said.max(axis=1)),
            }
        )

    return answer


def _text_model(folder: Path) -> Any:
    import torch
    import transformers

    from residual_memory.models.pretrained import BASE
    from residual_memory.models.transformers import ResMemForCausalLM

    lm = ResMemForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / BASE, local_files_only=True)

    def answer(inputs: Any, params: Mapping[str, Any]) -> list[str]:
        texts = inputs.iloc[:, 0].tolist() if hasattr(inputs, "iloc") else list(inputs)
        found = []
        for text in texts:
            prompt = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
            made = lm.generate(prompt, max_new_tokens=int(params.get("max_new_tokens", 32)), do_sample=False)
            found.append(tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True))
        return found

    return answer
