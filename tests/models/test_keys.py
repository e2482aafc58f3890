"""Keys of several layers side by side, copies of every example, and the choice among kinds of keys."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy import ndarray
from torch import Tensor, nn

from residual_memory.correction import ResidualKNN
from residual_memory.errors import FingerprintMismatch, InvalidInput
from residual_memory.evaluation import Setting
from residual_memory.memory import Memory
from residual_memory.models.base import KeyChoice
from residual_memory.models.torch import (
    ResMemModule,
    Watch,
    build_memory,
    choose_keys,
    exportable,
    key_choices,
    observe,
)
from tests.models.nets import (
    ConvNet,
    Examples,
    Mlp,
    batches_seen,
    image_data,
    mlp_data,
    rows_of,
    same_rows,
    trained_a_little,
)

MAPS = "features.0@input+features@output"


def build(model: nn.Module, data: Any, path: Path | None = None, **options: Any) -> Memory:
    return build_memory(model, data, path, **{"verbose": False, "batch_size": 4, **options})


def conv() -> tuple[nn.Module, Examples]:
    data = image_data()
    return trained_a_little(ConvNet(), data.inputs), data


def unit(keys: ndarray) -> ndarray:
    return keys / np.linalg.norm(keys, axis=1, keepdims=True)


def mirrored(x: Tensor) -> Tensor:
    return x.flip(-1)


def darker(x: Tensor) -> Tensor:
    return x / 2


class Scaled:
    """A view that is an object, as those of libraries are."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x: Tensor) -> Tensor:
        return self.by * x


def noisy(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape checks off, as for users: beartype stops a wrong word first, and an exporter cannot trace through it."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


# ---------------------------------------------------------------------------------------------- several layers


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_keys_of_two_layers_are_those_of_each_at_length_one_side_by_side(pool: int) -> None:
    model, data = conv()
    first = rows_of(build(model, data, layer="features.0", side="input", pool=pool), "keys")
    second = rows_of(build(model, data, layer="features", side="output", pool=pool), "keys")
    both = build(model, data, layer=MAPS, pool=pool)
    assert both.layout.dim == (3 + 5) * pool**2
    np.testing.assert_allclose(rows_of(both, "keys"), np.hstack([unit(first), unit(second)]), atol=1e-6)
    for name in ("labels", "predictions"):
        np.testing.assert_array_equal(rows_of(both, name), rows_of(build(model, data), name))


@pytest.mark.parametrize("layer", ["features.0+features@output", " features.0@input + features@output "])
def test_a_part_without_a_side_takes_the_side_of_the_call(layer: str) -> None:
    model, data = conv()
    same_rows(build(model, data, layer=layer), build(model, data, layer=MAPS))


def test_one_layer_may_say_its_side_and_is_not_scaled() -> None:
    model, data = conv()
    same_rows(
        build(model, data, layer="features@output"), build(model, data, layer="features", side="output"), atol=1e-7
    )


def test_vectors_and_maps_and_both_sides_of_one_layer_go_together() -> None:
    model, data = conv()
    memory = build(model, data, layer="head@input+head@output+features@output", pool=2)
    keys = rows_of(memory, "keys")
    assert keys.shape[1] == 5 + 3 + 20
    for part in np.split(keys, [5, 8], axis=1):
        np.testing.assert_allclose(np.linalg.norm(part, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("layer", ["features@inside", "features.0@input+features@Output", "features@"])
def test_a_side_that_there_is_not_is_refused(layer: str) -> None:
    model, data = conv()
    with pytest.raises(InvalidInput, match=r"ends in '.*', expected 'input' or 'output' after the @"):
        build(model, data, layer=layer)


@pytest.mark.parametrize(
    ("layer", "wrong", "close"),
    [("feature@input+head", "feature", "features"), ("features.0@input+haed@input", "haed", "head")],
)
def test_a_wrong_name_in_a_part_suggests_the_close_one(layer: str, wrong: str, close: str) -> None:
    model, data = conv()
    with pytest.raises(InvalidInput, match=f"no layer '{wrong}'; did you mean .*'{close}'"):
        build(model, data, layer=layer)


def test_a_part_that_runs_twice_is_named() -> None:
    class Twice(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.features[2](self.features(x)).mean((2, 3)))

    with pytest.raises(InvalidInput, match=r"'features\.2' ran 2 times"):
        build(Twice(), image_data(), layer="features.0@input+features.2@output")


def test_observing_gives_the_memorys_own_rows() -> None:
    model, data = conv()
    memory = build(model, data, layer=MAPS, pool=2)
    seen = observe(model, data, memory, verbose=False)
    np.testing.assert_allclose(seen.keys, rows_of(memory, "keys"), atol=1e-6)
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 0


def test_a_corrected_model_memorizes_by_the_keys_of_two_layers() -> None:
    model, data = conv()
    memory = build(model, data, layer=MAPS, pool=2)
    module = ResMemModule(model, memory, setting=Setting(n_neighbors=1, bandwidth=1.0))
    assert torch.equal(module(data.inputs).argmax(1), data.labels)


@pytest.mark.parametrize("layer", ["features.0@input", "features@output+features.0@input", "features.0@input+features"])
def test_a_memory_of_other_parts_is_refused(layer: str, tmp_path: Path) -> None:
    model, data = conv()
    build(model, data, tmp_path / "memory", layer=MAPS).close()
    with pytest.raises(FingerprintMismatch, match=f"was built with layer '{re.escape(MAPS)}', but this is"):
        build(model, data, tmp_path / "memory", layer=layer)
    with pytest.raises(FingerprintMismatch, match="was built with layer"):
        ResMemModule(model, Memory.open(tmp_path / "memory"), layer=layer, setting=Setting(n_neighbors=1))


def test_an_interrupted_build_of_two_layers_goes_on(tmp_path: Path) -> None:
    model, data = conv()
    data.fails_at = 6
    with pytest.raises(KeyboardInterrupt):
        build(model, data, tmp_path / "memory", layer=MAPS)
    data.fails_at = None
    seen = batches_seen(model)
    resumed = build(model, data, tmp_path / "memory", layer=MAPS)
    assert sum(seen) == 1 + 6  # item 0 for the shapes, and the rows that were missing
    same_rows(resumed, build(model, data, layer=MAPS), atol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_an_exported_graph_gives_the_keys_of_two_layers() -> None:
    model, data = conv()
    memory = build(model, data, layer=MAPS, pool=2)
    shapes = {"inputs": ({0: torch.export.Dim("batch")},)}
    program = torch.export.export(exportable(model, memory), (data.inputs[:3],), dynamic_shapes=shapes, strict=False)
    watch = Watch(model, MAPS, pool=2)
    for found, wanted in zip(program.module()(data.inputs), watch.run(data.inputs), strict=True):
        np.testing.assert_allclose(found.detach(), wanted, atol=1e-6)


# ---------------------------------------------------------------------------------------------- copies


def test_a_memory_with_copies_holds_every_item_as_each_view_sees_it() -> None:
    model, data = conv()
    memory = build(model, data, copies=[mirrored, darker], layer="features", side="output", pool=2)
    np.testing.assert_array_equal(memory.ids, np.arange(30))
    np.testing.assert_array_equal(memory.snapshot.all_groups, np.arange(30) % 10)
    views = [data.inputs, mirrored(data.inputs), darker(data.inputs)]
    for place, inputs in enumerate(views):
        alone = build(model, Examples(inputs, data.labels), layer="features", side="output", pool=2)
        here = slice(10 * place, 10 * (place + 1))
        for name in ("keys", "labels", "predictions"):
            np.testing.assert_allclose(rows_of(memory, name)[here], rows_of(alone, name), atol=1e-6)


def test_leaving_an_item_out_leaves_out_all_its_copies() -> None:
    model, data = conv()
    memory = build(model, data, copies=[mirrored, darker])
    knn = ResidualKNN(memory, n_neighbors=27, bandwidth=1.0)
    found = knn.neighbors(rows_of(memory, "keys")[:10], exclude=np.arange(10)).ids
    for item in range(10):
        assert sorted(found[item]) == [row for row in range(30) if row % 10 != item]


@pytest.mark.parametrize("fails_at", [3, 8])
def test_an_interrupted_build_of_copies_goes_on(fails_at: int, tmp_path: Path) -> None:
    model, data = conv()
    data.fails_at = fails_at
    with pytest.raises(KeyboardInterrupt):
        build(model, data, tmp_path / "memory", copies=[mirrored])
    data.fails_at = None
    resumed = build(model, data, tmp_path / "memory", copies=[mirrored])
    whole = build(model, data, copies=[mirrored])
    same_rows(resumed, whole, atol=1e-6)
    np.testing.assert_array_equal(resumed.snapshot.all_groups, whole.snapshot.all_groups)


def test_a_build_that_was_interrupted_among_the_copies_goes_on(tmp_path: Path) -> None:
    model, data = conv()

    class Stopping:
        """Fails once, at a later copy."""

        calls = 0

        def __call__(self, x: Tensor) -> Tensor:
            Stopping.calls += 1
            if Stopping.calls == 8:
                raise KeyboardInterrupt
            return mirrored(x)

    with pytest.raises(KeyboardInterrupt):
        build(model, data, tmp_path / "memory", copies=[Stopping()], batch_size=1)
    with Memory.open(tmp_path / "memory") as memory:
        assert 10 < len(memory) < 20
    resumed = build(model, data, tmp_path / "memory", copies=[Stopping()])
    same_rows(resumed, build(model, data, copies=[mirrored]), atol=1e-6)


def test_out_of_fold_predictions_are_those_of_the_item_for_all_its_copies() -> None:
    model, data = conv()
    own = np.random.default_rng(0).dirichlet(np.ones(3), 10)
    memory = build(model, data, copies=[mirrored, darker], predictions=own, prediction_dtype="float64")
    np.testing.assert_allclose(rows_of(memory, "predictions"), np.tile(own, (3, 1)))


@pytest.mark.parametrize(
    ("built", "asked"),
    [
        ([mirrored], [darker]),
        ([mirrored], []),
        ([], [mirrored]),
        ([mirrored], [mirrored, darker]),
        ([mirrored, darker], [darker, mirrored]),
        ([Scaled(0.5)], [Scaled(0.6)]),
        ([lambda x: 0.5 * x], [lambda x: 0.6 * x]),
    ],
    ids=["another", "none", "some", "more", "another order", "another parameter", "another lambda"],
)
def test_a_memory_of_the_same_data_with_other_copies_is_refused(built: Any, asked: Any, tmp_path: Path) -> None:
    model, data = conv()
    build(model, data, tmp_path / "memory", copies=built).close()
    with pytest.raises(FingerprintMismatch, match="was built with data"):
        build(model, data, tmp_path / "memory", copies=asked)
    build(model, data, tmp_path / "memory", copies=built).close()


def test_a_copy_that_differs_each_time_is_refused() -> None:
    model, data = conv()
    with pytest.raises(InvalidInput, match=r"item 0 as .*:noisy sees it differs when it is read twice"):
        build(model, data, copies=[mirrored, noisy])


def test_worker_processes_change_nothing() -> None:
    model, data = conv()
    same_rows(build(model, data, copies=[mirrored], num_workers=2), build(model, data, copies=[mirrored]), atol=1e-7)


def test_a_memory_with_copies_is_observed_and_used_as_one_without() -> None:
    model, data = conv()
    memory = build(model, data, copies=[mirrored])
    seen = observe(model, data, memory, verbose=False)
    np.testing.assert_allclose(seen.keys, rows_of(memory, "keys")[:10], atol=1e-6)
    module = ResMemModule(model, memory, setting=Setting(n_neighbors=1, bandwidth=1.0))
    assert torch.equal(module(mirrored(data.inputs)).argmax(1), data.labels)


# ---------------------------------------------------------------------------------------------- the choice of keys


def quarters(n: int, seed: int) -> Examples:
    """Images whose class is which quarter is bright: their mean, which the head sees, says nothing of it."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=random)
    images = 0.1 * torch.rand(n, 3, 8, 8, generator=random) + 0.5 * torch.rand(n, 3, 1, 1, generator=random)
    for quarter in range(4):
        top, left = 4 * (quarter // 2), 4 * (quarter % 2)
        images[labels == quarter, :, top : top + 4, left : left + 4] += 1.0
    return Examples(images, labels)


SMALL: dict[str, Any] = {
    "n_neighbors": (5,),
    "bandwidths": (0.5,),
    "temperatures": (1.0,),
    "shrinkages": (1.0,),
    "nuggets": (0.1,),
    "verbose": False,
    "batch_size": 100,
}


def test_a_network_of_maps_is_offered_its_last_maps_and_two_layers() -> None:
    choices = key_choices(ConvNet(), image_data().inputs[:1])
    assert [(choice.layer, choice.side, choice.pool) for choice in choices] == [
        ("head", "input", 1),
        ("features", "output", 2),
        ("features", "output", 4),
        (MAPS, "input", 4),
    ]
    assert {choice.kernels for choice in choices[:3]} == {("exponential",)}
    assert choices[3].kernels == ("exponential", "kriging")


def test_a_network_without_maps_is_offered_lengths_and_directions() -> None:
    choices = key_choices(Mlp(), mlp_data().inputs[:1])
    assert [(choice.layer, choice.metric) for choice in choices] == [("head", "euclidean"), ("head", "cosine")]


def test_a_layer_that_runs_twice_is_not_offered() -> None:
    class Shared(nn.Module):
        """One activation after each of two convolutions, as many networks have it."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.act, self.head = nn.ReLU(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.second(self.act(self.first(x)))).mean((2, 3)))

    model = Shared()
    choices = key_choices(model, image_data().inputs[:1])
    assert [choice.layer for choice in choices][1:] == ["second", "second", "second@input+second@output"]
    for choice in choices:
        build(model, image_data(), **choice.options)


def test_looking_for_layers_leaves_no_hook_and_the_mode_alone() -> None:
    model = ConvNet().train()
    key_choices(model, image_data().inputs[:1])
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 0
    assert all(module.training for module in model.modules())


def test_the_best_keys_are_those_of_the_largest_gain() -> None:
    """Where the class is a place, keys that keep places tell it, and the mean does not."""
    torch.manual_seed(0)
    found = choose_keys(ConvNet(n_outputs=4), quarters(80, 0), quarters(60, 1), **SMALL)
    gains = {name: result.gain.value for name, result in found.results.items()}
    assert list(gains) == ["last linear", "last maps 2x2", "last maps 4x4", "two layers 4x4"]
    assert gains[found.best.name] == max(gains.values())
    assert gains["last maps 2x2"] > gains["last linear"] + 0.3
    assert found.best.name != "last linear"
    assert found.results[found.best.name].corrected.value > 0.9


def test_a_choice_is_measured_as_building_and_tuning_it_by_hand() -> None:
    torch.manual_seed(0)
    model, data, held = ConvNet(n_outputs=4), quarters(80, 0), quarters(60, 1)
    choice = KeyChoice("maps", "features", "output", 2, "cosine", "float32", (mirrored,))
    found = choose_keys(model, data, held, [choice], **SMALL).results["maps"]
    memory = build_memory(model, data, None, verbose=False, batch_size=100, **choice.options)
    assert len(memory) == 160
    seen = observe(model, held, memory, verbose=False)
    setting = replace(found.best, gate=None)
    said = setting.predict(setting.knn(memory), seen.keys, np.asarray(seen.predictions))
    assert (said.argmax(axis=1) == seen.labels).mean() == pytest.approx(found.corrected.value)


def test_vectors_are_chosen_among_too_and_it_says_how_each_did(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    found = choose_keys(model, mlp_data(60), mlp_data(40, seed=1), **{**SMALL, "verbose": True})
    assert list(found.results) == ["last linear", "last linear, unit length"]
    said = capsys.readouterr().err
    assert all(f"{name}: {result.verdict}" in said for name, result in found.results.items())


def test_what_tuning_takes_is_passed_on() -> None:
    torch.manual_seed(0)
    found = choose_keys(
        ConvNet(n_outputs=4), quarters(40, 0), quarters(60, 1), [KeyChoice("maps", "features", "output", 2)],
        **{**SMALL, "metric": "log_loss", "kernel": "kriging"},
    )  # fmt: skip
    result = found.results["maps"]
    assert (result.metric, result.best.kernel) == ("log_loss", "kriging")


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ([], "choices is empty"),
        ([KeyChoice("a"), KeyChoice("b"), KeyChoice("a", "body")], "choices have 'a' more than once"),
        ([KeyChoice("a", "haed")], "no layer 'haed'; did you mean 'head'"),
        ([KeyChoice("a", "head@outside")], "ends in 'outside'"),
        ([KeyChoice("a", kernels=("krigging",))], "kernel is 'krigging'"),
        ([KeyChoice("a", kernels=())], "kernel is empty"),
    ],
)
def test_choices_that_cannot_be_used_are_refused(choices: list[KeyChoice], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        choose_keys(Mlp(), mlp_data(), mlp_data(seed=1), choices, **SMALL)
