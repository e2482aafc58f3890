"""Models in MLflow: logged as code and files, loaded by a process that knows nothing, the same predictions."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residual_memory as rm
from residual_memory.errors import DataNotFound, InvalidInput
from residual_memory.models.torch import ResMemModule, build_memory
from tests.models.nets import Mlp, mlp_data, target_data, trained_a_little

mlflow = pytest.importorskip("mlflow", reason="mlflow missing: pip install mlflow-skinny")
transformers = pytest.importorskip("transformers", reason="transformers missing: pip install transformers")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers missing: pip install tokenizers")

from residual_memory.models.mlflow import log_model  # noqa: E402
from residual_memory.models.transformers import ResMemForCausalLM  # noqa: E402
from tests.models.test_pretrained_language import lm_of, words  # noqa: E402
from tests.models.texts import LONGEST  # noqa: E402

ARCHITECTURES = """
import torch
from torch import nn
from tests.models.nets import Mlp

def values():
    return Mlp(n_outputs=2)
"""
LOADING = """
import json, sys
import numpy as np
import mlflow

uris, inputs, texts = json.loads(sys.argv[1])
x = np.array(inputs, np.float32)
said = [mlflow.pyfunc.load_model(uri).predict(x).to_dict("list") for uri in uris[:2]]
lm = mlflow.pyfunc.load_model(uris[2])
print(json.dumps([*said, lm.predict(texts, params={"max_new_tokens": 4}), lm.predict(texts[:1])]))
"""


@dataclass(frozen=True)
class Logged:
    """Models, and what MLflow made of them."""

    classifier: ResMemModule
    regressor: ResMemModule
    lm: ResMemForCausalLM
    place: Path
    infos: tuple[Any, Any, Any]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    """Three models, logged to files by this process."""
    place = tmp_path_factory.mktemp("a place") / "of # runs"
    place.mkdir()
    torch.manual_seed(0)
    setting, data, targets = rm.Setting(n_neighbors=5), mlp_data(), target_data(n_outputs=2)
    net = trained_a_little(Mlp(), data.inputs)
    memory = build_memory(net, data, None, class_names=["oak", "elm", "ash"], verbose=False)
    classifier = ResMemModule(net, memory, setting=setting)
    net = trained_a_little(Mlp(n_outputs=2), targets.inputs)
    regressor = ResMemModule(net, build_memory(net, targets, None, verbose=False), setting=setting)
    lm = lm_of()
    classifier.save_pretrained(place / "classes")
    regressor.save_pretrained(place / "values")
    lm.save_pretrained(place / "text", tokenizer=words())
    (place / "architectures.py").write_text(ARCHITECTURES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.syspath_prepend(place)
        mlflow.set_tracking_uri((place / "runs").as_uri())
        with mlflow.start_run():
            infos = (
                log_model(place / "classes", "classes", model="tests.models.nets:Mlp"),
                log_model(
                    place / "values",
                    "values",
                    model="architectures:values",
                    code_paths=[str(place / "architectures.py")],
                    input_example=data.inputs[:2].numpy(),
                    extra_pip_requirements=["scipy"],
                ),
                log_model(place / "text", "text", input_example=["w3 w7"]),
            )
        for name in ("classes", "values", "text"):
            shutil.rmtree(place / name)
        (place / "architectures.py").unlink()
        yield Logged(classifier, regressor, lm, place, infos)


def test_a_fresh_process_says_the_same(logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders that were logged and the module of the architecture are gone by then."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (logged.place / "runs").as_uri())
    x, texts = mlp_data(7, seed=3).inputs, ["w3 w7 w11", "w5"]
    told = json.dumps([[info.model_uri for info in logged.infos], x.tolist(), texts])
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", LOADING, told], cwd=root, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    classes, values, four, more = json.loads(ended.stdout)
    expected = logged.classifier(x)
    names = logged.classifier.memory.class_names
    assert names is not None
    assert classes["label"] == [names[label] for label in expected.argmax(1)]
    np.testing.assert_array_equal(np.asarray(classes["probability"], np.float32), np.exp(expected.numpy()).max(1))
    np.testing.assert_array_equal(
        np.asarray([values["target_0"], values["target_1"]], np.float32).T, logged.regressor(x)
    )
    for text, said in zip(texts, four, strict=True):
        prompt = torch.tensor([words()(text).input_ids])
        made = logged.lm.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert said == words().decode(made[0, prompt.shape[1] :], skip_special_tokens=True)
    assert more[0].startswith(four[0])
    assert len(words()(more[0]).input_ids) == LONGEST - 3


def test_what_is_logged_is_files_and_says_what_it_needs(logged: Logged) -> None:
    made = [path for path in (logged.place / "runs").rglob("artifacts/**/*") if path.is_file()]
    assert len(made) > 20
    assert not [path for path in made if path.suffix in (".pkl", ".bin", ".pt")]
    assert not [path for path in made if b"\x80\x04\x95" in path.read_bytes()]
    requirements = [path for path in made if path.name == "requirements.txt"]
    needed = [
        next(path for path in requirements if info.model_id in path.parts).read_text().split() for info in logged.infos
    ]
    version = rm.__version__
    for lines, own in zip(
        needed,
        (
            [f"residual-memory[faiss,mlflow]=={version}"],
            [f"residual-memory[faiss,mlflow]=={version}", "scipy"],
            [f"residual-memory[faiss,mlflow,transformers]=={version}"],
        ),
        strict=True,
    ):
        assert [line for line in lines if not line.startswith("mlflow==")] == own


def test_a_signature_comes_from_the_example_and_texts_have_one_anyway(logged: Logged) -> None:
    _, values, text = logged.infos
    assert [(tuple(part.shape), part.type) for part in values.signature.inputs] == [((-1, 4), np.dtype("float32"))]
    assert values.signature.outputs.input_names() == ["target_0", "target_1"]
    assert [part.name for part in text.signature.params] == ["max_new_tokens"]


def test_what_cannot_be_loaded_is_not_logged(logged: Logged, tmp_path: Path) -> None:
    logged.classifier.save_pretrained(tmp_path / "classes")
    for model in (None, "Mlp", "nets:Mlp()", "nets:Mlp\n"):
        with pytest.raises(InvalidInput, match="name it as model='MODULE:FUNCTION'"):
            log_model(tmp_path / "classes", model=model)
    with pytest.raises(DataNotFound, match=r"resmem\.json"):
        log_model(tmp_path)
    logged.lm.save_pretrained(tmp_path / "bare")
    with pytest.raises(InvalidInput, match="holds no tokenizer"):
        log_model(tmp_path / "bare")
