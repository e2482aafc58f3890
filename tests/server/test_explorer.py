"""What the page asks for: rows, pictures, the map, and what a survey found."""

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from residual_memory.correction import ById
from residual_memory.evaluation import Setting
from residual_memory.memory import Memory
from residual_memory.server import create_app
from residual_memory.surveying import survey
from tests.problems import classification, memory_of, regression
from tests.server.conftest import BEARER, TOKEN, small_memory


def patiently(client: TestClient, path: str) -> Any:
    deadline = time.monotonic() + 60
    while (answer := client.get(path)).status_code == 202:
        assert 0 <= answer.json()["progress"] <= 1
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert answer.status_code == 200, answer.text
    return answer


def unpacked(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    length = int.from_bytes(content[:4], "little")
    head = json.loads(content[4 : 4 + length])
    start, columns = 4 + length, {}
    for column in head["columns"]:
        assert start % 8 == 0
        dtype = np.dtype(column["type"])
        columns[column["name"]] = np.frombuffer(content, dtype, head["n"], start)
        start += -(-head["n"] * dtype.itemsize // 8) * 8
    assert start == len(content)
    return head, columns


def test_the_map_holds_every_row_once_with_what_the_base_missed(client: TestClient, memory: Memory) -> None:
    patiently(client, "/survey")
    client.post("/forget", json={"ids": [3]})
    head, columns = unpacked(patiently(client, "/map").content)
    assert sorted(columns["id"].tolist()) == sorted(memory.ids.tolist())
    snapshot = memory.snapshot
    rows = snapshot.rows_of(columns["id"])
    np.testing.assert_array_equal(columns["label"], snapshot.targets(rows))
    missed = 1 - snapshot.predictions(rows)[np.arange(len(rows)), snapshot.targets(rows)]
    np.testing.assert_allclose((columns["residual"] - 1.0) / 254, missed, atol=0.003)
    assert head["ranges"]["residual"] == [0, 1]
    assert columns["x"].max() > 30_000


def test_a_map_from_before_a_compaction_is_laid_out_again(tmp_path: Path) -> None:
    with small_memory(tmp_path / "memory") as writer:
        app = create_app(Memory.open(tmp_path / "memory"), token=TOKEN)
        with TestClient(app, headers=BEARER) as client:
            patiently(client, "/map")
            writer.forget(list(range(200)))
            writer.compact()
            app.state.service.refresh()
            assert client.get("/map").status_code == 202
            _, columns = unpacked(patiently(client, "/map").content)
    assert sorted(columns["id"].tolist()) == list(range(200, 300))


@pytest.mark.parametrize("keys", [np.zeros((40, 3)), np.arange(40.0)[:, None], np.full((3, 2), 1e15)])
def test_keys_without_a_shape_have_a_map_all_the_same(keys: np.ndarray) -> None:
    memory = Memory.create(dim=keys.shape[1], n_outputs=2, key_dtype="float64")
    memory.append(keys, np.zeros(len(keys), int), np.full((len(keys), 2), 0.5))
    memory.save_setting({"n_neighbors": 2})
    with TestClient(create_app(memory, token=TOKEN), headers=BEARER) as client:
        head, _ = unpacked(patiently(client, "/map").content)
    assert head["n"] == len(keys)


def test_near_rows_lie_near_each_other_on_the_map() -> None:
    random = np.random.default_rng(0)
    clusters = np.repeat(np.arange(4), 200)
    keys = 20 * np.eye(4, 16)[clusters] + random.normal(size=(800, 16))
    memory = Memory.create(dim=16, n_outputs=4)
    memory.append(keys, clusters, np.full((800, 4), 0.25))
    with TestClient(create_app(memory, token=TOKEN), headers=BEARER) as client:
        _, columns = unpacked(patiently(client, "/map").content)
    places = np.stack([columns["x"], columns["y"]], axis=1).astype(float)
    centres = np.array([places[columns["label"] == label].mean(axis=0) for label in range(4)])
    nearest = np.linalg.norm(places[:, None] - centres, axis=2).argmin(axis=1)
    assert (nearest == columns["label"]).mean() > 0.98


def test_string_ids_and_regressions_have_maps_too() -> None:
    problem = regression(n=60)
    memory = memory_of(problem, ids=[f"row {number}" for number in range(60)])
    with TestClient(create_app(memory, token=TOKEN), headers=BEARER) as client:
        head, columns = unpacked(patiently(client, "/map").content)
        assert sorted(head["ids"]) == sorted(memory.ids.tolist())
        assert "label" not in columns
        assert client.get("/survey").status_code in (202, 422)
        assert client.post("/rows", json={"ids": ["row 7"]}).json()["rows"][0]["id"] == "row 7"


def test_a_survey_asks_each_row_without_itself(memory: Memory) -> None:
    setting = Setting()
    knn = setting.knn(memory)
    found = survey(knn, setting)
    snapshot = memory.snapshot
    keys, said = np.asarray(snapshot.keys.take(np.arange(300))), snapshot.predictions(np.arange(300))
    corrected = setting.predict(knn, keys, said, ById(memory.ids))
    np.testing.assert_array_equal(found.corrected, corrected.argmax(axis=1))
    np.testing.assert_allclose(found.corrected_label, corrected[np.arange(300), found.labels], atol=1e-6)
    np.testing.assert_allclose(found.gain, np.log(found.corrected_label) - np.log(found.said_label), atol=1e-6)


def test_a_survey_of_a_large_memory_takes_a_sample(memory: Memory) -> None:
    setting = Setting()
    found = survey(setting.knn(memory), setting, n_rows=50)
    assert len(found) == 50
    assert set(found.ids.tolist()) <= set(memory.ids.tolist())


def test_a_planted_label_error_comes_first() -> None:
    problem = classification(n=400, q=5, d=8, c=4)
    labels = problem.labels
    keys = 6 * np.eye(8)[labels] + problem.keys / 4
    wrong = labels.copy()
    wrong[17] = (labels[17] + 1) % 4
    said = np.full((400, 4), 0.1) + 0.6 * np.eye(4)[labels]
    memory = Memory.create(dim=8, n_outputs=4)
    memory.append(keys, wrong, said)
    with TestClient(create_app(memory, token=TOKEN), headers=BEARER) as client:
        issues = patiently(client, "/survey").json()["issues"]
    assert issues[0]["id"] == 17
    assert issues[0]["suggestion"] == str(labels[17])


class Pictures:
    """Images in different forms."""

    def __init__(self, image: Any) -> None:
        self._image = image

    def __len__(self) -> int:
        return 300

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self._image, 0


@pytest.mark.parametrize(
    "image",
    [
        np.full((3, 8, 6), 0.5, np.float32),
        np.full((3, 8, 6), 127, np.uint8),
        np.linspace(-2, 2, 144, dtype=np.float32).reshape(3, 8, 6),
        np.full((8, 6), 0.5, np.float32),
        np.full((1, 8, 6), 0.5),
    ],
    ids=["floats", "bytes", "normalised", "grey", "one channel"],
)
def test_pictures_are_png_files(memory: Memory, image: Any) -> None:
    with TestClient(create_app(memory, token=TOKEN, examples=Pictures(image)), headers=BEARER) as client:
        answer = client.get("/picture", params={"id": 5})
        assert answer.headers["content-type"] == "image/png"
        with Image.open(io.BytesIO(answer.content)) as shown:
            assert (shown.width * 8, min(shown.size) >= 64) == (shown.height * 6, True)
        for name in ("999", "-1", "oak", "9" * 19, "1" * 40, "../../etc/passwd"):
            assert client.get("/picture", params={"id": name}).status_code == 404


def test_a_row_that_came_later_or_is_forgotten_has_no_picture(memory: Memory) -> None:
    problem = classification(n=2, q=1, d=8, c=5, seed=3)
    memory.append(problem.keys, problem.labels, problem.predictions)
    with TestClient(create_app(memory, token=TOKEN, examples=Pictures(np.zeros((3, 8, 8)))), headers=BEARER) as client:
        client.post("/forget", json={"ids": [7]})
        assert client.get("/picture", params={"id": 7}).status_code == 404
        assert client.get("/picture", params={"id": 300}).status_code == 404
        rows = client.post("/rows", json={"ids": [6, 7, 301]}).json()["rows"]
    assert [(row["id"], row["picture"]) for row in rows] == [(6, True), (301, False)]


def test_copies_of_an_image_have_its_picture() -> None:
    problem = classification(n=600, q=1, d=8, c=5)
    memory = Memory.create(dim=8, n_outputs=5)
    memory.append(problem.keys, problem.labels, problem.predictions, groups=np.arange(600) % 300)
    with TestClient(create_app(memory, token=TOKEN, examples=Pictures(np.zeros((3, 8, 8)))), headers=BEARER) as client:
        assert client.get("/picture", params={"id": 599}).status_code == 200


def test_without_examples_there_are_no_pictures(client: TestClient) -> None:
    assert client.get("/picture", params={"id": 5}).status_code == 404
    assert not client.get("/info").json()["pictures"]


def test_samples_are_rows_of_the_memory(client: TestClient, memory: Memory) -> None:
    ids = client.get("/sample", params={"n": 30}).json()["ids"]
    assert len(set(ids)) == 30
    assert set(ids) <= set(memory.ids.tolist())
    assert client.get("/sample", params={"n": 0}).status_code == 422
    assert client.get("/sample", params={"n": 10**9}).status_code == 422


def test_rows_say_what_they_carry() -> None:
    memory = small_memory()
    problem = classification(n=1, q=1, d=8, c=5, seed=3)
    memory.append(problem.keys, problem.labels, problem.predictions, owners="ann", tags=["new"], snippets=["a text"])
    with TestClient(create_app(memory, token=TOKEN), headers=BEARER) as client:
        (row,) = client.post("/rows", json={"ids": [300]}).json()["rows"]
    assert (row["owner"], row["tags"], row["snippet"]) == ("ann", ["new"], "a text")
    assert row["missed"] == pytest.approx(1 - problem.predictions[0, problem.labels[0]], abs=1e-6)


def test_every_file_of_the_page_is_served_and_nothing_else(client: TestClient) -> None:
    page = client.get("/").text
    names = ["explorer.css", "icon.svg", "main.js"]
    for name in names:
        assert f"/page/{name}" in page
        assert client.get(f"/page/{name}").status_code == 200
    for script in ("api", "dom", "explain", "cards", "map", "panels"):
        assert client.get(f"/page/{script}.js").headers["content-type"].startswith("text/javascript")
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/login.html", "/page/"):
        assert client.get(path).status_code == 404
