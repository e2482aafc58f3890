"""The example for image folders, run as a user runs it on small pictures, with a network that was never trained."""

import contextlib
import functools
import io
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy import ndarray
from safetensors.torch import save_file
from torch import Tensor, nn

import residual_memory as rm
from examples.image_folder import Centre, main, scan, split
from residual_memory.errors import FingerprintMismatch
from residual_memory.memory import Memory
from residual_memory.models.torch import ResMemModule
from tests.cli.workshop import as_images
from tests.models.nets import rows_of, same_rows

ROOT = Path(__file__).parents[2]
CLASSES = ("cat", "dog", "owl")
NETWORK = f"{__name__}:network"
TUNE = ("--tune", "unseen")


def network(n_outputs: int = len(CLASSES)) -> nn.Module:
    """Random features that tell the colours apart, and a head that knows nothing of it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, n_outputs)
    )


def five_outputs() -> nn.Module:
    return network(5)


class Stopping(nn.Module):
    """The same network; Ctrl-C comes once, when it sees the n-th batch."""

    n_left = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        Stopping.n_left -= 1
        if Stopping.n_left == 0:
            raise KeyboardInterrupt
        return self.inner(x)


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def run(*words: object, model: str = NETWORK) -> Ran:
    """The command line in this process."""
    given = ("--model", model, "--train", "train", "--test", "test", "--memory", "mem", "--workers", 0)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in (*given, "--image-size", 8, *words)])
        except SystemExit as ended:  # argparse's
            code = int(ended.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


def refused(ran: Ran, *parts: str) -> None:
    """Assert that a run ended with one line of cause and remedy, and that nothing was written."""
    assert (ran.code, ran.err.count("\n")) == (2, 1), ran.err
    assert ran.err.startswith("error: ")
    for part in parts:
        assert part in ran.err
    assert not Path("mem").exists()


@pytest.fixture(scope="module", autouse=True)
def _few_settings() -> Iterator[None]:
    """Choose among few settings: 2,000 take seconds, and `tune` has tests of its own."""
    few: dict[str, Any] = {
        "n_neighbors": (5, 10),
        "bandwidths": (0.2,),
        "temperatures": (1.0,),
        "shrinkages": (0.5, 1.0),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rm, "tune", functools.partial(rm.tune, **few), raising=False)
        yield


@pytest.fixture(scope="module")
def finished(_few_settings: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """A folder with pictures in train/, test/ and unseen/ and the memory of a run in mem/, and what the run said."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, n_each, seed in (("train", 30, 0), ("test", 20, 1), ("unseen", 15, 2)):
        as_images(folder / name, n_each, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, run(*TUNE, "--explain", 2)


@pytest.fixture
def here(finished: tuple[Path, Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with such pictures and no memory."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("mem"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def images_of(folder: Path) -> tuple[Tensor, ndarray]:
    found = scan(folder, "--test", CLASSES, Centre(8))
    return torch.stack([found[row][0] for row in range(len(found))]), found.labels


def test_the_plan_is_printed_and_nothing_is_written(here: Path) -> None:
    before = names_of(here)
    ran = run("--plan")
    assert (ran.code, ran.err, names_of(here)) == (0, "", before)
    for words in ("85 to remember, in 3 classes", "5 to choose the setting with, held out", "60 to test on"):
        assert words in ran.out
    for words in ("input of '4', 64 numbers", "index (exact)", "ms to decode", "as in-sample as"):
        assert words in ran.out
    assert "accuracy" not in ran.out


def test_a_row_takes_the_bytes_that_the_plan_says(finished: tuple[Path, Ran]) -> None:
    found = re.search(r"a row +([\d,]+) bytes", finished[1].out)
    [segment] = (finished[0] / "mem").glob("rows-*")
    header = 8 + int.from_bytes(segment.read_bytes()[:8], "little")
    assert found
    assert segment.stat().st_size - header == 90 * int(found[1].replace(",", ""))


def test_a_memory_that_the_disk_has_no_room_for_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 10**3))
    refused(run("--plan"), "the memory needs ", "has 1.0 kB free; make room")


def test_a_gain_is_measured_on_the_test_images_and_ends_with_0(finished: tuple[Path, Ran]) -> None:
    folder, ran = finished
    assert ran.code == 0, ran.out
    assert re.search(r"^gain \+\d+\.\d ± \d+\.\d points on 60 held-out rows", ran.out, re.MULTILINE)
    assert "45 to choose the setting with, from unseen" in ran.out
    assert "in-sample" not in ran.out
    images, labels = images_of(folder / "test")
    with Memory.open(folder / "mem") as memory:
        assert memory.setting is not None
        right = ResMemModule(network(), memory)(images).argmax(1).numpy() == labels
    assert re.search(rf"^corrected +{100 * right.mean():.1f} %", ran.out, re.MULTILINE)


def test_ids_are_file_names_and_rows_are_those_of_a_pass_by_hand(finished: tuple[Path, Ran]) -> None:
    images, labels = images_of(finished[0] / "train")
    model = network().eval()
    with torch.inference_mode():
        keys, said = model[:-1](images), model(images).softmax(1)  # type: ignore[index]
    with Memory.open(finished[0] / "mem") as memory:
        assert memory.class_names == CLASSES
        assert memory.ids.tolist() == names_of(finished[0] / "train")
        assert rows_of(memory, "labels").tolist() == labels.tolist()
        np.testing.assert_allclose(rows_of(memory, "keys"), keys.numpy(), atol=2e-3)
        np.testing.assert_allclose(rows_of(memory, "predictions"), said.numpy(), atol=1e-3)


def test_an_explanation_names_files(finished: tuple[Path, Ran]) -> None:
    folder, ran = finished
    said = ran.out.splitlines()
    cases = [place for place, line in enumerate(said) if line.endswith("what moved it most:")]
    assert len(cases) == 2
    for place in cases:
        assert said[place].split()[0] in names_of(folder / "test")
        assert all(line.split(",")[0].strip() in names_of(folder / "train") for line in said[place + 1 : place + 4])


def test_labels_that_no_picture_tells_of_are_no_gain_and_end_with_1(here: Path) -> None:
    for name, seed in (("train", 5), ("test", 6)):
        shutil.rmtree(name)
        as_images(here / name, 20, seed, classes=("one", "six", "two"))  # which have one colour
    ran = run("--held-out", 0.25)
    assert ran.code == 1
    assert "no gain: do not deploy" in ran.out
    assert ran.out.count("as in-sample as") == 2  # in the plan and beside the result
    rows, drawn = split(scan(Path("train"), "--train", ("one", "six", "two"), Centre(8)), 15)
    assert np.bincount(drawn.labels).tolist() == [5, 5, 5]
    assert sorted([*rows.names, *drawn.names]) == names_of(Path("train"))
    with Memory.open("mem") as memory:
        assert memory.ids.tolist() == rows.names.tolist()


def test_test_images_choose_nothing_and_worker_processes_change_nothing(here: Path, finished: tuple[Path, Ran]) -> None:
    shutil.rmtree("test")
    as_images(here / "test", 10, 9)
    run(*TUNE, "--workers", 1)
    with Memory.open("mem") as memory, Memory.open(finished[0] / "mem") as before:
        assert memory.setting == before.setting
        same_rows(memory, before)


def test_broken_images_are_named_and_left_out_on_demand(here: Path) -> None:
    for name in ("train/cat/000.png", "train/cat/011.png", "test/dog/003.png"):
        Path(name).write_bytes(b"")
    cause = "000.png cannot be read as an image (UnidentifiedImageError); replace it"
    refused(run(*TUNE), f"error: train/cat/{cause}")
    ran = run(*TUNE, "--skip-broken")
    assert ran.code == 0
    assert "left out: test/dog/003.png cannot be read as an image" in ran.err
    with Memory.open("mem") as memory:
        assert set(names_of(Path("train"))) - set(memory.ids) == {"cat/000.png", "cat/011.png"}


def test_an_image_that_breaks_in_a_worker_process_is_named_in_one_line(here: Path) -> None:
    Path("train/cat/001.png").write_bytes(b"")
    ran = run(*TUNE, "--batch-size", 2, "--workers", 1)
    assert ran.code == 2
    assert ran.err.splitlines()[-1].startswith("error: train/cat/001.png cannot be read as an image")


def test_an_interrupted_build_goes_on_where_it_was(
    here: Path, finished: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stopping, "n_left", 10)  # the plan takes a few batches first
    ran = run(*TUNE, "--batch-size", 16, model=f"{__name__}:Stopping")
    assert ran.code == 130
    assert ran.err.splitlines()[-1] == "interrupted; run the same command again to go on"
    with Memory.open("mem") as memory:
        done = len(memory)
    assert 0 < done < 90
    ran = run(*TUNE, "--batch-size", 16, model=f"{__name__}:Stopping")
    assert ran.code == 0
    assert f"for {90 - done} rows to come" in ran.out
    with Memory.open("mem") as memory, Memory.open(finished[0] / "mem") as at_once:
        same_rows(memory, at_once, atol=2e-3)


@pytest.mark.parametrize("words", [("--layer", "0"), ("--image-size", 9), ("--held-out", 0.5)])
def test_a_build_does_not_go_on_with_other_options(
    here: Path, finished: tuple[Path, Ran], words: tuple[object, ...]
) -> None:
    shutil.copytree(finished[0] / "mem", "mem")
    ran = run(*(words if "--held-out" in words else (*TUNE, *words)))
    assert ran.code == 2
    assert "error: the memory at mem was built with" in ran.err
    Path("train/dog/000.png").rename("train/dog/999.png")
    assert "mem holds images that --train does not have; name another path" in run(*TUNE).err


def test_weights_come_from_a_file_that_fits(here: Path) -> None:
    save_file(network(5).state_dict(), "five.safetensors")
    refused(run("--weights", "five.safetensors"), "'4.bias' is (5,) in the file and (3,) in the model; is it")
    refused(run("--weights", "mem.pt"), "reading mem.pt failed", ".safetensors")
    other = network()
    torch.nn.init.zeros_(other[4].bias)  # type: ignore[index]
    save_file(other.state_dict(), "other.safetensors")
    run(*TUNE, "--weights", "other.safetensors")
    with Memory.open("mem") as memory:
        ResMemModule(other, memory)
        with pytest.raises(FingerprintMismatch):
            ResMemModule(network(), memory)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_the_models_of_a_library_run_with_their_own_preprocessing(
    here: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pytest.importorskip(library, exc_type=ImportError)
    pytest.importorskip("torchvision", exc_type=ImportError)
    make = package.create_model if library == "timm" else package.models.get_model
    save_file(make("resnet18", num_classes=3).state_dict(), "weights.safetensors")
    ran = run("--weights", "weights.safetensors", "--batch-size", 2, "--plan", model=f"{library}:resnet18")
    assert (ran.code, "512 numbers" in ran.out, "224" in ran.out) == (0, True, True), ran.err
    refused(run(model=f"{library}:resnet81"), f"making the model {library}:resnet81 failed")
    monkeypatch.setitem(sys.modules, library, None)
    refused(run(model=f"{library}:resnet18"), f"needs {library}; pip install {library}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--train", "trian"), "--train trian is no folder; name one"),
        (("--train", "train/cat"), "--train train/cat has no subfolders; put"),
        (("--test", "hollow"), "--test hollow has no images; they are known by .bmp"),
        (("--test", "train"), "overlap; name folders of their own"),
        (("--tune", "link"), "overlap; name folders of their own"),
        (("--tune", "other"), "other/cats is a class that --train does not have; did you mean 'cat'?"),
        (("--layer", "7"), "the model has no layer '7'; did you mean"),
        (("--batch-size", 0), "--batch-size is 0, expected"),
        (("--held-out", 1), "train has 90 images, but 90 are to tune with; give"),
        (("--device", "cud"), "moving the model to 'cud' failed"),
        (("--model", NETWORK + "s"), "has no 'networks'; did you mean"),
        (("--model", f"{__name__}:five_outputs"), "has 3 class folders, but the model has 5 outputs; add"),
    ],
)
def test_a_mistake_is_one_line_of_cause_and_remedy(here: Path, words: tuple[object, ...], said: str) -> None:
    Path("link").symlink_to("test")
    Path("hollow/cat").mkdir(parents=True)
    shutil.copytree("unseen/cat", "other/cats")
    refused(run(*words), said)


def test_usage_ends_with_2_and_the_page_names_options_that_there_are() -> None:
    assert run("--tune", "unseen", "--held-out", 0.1).code == 2
    page = (ROOT / "docs" / "images-at-scale.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page)) <= set(re.findall(r"--[a-z][a-z-]+", run("--help").out))
