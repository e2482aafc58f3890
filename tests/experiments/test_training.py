"""The recipe that trains the networks: its samples are what they say, and an interruption changes nothing."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy import ndarray
from torch import Tensor

from experiments.cifar100 import train as recipe
from experiments.cifar100.networks import NETWORKS as NETWORKS_FOLDER
from experiments.cifar100.networks import weights_file
from experiments.cifar100.samples import FRACTIONS, IMBALANCE, SAMPLES, fraction_of
from experiments.cifar100.train import augment, train
from residual_memory.demo.cifar100 import Cifar100, held_out_split
from residual_memory.demo.networks import CifarNetwork, CifarResNet

N, N_CLASSES = 50_000, 100


@pytest.fixture(scope="module")
def data() -> Cifar100:
    """As many labels as in CIFAR-100, 500 of each class, in random order; the samples look at no pixel."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(N_CLASSES), N // N_CLASSES))
    names = tuple(map(str, range(N_CLASSES)))
    pixels = np.broadcast_to(np.zeros((1, 3, 32, 32), np.uint8), (N, 3, 32, 32))
    return Cifar100(pixels, labels, labels // 5, names, names[:20])


# ---------------------------------------------------------------------------------------------- samples


def test_each_fraction_has_its_name_and_its_number_of_images(data: Cifar100) -> None:
    assert list(SAMPLES) == ["10%", "20%", "40%", "60%", "90%", "100%", "long-tailed"]
    assert [len(SAMPLES[f"{fraction:.0%}"](data)) for fraction in FRACTIONS] == [round(f * N) for f in FRACTIONS]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_ascending_and_names_no_image_twice(name: str, data: Cifar100) -> None:
    rows = SAMPLES[name](data)
    assert (np.diff(rows) > 0).all()
    assert 0 <= rows[0] <= rows[-1] < N


@pytest.mark.parametrize("name", SAMPLES)
def test_held_out_images_are_in_no_sample_but_the_whole(name: str, data: Cifar100) -> None:
    shared = np.intersect1d(SAMPLES[name](data), held_out_split(N)[1])
    assert len(shared) == (5_000 if name == "100%" else 0)


def test_each_sample_holds_the_smaller_ones(data: Cifar100) -> None:
    samples = [fraction_of(fraction)(data) for fraction in FRACTIONS]
    for smaller, larger in pairwise(samples):
        assert np.isin(smaller, larger).all()


def test_nine_tenths_are_all_that_are_not_held_out(data: Cifar100) -> None:
    np.testing.assert_array_equal(SAMPLES["90%"](data), held_out_split(N)[0])


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_the_same_each_time(name: str, data: Cifar100) -> None:
    np.testing.assert_array_equal(SAMPLES[name](data), SAMPLES[name](data))


def test_long_tailed_counts_fall_by_a_hundred_and_geometrically(data: Cifar100) -> None:
    counts = np.sort(np.bincount(data.labels[SAMPLES["long-tailed"](data)], minlength=N_CLASSES))[::-1]
    assert counts[-1] >= 1
    assert counts[0] / (counts[-1] + 0.5) <= IMBALANCE <= counts[0] / (counts[-1] - 0.5)
    wanted = counts[0] * IMBALANCE ** (-np.arange(N_CLASSES) / (N_CLASSES - 1))
    np.testing.assert_allclose(counts, wanted, atol=0.5 + 1e-9)


def test_the_rare_classes_are_not_those_of_the_first_or_last_names(data: Cifar100) -> None:
    counts = np.bincount(data.labels[SAMPLES["long-tailed"](data)], minlength=N_CLASSES)
    assert abs(np.corrcoef(counts, np.arange(N_CLASSES))[0, 1]) < 0.3


# ---------------------------------------------------------------------------------------------- augmentation


def test_an_augmented_image_is_a_crop_of_the_padded_one_or_its_mirror_image() -> None:
    images = torch.randint(1, 256, (12, 3, 32, 32), dtype=torch.uint8)
    found = augment(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    mirrored = []
    for image, wide in zip(found, padded, strict=True):
        crops = [wide[:, top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
        straight = any(torch.equal(image, crop) for crop in crops)
        assert straight or any(torch.equal(image, crop.flip(2)) for crop in crops)
        mirrored.append(not straight)
    assert 0 < sum(mirrored) < 12


def test_the_generator_alone_decides_how_an_image_is_augmented() -> None:
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    first, again, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---------------------------------------------------------------------------------------------- training


class Batches:
    """Counts the batches that are augmented, and may stop at one of them."""

    def __init__(self, stops_at: int | None = None) -> None:
        self.sizes: list[int] = []
        self.stops_at = stops_at

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if len(self.sizes) == self.stops_at:
            raise KeyboardInterrupt
        self.sizes.append(len(images))
        return augment(images, generator)


@pytest.fixture(autouse=True)
def small_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 4 images, and a checkpoint after every third."""
    monkeypatch.setattr(recipe, "BATCH", 4)
    monkeypatch.setattr(recipe, "ROUND", 3)
    torch.set_num_threads(1)


def counted(monkeypatch: pytest.MonkeyPatch, stops_at: int | None = None) -> Batches:
    batches = Batches(stops_at)
    monkeypatch.setattr(recipe, "augment", batches)
    return batches


def trained(checkpoint: Path, n: int = 10, **options: Any) -> CifarNetwork:
    """A fresh network trained on a few images; the same network each time."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=random)
    torch.manual_seed(0)
    network = CifarResNet(8, 3)
    return train(network, images, torch.arange(n) % 3, **{"n_steps": 8, "seed": 0, "checkpoint": checkpoint, **options})


def weights(network: CifarNetwork) -> ndarray:
    return np.concatenate([value.detach().double().ravel().numpy() for value in network.state_dict().values()])


@pytest.mark.parametrize("stops_at", [2, 3, 7])
def test_an_interrupted_training_goes_on_from_its_checkpoint_and_ends_where_it_would_have(
    stops_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights(trained(tmp_path / "whole.pt"))
    counted(monkeypatch, stops_at)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "part.pt")
    left = counted(monkeypatch)
    np.testing.assert_array_equal(weights(trained(tmp_path / "part.pt")), whole)
    assert len(left.sizes) == 8 - 3 * (stops_at // 3)


def test_a_finished_training_is_read_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = weights(trained(tmp_path / "done.pt"))
    batches = counted(monkeypatch)
    again = trained(tmp_path / "done.pt")
    assert batches.sizes == []
    assert not again.training
    np.testing.assert_array_equal(weights(again), first)


@pytest.mark.parametrize("n", [2, 4, 11, 50])
def test_the_steps_are_as_many_whatever_the_number_of_images(
    n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = counted(monkeypatch)
    trained(tmp_path / "network.pt", n)
    assert batches.sizes == [4] * 8


def test_another_seed_ends_elsewhere(tmp_path: Path) -> None:
    first, other = (weights(trained(tmp_path / f"{seed}.pt", seed=seed)) for seed in (0, 1))
    assert np.abs(first - other).max() > 1e-3


def test_training_changes_the_weights_and_keeps_them_finite(tmp_path: Path) -> None:
    found = trained(tmp_path / "network.pt")
    torch.manual_seed(0)
    fresh = CifarResNet(8, 3)
    assert np.isfinite(weights(found)).all()
    assert not torch.equal(found.head.weight, fresh.head.weight)
    assert torch.equal(found.mean.cpu(), fresh.mean)


def test_every_recipe_has_a_file_of_its_own() -> None:
    recipes = [("resnet8", "90%", 7_800, 0), ("resnet8", "100%", 7_800, 0), ("resnet8", "90%", 7_800, 1)]
    recipes += [("resnet8", "90%", 3_900, 0), ("resnet14", "90%", 7_800, 0), ("resnet8", "long-tailed", 7_800, 0)]
    files = {weights_file(*each) for each in recipes}
    assert len(files) == len(recipes)
    assert all(file.parent == NETWORKS_FOLDER and file.suffix == ".safetensors" for file in files)
