"""The OpenAPI document says what there is, and whatever is sent, the server answers as it says and does not fail."""

import json
from collections.abc import Callable

import pytest
from fastapi import FastAPI

from residual_memory.server import create_app
from tests.server.conftest import TOKEN, small_memory
from tests.server.fuzzing import app_of_arrays, app_of_text, fuzz


# Threads of the server may use `random` while schemathesis draws a case; Hypothesis takes it for the strategy's doing.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.parametrize("made", [app_of_arrays, app_of_text])
def test_whatever_is_sent_the_server_answers_and_as_the_document_says(made: Callable[[], FastAPI]) -> None:
    statuses = fuzz(made(), 3)
    assert statuses["200"] > 40
    assert statuses["422"] > 40


def test_the_document_says_how_to_show_the_token_and_refers_to_nothing_that_is_not_in_it() -> None:
    document = create_app(small_memory(), token=TOKEN).openapi()
    assert document["security"] == [{"token": []}]
    assert document["components"]["securitySchemes"]["token"] == {"type": "http", "scheme": "bearer"}
    text = json.dumps(document)
    assert "$defs" not in text
    referred = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert referred <= set(document["components"]["schemas"])
    assert TOKEN not in text


def test_every_operation_has_a_name_of_its_own_and_says_what_it_does() -> None:
    paths = create_app(small_memory(), token=TOKEN).openapi()["paths"]
    operations = [operation for path in paths.values() for operation in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert {"predict", "neighbors", "explain", "add", "forget", "info", "health", "metrics", "infer"} < set(names)
    assert len(set(names)) == len(names)
    for operation in operations:
        assert operation["summary"]
        assert {"200", "401", "403", "422", "429", "503"} <= set(operation["responses"])
