"""A memory of text behind HTTP: answers beside the library's own, rows in their context, texts that come and go."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
import torch
from starlette.testclient import TestClient

from residual_memory.errors import InvalidInput
from residual_memory.language import LanguageSetting
from residual_memory.memory import Memory
from residual_memory.models.transformers import ResMemForCausalLM
from residual_memory.server import create_app, text_service
from tests.server.conftest import BEARER, TOKEN
from tests.server.texts import LENGTH, Library, library

TEXTS = ["the cat saw a", "the owl", "a bell the cat saw a mouse", ""]


@pytest.fixture(scope="module")
def made() -> Library:
    """For questions alone."""
    return library()


@pytest.fixture(scope="module")
def client(made: Library) -> Iterator[TestClient]:
    with TestClient(made.app(), headers=BEARER) as client:
        yield client


@pytest.fixture
def own(tmp_path: Any) -> Library:
    """On disk, to be changed."""
    return library(tmp_path / "memory", positions=64)


@pytest.fixture
def own_client(own: Library) -> Iterator[TestClient]:
    with TestClient(own.app(), headers=BEARER) as client:
        yield client


def asked(client: TestClient, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client: TestClient, path: str, **body: Any) -> str:
    answer = client.post(path, json=body)
    assert answer.status_code == 422, answer.text
    return str(answer.json()["error"]["message"])


# ---------------------------------------------------------------------- questions


@pytest.mark.parametrize("text", TEXTS)
def test_predictions_are_those_of_the_model_with_its_memory(client: TestClient, made: Library, text: str) -> None:
    tokens = made.tokens(text) if text else torch.tensor([[0]])  # a text begins with the end of another
    found = asked(client, "/predict", inputs=[text])
    wanted = made.lm(tokens).logits[0, -1].softmax(0)
    base = made.lm.model.eval()(tokens).logits[0, -1].softmax(0)
    np.testing.assert_allclose(found["corrected"][0], wanted.detach(), atol=1e-6)
    np.testing.assert_allclose(found["base"][0], base.detach(), atol=1e-6)
    assert not np.allclose(found["base"][0], found["corrected"][0], atol=1e-3)


def test_texts_that_are_asked_together_are_answered_alike(client: TestClient, made: Library) -> None:
    alone = [asked(client, "/predict", inputs=[text])["corrected"][0] for text in TEXTS]
    np.testing.assert_allclose(asked(client, "/predict", inputs=TEXTS)["corrected"], alone, atol=1e-6)
    service = client.app.state.service  # type: ignore[attr-defined]
    queries = [service.query(inputs=TEXTS[:2]), service.query(ids=[5, 9]), service.query(inputs=TEXTS[2:])]
    several = service.answers(queries)
    for query, answer in zip(queries, several, strict=True):
        np.testing.assert_allclose(answer.corrected, service.answers([query])[0].corrected, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([several[0].corrected, several[2].corrected]), alone, atol=1e-6)


def test_a_base_that_is_sure_is_left_alone(client: TestClient, made: Library) -> None:
    texts = [made.tokenizer.decode(made.documents[0][:n]) for n in range(1, 13)]
    base = np.asarray(asked(client, "/predict", inputs=texts)["base"])
    below = float(np.median(base.max(axis=1)))
    lm = made.lm.with_setting(LanguageSetting(n_neighbors=8, shrinkage=0.6, search_below=below))
    with TestClient(create_app(made.memory, lm, token=TOKEN, tokenizer=made.tokenizer), headers=BEARER) as other:
        found = np.asarray(asked(other, "/predict", inputs=texts)["corrected"])
    wanted = [lm(made.tokens(text)).logits[0, -1].softmax(0).detach() for text in texts]
    np.testing.assert_allclose(found, torch.stack(wanted), atol=1e-6)
    assert np.isclose(base, found, atol=1e-7).all(axis=1).sum() == 6


def test_neighbors_are_what_the_library_recalls(client: TestClient, made: Library) -> None:
    recalled, weights, _ = made.lm.explain(made.tokens(TEXTS[0]))
    (found,) = asked(client, "/neighbors", inputs=TEXTS[:1])["queries"]
    assert [entry["id"] for entry in found] == recalled.ids[0].tolist()
    np.testing.assert_allclose([entry["weight"] for entry in found], weights[0], rtol=1e-5)
    (more,) = asked(client, "/neighbors", inputs=TEXTS[:1], n_neighbors=20)["queries"]
    assert len(more) == 20
    assert more[:8] == found
    assert more[8]["distance"] >= found[-1]["distance"]
    assert "weight" not in more[8]


def test_an_explanation_says_which_tokens_moved_the_prediction(client: TestClient, made: Library) -> None:
    (told,) = asked(client, "/explain", inputs=TEXTS[:1], neighbors=3, outputs=4)["queries"]
    whole = asked(client, "/predict", inputs=TEXTS[:1])
    for output in told["outputs"]:
        assert output["base"] == pytest.approx(whole["base"][0][output["output"]])
        assert output["corrected"] == pytest.approx(whole["corrected"][0][output["output"]])
        assert output["name"] == made.tokenizer.decode([output["output"]])
    assert told["n_more"] == 5
    assert sum(entry["share"] for entry in told["neighbors"]) + told["share_of_more"] == pytest.approx(1)
    assert told["context"] == {"before": TEXTS[0], "token": "…", "after": ""}
    left_out = told["neighbors"][0]["id"]
    (other,) = asked(client, "/explain", inputs=TEXTS[:1], without=[left_out])["queries"]
    assert left_out not in [entry["id"] for entry in other["neighbors"]]


def test_a_share_is_how_far_a_row_moves_the_whole_distribution(client: TestClient, made: Library) -> None:
    (told,) = asked(client, "/explain", inputs=TEXTS[:1])["queries"]
    base = np.asarray(asked(client, "/predict", inputs=TEXTS[:1])["base"][0])
    share, memory = made.lm.setting.residual_share, made.memory
    moved = []
    for entry in told["neighbors"]:
        row = memory.snapshot.rows_of(np.array([entry["id"]]))
        residual = np.eye(len(base))[entry["label"]] - share * memory.snapshot.predictions(row)[0] - (1 - share) * base
        moved.append(entry["weight"] * np.abs(residual).sum())
    np.testing.assert_allclose([entry["share"] for entry in told["neighbors"]], moved / np.sum(moved), atol=2e-3)


def test_a_row_is_asked_without_itself(client: TestClient) -> None:
    (told,) = asked(client, "/explain", ids=[40])["queries"]
    assert 40 not in [entry["id"] for entry in told["neighbors"]]


def test_a_long_text_is_read_from_its_end(own_client: TestClient, own: Library) -> None:
    text = own.tokenizer.decode(own.documents[0]) * 5
    tokens = own.tokens(text)[:, -64:]
    assert own.tokens(text).shape[1] > 64
    found = asked(own_client, "/predict", inputs=[text])
    np.testing.assert_allclose(found["corrected"][0], own.lm(tokens).logits[0, -1].softmax(0).detach(), atol=1e-6)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": []}, "0 texts"),
        ({"inputs": ["a"] * 65}, "65 texts"),
        ({"inputs": ["a" * 300_000]}, "300,000 characters"),
        ({"inputs": [5]}, "no text"),
        ({"keys": [[1.0]], "predictions": [[1.0]]}, "by inputs"),
        ({"inputs": ["a"], "ids": [1]}, "by inputs"),
        ({}, "by inputs"),
    ],
)
def test_what_is_no_text_is_refused(client: TestClient, body: dict[str, Any], message: str) -> None:
    assert message in refused(client, "/predict", **body)


def test_more_rows_than_fit_are_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_service, "ROW_BYTES", 4 * 320 * 3)
    assert "at most 3" in refused(client, "/explain", ids=[1, 2, 3, 4])
    assert len(asked(client, "/explain", ids=[1, 2, 3])["queries"]) == 3


# ---------------------------------------------------------------------- the page


def test_rows_are_shown_where_they_stand_in_the_text(client: TestClient, made: Library) -> None:
    stream = np.concatenate([[*document, 0] for document in made.documents])
    ids = [1, 2, 17, 40, 200, int(made.memory.ids.max())]
    rows = asked(client, "/rows", ids=ids)["rows"]
    assert [row["id"] for row in rows] == ids
    for row in rows:
        place, shown = row["id"], row["context"]
        assert row["label"] == stream[place]
        assert shown["token"] == row["name"] == made.tokenizer.decode([row["label"]])
        assert shown["before"] == made.tokenizer.decode(stream[max(0, place - 32) : place])
        assert shown["after"] == made.tokenizer.decode(stream[place + 1 : place + 9])


def test_without_the_text_rows_are_tokens_alone(made: Library) -> None:
    with TestClient(made.app(text=None), headers=BEARER) as client:
        (row,) = asked(client, "/rows", ids=[7])["rows"]
    assert row["context"] is None
    assert row["name"] == made.tokenizer.decode([row["label"]])


def test_another_text_than_the_memorys_is_refused(made: Library) -> None:
    with pytest.raises(InvalidInput, match="comes from"):
        made.app(text=[document[1:] for document in made.documents])
    with pytest.raises(InvalidInput, match="comes from"):
        made.app(text=[])


def test_the_page_knows_what_there_is_not(client: TestClient) -> None:
    info = client.get("/info").json()
    assert (info["surveyed"], info["pictures"], info["inputs"]) == (False, False, {"kind": "text"})
    assert client.get("/survey").status_code in (202, 422)
    assert client.get("/").status_code == 200
    sampled = client.get("/sample?n=3").json()["ids"]
    assert len(asked(client, "/explain", ids=sampled)["queries"]) == 3


# ---------------------------------------------------------------------- changes


NEW = "the owl rang a bell at noon"


def test_a_text_that_is_added_counts_in_the_next_answer_until_it_is_forgotten(
    own_client: TestClient, own: Library
) -> None:
    before = asked(own_client, "/predict", inputs=["the owl rang a bell at"])
    tokens = own.tokens(NEW)[0].tolist()
    added = asked(own_client, "/add", inputs=[NEW], owner="ann", tags=["owls"])
    assert len(added["ids"]) == len(tokens) - 1
    (last,) = added["ids"][-1:]
    prefix = own.tokenizer.decode(tokens[:-1])
    (found,) = asked(own_client, "/neighbors", inputs=[prefix])["queries"]
    assert (found[0]["id"], found[0]["label"]) == (last, tokens[-1])
    assert found[0]["distance"] == pytest.approx(0, abs=0.02)  # keys are kept in half precision
    during = asked(own_client, "/predict", inputs=["the owl rang a bell at"])
    assert during["version"] > before["version"]
    assert not np.allclose(during["corrected"], before["corrected"], atol=1e-4)
    (row,) = asked(own_client, "/rows", ids=[last])["rows"]
    assert row["context"] == {"before": prefix, "token": own.tokenizer.decode(tokens[-1:]), "after": ""}
    assert (row["owner"], row["tags"], row["snippet"]) == ("ann", ["owls"], NEW)
    forgotten = asked(own_client, "/forget", where={"tag": "owls"})
    assert forgotten["forgotten"] == len(tokens) - 1
    after = asked(own_client, "/predict", inputs=["the owl rang a bell at"])
    np.testing.assert_allclose(after["corrected"], before["corrected"], atol=1e-6)


def test_rows_that_were_added_are_those_of_a_build(own_client: TestClient, own: Library) -> None:
    texts = [NEW, "a mouse"]
    ids = asked(own_client, "/add", inputs=texts)["ids"]
    snapshot = own.memory.snapshot
    rows = snapshot.rows_of(np.array(ids))
    batches = list(own.lm.watch.batches([{"input_ids": own.tokens(text)[0].numpy()} for text in texts]))
    keys, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("keys", "labels"))
    np.testing.assert_allclose(snapshot.keys.take(rows), keys, atol=2e-3)
    np.testing.assert_array_equal(snapshot.targets(rows), labels)
    groups = snapshot.all_groups
    assert groups is not None
    n_first = own.tokens(NEW).shape[1] - 1
    assert groups[rows].tolist() == [40] * n_first + [41] * (len(rows) - n_first)


def test_a_text_longer_than_the_model_reads_is_added_in_windows(own_client: TestClient, own: Library) -> None:
    text = own.tokenizer.decode(own.documents[0]) * 6
    n = own.tokens(text).shape[1]
    assert n > 64 > LENGTH
    assert len(asked(own_client, "/add", inputs=[text])["ids"]) == n - 1


def test_a_text_of_one_token_holds_nothing_to_remember(own_client: TestClient, own: Library) -> None:
    assert asked(own_client, "/add", inputs=[own.tokenizer.decode([9])])["ids"] == []


@pytest.mark.parametrize(
    "more", [{"labels": [1]}, {"ids": [9000]}, {"groups": [1]}, {"snippets": ["the"]}, {"keys": [[1.0]]}]
)
def test_a_text_says_all_of_itself(own_client: TestClient, own: Library, more: dict[str, Any]) -> None:
    n = len(own.memory)
    refused(own_client, "/add", inputs=[NEW], **more)
    assert len(own.memory) == n


def test_what_was_added_is_there_when_the_memory_is_opened_again(own_client: TestClient, own: Library) -> None:
    ids = asked(own_client, "/add", inputs=[NEW])["ids"]
    assert own.memory.path is not None
    with Memory.open(own.memory.path) as again:
        assert set(ids) <= set(again.ids.tolist())


# ---------------------------------------------------------------------- what is served


def test_a_model_that_cannot_be_served_is_refused(made: Library) -> None:
    with pytest.raises(InvalidInput, match="tokenizer"):
        create_app(made.memory, made.lm)
    with pytest.raises(InvalidInput, match="another memory"):
        create_app(library().memory, made.lm, tokenizer=made.tokenizer)
    two = ResMemForCausalLM(made.lm.model, [made.memory, library().memory], tokenizer=made.tokenizer)
    with pytest.raises(InvalidInput, match="several"):
        create_app(made.memory, two, tokenizer=made.tokenizer)


def test_a_plain_model_is_served_with_the_cap_of_the_server(made: Library) -> None:
    app = create_app(made.memory, made.lm.model, token=TOKEN, tokenizer=made.tokenizer)
    assert app.state.service.lm.max_weight == pytest.approx(0.1)
