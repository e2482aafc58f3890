"""What the OpenAPI document says: of each route, and of the token that all of them want."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from residual_memory.server.answered import Refused, Working

ABOUT = """Corrected predictions, the memories behind them, and changes.

Every request shows a token, as `Authorization: Bearer TOKEN`. It has one or more of the scopes `predict`, `explain`
(who the neighbours are) and `write`. When a server has too much to do it answers 429 or 503 with `Retry-After`.
"""
JSON, BYTES = "application/json", "application/octet-stream"
SCHEMAS = "#/components/schemas/{model}"

Described = dict[str, Any]


def schema_of(kind: Any) -> Described:
    """A type's JSON schema, by reference; `describe` moves what it refers to where the references lead."""
    schema = TypeAdapter(kind).json_schema(ref_template=SCHEMAS)
    known = schema.pop("$defs", {})
    return {"$ref": SCHEMAS.format(model=kind.__name__), "$defs": {**known, kind.__name__: schema}}


def described(
    summary: str,
    body: Any = None,
    answer: Any = None,
    *,
    media: str = JSON,
    others: Sequence[str] = (),
    error: Any = Refused,
    later: bool = False,
) -> Described:
    """Of a route that reads its body and writes its answer by itself.

    Parameters
    ----------
    summary : what it does, in one line.
    body, answer : types of what is sent and of what comes back; an answer without a type is some of `media`.
    others : media types that it may be of too.
    error : the type of a refusal.
    later : whether it may have to be worked out first.
    """
    given: Described = {} if answer is None else {"schema": schema_of(answer)}
    refused = {"content": {JSON: {"schema": schema_of(error)}}}
    told: Described = {
        "summary": summary,
        "responses": {
            200: {"description": "As asked.", "content": {media: given, **{other: {} for other in others}}},
            **{status: {"description": reason, **refused} for status, reason in REFUSALS.items()},
        },
    }
    if later:
        working = {"content": {JSON: {"schema": schema_of(Working)}}}
        told["responses"][202] = {"description": "It is being worked out; come again.", **working}
    if body is not None:
        told["openapi_extra"] = {"requestBody": {"required": True, "content": {JSON: {"schema": schema_of(body)}}}}
    return told


REFUSALS = {
    401: "No token, or a wrong one.",
    403: "The token is without the scope, the memory is open read-only, or the host or origin is not served.",
    404: "The memory does not hold an id, or the server has no such model.",
    409: "An id is there already, or another process writes.",
    413: "The body is too large.",
    422: "The request is not one that fits the memory.",
    429: "Too many queries wait; come again after `Retry-After` seconds.",
    500: "The server failed; its log says where.",
    503: "Too many requests are under way, or the server stops; come again after `Retry-After` seconds.",
    507: "The disk refused; the memory is as it was.",
}


def operation_id(route: Any) -> str:
    """What a function of a generated client is called; a route, or what newer versions of FastAPI have in its place."""
    name: str = route.name
    return name


def describe(app: FastAPI) -> None:
    """Complete the document that FastAPI makes of an application's routes."""
    made = app.openapi

    def document() -> Described:
        if app.openapi_schema is None:
            found = made()
            components = found.setdefault("components", {})
            schemas = components.setdefault("schemas", {})
            _gather(found["paths"], schemas)
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            found["security"] = [{"token": []}]
            found["info"]["description"] = ABOUT
        return app.openapi_schema or {}

    app.openapi = document  # type: ignore[method-assign]


def _gather(node: Any, schemas: Described) -> None:
    """Move all definitions to one place."""
    if isinstance(node, dict):
        for name, schema in node.pop("$defs", {}).items():
            assert schemas.setdefault(name, schema) == schema, f"there are two types of the name {name}"
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _gather(value, schemas)
