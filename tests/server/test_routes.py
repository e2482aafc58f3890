"""What the routes answer is what the library says."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

import residual_memory as rm
from residual_memory.evaluation import Setting
from residual_memory.memory import Memory
from residual_memory.server import create_app
from tests.problems import memory_of, regression
from tests.server.conftest import BEARER, TOKEN, queries, small_memory

CAP = 0.1  # what a server allows a row by default


def error_of(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["type"]


def test_predict_is_what_the_library_says(client: TestClient, memory: Memory) -> None:
    asked = queries()
    told = client.post("/predict", json=asked).json()
    keys, said = (np.asarray(asked[name], np.float32) for name in ("keys", "predictions"))
    setting = Setting()
    expected = setting.predict(setting.knn(memory, index="auto", max_weight=CAP), keys, said)
    np.testing.assert_allclose(told["base"], said, atol=1e-7)
    np.testing.assert_allclose(told["corrected"], expected, atol=1e-6)
    assert told["labels"] == expected.argmax(axis=1).tolist()


def test_top_names_the_likeliest_classes(client: TestClient) -> None:
    whole = client.post("/predict", json=queries(1)).json()
    (top,) = client.post("/predict", json={**queries(1), "top": 2}).json()["top"]
    best = np.argsort(-np.array(whole["corrected"][0]))[:2]
    assert [entry["output"] for entry in top] == best.tolist()
    assert [entry["name"] for entry in top] == [["oak", "elm", "ash", "fir", "yew"][place] for place in best]


def test_a_row_is_asked_without_itself(client: TestClient, memory: Memory) -> None:
    (listed,) = client.post("/neighbors", json={"ids": [7], "n_neighbors": 300}).json()["queries"]
    assert len(listed) == 299
    assert 7 not in [entry["id"] for entry in listed]


def test_an_explanation_adds_up_to_what_is_predicted(client: TestClient) -> None:
    (told,) = client.post("/explain", json={**queries(1), "neighbors": 300, "outputs": 5}).json()["queries"]
    added = np.sum([entry["adds"] for entry in told["neighbors"]], axis=0)
    base = np.array([entry["base"] for entry in told["outputs"]])
    corrected = np.array([entry["corrected"] for entry in told["outputs"]])
    valid = np.maximum(base + added, 0.1 * base)
    np.testing.assert_allclose(corrected, valid / valid.sum(), atol=1e-5)
    assert sum(entry["share"] for entry in told["neighbors"]) == pytest.approx(1)


def test_the_weightiest_memories_are_listed_where_they_are_wanted(client: TestClient) -> None:
    (nearest,) = client.post("/explain", json={**queries(1), "neighbors": 50}).json()["queries"]
    (weightiest,) = client.post("/explain", json={**queries(1), "neighbors": 3, "order": "share"}).json()["queries"]
    (agreeing,) = client.post("/explain", json={**queries(1), "order": "answer"}).json()["queries"]
    assert agreeing["neighbors"][0]["label"] == agreeing["outputs"][0]["output"]
    shares = sorted((entry["share"] for entry in nearest["neighbors"]), reverse=True)
    assert [entry["share"] for entry in weightiest["neighbors"]] == shares[:3]
    assert weightiest["share_of_more"] == pytest.approx(sum(shares[3:]))


def test_what_is_left_out_once_answers_as_if_it_were_forgotten(client: TestClient, memory: Memory) -> None:
    asked = queries(1)
    (first,) = client.post("/explain", json=asked).json()["queries"]
    gone = [entry["id"] for entry in first["neighbors"][:3]]
    (without,) = client.post("/explain", json={**asked, "without": gone}).json()["queries"]
    assert len(memory) == 300
    client.post("/forget", json={"ids": gone})
    (after,) = client.post("/explain", json=asked).json()["queries"]
    assert without == after
    assert without["outputs"] != first["outputs"]


def test_what_is_added_counts_in_the_next_answer_and_what_is_forgotten_no_more(client: TestClient) -> None:
    asked = queries(1)
    before = client.post("/predict", json=asked).json()
    told = client.post("/add", json={**asked, "labels": ["yew"], "ids": [1000], "owner": "ann"}).json()
    assert told == {"ids": [1000], "rows": 301, "version": 2}
    nearest = client.post("/neighbors", json={**asked, "n_neighbors": 1}).json()["queries"][0][0]
    assert (nearest["id"], nearest["name"], nearest["distance"]) == (1000, "yew", 0.0)
    assert client.post("/predict", json=asked).json()["corrected"][0][4] > before["corrected"][0][4]
    assert client.post("/forget", json={"where": {"owner": "ann"}}).json()["forgotten"] == 1
    assert client.post("/predict", json=asked).json()["corrected"] == before["corrected"]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/predict", {}, (422, "InvalidInput")),
        ("/predict", {"keys": [[1.0] * 8]}, (422, "InvalidInput")),
        ("/predict", {"keys": [[1.0]], "predictions": [[0.2] * 5]}, (422, "DimensionMismatch")),
        ("/predict", {"keys": [[1.0] * 8, [1.0]], "predictions": [[0.2] * 5] * 2}, (422, "InvalidInput")),
        ("/predict", {"keys": [[1.0] * 8], "predictions": [[0.9] * 5]}, (422, "InvalidInput")),
        ("/predict", {"keys": [[1.0] * 8] * 2, "predictions": [[0.2] * 5]}, (422, "DimensionMismatch")),
        ("/predict", {"inputs": [[1.0]]}, (422, "InvalidInput")),
        ("/predict", {"ids": [999]}, (404, "UnknownId")),
        ("/predict", {"ids": ["oak"]}, (404, "UnknownId")),
        ("/predict", {"ids": [1], "more": 1}, (422, "InvalidInput")),
        ("/explain", {"ids": [1], "neighbors": 0}, (422, "InvalidInput")),
        ("/explain", {"ids": [1], "without": ["x"]}, (422, "InvalidInput")),
        ("/add", {**queries(1), "labels": ["ok"]}, (422, "InvalidInput")),
        ("/add", {**queries(1), "labels": [5]}, (422, "InvalidInput")),
        ("/add", {**queries(1), "labels": [[1]]}, (422, "DimensionMismatch")),
        ("/add", {**queries(1), "labels": [1], "ids": [7]}, (409, "DuplicateId")),
        ("/forget", {"ids": [7, 999]}, (404, "UnknownId")),
        ("/forget", {}, (422, "InvalidInput")),
        ("/forget", {"where": {"colour": 1}}, (422, "InvalidInput")),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    client: TestClient, memory: Memory, path: str, body: dict[str, Any], expected: tuple[int, str]
) -> None:
    assert error_of(client.post(path, json=body)) == expected
    assert (len(memory), memory.version) == (300, 1)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"keys": NaN}', b"\xff", b'{"ids": [1e400]}', b"[" * 3000]
)
def test_a_body_that_is_no_request_is_refused(client: TestClient, body: bytes) -> None:
    assert error_of(client.post("/predict", content=body)) == (422, "InvalidInput")


def test_a_short_request_cannot_make_an_answer_of_any_length() -> None:
    memory = Memory.create(dim=1, n_outputs=40_000)
    memory.append([[0.0], [1.0]], [0, 39_999], [[1.0], [1.0]])
    with TestClient(create_app(memory, token=TOKEN, setting=Setting(n_neighbors=1)), headers=BEARER) as client:
        asked = {"keys": [[0.5]] * 101, "predictions": [[1.0]] * 101}
        assert error_of(client.post("/predict", json=asked)) == (422, "InvalidInput")
        shapes = [{"name": name, "shape": [101, 1], "datatype": "FP32", "data": asked[name]} for name in asked]
        assert client.post("/v2/models/memory/infer", json={"inputs": shapes}).status_code == 422
        assert error_of(client.post("/explain", json={"ids": [0] * 257})) == (422, "InvalidInput")
        assert error_of(client.post("/rows", json={"ids": [0] * 1001})) == (422, "InvalidInput")


def test_a_mistyped_class_is_met_with_a_question(client: TestClient) -> None:
    told = client.post("/add", json={**queries(1), "labels": ["asch"]}).json()["error"]
    assert told["remedy"] == "did you mean 'ash'?"


def test_a_read_only_memory_is_not_changed_and_seen_anew_within_a_second(tmp_path: Path) -> None:
    with small_memory(tmp_path / "memory") as writer:
        with TestClient(create_app(Memory.open(tmp_path / "memory"), token=TOKEN), headers=BEARER) as client:
            assert error_of(client.post("/forget", json={"ids": [1]})) == (403, "ReadOnlyMemory")
            assert not client.get("/info").json()["writable"]
            writer.forget([1, 2])
            writer.append([[9.0] * 8], [0], [[0.2] * 5], ids=[5000])
            deadline = time.monotonic() + 1.0
            while client.get("/info").json()["rows"] != 299:
                assert time.monotonic() < deadline, "not seen within a second"
                time.sleep(0.02)
            assert client.post("/predict", json={"ids": [5000]}).status_code == 200
            assert error_of(client.post("/predict", json={"ids": [1]})) == (404, "UnknownId")


def test_a_regression_is_served_too() -> None:
    problem = regression(n=60, q=2)
    memory = memory_of(problem)
    with TestClient(create_app(memory, token=TOKEN), headers=BEARER) as client:
        asked = {"keys": problem.queries.tolist(), "predictions": problem.said.tolist()}
        told = client.post("/predict", json=asked).json()
        setting = Setting()
        expected = setting.predict(setting.knn(memory, max_weight=CAP), problem.queries, problem.said)
        np.testing.assert_allclose(told["corrected"], expected)
        (explained, _) = client.post("/explain", json=asked).json()["queries"]
        assert [entry["base"] for entry in explained["outputs"]] == problem.said[0].tolist()
        added = client.post("/add", json={**asked, "labels": [[1.0, 2.0], [3.0, 4.0]]}).json()
        assert added["rows"] == 62


def test_the_cap_on_weights_is_on_unless_it_is_taken_off(memory: Memory) -> None:
    cases: list[tuple[dict[str, Any], float]] = [({}, CAP), ({"max_weight": 1.0}, 1.0)]
    for given, expected in cases:
        with TestClient(create_app(memory, token=TOKEN, **given), headers=BEARER) as client:
            asked = {
                "keys": [np.asarray(memory.snapshot.keys.take(np.array([3])))[0].tolist()],
                "predictions": [[0.2] * 5],
            }
            (listed,) = client.post("/neighbors", json=asked).json()["queries"]
            assert max(entry["weight"] for entry in listed) <= expected
            assert client.get("/info").json()["max_weight"] == expected


def test_metrics_count_what_was_asked_and_name_none_of_it(client: TestClient) -> None:
    client.post("/predict", json=queries())
    client.post("/forget", json={"ids": [3]})
    client.get("/no/such/secret-path")
    told = client.get("/metrics").text
    assert 'resmem_requests_total{method="POST",route="/predict",status="200"} 1.0' in told
    assert 'resmem_rows_changed_total{change="forget"} 1.0' in told
    assert "resmem_rows 299.0" in told
    assert "secret-path" not in told


def test_the_log_is_of_changes_newest_first(client: TestClient) -> None:
    client.post("/forget", json={"ids": [3, 4]})
    changes = client.get("/log").json()["changes"]
    assert [(change["what"], change["rows"]) for change in changes] == [("forget", 2), ("append", 300)]


def test_without_the_extra_the_error_says_what_to_install() -> None:
    assert rm.errors.MissingExtra("the server", "serve").args[0].endswith("pip install 'residual-memory[serve]'")
