"""Who may only predict is told nothing that names a row, and not even which ids there are."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from residual_memory.memory import Memory
from residual_memory.server import create_app
from tests.problems import classification
from tests.server.conftest import queries
from tests.server.test_access import paths_of
from tests.server.test_inference_v2 import tensors

PREDICTS = {"authorization": "Bearer token-that-predicts"}
EXPLAINS = {"authorization": "Bearer token-that-explains"}


@pytest.fixture
def memory() -> Memory:
    """All that rows can carry, with a word in it that is nowhere else."""
    problem = classification(n=60, q=2, d=8, c=5)
    memory = Memory.create(dim=8, n_outputs=5)
    names = [f"canary-id-{number}" for number in range(60)]
    carried: Any = {"owners": "canary-owner", "tags": ["canary-tag"], "snippets": ["canary-snippet"] * 60}
    memory.append(problem.keys, problem.labels, problem.predictions, names, names, **carried)
    return memory


@pytest.fixture
def app(memory: Memory) -> Any:
    return create_app(memory, token={"token-that-predicts": {"predict"}, "token-that-explains": {"predict", "explain"}})


def everything(client: TestClient, app: Any, headers: dict[str, str]) -> dict[tuple[str, str], str]:
    """What each route says, asked as it wants to be asked."""
    rows = {"ids": ["canary-id-1"]}
    bodies: dict[str, list[dict[str, Any]]] = {
        "/predict": [queries(2), {**queries(2), "top": 3}, rows, {"ids": ["canary-id-none"]}],
        "/neighbors": [queries(2), rows],
        "/explain": [queries(2), rows],
        "/rows": [rows],
        "/add": [{**queries(1), "labels": [1], "ids": ["canary-id-1"]}],
        "/forget": [rows, {"where": {"owner": "canary-owner"}}],
    }
    wanted = [{"name": name} for name in ("corrected", "neighbor_ids", "neighbor_distances", "neighbor_weights")]
    for path in ("/v2/models/memory/infer", "/v2/models/memory/versions/1/infer"):
        bodies[path] = [tensors(), tensors(outputs=wanted)]
    said = {}
    for path in paths_of(app):
        answers = [client.get(path, params={"id": "canary-id-1"}, headers=headers)]
        answers += [client.post(path, json=body, headers=headers) for body in bodies.get(path, [])]
        for number, answer in enumerate(answers):
            said[path, str(number)] = answer.text
    return said


def test_nothing_that_a_row_carries_is_told_to_who_may_only_predict(app: Any) -> None:
    with TestClient(app) as client:
        told = everything(client, app, PREDICTS)
        assert not [place for place, text in told.items() if "canary" in text]
        assert [place for place, text in everything(client, app, EXPLAINS).items() if "canary" in text], "it is there"


def test_predictions_hold_what_was_asked_and_no_more(app: Any) -> None:
    with TestClient(app, headers=PREDICTS) as client:
        assert set(client.post("/predict", json=queries(2)).json()) == {"version", "labels", "base", "corrected"}
        answer = client.post("/v2/models/memory/infer", json=tensors()).json()
        assert [output["name"] for output in answer["outputs"]] == ["corrected", "base"]
        assert set(answer) == {"model_name", "model_version", "id", "outputs"}
        everybody = {"name": "neighbor_ids"}
        assert client.post("/v2/models/memory/infer", json=tensors(outputs=[everybody])).status_code == 403


def test_an_id_that_is_there_is_refused_like_one_that_is_not(app: Any) -> None:
    with TestClient(app, headers=PREDICTS) as client:
        answers = [client.post("/predict", json={"ids": [name]}) for name in ("canary-id-1", "canary-id-none")]
        assert [answer.status_code for answer in answers] == [403, 403]
        assert answers[0].text == answers[1].text
