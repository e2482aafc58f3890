import hashlib
import http.server
import io
import os
import pickle
import socket
import struct
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy import ndarray

from residual_memory.demo import cifar100
from residual_memory.demo.cifar100 import (
    BINARY_FOLDER,
    PYTHON_FOLDER,
    Cifar100,
    Split,
    download_cifar100,
    find_cifar100,
    held_out_split,
    read_cifar100,
    user_cache,
)
from residual_memory.errors import CorruptFile, DataNotFound

CLASS_NAMES = [f"class_{number}" for number in range(100)]
SUPERCLASS_NAMES = [f"superclass_{number}" for number in range(20)]
SIZES: dict[Split, int] = {"train": 12, "test": 5}
LAYOUTS = ["binary", "python"]


def synthetic(split: Split) -> Cifar100:
    random = np.random.default_rng(len(split))
    labels = random.integers(0, 100, SIZES[split])
    images = random.integers(0, 256, (SIZES[split], 3, 32, 32)).astype(np.uint8)
    return Cifar100(images, labels, labels // 5, tuple(CLASS_NAMES), tuple(SUPERCLASS_NAMES))


class Python2Pickler(pickle._Pickler):
    """Writes strings and bytes alike as Python 2 wrote its str: the publisher's files are of that time."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_str(self, value: str | bytes) -> None:
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)  # type: ignore[attr-defined]

    dispatch[str] = dispatch[bytes] = save_str


def pickled(content: Any) -> bytes:
    """As the publisher's files are: protocol 2, by Python 2 and the NumPy of its days."""
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def python_content(data: Cifar100) -> dict[str, Any]:
    return {
        "data": data.images.reshape(len(data), -1),
        "fine_labels": data.labels.tolist(),
        "coarse_labels": data.superclasses.tolist(),
        "filenames": [f"{row}.png" for row in range(len(data))],
    }


def write(layout: str, folder: Path) -> Path:
    """The synthetic set in one of the two official layouts."""
    folder.mkdir(parents=True)
    for split in SIZES:
        data = synthetic(split)
        if layout == "binary":
            head = np.stack([data.superclasses, data.labels], axis=1).astype(np.uint8)
            np.concatenate([head, data.images.reshape(len(data), -1)], axis=1).tofile(folder / f"{split}.bin")
        else:
            (folder / split).write_bytes(pickled(python_content(data)))
    if layout == "binary":
        (folder / "fine_label_names.txt").write_text("\n".join(CLASS_NAMES) + "\n")
        (folder / "coarse_label_names.txt").write_text("\n".join(SUPERCLASS_NAMES) + "\n")
    else:
        names = {"fine_label_names": CLASS_NAMES, "coarse_label_names": SUPERCLASS_NAMES}
        (folder / "meta").write_bytes(pickled(names))
    return folder


@pytest.fixture(autouse=True)
def small_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The published sizes and checksums are those of the synthetic set; nothing of this machine's is looked at."""
    digests = {split: hashlib.sha256(synthetic(split).images.tobytes()).hexdigest() for split in SIZES}
    monkeypatch.setattr(cifar100, "N_IMAGES", SIZES)
    monkeypatch.setattr(cifar100, "PIXELS_SHA256", digests)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RESMEM_DATA", raising=False)


def test_the_pickles_here_are_written_as_the_publishers_are(tmp_path: Path) -> None:
    written = (write("python", tmp_path / "data") / "train").read_bytes()
    assert written.startswith(b"\x80\x02}")
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in written
    assert b"_codecs" not in written


def change_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", SIZES)
def test_both_official_layouts_give_the_same_images_and_labels(layout: str, split: Split, tmp_path: Path) -> None:
    found, wanted = read_cifar100(write(layout, tmp_path / "data"), split), synthetic(split)
    for name in ("images", "labels", "superclasses"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    assert (found.class_names, found.superclass_names) == (wanted.class_names, wanted.superclass_names)
    assert len(found) == SIZES[split]


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_pixel_that_differs_is_refused(name: Split, tmp_path: Path) -> None:
    folder = write("binary", tmp_path / "data")
    change_byte(folder / f"{name}.bin", 3074 + 500)
    with pytest.raises(CorruptFile, match=f"{name} images have sha256"):
        read_cifar100(folder, name)


def test_a_pixel_that_differs_in_a_pickle_is_refused(tmp_path: Path) -> None:
    folder = write("python", tmp_path / "data")
    content = python_content(synthetic("train"))
    content["data"][3, 7] ^= 1
    (folder / "train").write_bytes(pickled(content))
    with pytest.raises(CorruptFile, match="train images have sha256"):
        read_cifar100(folder, "train")


@pytest.mark.parametrize("length", [0, 1, 3074, 12 * 3074 - 1, 12 * 3074 + 1])
def test_a_binary_file_of_another_length_is_refused(length: int, tmp_path: Path) -> None:
    path = write("binary", tmp_path / "data") / "train.bin"
    path.write_bytes((path.read_bytes() + b"\0")[:length])
    with pytest.raises(CorruptFile, match=r"train\.bin has .* bytes, expected 36,888"):
        read_cifar100(path.parent, "train")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("file", ["train", "meta"])
def test_a_pickle_cut_short_is_refused(share: float, file: str, tmp_path: Path) -> None:
    path = write("python", tmp_path / "data") / file
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CorruptFile):
        read_cifar100(path.parent, "train")


@pytest.mark.parametrize("content", [b"not a pickle", pickled([1, 2, 3]), pickled(7), pickled({"data": None})])
@pytest.mark.parametrize("file", ["train", "meta"])
def test_a_file_with_something_else_in_it_is_refused(content: bytes, file: str, tmp_path: Path) -> None:
    path = write("python", tmp_path / "data") / file
    path.write_bytes(content)
    with pytest.raises(CorruptFile):
        read_cifar100(path.parent, "train")


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_pickle_is_refused_or_read_whole_and_never_anything_else(seed: int, tmp_path: Path) -> None:
    path = write("python", tmp_path / "data") / "train"
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(seed)
    structure = len(content) - 12 * 3072  # what is not a pixel lies around them
    place = int(random.choice([random.integers(0, 150), len(content) - 1 - random.integers(0, structure - 150)]))
    content[place] = random.integers(0, 256)
    path.write_bytes(bytes(content))
    try:
        found = read_cifar100(path.parent, "train")
    except (CorruptFile, DataNotFound):
        return
    np.testing.assert_array_equal(found.images, synthetic("train").images)


@pytest.mark.parametrize(("layout", "file"), [("binary", "fine_label_names.txt"), ("python", "meta")])
def test_names_that_are_missing_are_missing_data(layout: str, file: str, tmp_path: Path) -> None:
    folder = write(layout, tmp_path / "data")
    (folder / file).unlink()
    with pytest.raises(DataNotFound, match=file):
        read_cifar100(folder, "train")


def test_a_folder_with_neither_version_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataNotFound, match=r"neither train\.bin nor train"):
        read_cifar100(tmp_path, "train")


class Hostile:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._made_by = call, arguments

    def __reduce__(self) -> Any:
        return self._made_by


@pytest.mark.parametrize("file", ["train", "meta"])
@pytest.mark.parametrize(
    "attack",
    [
        lambda target: Hostile(os.system, f"touch {target}"),
        lambda target: Hostile(eval, f"open({str(target)!r}, 'w')"),
        lambda target: Hostile(os.mkdir, str(target)),
        lambda target: Hostile(np.save, str(target), np.zeros(1)),
        lambda target: Hostile(np.memmap, str(target), "uint8", "w+", 0, (1,)),
    ],
    ids=["system", "eval", "mkdir", "numpy.save", "numpy.memmap"],
)
def test_a_hostile_pickle_is_not_executed(file: str, attack: Any, tmp_path: Path) -> None:
    folder, target = write("python", tmp_path / "data"), tmp_path / "was-here"
    (folder / file).write_bytes(pickled({**python_content(synthetic("train")), "extra": attack(target)}))
    with pytest.raises(CorruptFile, match="which no such file needs; not read"):
        read_cifar100(folder, "train")
    assert list(tmp_path.glob("was-here*")) == []


def test_the_attacks_above_would_work_on_a_plain_unpickler(tmp_path: Path) -> None:
    pickle.loads(pickled(Hostile(os.mkdir, str(tmp_path / "was-here"))))
    assert (tmp_path / "was-here").exists()


def test_held_out_rows_are_fixed_apart_and_ascending() -> None:
    train, held_out = held_out_split()
    assert (len(train), len(held_out)) == (45_000, 5_000)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(50_000))
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()
    np.testing.assert_array_equal(held_out_split()[1], held_out)


# ---------------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("below", ["", BINARY_FOLDER, PYTHON_FOLDER])
def test_the_data_are_found_where_the_variable_says(
    layout: str, below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(layout, tmp_path / "mine" / below)
    monkeypatch.setenv("RESMEM_DATA", str(tmp_path / "mine"))
    found = find_cifar100()
    assert found == folder
    assert len(read_cifar100(folder, "test")) == 5


def test_the_variable_comes_before_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = write("binary", user_cache() / BINARY_FOLDER)
    assert find_cifar100() == cached
    mine = write("python", tmp_path / "mine" / PYTHON_FOLDER)
    monkeypatch.setenv("RESMEM_DATA", str(tmp_path / "mine"))
    assert find_cifar100() == mine


@pytest.mark.parametrize("named", ["", "/nowhere"])
def test_the_cache_is_looked_at_where_the_variable_leads_nowhere(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = write("binary", user_cache() / BINARY_FOLDER)
    monkeypatch.setenv("RESMEM_DATA", named)
    assert find_cifar100() == cached


def test_no_data_are_none(tmp_path: Path) -> None:
    assert find_cifar100() is None
    assert not user_cache().exists()


def test_the_cache_is_where_the_desktop_keeps_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_cache() == tmp_path / "cache" / "residual-memory"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "residual-memory"


# ---------------------------------------------------------------------------------------------- downloading


def archive_of(folder: Path) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(folder, BINARY_FOLDER)
    return packed.getvalue()


@contextmanager
def publisher(answer: bytes, status: int = 200) -> Iterator[str]:
    """A server on this machine that answers everything with the same bytes; gives its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *parts: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/cifar-100-binary.tar.gz"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def raw_publisher(answer: bytes | None) -> Iterator[str]:
    """A port that answers with these bytes whatever is asked, or (None) says nothing at all."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []

        def serve() -> None:
            connection, _ = listener.accept()
            held.append(connection)
            if answer is not None:
                connection.recv(1 << 16)
                connection.sendall(answer)
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/archive"
        finally:
            thread.join(10)
            for connection in held:
                connection.close()


def point_to(url: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar100, "ARCHIVE", url)
    monkeypatch.setattr(cifar100, "ARCHIVE_MD5", hashlib.md5(content, usedforsecurity=False).hexdigest())
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def leftovers() -> list[Path]:
    return [path for path in user_cache().iterdir() if path.name != BINARY_FOLDER]


def test_a_download_is_checked_unpacked_into_the_cache_and_found_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive_of(write("binary", tmp_path / "published"))
    seen: list[tuple[int, int]] = []
    with publisher(content) as url:
        point_to(url, content, monkeypatch)
        folder = download_cifar100(progress=lambda done, total: seen.append((done, total)))
    assert folder == user_cache() / BINARY_FOLDER == find_cifar100()
    np.testing.assert_array_equal(read_cifar100(folder, "train").images, synthetic("train").images)
    assert seen[-1] == (len(content), len(content))
    assert leftovers() == []


def test_a_download_over_an_earlier_one_leaves_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive_of(write("binary", tmp_path / "published"))
    with publisher(content) as url:
        point_to(url, content, monkeypatch)
        assert download_cifar100() == download_cifar100()
    assert len(read_cifar100(user_cache() / BINARY_FOLDER, "test")) == 5


def test_an_archive_with_another_checksum_is_refused_and_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive_of(write("binary", tmp_path / "published"))
    with publisher(content[:-1] + b"!") as url:
        point_to(url, content, monkeypatch)
        with pytest.raises(CorruptFile, match=r"has md5 .*, expected .*; try the download again"):
            download_cifar100()
    assert find_cifar100() is None
    assert leftovers() == []


def expect_no_data(url: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> float:
    """Seconds until the attempt was given up with an explanation."""
    point_to(url, b"", monkeypatch)
    start = time.monotonic()
    with pytest.raises(DataNotFound, match=r"(?s)gave no answer .*put the folder cifar-100-binary there by hand"):
        download_cifar100(**options)
    assert leftovers() == []
    return time.monotonic() - start


def test_without_a_network_the_attempt_is_given_up_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert expect_no_data(f"http://127.0.0.1:{port}/archive", monkeypatch) < 5


def test_a_host_without_a_name_is_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    expect_no_data("http://no-such-host.invalid/archive", monkeypatch)


@pytest.mark.parametrize("status", [404, 503])
def test_an_error_of_the_publisher_is_no_data(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with publisher(b"sorry", status) as url:
        expect_no_data(url, monkeypatch)


def test_a_publisher_that_says_nothing_is_given_up_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    with raw_publisher(None) as url:
        assert expect_no_data(url, monkeypatch, timeout=0.3) < 5


@pytest.mark.parametrize("answer", [b"this is no HTTP\r\n\r\n", b""], ids=["no HTTP", "hung up"])
def test_an_answer_that_is_no_http_is_no_data(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with raw_publisher(answer) as url:
        expect_no_data(url, monkeypatch)


def test_an_archive_cut_off_on_the_way_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive_of(write("binary", tmp_path / "published"))
    head = f"HTTP/1.0 200 OK\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    with raw_publisher(head + content[:1000]) as url:
        point_to(url, content, monkeypatch)
        with pytest.raises((CorruptFile, DataNotFound)):
            download_cifar100()
    assert find_cifar100() is None


def test_nothing_of_an_archive_leaves_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        entry = tarfile.TarInfo("../../../escaped")
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"here"))
    content = packed.getvalue()
    with publisher(content) as url:
        point_to(url, content, monkeypatch)
        with pytest.raises(Exception, match="outside"):
            download_cifar100()
    assert list(tmp_path.rglob("escaped")) == []


def arrays_of(data: Cifar100) -> list[ndarray]:
    return [data.images, data.labels, data.superclasses]


def test_arrays_can_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    folder = write("binary", tmp_path / "data")
    for array in arrays_of(read_cifar100(folder, "test")):
        array[0] = 0
    np.testing.assert_array_equal(read_cifar100(folder, "test").labels, synthetic("test").labels)
