"""Requests that nobody would send: drawn from the OpenAPI document, and valid ones with something in them exchanged."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import schemathesis
import torch
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

import residual_memory as rm
from residual_memory.server import create_app
from tests.models.texts import LONGEST, VOCABULARY, model_of, texts
from tests.server.conftest import BEARER, TOKEN, queries, small_memory

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
BUSY = {429, 503}  # said by the document to happen

Body = dict[str, Any]


def app_of_arrays() -> FastAPI:
    """Over keys and predictions, with snippets, owners and tags in it."""
    memory = small_memory()
    asked = queries(3)
    carried: Body = {"owners": "ann", "tags": ["new"], "snippets": ["<b>bold</b>", "\u202eright to left", "x" * 4000]}
    memory.append(asked["keys"], [0, 1, 2], asked["predictions"], **carried)
    return create_app(memory, token=TOKEN)


def app_of_text() -> FastAPI:
    """Over the tokens of a tiny language model."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    model = model_of("gpt2").eval()
    documents = texts(6, longest=LONGEST)
    memory = rm.build_memory(model, rm.Windows(documents, length=LONGEST, end=0), None)
    words = {"<end>": 0} | {f"w{number}": number for number in range(1, VOCABULARY)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="w1")
    torch.set_num_threads(1)
    return create_app(memory, model, token=TOKEN, tokenizer=tokenizer, text=documents)


def valid_requests(app: FastAPI) -> list[tuple[str, Body]]:
    """Of each route that reads a body, what it takes."""
    if "/v1/completions" in app.openapi()["paths"]:
        text = {"inputs": ["w3 w4 w5"]}
        options: Body = {"max_tokens": 3, "logprobs": 2, "echo": True, "stop": ["w9"], "seed": 1, "n": 2}
        return [
            ("/predict", text),
            ("/predict", {**text, "top": 3}),
            ("/neighbors", {**text, "n_neighbors": 3, "without": [1]}),
            ("/explain", {"ids": [2], "neighbors": 2, "outputs": 2}),
            ("/add", {**text, "owner": "bob", "tags": ["t"]}),
            ("/v1/completions", {"prompt": "w3 w4", "temperature": 0.5, "top_p": 0.9, **options}),
            ("/v1/completions", {"prompt": [3, 4], "stream": True, **options}),
        ]
    asked = queries(2)
    more = {"owner": "bob", "tags": ["t"], "snippets": ["a", "b"]}
    tensors = [
        {"name": "keys", "shape": [2, 8], "datatype": "FP32", "data": asked["keys"]},
        {"name": "predictions", "shape": [2, 5], "datatype": "FP32", "data": asked["predictions"]},
    ]
    wanted = [{"name": "neighbor_ids", "parameters": {"binary_data": True}}, {"name": "corrected"}]
    return [
        ("/predict", asked),
        ("/predict", {"ids": [1, 2], "top": 3}),
        ("/neighbors", {**asked, "n_neighbors": 3, "without": [1]}),
        ("/explain", {**asked, "without": [1], "neighbors": 2, "outputs": 2}),
        ("/add", {**asked, "labels": [1, "oak"], "ids": [1000, 1001], **more}),
        ("/forget", {"ids": [1000, 1001]}),
        ("/forget", {"where": {"owner": "bob", "tag": ["t"], "label": 1}}),
        ("/rows", {"ids": [1, 2]}),
        ("/v2/models/memory/infer", {"id": "1", "inputs": tensors, "outputs": wanted, "parameters": {}}),
    ]


NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**400, 1e300, 1e-320, float("nan"), float("inf")]),
    st.floats(),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.sampled_from(["", "keys", "\0", "\ud800", "é" * 2000]), st.text()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a body, with a place in it."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for place, inner in entries:
        yield value, place
        yield from places(inner)


@st.composite
def exchanged(draw: st.DrawFn, requests: list[tuple[str, Body]]) -> tuple[str, Body]:
    """A valid request with one or two places exchanged, or left out."""
    path, body = copy.deepcopy(draw(st.sampled_from(requests)))
    for _ in range(draw(st.integers(1, 2))):
        if found := list(places(body)):
            container, place = draw(st.sampled_from(found))
            if draw(st.booleans()):
                container[place] = draw(VALUES)
            else:
                del container[place]
    return path, body


def fuzz(app: FastAPI, n_cases: int, number: int = 0) -> Counter[str]:
    """Ask an application, and count the answers by status.

    Parameters
    ----------
    n_cases : of each way of each operation that the document has, valid and invalid; and ten times as many of valid
        requests with something exchanged.
    number : of the run, from which its cases follow.

    Raises
    ------
    AssertionError : at the first answer that is a failure of the server, or not what the document says.
    """
    statuses: Counter[str] = Counter()
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=BEARER)
    paths = app.openapi()["paths"]
    with TestClient(app, headers=BEARER) as client:

        def ask_from_document(case: Any) -> None:
            case.headers = {**(case.headers or {}), **BEARER}
            answer = case.call()
            statuses[str(answer.status_code)] += 1
            if answer.status_code not in BUSY:
                case.validate_response(answer, checks=CHECKS)

        def ask_exchanged(request: tuple[str, Body]) -> None:
            path, body = request
            content = json.dumps(body).encode()
            answer = client.post(path, content=content, headers={"content-type": "application/json"})
            statuses[str(answer.status_code)] += 1
            assert answer.status_code in BUSY or answer.status_code < 500, (path, content[:2000], answer.text[:500])
            documented = paths[path.replace("/memory/", "/{model}/")]["post"]["responses"]
            assert str(answer.status_code) in documented, (path, content[:2000], answer.status_code)

        for result in schema.get_all_operations():
            assert isinstance(result, Ok)
            operation = result.ok()
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                _run(ask_from_document, operation.as_strategy(generation_mode=mode), n_cases, number)
        _run(ask_exchanged, exchanged(valid_requests(app)), 10 * n_cases, number)
    return statuses


def _run(ask: Callable[[Any], None], cases: st.SearchStrategy[Any], n: int, number: int) -> None:
    quietly = settings(
        max_examples=n,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    quietly(seed(number)(given(cases)(ask)))()
