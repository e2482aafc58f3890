"""The Open Inference Protocol: by hand, and by Triton's own client."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from residual_memory.evaluation import Setting
from residual_memory.memory import Memory
from residual_memory.server import create_app
from tests.server.conftest import BEARER, TOKEN, Address, queries, running, small_memory


def tensors(n: int = 2, **changes: Any) -> dict[str, Any]:
    """A request in JSON."""
    asked = queries(n)
    keys = {"name": "keys", "shape": [n, 8], "datatype": "FP32", "data": asked["keys"]}
    said = {"name": "predictions", "shape": [n, 5], "datatype": "FP32", "data": asked["predictions"]}
    return {"id": "7", "inputs": [keys, said], **changes}


def expected(memory: Memory, n: int = 2) -> np.ndarray:
    setting, asked = Setting(), queries(n)
    keys, said = (np.asarray(asked[name], np.float32) for name in ("keys", "predictions"))
    return setting.predict(setting.knn(memory, max_weight=0.1), keys, said)


def test_json_in_and_out(client: TestClient, memory: Memory) -> None:
    told = client.post("/v2/models/memory/infer", json=tensors()).json()
    assert (told["model_name"], told["id"]) == ("memory", "7")
    corrected, base = told["outputs"]
    assert (corrected["name"], corrected["datatype"], corrected["shape"]) == ("corrected", "FP32", [2, 5])
    np.testing.assert_allclose(np.reshape(corrected["data"], (2, 5)), expected(memory), atol=1e-6)
    np.testing.assert_allclose(np.reshape(base["data"], (2, 5)), queries(2)["predictions"], atol=1e-6)


def test_neighbors_come_on_request(client: TestClient, memory: Memory) -> None:
    wanted = [{"name": "neighbor_ids"}, {"name": "neighbor_distances"}, {"name": "neighbor_weights"}]
    told = client.post("/v2/models/memory/versions/1/infer", json=tensors(outputs=wanted)).json()
    ids, distances, weights = (np.reshape(output["data"], output["shape"]) for output in told["outputs"])
    found = Setting().knn(memory, max_weight=0.1).neighbors(np.asarray(queries(2)["keys"], np.float32))
    np.testing.assert_array_equal(ids, found.ids)
    np.testing.assert_allclose(distances, found.distances)
    np.testing.assert_allclose(weights, found.weights)


def test_metadata_says_what_it_takes_and_gives(client: TestClient) -> None:
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/health/ready").status_code == 200
    told = client.get("/v2/models/memory").json()
    assert told["inputs"][0] == {"name": "keys", "datatype": "FP32", "shape": [-1, 8]}
    assert client.get("/v2/models/other").status_code == 404


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": []},
        {"inputs": [{"name": "keys", "shape": [2, 8], "datatype": "FP32", "data": [1.0]}]},
        {"inputs": [{"name": "keys", "shape": [2, 8], "datatype": "TEXT", "data": [1.0] * 16}]},
        {"inputs": [{"name": "keys", "shape": [-2, 8], "datatype": "FP32", "data": [1.0] * 16}]},
        {"inputs": [{"name": "keys", "shape": [1 << 31, 1 << 31], "datatype": "FP32", "data": []}]},
        {"inputs": [{"name": "keys", "shape": [0, 8], "datatype": "FP32", "data": []}]},
        {"inputs": [{"name": "others", "shape": [1], "datatype": "FP32", "data": [1.0]}]},
        {"inputs": [{"name": "keys", "shape": [1, 8], "datatype": "FP32", "data": ["x"] * 8}]},
        {"inputs": [{"name": "keys", "shape": [1, 8], "datatype": "FP32", "parameters": {"binary_data_size": 32}}]},
        {"outputs": [{"name": "secrets"}]},
    ],
)
def test_what_does_not_fit_is_refused(client: TestClient, change: dict[str, Any]) -> None:
    assert client.post("/v2/models/memory/infer", json={**tensors(), **change}).status_code == 422


def test_a_failure_is_an_error_in_one_string(client: TestClient) -> None:
    for answer in (
        client.get("/v2/models/other"),
        client.get("/v2/models/memory/versions/7"),
        client.get("/v2/nothing"),
        client.post("/v2/models/memory/infer", content=b"{"),
        client.post("/v2/models/memory/infer", json=tensors(), headers={"authorization": "Bearer wrong"}),
    ):
        assert answer.status_code in (401, 404, 422)
        assert list(answer.json()) == ["error"]
        assert isinstance(answer.json()["error"], str)


def test_a_version_is_the_memorys(client: TestClient) -> None:
    assert client.get("/v2/models/memory").json()["versions"] == ["1"]
    assert client.post("/v2/models/memory/versions/1/infer", json=tensors()).json()["model_version"] == "1"
    client.post("/forget", json={"ids": [1]})
    assert client.post("/v2/models/memory/versions/1/infer", json=tensors()).status_code == 404
    assert client.post("/v2/models/memory/versions/2/infer", json=tensors()).json()["model_version"] == "2"


@pytest.mark.filterwarnings("ignore::residual_memory.errors.FewerNeighbors")
def test_neighbors_are_as_many_as_there_are(memory: Memory) -> None:
    memory.forget(memory.ids[3:])
    with TestClient(create_app(memory, token=TOKEN), headers=BEARER) as client:
        wanted = [{"name": "neighbor_ids"}, {"name": "neighbor_distances"}]
        told = client.post("/v2/models/memory/infer", json=tensors(outputs=wanted)).json()["outputs"]
    assert [output["shape"] for output in told] == [[2, 3], [2, 3]]
    assert None not in told[1]["data"]


@pytest.mark.parametrize("header", ["-1", "1e3", "99999999", "x", "²"])
def test_a_header_that_lies_about_its_length_is_refused(client: TestClient, header: str) -> None:
    content = json.dumps(tensors()).encode()
    headers = [(b"inference-header-content-length", header.encode())]
    assert client.post("/v2/models/memory/infer", content=content, headers=headers).status_code == 422


# ---------------------------------------------------------------------- Triton's client


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Address, Memory]]:
    memory = small_memory()
    with running(create_app(memory, token=TOKEN)) as address:
        yield address, memory


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_works_unchanged(served: tuple[Address, Memory], binary: bool) -> None:
    http = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
    utils = pytest.importorskip("tritonclient.utils", reason="tritonclient is not installed")
    address, memory = served

    def bearer() -> dict[str, str]:
        """Afresh, as the client adds to what it is given."""
        return dict(BEARER)

    triton = http.InferenceServerClient(f"{address.host}:{address.port}")
    assert triton.is_server_live(headers=bearer())
    assert triton.is_server_ready(headers=bearer())
    assert triton.is_model_ready("memory", headers=bearer())
    assert not triton.is_model_ready("other", headers=bearer())
    assert triton.get_server_metadata(headers=bearer())["name"] == "residual-memory"
    assert triton.get_model_metadata("memory", "1", headers=bearer())["platform"] == "residual-memory"
    asked = queries(2)
    inputs = []
    for name in ("keys", "predictions"):
        values = np.asarray(asked[name], np.float32)
        tensor = http.InferInput(name, list(values.shape), "FP32")
        tensor.set_data_from_numpy(values, binary_data=binary)
        inputs.append(tensor)
    wanted = [http.InferRequestedOutput(name, binary_data=binary) for name in ("corrected", "neighbor_ids")]
    found = triton.infer("memory", inputs, outputs=wanted, request_id="42", headers=bearer())
    np.testing.assert_allclose(found.as_numpy("corrected"), expected(memory), atol=1e-6)
    assert found.as_numpy("neighbor_ids").shape == (2, 50)
    assert found.get_response()["id"] == "42"
    everything = triton.infer("memory", inputs, headers=bearer())
    np.testing.assert_allclose(everything.as_numpy("corrected"), expected(memory), atol=1e-6)
    with pytest.raises(utils.InferenceServerException, match="there is no output 'secrets'"):
        triton.infer("memory", inputs, outputs=[http.InferRequestedOutput("secrets")], headers=bearer())
    triton.close()
