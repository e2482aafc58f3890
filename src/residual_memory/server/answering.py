"""The routes of the memory itself: predict, neighbors, explain, add, forget, info, health, metrics."""

from typing import Any, TypeVar

import numpy as np
import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from residual_memory._version import __version__
from residual_memory.errors import InvalidInput
from residual_memory.server import answered, asked
from residual_memory.server.access import Scope
from residual_memory.server.batching import Batcher
from residual_memory.server.observing import Observer
from residual_memory.server.openapi import described
from residual_memory.server.refusals import Forbidden
from residual_memory.server.service import Answer, Query, Service

Body = TypeVar("Body", bound=asked.Asked)

NAMES = 2_000  # of classes that are listed
EXPLAINED = 256  # queries of a request for explanations, which are many numbers each
NUMBERS = 4_000_000  # of an answer: a short request for a large vocabulary would make a very long one


def answering(service: Service, batcher: Batcher[Query, Answer], observer: Observer, *, pictures: bool) -> APIRouter:
    """Routes over a service; predictions go through the batcher."""
    router = APIRouter()

    @router.get("/health", **described("Whether the server answers.", answer=answered.Health))
    async def health(request: Request) -> Response:
        return as_json({"status": "ok", "version": service.memory.version})

    @router.get("/metrics", **described("Counters in the text format of Prometheus.", media="text/plain"))
    async def metrics(request: Request) -> Response:
        return Response(observer.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/info", **described("What the memory holds, and how it is used.", answer=answered.Info))
    async def info(request: Request) -> Response:
        return as_json({**facts(service), "pictures": pictures})

    @router.post("/predict", **described("Base and corrected predictions.", asked.Predict, answered.Predicted))
    async def predict(request: Request) -> Response:
        needs(request, "predict")
        body = await body_of(request, asked.Predict)
        if body.ids is not None:
            needs(request, "explain")  # already which ids there are tells who is in the memory
        query = answerable(service, service.query(body.keys, body.predictions, body.inputs, body.ids))
        answer = await batcher(query)
        return as_json({"version": service.memory.version, **predicted(service, answer, body.top)})

    @router.post("/neighbors", **described("The nearest memories.", asked.Neighbors, answered.NeighborsFound))
    async def neighbors(request: Request) -> Response:
        needs(request, "explain")
        body = await body_of(request, asked.Neighbors)

        def work() -> list[Any]:
            query = few(service.query(body.keys, body.predictions, body.inputs, body.ids))
            return service.neighbors(query, body.n_neighbors, body.without)

        return as_json({"queries": await run_in_threadpool(work)})

    @router.post(
        "/explain",
        **described("Which memories corrected each prediction, and by how much.", asked.Explain, answered.Explained),
    )
    async def explain(request: Request) -> Response:
        needs(request, "explain")
        body = await body_of(request, asked.Explain)

        def work() -> list[Any]:
            query = few(service.query(body.keys, body.predictions, body.inputs, body.ids))
            return service.explain(
                query, without=body.without, n_neighbors=body.neighbors, n_outputs=body.outputs, order=body.order
            )

        return as_json({"queries": await run_in_threadpool(work), "version": service.memory.version})

    @router.post(
        "/add", **described("Add examples; they are durable when the answer comes.", asked.Add, answered.Added)
    )
    async def add(request: Request) -> Response:
        needs(request, "write")
        body = await body_of(request, asked.Add)
        carried = {"owners": body.owner, "tags": body.tags or None, "snippets": body.snippets}

        def work() -> Any:
            query = service.query(body.keys, body.predictions, body.inputs)
            return service.add(query, body.labels, body.ids, body.groups, **carried)

        request.scope["state"]["take_time"]()
        ids = await run_in_threadpool(work)
        observer.changed.labels("add").inc(len(ids))
        return as_json({"ids": ids.tolist(), "rows": len(service.memory), "version": service.memory.version})

    @router.post("/forget", **described("Take rows out of use at once.", asked.Forget, answered.Forgotten))
    async def forget(request: Request) -> Response:
        needs(request, "write")
        body = await body_of(request, asked.Forget)
        if (body.ids is None) == (body.where is None):
            raise InvalidInput("the request has both ids and where, or neither, expected one of them")
        request.scope["state"]["take_time"]()
        gone = await run_in_threadpool(lambda: service.forget(body.ids, body.where))
        observer.changed.labels("forget").inc(gone)
        return as_json({"forgotten": gone, "rows": len(service.memory), "version": service.memory.version})

    return router


def facts(service: Service) -> dict[str, Any]:
    """What a client needs to know before it asks."""
    memory, layout = service.memory, service.memory.layout
    return {
        "library": __version__,
        "memory": None if memory.path is None else memory.path.name,
        "rows": len(memory),
        "forgotten": memory.n_forgotten,
        "version": memory.version,
        "writable": memory.writable,
        "dim": layout.dim,
        "n_outputs": layout.n_outputs,
        "task": layout.task,
        "metric": layout.metric,
        "class_names": memory.class_names if layout.n_outputs <= NAMES else None,
        "id_kind": memory.snapshot.manifest.id_kind,
        **service.facts,
    }


def predicted(service: Service, answer: Answer, top: int | None) -> dict[str, Any]:
    """Predictions as JSON values: whole ones, or the likeliest classes."""
    memory = service.memory
    if memory.layout.task == "regression":
        return {"base": answer.base, "corrected": answer.corrected}
    found: dict[str, Any] = {"labels": answer.corrected.argmax(axis=1)}
    if top is None:
        return {**found, "base": answer.base, "corrected": answer.corrected}
    order = np.argsort(-answer.corrected, axis=1, kind="stable")[:, :top]
    listed = [
        [
            {
                "output": place,
                "name": service.name_of(place),
                "base": float(answer.base[row, place]),
                "corrected": float(answer.corrected[row, place]),
            }
            for place in places
        ]
        for row, places in enumerate(order.tolist())
    ]
    return {**found, "top": listed}


# ---------------------------------------------------------------------- what routes share


def needs(request: Request, scope: Scope) -> None:
    """Refuse a token without a scope, before any of the body is read.

    Raises
    ------
    Forbidden : if it is without it.
    """
    if scope not in request.scope["state"]["scopes"]:
        raise Forbidden(f"the token is without the scope {scope!r}; ask with one that has it")


def answerable(service: Service, query: Query) -> Query:
    """Refuse more queries than there can be predictions in an answer.

    Raises
    ------
    InvalidInput : if there are more.
    """
    most = max(1, NUMBERS // service.memory.layout.n_outputs)
    if len(query) > most:
        raise InvalidInput(f"the request has {len(query):,} queries, expected at most {most:,}; ask in parts")
    return query


def few(query: Query) -> Query:
    """Refuse more queries than can be explained at a time.

    Raises
    ------
    InvalidInput : if there are more.
    """
    if len(query) > EXPLAINED:
        raise InvalidInput(f"the request has {len(query):,} queries, expected at most {EXPLAINED}; ask in parts")
    return query


async def body_of(request: Request, kind: type[Body]) -> Body:
    """A request's body, checked.

    Raises
    ------
    InvalidInput : naming the first place that does not fit.
    """
    return read(kind, await request.body())


def read(kind: type[Body], content: bytes) -> Body:
    """A body that has come, checked.

    Raises
    ------
    InvalidInput : naming the first place that does not fit.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise InvalidInput(f"{place}: {first['msg']}") from None


def as_json(content: Any) -> Response:
    """Plain values and arrays as JSON."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")
