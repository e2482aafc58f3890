"""Memories from a model and its data set, or from a folder of images: end to end, and when the user's code fails."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import residual_memory as rm
from tests.cli.workshop import as_images, as_npz, columns, done, resmem

MODEL = ("--model", "net:make_model")


@pytest.fixture
def built(net: Path) -> Path:
    """A memory of net:train."""
    done("build", "mem", "--data", "net:train", *MODEL)
    return net / "mem"


def test_a_factory_and_an_object_build_the_same_memory(net: Path) -> None:
    done("build", "a", "--data", "net:train", "--model", "net:make_model")
    done("build", "b", "--data", "net:train", "--model", "net:model")
    first, second = rm.Memory.open("a").snapshot, rm.Memory.open("b").snapshot
    np.testing.assert_array_equal(first.keys.take(np.arange(150)), second.keys.take(np.arange(150)))


def test_a_models_memory_is_tuned_used_and_explained(built: Path) -> None:
    tuned = done("tune", built, "--data", "net:held_out", *MODEL, "--json").json
    assert tuned["helps"]
    assert tuned["n_test"] == 80
    done("evaluate", built, "--data", "net:held_out", *MODEL)
    found = done("predict", built, "--data", "net:Unlabelled", *MODEL, "--json", "--top", 1).json
    assert (found["rows"], len(found["predictions"][0]["top"])) == (80, 1)
    explained = done("explain", built, "--data", "net:held_out", *MODEL, "--row", 79, "--json").json
    assert explained["outputs"][0]["name"] == str(found["predictions"][79]["top"][0]["class"])


def test_the_command_says_what_the_module_says(built: Path) -> None:
    import net  # type: ignore[import-not-found]

    done("tune", built, "--data", "net:held_out", *MODEL, "--no-save")
    assert rm.Memory.open(built).setting is None
    done("tune", built, "--data", "net:held_out", *MODEL)
    module = rm.ResMemModule(net.make_model(), rm.Memory.open(built))
    images, _ = net.held_out().tensors
    wanted = module(images).exp().numpy()
    done("predict", built, "--data", "net:held_out", *MODEL, "--out", "out.npz")
    with np.load("out.npz") as found:
        np.testing.assert_allclose(found["corrected"], wanted, rtol=1e-4)


def test_options_of_the_build_reach_the_memory(net: Path) -> None:
    Path("names.txt").write_text("red\ngreen\nblue\nnew\n")
    options = ("--layer", "1", "--side", "output", "--metric", "cosine", "--n-outputs", 4, "--class-names", "names.txt")
    types = ("--key-dtype", "float16", "--prediction-dtype", "float64", "--autocast", "bfloat16", "--batch-size", 32)
    done("build", "mem", "--data", "net:train", *MODEL, *options, *types)
    info = done("info", "mem", "--json").json
    assert info["class_names"] == ["red", "green", "blue", "new"]
    assert info["source"]["layer"] == "1"
    assert info["source"]["side"] == "output"
    layout = info["layout"]
    assert (layout["metric"], layout["n_outputs"]) == ("cosine", 4)
    assert (layout["key_dtype"], layout["prediction_dtype"]) == ("float16", "float64")


def test_out_of_fold_predictions_are_kept_in_place_of_the_models(net: Path) -> None:
    said = np.full((150, 3), 1 / 3, np.float32)
    np.save("folds.npy", said)
    done("build", "mem", "--data", "net:train", *MODEL, "--predictions", "folds.npy")
    np.testing.assert_array_equal(rm.Memory.open("mem").snapshot.predictions(np.arange(150)), said)


def test_an_interrupted_build_from_a_model_goes_on(net: Path) -> None:
    words = ("build", "mem", "--data", "net:Stopping", *MODEL, "--batch-size", 30)
    assert resmem(*words).code == 130
    assert 0 < len(rm.Memory.open("mem")) < 150
    assert done(*words, "--json").json["rows"] == 150


def test_examples_are_added_through_the_model(built: Path) -> None:
    assert done("add", built, "--data", "net:held_out", *MODEL, "--json").json["rows"] == 230


def test_another_model_is_refused(built: Path) -> None:
    source = Path("net.py").read_text()
    Path("other.py").write_text(source.replace("manual_seed(0)", "manual_seed(9)"))
    ran = resmem("tune", built, "--data", "net:held_out", "--model", "other:make_model")
    assert ran.code == 2
    assert "was built with model" in ran.err


def test_arrays_and_models_are_not_mixed(built: Path) -> None:
    as_npz(built.parent / "a.npz", columns(60))
    for words, said in (
        (("tune", built, "--data", "net:held_out"), "add --model"),
        (("build", "new", "--data", "net:train"), "add --model"),
        (("tune", built, "--data", "a.npz", *MODEL), "leave --model out"),
        (("build", "new", "--data", "a.npz", *MODEL, "--layer", "1"), "leave --model and --layer out"),
        (("build", "new", "--data", "a.npz", "--held-out", "net:held_out"), "of another kind"),
        (("build", built, "--data", "a.npz"), "was built from a model"),
    ):
        ran = resmem(*words)
        assert ran.code == 2
        assert said in ran.err
    done("build", "new", "--data", "a.npz")
    ran = resmem("tune", "new", "--data", "net:held_out", *MODEL)
    assert ran.code == 2
    assert "does not say which layer" in ran.err


# ---------------------------------------------------------------------- the user's own code


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data", "net:broken", *MODEL), "ZeroDivisionError: division by zero (net.py, line "),
        (("--data", "net:misshapen", *MODEL), "cannot be multiplied"),
        (("--data", "bad:x", *MODEL), "SyntaxError"),
        (("--data", "net:train", "--model", "net:train"), "expected a torch.nn.Module"),
        (("--data", "net:NET", *MODEL), "net has no 'NET'"),
        (("--data", "net:train.size", *MODEL), "has no 'size'"),
        (("--data", "net:train", "--model", "make_model"), "not of the form MODULE:NAME"),
    ],
)
def test_failures_of_the_users_code_are_one_line(net: Path, words: tuple[str, ...], said: str) -> None:
    Path("bad.py").write_text("def x(:\n")
    ran = resmem("build", "mem", *words)
    assert ran.code == 2
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert not Path("mem").exists()


def test_the_import_path_is_as_it_was(net: Path) -> None:
    import sys

    before = list(sys.path)
    done("build", "mem", "--data", "net:train", *MODEL)
    assert sys.path == before


# ---------------------------------------------------------------------- images


def test_a_folder_of_images_end_to_end(net: Path) -> None:
    as_images(net / "train", 15, 1)
    as_images(net / "held", 10, 2)
    done("build", "mem", "--data", "train", *MODEL, "--held-out", "held")
    memory = rm.Memory.open("mem")
    assert memory.class_names == ("cat", "dog", "owl")
    assert memory.snapshot.targets(np.arange(45)).tolist() == [0] * 15 + [1] * 15 + [2] * 15
    assert done("tune", "mem", "--data", "held", *MODEL, "--json").json["corrected"] > 0.8
    found = done("predict", "mem", "--data", "held", *MODEL, "--json").json["predictions"]
    assert found[10]["id"] == str(Path("dog/000.png"))
    assert found[10]["top"][0]["name"] == "dog"
    assert "dog" in done("explain", "mem", "--data", "held", *MODEL, "--row", 10).out


def test_pixels_are_rgb_from_0_to_1(tmp_path: Path) -> None:
    from residual_memory.cli.images import ImageFolder

    for name, mode, colour in (("a", "RGBA", (255, 0, 51, 255)), ("b", "L", 255)):
        (tmp_path / name).mkdir()
        Image.new(mode, (5, 7), colour).save(tmp_path / name / "x.png")
    found = ImageFolder(tmp_path)
    image, label = found[0]
    assert (image.shape, image.dtype, label) == ((3, 7, 5), torch.float32, 0)
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    assert found[1][0].min() == 1.0
    assert ImageFolder(tmp_path, size=4)[0][0].shape == (3, 4, 4)


def test_classes_mean_the_same_in_other_folders(net: Path) -> None:
    as_images(net / "train", 12, 1)
    done("build", "mem", "--data", "train", *MODEL)
    as_images(net / "two", 10, 2, classes=("dog", "owl"))  # "dog" stays class 1
    done("tune", "mem", "--data", "two", *MODEL)
    as_images(net / "typo", 3, 2, classes=("dgo",))
    ran = resmem("tune", "mem", "--data", "typo", *MODEL)
    assert ran.code == 2
    assert "did you mean 'dog'?" in ran.err


def test_images_behind_links_to_folders_are_found_once_and_circles_end(tmp_path: Path) -> None:
    from residual_memory.cli.images import images_under

    as_images(tmp_path / "elsewhere", 2, 1, classes=("cat", "dog"))
    train = tmp_path / "train"
    train.mkdir()
    (train / "pets").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (train / "pets_again").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    for name, other in (("cat", "dog"), ("dog", "cat")):
        (tmp_path / "elsewhere" / name / "round").symlink_to(tmp_path / "elsewhere" / other, target_is_directory=True)
    (tmp_path / "elsewhere" / "up").symlink_to(train, target_is_directory=True)
    (train / "gone.png").symlink_to(tmp_path / "nothing.png")
    found = images_under(train)
    assert len(found) == 4
    assert sorted(path.name for path in found) == ["000.png", "000.png", "001.png", "001.png"]
    assert {path.relative_to(train).parts[0] for path in found} == {"pets"}


def test_an_unreadable_image_is_named(net: Path) -> None:
    as_images(net / "train", 5, 1)
    (net / "train" / "dog" / "002.png").write_bytes(b"\x89PNG no image")
    ran = resmem("build", "mem", "--data", "train", *MODEL)
    assert ran.code == 3
    assert str(Path("train/dog/002.png")) in ran.err


def test_images_of_different_sizes_need_one_size(net: Path) -> None:
    as_images(net / "train", 5, 1)
    Image.new("RGB", (9, 8)).save(net / "train" / "owl" / "big.png")
    ran = resmem("build", "mem", "--data", "train", *MODEL)
    assert ran.code == 2
    assert "big.png is 9 × 8, but the first image is 8 × 8" in ran.err
    assert "--image-size" in ran.err
    done("build", "mem", "--data", "train", *MODEL, "--image-size", 8)


def test_a_folder_of_nothing_usable_is_refused(net: Path) -> None:
    (net / "empty").mkdir()
    ran = resmem("build", "mem", "--data", "empty", *MODEL)
    assert ran.code == 2
    assert "holds neither" in ran.err


def test_the_users_prints_do_not_mix_with_json(net: Path) -> None:
    ran = done("build", "mem", "--data", "net:train", *MODEL, "--json")
    assert ran.json["rows"] == 150
    assert "the user's own print" in ran.err
