import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional

from residual_memory.correction import ResidualKNN, correct, to_probabilities
from residual_memory.errors import DimensionMismatch, FingerprintMismatch, InSampleResiduals, InvalidInput
from residual_memory.evaluation import Setting
from residual_memory.memory import Memory
from residual_memory.models import watching
from residual_memory.models.base import Side
from residual_memory.models.torch import ResMemModule, Watch, build_memory, exportable, observe
from residual_memory.models.watching import captured, fingerprint, pooled
from residual_memory.residuals import temper
from tests import reference
from tests.models.nets import (
    CLASSIFIERS,
    REGRESSORS,
    ConvNet,
    Examples,
    Mlp,
    batches_seen,
    image_data,
    keys_of,
    mlp_data,
    outputs_of,
    rows_of,
    same_rows,
    target_data,
    trained_a_little,
)

ROOT = Path(__file__).parents[2]
ALL = {**CLASSIFIERS, **REGRESSORS}
SMALL = Setting(n_neighbors=5, bandwidth=0.7, temperature=1.5, shrinkage=0.6)


def build(model: nn.Module, data: Any, path: Path | None = None, **options: Any) -> Memory:
    return build_memory(model, data, path, **{"verbose": False, "batch_size": 4, **options})


def case(name: str) -> tuple[nn.Module, Examples]:
    """A network whose running statistics are used, in training mode, and its data."""
    make_model, make_data = ALL[name]
    data = make_data()
    return trained_a_little(make_model(), data.inputs), data


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def first_inputs(inputs: Tensor) -> Tensor:
    return inputs[:, :2] * 3


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError


class Calls(nn.Module):
    """Runs a function as a layer."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor) -> Any:
        return self._function(x)


# ---------------------------------------------------------------------- what a memory holds


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_leaves_keys_labels_and_probabilities(name: str, tmp_path: Path) -> None:
    model, data = case(name)
    memory = build(model, data, tmp_path / "memory")
    assert memory.layout.task == "classification"
    np.testing.assert_array_equal(memory.ids, np.arange(len(data)))
    np.testing.assert_array_equal(rows_of(memory, "labels"), data.labels)
    np.testing.assert_allclose(rows_of(memory, "keys"), keys_of(model, data.inputs), atol=1e-5)
    probabilities = outputs_of(model, data.inputs).softmax(1)
    np.testing.assert_allclose(rows_of(memory, "predictions"), probabilities, atol=1e-6)


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_regressor_leaves_keys_targets_and_values(name: str, tmp_path: Path) -> None:
    model, data = case(name)
    memory = build(model, data, tmp_path / "memory")
    assert memory.layout.task == "regression"
    np.testing.assert_array_equal(rows_of(memory, "labels"), data.labels.reshape(len(data), -1))
    np.testing.assert_allclose(rows_of(memory, "keys"), keys_of(model, data.inputs), atol=1e-6)
    np.testing.assert_allclose(rows_of(memory, "predictions"), outputs_of(model, data.inputs), atol=1e-6)


def test_one_output_without_an_axis_of_its_own_is_one_column() -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    data = target_data()
    memory = build(model, data)
    np.testing.assert_allclose(rows_of(memory, "predictions")[:, 0], outputs_of(model, data.inputs), atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
@pytest.mark.parametrize("name", ALL)
def test_the_batch_size_changes_nothing_beyond_rounding(name: str, batch_size: int) -> None:
    model, data = case(name)
    same_rows(build(model, data, batch_size=batch_size), build(model, data), atol=1e-5)


def test_workers_change_nothing(tmp_path: Path) -> None:
    model, data = case("mlp")
    same_rows(build(model, data, num_workers=1), build(model, data))


def test_integer_targets_are_values_where_the_task_says_so() -> None:
    data = mlp_data()
    memory = build(Mlp(n_outputs=1), data, task="regression")
    np.testing.assert_array_equal(rows_of(memory, "labels")[:, 0], data.labels)


@pytest.mark.parametrize(
    ("outputs", "last"),
    [("logits", nn.Identity()), ("probabilities", nn.Softmax(1)), ("log-probabilities", nn.LogSoftmax(1))],
)
def test_logits_probabilities_and_log_probabilities_leave_the_same_rows(outputs: str, last: nn.Module) -> None:
    model, data = case("mlp")
    told = build(nn.Sequential(model, last), data, outputs=outputs)
    same_rows(told, build(model, data), atol=1e-6)


def test_room_is_left_for_classes_that_the_model_never_saw() -> None:
    memory = build(Mlp(), mlp_data(), n_outputs=5)
    predictions = rows_of(memory, "predictions")
    assert predictions.shape == (20, 5)
    assert not predictions[:, 3:].any()


def test_class_names_are_those_of_the_data() -> None:
    data = mlp_data()
    data.classes = ["cat", "dog", "owl"]  # type: ignore[attr-defined]
    assert build(Mlp(), data).class_names == ("cat", "dog", "owl")
    assert build(Mlp(), data, class_names="abc").class_names == ("a", "b", "c")


def test_cosine_and_half_precision_are_passed_on() -> None:
    memory = build(Mlp(), mlp_data(), metric="cosine", key_dtype="float16", prediction_dtype="float16")
    assert (memory.layout.metric, memory.layout.key_dtype, memory.layout.prediction_dtype) == (
        "cosine",
        "float16",
        "float16",
    )
    np.testing.assert_allclose(np.linalg.norm(rows_of(memory, "keys").astype(float), axis=1), 1, atol=1e-3)


# ---------------------------------------------------------------------- layers


@pytest.mark.parametrize(("name", "said"), [("mlp", "6"), ("conv", "5"), ("resnet", "64")])
def test_the_default_layer_is_the_input_of_the_last_linear_and_it_says_so(
    name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = case(name)
    build(model, data, verbose=True)
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"keys: input of 'head', {said} numbers\n")


def test_nothing_is_said_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    build(Mlp(), mlp_data())
    assert capsys.readouterr() == ("", "")


def test_the_last_linear_is_the_one_that_runs_last_not_the_one_defined_last() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(6, 3)
            self.first = nn.Linear(4, 6)
            self.unused = nn.Linear(9, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.first(x))

    model, data = Backwards(), mlp_data()
    memory = build(model, data)
    assert memory.source is not None
    assert memory.source["layer"] == "out"
    np.testing.assert_allclose(rows_of(memory, "keys"), model.first(data.inputs).detach(), atol=1e-6)


def test_a_model_without_a_linear_needs_a_named_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten())
    with pytest.raises(InvalidInput, match="runs no Linear, so the layer must be named; its parts are: 0, 1"):
        build(model, image_data())
    assert build(model, image_data(), layer="1").layout.dim == 3


@pytest.mark.parametrize(
    ("layer", "side", "expected"),
    [
        ("body.0", "input", lambda model, x: x),
        ("body.0", "output", lambda model, x: model.body[0](x)),
        ("body.1", "output", lambda model, x: model.body[1](model.body[0](x))),
        ("body", "output", lambda model, x: model.body(x)),
        ("head", "output", lambda model, x: model(x)),
    ],
)
def test_keys_come_from_the_named_side_of_the_named_layer(layer: str, side: str, expected: Any) -> None:
    model, data = case("mlp")
    memory = build(model, data, layer=layer, side=side)
    with torch.no_grad():
        wanted = expected(model.eval(), data.inputs)
    np.testing.assert_allclose(rows_of(memory, "keys"), wanted, atol=1e-6)


@pytest.mark.parametrize(("layer", "side"), [("body.0", "output"), ("body.1", "input")])
def test_a_layer_that_works_in_place_does_not_spoil_the_keys(layer: str, side: str) -> None:
    model = Mlp()
    model.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True))
    data = mlp_data()
    keys = rows_of(build(model, data, layer=layer, side=side), "keys")
    np.testing.assert_allclose(keys, model.body[0](data.inputs).detach(), atol=1e-6)


def test_a_function_of_the_inputs_gives_keys() -> None:
    data = mlp_data()
    memory = build(Mlp(), data, layer=first_inputs)
    np.testing.assert_array_equal(rows_of(memory, "keys"), first_inputs(data.inputs))
    assert memory.source is not None
    assert memory.source["layer"] == f"{__name__}:first_inputs"


def test_a_function_that_uses_the_model_finds_it_in_eval_mode() -> None:
    model, data = case("mlp")
    assert isinstance(model, Mlp)
    body = model.body
    keys = rows_of(build(model, data, layer=lambda x: body(x)), "keys")
    np.testing.assert_allclose(keys, keys_of(model, data.inputs), atol=1e-6)


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_feature_maps_are_averaged_to_pool_by_pool_cells(pool: int) -> None:
    model, data = case("conv")
    memory = build(model, data, layer="features", side="output", pool=pool)
    assert isinstance(model, ConvNet)
    with torch.no_grad():
        maps = model.eval().features(data.inputs).numpy()
    cells = maps.reshape(len(data), 5, pool, 8 // pool, pool, 8 // pool).mean((3, 5))
    np.testing.assert_allclose(rows_of(memory, "keys"), cells.reshape(len(data), -1), atol=1e-6)


def test_sequences_are_averaged_over_time_and_volumes_over_space() -> None:
    random = np.random.default_rng(0)
    sequence, volume = random.normal(size=(2, 7, 3)), random.normal(size=(2, 3, 4, 4, 4))
    np.testing.assert_allclose(pooled(torch.from_numpy(sequence), 1), sequence.mean(1), atol=1e-6)
    np.testing.assert_allclose(pooled(torch.from_numpy(volume), 1), volume.mean((2, 3, 4)), atol=1e-6)
    assert pooled(torch.from_numpy(volume), 2).shape == (2, 24)


@pytest.mark.parametrize("shape", [(3,), (1, 1, 1, 1, 1, 1)])
def test_other_shapes_give_no_keys(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="expected a batch of vectors or maps"):
        pooled(torch.zeros(shape), 1)


@pytest.mark.parametrize(
    ("wrong", "close"), [("haed", "'head'"), ("body.9", "'body.[0-3]'"), ("nothing like it", "'head'")]
)
def test_a_wrong_layer_name_suggests_the_close_one(wrong: str, close: str) -> None:
    with pytest.raises(InvalidInput, match=f"no layer '{wrong}'; did you mean.*{close}"):
        build(Mlp(), mlp_data(), layer=wrong)


@pytest.mark.parametrize(("layer", "times"), [("twice", 2), ("never", 0)])
def test_a_layer_that_does_not_run_exactly_once_is_refused(layer: str, times: int) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.never, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.twice(self.twice(x)))

    model = Odd()
    with pytest.raises(InvalidInput, match=f"the layer '{layer}' ran {times} times"):
        build(model, mlp_data(), layer=layer)
    assert n_hooks(model) == 0


@pytest.mark.parametrize(
    ("option", "value"), [("side", "inside"), ("outputs", "scores"), ("pool", 0), ("batch_size", 0), ("n_outputs", 0)]
)
@pytest.mark.usefixtures("unchecked")
def test_options_that_mean_nothing_are_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=f"{option} is {value!r}"):
        build(Mlp(), mlp_data(), **{option: value})


def test_a_layer_without_a_tensor_is_refused() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.name, self.head = Calls(lambda x: "words"), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.name(x)
            return self.head(x)

    with pytest.raises(InvalidInput, match="passes a str without a tensor"):
        build(Words(), mlp_data(), layer="name", side="output")


# ---------------------------------------------------------------------- the model is left as it was


def partly_frozen() -> Mlp:
    """A model in training mode, one of whose parts is not."""
    model = Mlp().train()
    model.body[1].eval()
    return model


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_eval_mode_is_forced_and_every_module_gets_its_own_back() -> None:
    model = partly_frozen()
    seen: list[dict[str, bool]] = []
    model.head.register_forward_hook(lambda *_: seen.append(modes(model)))
    before, digest = modes(model), fingerprint(model)
    build(model, mlp_data())
    assert seen
    assert not any(any(mode.values()) for mode in seen)
    assert modes(model) == before
    assert fingerprint(model) == digest


def test_eval_mode_and_hooks_are_put_back_after_an_error_in_the_model() -> None:
    model = partly_frozen()
    model.body.append(Fails())
    before = modes(model)
    for layer in ("head", None):
        with pytest.raises(ZeroDivisionError):
            build(model, mlp_data(), layer=layer)
        assert modes(model) == before
        assert n_hooks(model) == 0


def test_eval_mode_and_hooks_are_put_back_after_an_error_in_the_data() -> None:
    model, before = partly_frozen(), modes(partly_frozen())
    data = mlp_data()
    data.fails_at, data.error = 13, ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        build(model, data)
    assert modes(model) == before
    assert n_hooks(model) == 0


def test_no_gradient_is_kept_and_no_hook_is_left() -> None:
    model = Mlp()
    memory = build(model, mlp_data())
    outputs = ResMemModule(model, memory, setting=SMALL)(mlp_data().inputs)
    assert not outputs.requires_grad
    assert n_hooks(model) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_autocast_computes_in_bfloat16_and_leaves_valid_rows() -> None:
    model, data = case("mlp")
    seen: list[torch.dtype] = []
    handle = model.get_submodule("head").register_forward_hook(lambda *parts: seen.append(parts[2].dtype))
    memory, plain = build(model, data, autocast=torch.bfloat16), build(model, data)
    handle.remove()
    assert set(seen) == {torch.bfloat16, torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    keys, exact = rows_of(memory, "keys"), rows_of(plain, "keys")
    assert keys.dtype == np.float32
    assert 0 < np.abs(keys - exact).max() < 0.05
    np.testing.assert_allclose(rows_of(memory, "predictions").sum(1), 1, atol=1e-6)


# ---------------------------------------------------------------------- what models take and give


class Gives(nn.Module):
    """An MLP whose output is wrapped."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.inner, self._wrap = Mlp(), wrap

    def forward(self, x: Tensor) -> Any:
        return self._wrap(self.inner(x), x)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits, x: SimpleNamespace(loss=x, logits=logits),
        lambda logits, x: (logits, x),
        lambda logits, x: [logits, x],
        lambda logits, x: {"logits": logits, "hidden": x},
    ],
    ids=["object", "tuple", "list", "dict"],
)
def test_logits_are_found_in_what_a_model_gives(wrap: Any) -> None:
    model, data = Gives(wrap), mlp_data()
    memory = build(model, data)
    assert memory.source is not None
    assert memory.source["layer"] == "inner.head"
    np.testing.assert_allclose(
        rows_of(memory, "predictions"), outputs_of(model.inner, data.inputs).softmax(1), atol=1e-6
    )


def test_outputs_of_more_axes_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"the model's output has shape \(1, 2, 3\)"):
        build(nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3))), mlp_data())


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(left + 2 * right)


@pytest.mark.parametrize("pack", [lambda a, b: {"right": b, "left": a}, lambda a, b: (a, b)], ids=["dict", "tuple"])
def test_several_inputs_go_by_name_or_by_place(pack: Any) -> None:
    left, right = torch.randn(20, 4), torch.randn(20, 4)
    model, data = Sums(), Examples(pack(left, right), torch.arange(20) % 3)
    memory = build(model, data)
    np.testing.assert_allclose(rows_of(memory, "keys"), left + 2 * right, atol=1e-6)
    corrected = ResMemModule(model, memory, setting=SMALL)
    assert corrected(pack(left[:5], right[:5])).shape == (5, 3)


def test_keys_are_found_in_keyword_arguments() -> None:
    class Keyword(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(input=self.body(x))

    model, data = Keyword(), mlp_data()
    memory = build(model, data, layer="head")
    np.testing.assert_allclose(rows_of(memory, "keys"), keys_of(model, data.inputs), atol=1e-6)


# ---------------------------------------------------------------------- data


class Augmented(Examples):
    def __getitem__(self, row: int) -> tuple[Any, Tensor]:
        x, y = super().__getitem__(row)
        return x + torch.rand_like(x), y


def test_random_augmentation_is_refused() -> None:
    with pytest.raises(InvalidInput, match="switch random augmentation off"):
        build(Mlp(), Augmented(torch.zeros(20, 4), torch.arange(20) % 3))


def test_an_empty_data_set_is_refused() -> None:
    empty = Examples(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    model = Mlp()
    with pytest.raises(InvalidInput, match="empty"):
        build(model, empty)
    with pytest.raises(InvalidInput, match="empty"):
        observe(model, empty, build(model, mlp_data()), verbose=False)


def test_items_that_are_no_pairs_are_refused() -> None:
    class Triples(Examples):
        def __getitem__(self, row: int) -> Any:
            return (*super().__getitem__(row), 1)

    with pytest.raises(InvalidInput, match=r"expected a pair \(x, y\)"):
        build(Mlp(), Triples(torch.zeros(20, 4), torch.arange(20)))


@pytest.mark.parametrize("label", [3, -1])
def test_labels_beyond_the_classes_are_refused(label: int) -> None:
    data = mlp_data()
    data.labels[7] = label
    with pytest.raises(InvalidInput, match="labels"):
        build(Mlp(), data)


def test_labels_of_a_class_that_the_model_never_saw_are_taken_where_there_is_room() -> None:
    data = mlp_data()
    data.labels[7] = 4
    assert rows_of(build(Mlp(), data, n_outputs=5), "labels")[7] == 4


def test_out_of_fold_predictions_are_kept_in_place_of_the_models_own() -> None:
    model, data = case("mlp")
    told = np.random.default_rng(0).dirichlet(np.ones(3), len(data))
    memory = build(model, data, predictions=told)
    np.testing.assert_allclose(rows_of(memory, "predictions"), told, atol=1e-7)
    np.testing.assert_allclose(rows_of(memory, "keys"), keys_of(model, data.inputs), atol=1e-6)


@pytest.mark.parametrize(
    ("told", "error", "said"),
    [
        (np.full((19, 3), 1 / 3), DimensionMismatch, "19 out-of-fold predictions for 20 examples"),
        (np.full((20, 3), 0.5), InvalidInput, "sums to 1.5"),
        (np.full((20, 3), np.nan), InvalidInput, "nan"),
        (np.tile([1.5, -0.5, 0.0], (20, 1)), InvalidInput, "expected probabilities"),
    ],
)
def test_out_of_fold_predictions_are_checked_before_the_pass(
    told: ndarray, error: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        build(Mlp(), mlp_data(), tmp_path / "memory", predictions=told)
    assert not (tmp_path / "memory").exists()


class ByHeart(nn.Module):
    """Gives the label that stands in its input, surely."""

    def __init__(self, sureness: float) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight.data = sureness * torch.eye(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def told_labels(wrong: int = 0) -> Examples:
    labels = torch.arange(30) % 3
    return Examples(functional.one_hot((labels + (torch.arange(30) < wrong)) % 3, 3).float(), labels)


def test_a_base_that_knows_its_data_by_heart_is_warned_about() -> None:
    with pytest.warns(InSampleResiduals, match="knows them by heart"):
        build(ByHeart(20), told_labels())


def test_a_base_that_does_much_better_on_its_own_data_than_on_held_out_data_is_warned_about() -> None:
    with pytest.warns(InSampleResiduals, match="on held-out data"):
        build(ByHeart(3), told_labels(), held_out=told_labels(wrong=15))


def test_a_base_that_does_as_well_on_held_out_data_is_not() -> None:
    assert len(build(ByHeart(3), told_labels(wrong=4), held_out=told_labels(wrong=6))) == 30


def test_out_of_fold_predictions_answer_the_warning() -> None:
    assert len(build(ByHeart(20), told_labels(), predictions=np.full((30, 3), 1 / 3))) == 30


# ---------------------------------------------------------------------- interruptions and reopening


def test_rows_seen_before_an_interruption_are_on_disk(tmp_path: Path) -> None:
    data = mlp_data()
    data.fails_at = 13
    with pytest.raises(KeyboardInterrupt):
        build(Mlp(), data, tmp_path / "memory")
    found = Memory.open(tmp_path / "memory")
    np.testing.assert_array_equal(found.ids, np.arange(12))
    assert found.source is not None
    assert not found.source["complete"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("gone")])
def test_an_interrupted_build_goes_on_where_it_was(error: BaseException, tmp_path: Path) -> None:
    model, data = case("mlp")
    data.fails_at, data.error = 13, error
    with pytest.raises(type(error)):
        build(model, data, tmp_path / "memory")
    data.fails_at = None
    seen = batches_seen(model)
    memory = build(model, data, tmp_path / "memory")
    assert seen[-2:] == [4, 4]  # rows 12 … 19
    assert set(seen[:-2]) <= {1}  # item 0, to find the layer and the shapes
    assert memory.source is not None
    assert memory.source["complete"]
    same_rows(memory, build(model, data), atol=1e-6)


SLOW_BUILD = """
import sys, torch
from residual_memory.models import base
from residual_memory.models.torch import build_memory
from tests.models.nets import Mlp, mlp_data
base.COMMIT_SECONDS = 0.0
torch.manual_seed(5)
torch.set_num_threads(1)
data = mlp_data()
data.seconds_each = 0.05
build_memory(Mlp(), data, sys.argv[1], batch_size=2, verbose=False)
"""


def test_a_build_that_was_killed_goes_on_and_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    child = subprocess.Popen([sys.executable, "-c", SLOW_BUILD, str(path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not (path / "manifest.json").exists() or len(Memory.open(path)) < 4:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert 4 <= len(Memory.open(path)) < 20
    torch.manual_seed(5)
    model = Mlp()
    with build(model, mlp_data(), path, batch_size=2) as memory:
        same_rows(memory, build(model, mlp_data(), batch_size=2), atol=1e-6)
        assert memory.verify().ok


def test_a_finished_build_is_opened_without_running_the_model_over_the_data(tmp_path: Path) -> None:
    model, data = Mlp(), mlp_data()
    first = build(model, data, tmp_path / "memory")
    first.close()
    seen, version = batches_seen(model), first.version
    data.fails_at = 1
    again = build(model, data, tmp_path / "memory")
    assert set(seen) <= {1}  # item 0, to find the layer and the shapes
    assert again.version == version
    same_rows(again, first)


def test_a_memory_built_from_scratch_can_be_forgotten_from_and_is_not_filled_up_again(tmp_path: Path) -> None:
    model, data = Mlp(), mlp_data()
    with build(model, data, tmp_path / "memory") as memory:
        memory.forget([3])
    with build(model, data, tmp_path / "memory") as memory:
        assert 3 not in memory.ids


def another_weight(model: Mlp) -> Mlp:
    model.head.weight.data[0, 0] += 1e-3
    return model


@pytest.fixture
def built(tmp_path: Path) -> tuple[Mlp, Path]:
    model = Mlp().eval()
    build(model, mlp_data(), tmp_path / "memory").close()
    return model, tmp_path / "memory"


@pytest.mark.parametrize(
    ("name", "change", "data", "options"),
    [
        ("model", another_weight, mlp_data(), {}),
        ("layer", lambda model: model, mlp_data(), {"layer": "body.0"}),
        ("layer", lambda model: model, mlp_data(), {"layer": first_inputs}),
        ("side", lambda model: model, mlp_data(), {"layer": "head", "side": "output"}),
        ("pool", lambda model: model, mlp_data(), {"pool": 2}),
        ("data", lambda model: model, mlp_data(n=21), {}),
        ("data", lambda model: model, mlp_data(seed=1), {}),
    ],
    ids=["weights", "layer", "function", "side", "pool", "number of rows", "first item"],
)
def test_a_memory_of_something_else_is_refused_and_stays_as_it_is(
    built: tuple[Mlp, Path], name: str, change: Any, data: Examples, options: dict[str, Any]
) -> None:
    model, path = built
    version = Memory.open(path).version
    with pytest.raises(FingerprintMismatch, match=f"was built with {name}"):
        build(change(model), data, path, **options)
    with Memory.open(path, writable=True) as memory:  # not left locked
        assert memory.version == version


def test_a_memory_filled_by_hand_is_not_taken_for_a_build(tmp_path: Path) -> None:
    Memory.create(tmp_path / "memory", dim=6, n_outputs=3).close()
    with pytest.raises(InvalidInput, match="not built from a model"):
        build(Mlp(), mlp_data(), tmp_path / "memory")


@pytest.mark.parametrize("use", [ResMemModule, lambda model, memory: observe(model, mlp_data(), memory), exportable])
def test_another_model_is_refused_wherever_a_memory_is_used(built: tuple[Mlp, Path], use: Any) -> None:
    model, path = built
    memory = Memory.open(path)
    with pytest.raises(FingerprintMismatch, match="built with model"):
        use(another_weight(model), memory)


@pytest.mark.parametrize(
    "use", [ResMemModule, lambda model, memory, layer: observe(model, mlp_data(), memory, layer=layer, verbose=False)]
)
def test_another_layer_is_refused_wherever_a_memory_is_used(built: tuple[Mlp, Path], use: Any) -> None:
    model, path = built
    for layer in (first_inputs, "body.0"):
        with pytest.raises(FingerprintMismatch, match="built with layer 'head'"):
            use(model, Memory.open(path), layer=layer)


@pytest.mark.parametrize("use", [ResMemModule, lambda model, memory: observe(model, mlp_data(), memory)])
def test_a_memory_whose_keys_come_from_a_function_asks_for_it(use: Any) -> None:
    model = Mlp()
    memory = build(model, mlp_data(), layer=first_inputs)
    with pytest.raises(InvalidInput, match=r"first_inputs.*pass"):
        use(model, memory)


def test_the_fingerprint_sees_every_value_of_a_small_model_and_a_buffer_too() -> None:
    model = Mlp()
    digests = [fingerprint(model)["sha256"]]
    for tensor in model.state_dict().values():
        tensor.view(-1)[-1] += 1
        digests.append(fingerprint(model)["sha256"])
    assert len(set(digests)) == len(digests)
    assert fingerprint(model)["class"] == "tests.models.nets.Mlp"


def test_the_fingerprint_of_a_large_model_samples_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "FULLY_HASHED", 0)
    monkeypatch.setattr(watching, "HASHED_SAMPLE", 3)
    model = nn.Linear(5, 5)
    before = fingerprint(model)
    model.bias.data[1] += 1  # 0, 2 and 4 are the sample
    assert fingerprint(model) == before
    model.bias.data[4] += 1
    assert fingerprint(model) != before


# ---------------------------------------------------------------------- corrected predictions


def reference_forward(memory: Memory, keys: ndarray, said: ndarray, setting: Setting) -> ndarray:
    """The whole method in plain numpy, from the rows of the memory."""
    stored, labels, predictions = (rows_of(memory, name) for name in ("keys", "labels", "predictions"))
    classes = labels.dtype.kind == "i"
    rest = reference.residuals(labels, predictions, setting.temperature) if classes else labels - predictions
    residual = reference.correction(stored, rest, keys, setting.n_neighbors, float(setting.bandwidth), setting.kernel)
    if not classes:
        return said + setting.shrinkage * residual
    base = reference.tempered(said, setting.temperature)
    positive = np.maximum(base + setting.shrinkage * residual, 0.1 * base)
    return np.log(positive / positive.sum(axis=1, keepdims=True))


@pytest.mark.parametrize(
    "setting", [SMALL, Setting(3, 0.2), Setting(20, 5.0, 0.8, 1.0, "gaussian"), Setting(4, 1.0, 2.0, 0.3, "uniform")]
)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_corrected_classifier_gives_the_logarithm_of_the_formula(name: str, setting: Setting) -> None:
    model, data = case(name)
    memory = build(model, data)
    setting = Setting(**{**setting.to_dict(), "n_neighbors": min(setting.n_neighbors, len(data))})
    queries = CLASSIFIERS[name][1]().inputs.flip(0) * 0.9
    given = ResMemModule(model, memory, setting=setting)(queries)
    probabilities = outputs_of(model, queries).double().softmax(1).numpy()
    wanted = reference_forward(memory, keys_of(model, queries).numpy(), probabilities, setting)
    assert given.dtype == torch.float32
    np.testing.assert_allclose(given, wanted, atol=2e-4)
    np.testing.assert_allclose(given.exp().sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_corrected_regressor_gives_the_values_of_the_formula(name: str) -> None:
    model, data = case(name)
    memory = build(model, data)
    queries = mlp_data(seed=7).inputs
    setting = Setting(n_neighbors=5, bandwidth=0.7, shrinkage=0.6)
    given = ResMemModule(model, memory, setting=setting)(queries)
    wanted = reference_forward(memory, keys_of(model, queries).numpy(), outputs_of(model, queries).numpy(), setting)
    np.testing.assert_allclose(given, wanted, atol=1e-5)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_shrinkage_zero_is_the_log_softmax_of_the_base(name: str) -> None:
    model, data = case(name)
    given = ResMemModule(model, build(model, data), setting=Setting(5, 1.0, shrinkage=0.0))(data.inputs)
    np.testing.assert_allclose(given, outputs_of(model, data.inputs).log_softmax(1), atol=1e-5)


@pytest.mark.parametrize("name", REGRESSORS)
def test_shrinkage_zero_is_the_value_of_the_base(name: str) -> None:
    model, data = case(name)
    given = ResMemModule(model, build(model, data), setting=Setting(5, 1.0, shrinkage=0.0))(data.inputs)
    assert torch.equal(given, Watch(model, "head").run(data.inputs)[0])


def test_one_neighbor_and_full_trust_give_the_label_of_a_stored_example() -> None:
    model, data = case("mlp")
    memory = build(model, data, layer="body.0", side="input")
    given = ResMemModule(model, memory, setting=Setting(1, 1.0))(data.inputs)
    base = outputs_of(model, data.inputs).double().softmax(1).numpy()
    floored = np.maximum(np.eye(3)[data.labels.numpy()], 0.1 * base)
    np.testing.assert_allclose(given.exp(), floored / floored.sum(1, keepdims=True), atol=1e-5)


def test_the_explanation_sums_to_the_correction() -> None:
    model, data = case("mlp")
    module = ResMemModule(model, build(model, data), setting=SMALL)
    report = module.explain(data.inputs[:6])
    assert report.contributions.shape == (6, 5, 3)
    base = temper(outputs_of(model, data.inputs[:6]).softmax(1).numpy(), SMALL.temperature)
    np.testing.assert_allclose(base + report.contributions.sum(1), report.corrected, atol=1e-6)
    logarithms = np.log(to_probabilities(report.corrected, base))
    np.testing.assert_allclose(module(data.inputs[:6]), logarithms, atol=1e-5)
    np.testing.assert_array_equal(report.ids[:, 0], np.arange(6))


def test_the_setting_saved_in_the_memory_is_used_also_after_reopening(tmp_path: Path) -> None:
    model, data = case("mlp")
    with build(model, data, tmp_path / "memory") as memory:
        memory.save_setting(SMALL.to_dict())
    opened = ResMemModule(model, Memory.open(tmp_path / "memory"))
    assert opened.setting == SMALL
    told = ResMemModule(model, memory, setting=SMALL)
    assert torch.equal(opened(data.inputs), told(data.inputs))
    assert ResMemModule(model, memory, setting=Setting(2)).setting == Setting(2)


def test_without_a_saved_setting_it_is_the_papers() -> None:
    model, data = Mlp(), mlp_data(n=60)
    assert ResMemModule(model, build(model, data)).setting == Setting()


def test_forward_follows_append_and_forget() -> None:
    model, data = case("mlp")
    memory = build(model, data, layer="body.0")
    module = ResMemModule(model, memory, setting=Setting(1, 1.0))
    query = torch.full((1, 4), 9.0)
    before = module(query)
    (added,) = memory.append(np.full((1, 4), 9.0), [2], [[0.5, 0.5, 0.0]])
    assert module.explain(query).ids[0, 0] == added
    assert module(query)[0].argmax() == 2
    assert not torch.equal(module(query), before)
    memory.forget([added])
    assert torch.equal(module(query), before)


def test_a_memory_filled_by_hand_takes_layer_side_and_pool() -> None:
    model, data = case("conv")
    built = build(model, data, layer="features", side="output", pool=2)
    memory = Memory.create(dim=20, n_outputs=3)
    memory.append(*(rows_of(built, name) for name in ("keys", "labels", "predictions")))
    by_hand = ResMemModule(model, memory, setting=SMALL, layer="features", side="output", pool=2)
    assert torch.equal(by_hand(data.inputs), ResMemModule(model, built, setting=SMALL)(data.inputs))


def test_a_class_that_the_base_never_saw_can_be_predicted() -> None:
    model, data = case("mlp")
    memory = build(model, data, layer="body.0", n_outputs=4)
    memory.append(np.full((1, 4), 9.0), [3], [[1.0, 0.0, 0.0]])
    given = ResMemModule(model, memory, setting=Setting(1, 1.0))(torch.full((1, 4), 9.0))
    assert given.shape == (1, 4)
    assert given[0].argmax() == 3


def test_the_corrected_model_leaves_modes_alone() -> None:
    model = partly_frozen()
    module = ResMemModule(model, build(model, mlp_data()), setting=SMALL)
    before = modes(module)
    module(mlp_data().inputs)
    assert modes(module) == before
    assert any(before.values())


def test_recomputing_predictions_from_keys_through_the_head_equals_the_stored_ones() -> None:
    model, data = case("mlp")
    assert isinstance(model, Mlp)
    memory = build(model, data)
    with torch.no_grad():
        logits = model.head(torch.from_numpy(rows_of(memory, "keys")))
    np.testing.assert_allclose(rows_of(memory, "predictions"), logits.softmax(1), atol=1e-6)
    stored = temper(rows_of(memory, "predictions"), SMALL.temperature)
    np.testing.assert_allclose(stored, (logits / SMALL.temperature).softmax(1), atol=1e-6)
    recomputed = Memory.create(dim=6, n_outputs=3)
    recomputed.append(rows_of(memory, "keys"), rows_of(memory, "labels"), logits.softmax(1).numpy())
    queries = rows_of(memory, "keys")[::2] + 0.1
    np.testing.assert_allclose(SMALL.knn(recomputed)(queries), SMALL.knn(memory)(queries), atol=1e-6)


# ---------------------------------------------------------------------- observe


@pytest.mark.parametrize("name", ALL)
def test_observing_the_memorys_own_data_gives_the_memorys_rows(name: str) -> None:
    model, data = case(name)
    memory = build(model, data)
    seen = observe(model, data, memory, batch_size=3, verbose=False)
    np.testing.assert_array_equal(seen.ids, memory.ids)
    np.testing.assert_array_equal(seen.labels.reshape(len(data), -1), rows_of(memory, "labels").reshape(len(data), -1))
    np.testing.assert_allclose(seen.keys, rows_of(memory, "keys"), atol=1e-5)
    np.testing.assert_allclose(seen.predictions, rows_of(memory, "predictions"), atol=1e-5)  # type: ignore[arg-type]


def test_observations_are_what_prediction_uses() -> None:
    model, data = case("conv")
    memory = build(model, data, layer="features", side="output", pool=2)
    held_out = image_data(seed=1)
    seen = observe(model, held_out, memory, verbose=False)
    base = temper(seen.predictions, SMALL.temperature)  # type: ignore[arg-type]
    scores = correct(base, SMALL.knn(memory)(seen.keys), SMALL.shrinkage)
    given = ResMemModule(model, memory, setting=SMALL)(held_out.inputs)
    np.testing.assert_allclose(given, np.log(to_probabilities(scores, base)), atol=1e-5)


def test_observing_with_a_function_needs_the_function_again() -> None:
    model, data = case("mlp")
    memory = build(model, data, layer=first_inputs)
    seen = observe(model, data, memory, layer=first_inputs, verbose=False)
    np.testing.assert_array_equal(seen.keys, first_inputs(data.inputs))


# ---------------------------------------------------------------------- threads


def in_threads(*jobs: Callable[[], Any]) -> list[Any]:
    """Results of jobs that run at the same time; an error in one is raised here."""
    results: list[Any] = [None] * len(jobs)

    def work(place: int) -> None:
        try:
            results[place] = jobs[place]()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("layer", ["1", None])
def test_two_threads_with_one_model_do_not_mix_keys(layer: str | None) -> None:
    barrier = threading.Barrier(2, timeout=10)

    def meet(x: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            barrier.wait()  # both threads have their hooks in place
        return x

    model = nn.Sequential(Calls(meet), nn.Linear(4, 3)).eval()
    watch = Watch(model, layer)
    watch.run(torch.zeros(1, 4))
    ones, twos = torch.ones(2, 4), torch.full((3, 4), 2.0)
    (_, first), (_, second) = in_threads(lambda: watch.run(ones), lambda: watch.run(twos))
    assert torch.equal(first, ones)
    assert torch.equal(second, twos)
    assert n_hooks(model) == 0


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_thread_may_stop_watching_while_another_one_is_at_the_layer(side: Side) -> None:
    there, gone = threading.Event(), threading.Event()

    def wait(*_arguments: Any) -> None:
        there.set()
        assert gone.wait(10)

    layer = nn.Linear(4, 3)
    layer.register_forward_pre_hook(wait) if side == "input" else layer.register_forward_hook(wait)

    def stop() -> None:
        with captured(layer, side) as caught:
            started.set()
            assert there.wait(10)  # torch has listed the hooks that it will call
        gone.set()
        assert not caught

    def run() -> Tensor:
        assert started.wait(10)
        return layer(torch.ones(2, 4))

    started = threading.Event()
    assert in_threads(stop, run)[1].shape == (2, 3)


def test_a_thread_that_is_done_does_not_switch_another_ones_model_to_training() -> None:
    inside, done = threading.Event(), threading.Event()

    def wait(x: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            if len(x) == 1:  # the thread that came first leaves once the other one is inside
                started.set()
                assert inside.wait(10)
            else:
                inside.set()
                assert done.wait(10)
        return x

    started = threading.Event()
    model = nn.Sequential(Calls(wait), nn.Dropout(0.9), nn.Linear(4, 3)).train()
    watch = Watch(model, "2")

    def first() -> None:
        watch.run(torch.ones(1, 4))
        done.set()

    def second() -> Tensor:
        assert started.wait(10)
        return watch.run(torch.ones(2, 4))[1]

    keys = in_threads(first, second)[1]
    assert torch.equal(keys, torch.ones(2, 4))
    assert all(modes(model).values())


# ---------------------------------------------------------------------- export


def exported_cases() -> list[Any]:
    options: list[tuple[str, dict[str, Any]]] = [
        ("mlp", {}),
        ("mlp", {"layer": "body.0", "side": "output"}),
        ("mlp", {"layer": "body", "side": "output"}),
        ("conv", {}),
        ("conv", {"layer": "features", "side": "output", "pool": 2}),
        ("resnet", {}),
        ("resnet", {"layer": "stage3", "side": "output"}),
        ("several outputs", {}),
    ]
    return [pytest.param(name, given, id=" ".join([name, *map(str, given.values())])) for name, given in options]


@pytest.mark.parametrize(("name", "options"), exported_cases())
@pytest.mark.usefixtures("unchecked")
def test_an_exported_graph_gives_outputs_and_keys_as_the_watch_does(name: str, options: dict[str, Any]) -> None:
    model, data = case(name)
    memory = build(model, data, **options)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        exportable(model, memory), (data.inputs[:3],), dynamic_shapes={"inputs": ({0: batch},)}
    )
    watch = Watch(model, options.get("layer"), options.get("side", "input"), pool=options.get("pool", 1))
    for n in (2, 5):
        for found, wanted in zip(program.module()(data.inputs[:n]), watch.run(data.inputs[:n]), strict=True):
            np.testing.assert_allclose(found.detach(), wanted, atol=1e-6)


def test_the_exportable_copy_leaves_the_model_alone() -> None:
    model, data = case("mlp")
    before, names = modes(model), dict(model.named_modules())
    copied = exportable(model, build(model, data))
    for found, wanted in zip(copied(data.inputs), Watch(model).run(data.inputs), strict=True):
        assert torch.equal(found, wanted)
    assert (modes(model), dict(model.named_modules())) == (before, names)


def test_an_exportable_module_still_works_after_an_export_and_exports_again() -> None:
    model, data = case("mlp")
    copied = exportable(model, build(model, data))
    before = copied(data.inputs)
    torch.export.export(copied, (data.inputs,))
    for found, wanted in zip(copied(data.inputs), before, strict=True):
        assert torch.equal(found, wanted)
    again = torch.export.export(copied, (data.inputs,)).module()
    for found, wanted in zip(again(data.inputs), before, strict=True):
        np.testing.assert_allclose(found.detach(), wanted.detach(), atol=1e-6)


def test_exported_outputs_and_keys_are_enough_to_predict() -> None:
    model, data = case("mlp")
    memory = build(model, data)
    program = torch.export.export(exportable(model, memory), (data.inputs,))
    outputs, keys = program.module()(data.inputs)
    base = temper(outputs.softmax(1).detach().numpy(), SMALL.temperature)
    knn = ResidualKNN(memory, n_neighbors=5, bandwidth=0.7, temperature=SMALL.temperature)
    scores = correct(base, knn(keys.detach().numpy()), SMALL.shrinkage)
    given = ResMemModule(model, memory, setting=SMALL)(data.inputs)
    np.testing.assert_allclose(np.log(to_probabilities(scores, base)), given, atol=1e-5)


def test_keys_from_a_function_cannot_be_exported() -> None:
    model = Mlp()
    with pytest.raises(InvalidInput, match=r"first_inputs.*export it by itself"):
        exportable(model, build(model, mlp_data(), layer=first_inputs))


def test_a_memory_that_does_not_know_its_layer_cannot_be_exported() -> None:
    with pytest.raises(InvalidInput, match="which layer"):
        exportable(Mlp(), Memory.create(dim=6, n_outputs=3))
