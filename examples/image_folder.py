"""Give a pre-trained image classifier a memory of a folder of images, and measure what that is worth.

    python examples/image_folder.py --model timm:resnet18 --train data/train --test data/test --memory resnet18.memory

Folders have one subfolder a class; the class names, sorted, are the model's outputs. Before anything starts the plan is
printed: images, keys, bytes on disk and in RAM, the index, the time. `--plan` stops there and writes nothing.

Then one pass over the training images fills the memory, images that are not in it choose the setting, and the test
images, which chose nothing, measure it. The same command goes on with a build that was interrupted.

Exit codes: 0 the memory helps; 1 no gain; 2 an option, a file or a disk that cannot be used; 130 interrupted.
"""

import argparse
import difflib
import importlib
import importlib.util
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from numpy import ndarray
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import residual_memory as rm
from residual_memory.cli.images import SUFFIXES, images_under
from residual_memory.cli.loading import load_model, user_code
from residual_memory.correction import TABLE_BYTES
from residual_memory.display import shown, size_text
from residual_memory.errors import CorruptFile, InvalidInput, MemoryNotFound, ResidualMemoryError, StorageFailure
from residual_memory.indexes.registry import planned
from residual_memory.validation import as_count, as_fraction

TUNED_ON = (5, 20_000)  # images: five folds measure the setting; more take hours at 1,000 classes and choose the same
TIMED = 64  # images that are decoded and run for the plan
SPARE_BYTES = 64 << 20  # of the disk: small segments are rewritten as larger ones while the memory grows
EXPLAINED_AMONG = 64  # wrong test images that are searched for examples
KEPT: dict[str, Any] = {"key_dtype": "float16", "prediction_dtype": "float16"}  # half the bytes of float32
SEEN = (
    "note: if the model was trained on --train, it has seen the images that choose the setting: what it gets wrong on "
    "them is as in-sample as what the memory holds; --tune DIR takes images that it never saw"
)


@dataclass(frozen=True)
class Pictures(Dataset[Any]):
    """Labelled images of a folder, in the order of their names: items (image [3 h w], class index).

    `names` are paths below the folder, which has one subfolder a class; `transform` makes of an RGB picture what the
    model takes, and of the same picture always the same.
    """

    folder: Path
    names: Shaped[ndarray, " n"]
    labels: Int64[ndarray, " n"]
    transform: Callable[[Any], Tensor]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(self.read(row)), int(self.labels[row])

    def read(self, row: int) -> Any:
        """The picture, in RGB."""
        path = self.folder / str(self.names[row])
        try:
            with Image.open(path) as file:
                return file.convert("RGB")
        except Exception as error:  # Pillow's readers raise whatever the bytes bring about
            raise CorruptFile(
                f"{path} cannot be read as an image ({type(error).__name__}); "
                "replace it, or leave such images out: --skip-broken"
            ) from error

    def complaints(self, rows: Sequence[int]) -> list[str]:
        """What is wrong with each of these images; empty where nothing is."""
        found = [""] * len(rows)
        for place, row in enumerate(rows):
            try:
                self.read(row)
            except CorruptFile as error:
                found[place] = str(error).partition("; ")[0]
        return found

    def only(self, rows: Shaped[ndarray, " r"]) -> "Pictures":
        """Some of the images."""
        return Pictures(self.folder, self.names[rows], self.labels[rows], self.transform)


def class_folders(folder: Path, option: str) -> list[str]:
    """The names of the subfolders, sorted."""
    if not folder.is_dir():
        raise InvalidInput(f"{option} {folder} is no folder; name one with a subfolder a class")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InvalidInput(f"{option} {folder} has no subfolders; put the images of each class into one of its name")
    return names


def scan(folder: Path, option: str, classes: Sequence[str], transform: Callable[[Any], Tensor]) -> Pictures:
    """All images below the class subfolders, however deep."""
    found: list[tuple[str, int]] = []
    for name in class_folders(folder, option):
        images = [path.relative_to(folder).as_posix() for path in images_under(folder / name)]
        if images and name not in classes:
            close = difflib.get_close_matches(name, classes, 1)
            hint = f"did you mean {close[0]!r}?" if close else "take it away, or give --train such a folder"
            raise InvalidInput(f"{option} {folder / name} is a class that --train does not have; {hint}")
        label = classes.index(name) if images else -1
        found += [(image, label) for image in images]
    if not found:
        raise InvalidInput(f"{option} {folder} has no images; they are known by {', '.join(sorted(SUFFIXES))}")
    found.sort()  # by the whole path: ids that ascend are the fastest to look up
    names, labels = zip(*found, strict=True)
    return Pictures(folder, np.array(names), np.array(labels, np.int64), transform)


def check_apart(folders: dict[str, Path]) -> None:
    """Refuse folders of which one is, or lies in, another: what is measured must not be what was remembered."""
    for (one, first), (two, second) in itertools.combinations(folders.items(), 2):
        places = first.resolve(), second.resolve()
        if places[0].is_relative_to(places[1]) or places[1].is_relative_to(places[0]):
            raise InvalidInput(f"{one} {first} and {two} {second} overlap; name folders of their own")


def split(pictures: Pictures, count: int) -> tuple[Pictures, Pictures]:
    """The images in two parts, of which the second has `count`, drawn evenly from every class."""
    order = np.lexsort((np.random.default_rng(0).random(len(pictures)), pictures.labels))
    drawn = np.zeros(len(pictures), bool)
    drawn[order[((np.arange(count) + 0.5) * len(order) / count).astype(int)]] = True
    return pictures.only(~drawn), pictures.only(drawn)


def without_broken(pictures: Pictures, workers: int) -> Pictures:
    """Those that can be read, found by decoding every image once; the others are named."""
    rows: Any = range(len(pictures))
    batches = DataLoader(rows, TIMED, num_workers=workers, collate_fn=pictures.complaints)
    complaints = [complaint for batch in batches for complaint in batch]
    for complaint in filter(None, complaints):
        say(f"left out: {complaint}")
    good = np.array([not complaint for complaint in complaints])
    if not good.any():
        raise CorruptFile(f"none of the {len(pictures):,} images of {pictures.folder} can be read; look at one")
    return pictures.only(good)


@dataclass(frozen=True)
class Centre:
    """For a model of your own: the centre square, resized to `size`, with ImageNet's mean and deviation taken off."""

    size: int

    def __call__(self, picture: Any) -> Tensor:
        square = ImageOps.fit(picture, (self.size, self.size), Image.Resampling.BILINEAR)
        pixels = np.asarray(square, np.float32) / 255
        mean, deviation = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
        return torch.from_numpy(((pixels - mean) / deviation).transpose(2, 0, 1).copy())


def load(name: str, weights: Path | None, n_classes: int, size: int) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """The model, with `weights` in place of its own and then with an output a class, and the transform it needs."""
    library, _, known_as = name.partition(":")
    own: dict[str, Any] = {} if weights is None else {"num_classes": n_classes}
    if library not in ("timm", "torchvision"):
        network, transform = load_model(name), Centre(size)
    elif not all(importlib.util.find_spec(package) for package in (library, "torchvision")):
        raise InvalidInput(f"the model {name} needs {library}; pip install {library} torchvision")
    else:
        with user_code(f"making the model {name}", f"{library} lists its models; --weights FILE needs no network"):
            models = importlib.import_module("timm" if library == "timm" else "torchvision.models")
            if library == "timm":
                network = models.create_model(known_as, pretrained=not own, **own)
                config = models.data.resolve_model_data_config(network)
                transform = models.data.create_transform(**config, is_training=False)
            else:
                pretrained = models.get_model_weights(known_as).DEFAULT
                network = models.get_model(known_as, weights=None if own else pretrained, **own)
                transform = pretrained.transforms()
    if weights is not None:
        load_weights(network, weights)
    return network.eval(), transform


def load_weights(network: nn.Module, path: Path) -> None:
    """From a file that can hold nothing but arrays."""
    with user_code(f"reading {path}", "give the .safetensors file of a state_dict"):
        found = load_file(path)
    has, takes = ({name: tuple(value.shape) for name, value in some.items()} for some in (found, network.state_dict()))
    for name in sorted(has.keys() | takes.keys()):
        if has.get(name) != takes.get(name):
            shapes = f"{has.get(name, 'missing')} in the file and {takes.get(name, 'missing')} in the model"
            raise InvalidInput(f"{path}: {name!r} is {shapes}; is it of another model, or of other classes?")
    network.load_state_dict(found)


def print_plan(options: argparse.Namespace, network: nn.Module, classes: list[str], *sets: Pictures) -> None:
    """Say what a run takes, from a few images; refuse what cannot end well."""
    train, choosing, test = sets
    n, batch = len(train), min(len(train), TIMED, options.batch_size)
    sample = train.only(np.linspace(0, n - 1, batch).astype(int))
    sample = without_broken(sample, 0) if options.skip_broken else sample
    started = time.perf_counter()
    images = torch.stack([sample[row][0] for row in range(len(sample))])
    decoding = (time.perf_counter() - started) / len(sample)
    with user_code("running the model", "it should take a batch [b 3 h w] and give logits [b c]"), torch.no_grad():
        for _ in range(2):  # the first is to warm up
            started = time.perf_counter()
            n_outputs = network(images.to(options.device)).cpu().shape[1]
            running = (time.perf_counter() - started) / len(sample)
    if n_outputs != len(classes):
        raise InvalidInput(
            f"--train {train.folder} has {len(classes):,} class folders, but the model has {n_outputs:,} outputs; "
            "add an empty folder for each class that is missing, or give --weights for these classes"
        )
    with rm.build_memory(network, sample.only(np.arange(1)), None, layer=options.layer, verbose=False, **KEPT) as probe:
        layout, layer = probe.layout, (probe.source or {})["layer"]
    try:
        with rm.Memory.open(options.memory) as begun:
            n_held = len(begun)
    except MemoryNotFound:
        n_held = 0
    row_bytes = (
        layout.bytes_per_row() - 8 + max(len(os.fsencode(name)) for name in train.names.tolist())
    )  # 8: integer ids
    n_missing, n_asked = max(n - n_held, 0), len(choosing) + len(test)
    needed = n_missing * row_bytes
    disk = next(place for place in (options.memory.absolute(), *options.memory.absolute().parents) if place.exists())
    free = shutil.disk_usage(disk).free
    spec, index = planned("auto", layout.dim, n)
    engine = spec.build or spec.engine
    table = 4 * n * layout.n_outputs  # the residuals of all rows, kept ready where that is little
    others = 2 * train.names.nbytes + (table if table <= TABLE_BYTES else 0)
    asked = 4 * n_asked * (layout.dim + layout.n_outputs)
    read = decoding * (2 if options.skip_broken else 1)
    each = max(read / options.workers, running) if options.workers else read + running
    minutes = max(each * (n_missing + n_asked) / 60, 0.1)
    for name, text in (
        ("images", f"{n:,} to remember, in {len(np.unique(train.labels)):,} classes"),
        ("", f"{len(choosing):,} to choose the setting with, {f'from {options.tune}' if options.tune else 'held out'}"),
        ("", f"{len(test):,} to test on, which choose nothing"),
        ("model", f"{options.model} on {options.device}"),
        ("transform", " ".join(str(train.transform).split())),
        ("keys", f"input of {layer!r}, {layout.dim:,} numbers"),
        ("a row", f"{row_bytes:,} bytes: key and {layout.n_outputs:,} probabilities in float16, label, file name"),
        ("on disk", f"{size_text(needed)} for {n_missing:,} rows to come; {size_text(free)} free at {disk}"),
        ("in RAM", f"{size_text(index.ram)} index ({engine}), {size_text(others)} residuals and names,"),
        ("", f"{size_text(asked)} images that are asked; besides the libraries"),
        ("time", f"about {minutes:,.1f} min for the images, then tuning; an image takes"),
        ("", f"{1e3 * decoding:.2g} ms to decode ({options.workers} workers), {1e3 * running:.2g} ms to run"),
    ):
        print(f"{name:<11}{shown(text)}")
    if not options.tune:
        print(SEEN)
    if needed and needed + SPARE_BYTES > free:
        raise StorageFailure(
            f"the memory needs {size_text(needed)} and {size_text(SPARE_BYTES)} to spare, but {disk} has "
            f"{size_text(free)} free; make room, or name another disk with --memory"
        )


def carry_out(options: argparse.Namespace, network: nn.Module, classes: list[str], *sets: Pictures) -> rm.Evaluation:
    """Build, tune, measure, explain."""
    train, choosing, test = sets
    reading: dict[str, Any] = {"batch_size": options.batch_size, "num_workers": options.workers}
    guarded = "running the model on the images", "give a smaller --batch-size or fewer --workers"
    with user_code(*guarded):
        unseen = choosing if options.tune else None  # tells whether the base knows its training images by heart
        places: dict[str, Any] = {"layer": options.layer, "ids": train.names, "class_names": classes}
        memory = rm.build_memory(network, train, options.memory, held_out=unseen, **places, **KEPT, **reading)
    with memory:
        if not np.isin(memory.ids, train.names).all():
            raise InvalidInput(f"{options.memory} holds images that --train does not have; name another path")
        with user_code(*guarded):
            held, asked = (rm.observe(network, some, memory, **reading) for some in (choosing, test))
        tuned = rm.tune(memory, held.keys, held.labels, np.asarray(held.predictions))
        best, alone, said = tuned.best, tuned.best_memory_only, np.asarray(asked.predictions)
        memory.save_setting(best.to_dict())
        result = rm.evaluate(memory, asked.keys, asked.labels, said, best, memory_only=alone)
        print(f"\naccuracy on {result.n_rows:,} test images, with 95 % intervals")
        figures = {"base": result.base, "memory only": result.memory_only, "corrected": result.corrected}
        for name, figure in figures.items():
            print(f"{name:<11}{100 * figure.value:5.1f} %   {100 * figure.low:.1f} to {100 * figure.high:.1f}")
        print(f"{result.verdict}\non the images that chose the setting: {tuned.verdict}")
        if not options.tune:
            print(SEEN)
        print(
            f"setting, saved with {options.memory}: k {best.n_neighbors}, bandwidth {float(best.bandwidth):.3g}, "
            f"temperature {best.temperature:g}, shrinkage {best.shrinkage:g}"
        )
        if options.explain and best.shrinkage:
            explain(memory, best, asked, test, options.explain)
    return result


def explain(memory: rm.Memory, setting: rm.Setting, asked: rm.Observations, test: Pictures, count: int) -> None:
    """Name test images that the memory set right, and the files that it did it with."""
    said, names = np.asarray(asked.predictions), memory.class_names or ()
    wrong = np.flatnonzero(said.argmax(1) != asked.labels)[:EXPLAINED_AMONG]
    base = rm.temper(said[wrong], setting.temperature)
    found = rm.explain(setting.knn(memory, index="auto"), asked.keys[wrong], base, shrinkage=setting.shrinkage)
    for case in np.flatnonzero(found.corrected.argmax(1) == asked.labels[wrong])[:count]:
        label, before = asked.labels[wrong[case]], said[wrong[case]].argmax()
        parts = found.contributions[case, :, label]
        print(shown(f"{test.names[wrong[case]]} is {names[label]}; the base said {names[before]}; what moved it most:"))
        for place in np.argsort(-parts)[:3]:
            print(shown(f"  {found.ids[case, place]}, which adds {parts[place]:+.3f} to {names[label]}"))


def run(options: argparse.Namespace) -> int:
    """The plan, and what was planned."""
    folders = {"--train": options.train, "--test": options.test, "--memory": options.memory}
    check_apart(folders | ({"--tune": options.tune} if options.tune else {}))
    size, _ = as_count("--image-size", options.image_size), as_count("--batch-size", options.batch_size)
    classes = class_folders(options.train, "--train")
    network, transform = load(options.model, options.weights, len(classes), size)
    with user_code(f"moving the model to {options.device!r}", "--device cpu is always there"):
        network.to(torch.device(options.device))
    train, test = (scan(folders[name], name, classes, transform) for name in ("--train", "--test"))
    choosing = scan(options.tune, "--tune", classes, transform) if options.tune else train
    share = 1.0 if options.tune else as_fraction("--held-out", options.held_out, above_zero=True)
    count = min(max(round(share * len(choosing)), TUNED_ON[0]), TUNED_ON[1])
    if count > len(choosing) - (not options.tune):
        raise InvalidInput(f"{choosing.folder} has {len(choosing):,} images, but {count:,} are to tune with; give more")
    rest, choosing = split(choosing, count)
    train = train if options.tune else rest
    print_plan(options, network, classes, train, choosing, test)
    if options.plan:
        return 0
    if options.skip_broken:
        train, choosing, test = (without_broken(some, options.workers) for some in (train, choosing, test))
    return 0 if carry_out(options, network, classes, train, choosing, test).helps else 1


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu, decoders = torch.cuda.is_available(), min((os.cpu_count() or 1) - 1, 16)
    add = made.add_argument
    add("--model", required=True, help="timm:NAME, torchvision:NAME, or MODULE:NAME of your own; gives logits")
    add("--weights", type=Path, metavar="FILE", help="safetensors file in place of the pre-trained weights")
    add("--train", type=Path, required=True, metavar="DIR", help="images to remember, one subfolder a class")
    add("--test", type=Path, required=True, metavar="DIR", help="images to measure on; they choose nothing")
    add("--memory", type=Path, required=True, metavar="DIR", help="where the memory is made, or goes on")
    choice = made.add_mutually_exclusive_group()
    choice.add_argument("--tune", type=Path, metavar="DIR", help="images the model never saw, to choose the setting")
    choice.add_argument("--held-out", type=float, default=0.05, metavar="PART", help="or this part of --train, 0.05")
    add("--layer", metavar="NAME", help="its input gives the keys; by default the last Linear")
    add("--image-size", type=int, default=224, metavar="N", help="of MODULE:NAME (%(default)s)")
    add("--batch-size", type=int, default=64, metavar="N", help="images the model sees at once (%(default)s)")
    add("--workers", type=int, default=decoders, metavar="N", help="processes that decode (%(default)s)")
    add("--device", default="cuda" if gpu else "cpu", metavar="NAME", help="of the model (%(default)s)")
    add("--skip-broken", action="store_true", help="first decode every image once, and leave out unreadable ones")
    add("--explain", type=int, default=1, metavar="N", help="explain N test images that were set right (%(default)s)")
    add("--plan", action="store_true", help="print the plan and stop; nothing is written")
    return made


def say(text: str) -> None:
    """Something on the side."""
    print(shown(text), file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    try:
        return run(parser().parse_args(arguments))
    except KeyboardInterrupt:
        say("interrupted; run the same command again to go on")
        return 130
    except (ResidualMemoryError, OSError) as error:
        kind = f"{type(error).__module__}.{type(error).__qualname__}: "  # in the last line of a worker's traceback
        say(f"error: {str(error).strip().splitlines()[-1].removeprefix(kind)}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
