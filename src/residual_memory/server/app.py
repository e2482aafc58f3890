"""The FastAPI application: routes, and what they have in common."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any

from residual_memory._version import __version__
from residual_memory.errors import InvalidInput, MissingExtra
from residual_memory.indexes.distances import leave_a_core
from residual_memory.memory import Memory

try:
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import Response
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException

    from residual_memory.examples import examples_for
    from residual_memory.server.access import HOSTS, Access, Scope
    from residual_memory.server.answering import answering
    from residual_memory.server.batching import Batcher
    from residual_memory.server.explorer import LOGIN_PAGE, exploring
    from residual_memory.server.guard import Guard
    from residual_memory.server.inference_v2 import inferring
    from residual_memory.server.limits import Limits
    from residual_memory.server.models import service_for
    from residual_memory.server.observing import LOG, Observer
    from residual_memory.server.openapi import describe, operation_id
    from residual_memory.server.refusals import NoSuchRoute, refusal
    from residual_memory.server.service import MAX_WEIGHT, Answer, ArrayService, Query, Service
except ImportError as error:
    raise MissingExtra("the server", "serve") from error

REFRESH_SECONDS = 0.5


def create_app(
    memory: Memory,
    model: Any = None,
    *,
    token: str | Mapping[str, Collection[Scope]] | None = None,
    setting: Any = None,
    index: str = "auto",
    max_weight: float = MAX_WEIGHT,
    hosts: Sequence[str] = HOSTS,
    examples: Any = None,
    tokenizer: Any = None,
    text: Any = None,
    limits: Limits | None = None,
) -> FastAPI:
    """An application that answers with a memory; `serve` runs it with deadlines for slow clients, which others do not.

    Parameters
    ----------
    memory : open for writing, or read-only: then rows can neither be added nor forgotten, and what other processes
        write is seen within a second.
    model : what the memory was built with: a torch module or `ResMemModule`, a fitted `ResMemClassifier` or
        `ResMemRegressor`, a language model of transformers or `ResMemForCausalLM`. Without one clients send keys and
        predictions.
    token : that every request must show; or several, with the scopes of each: "predict", "explain" (who the neighbours
        are, which tells who is in the memory) and "write". None makes a random one, `app.state.token`.
    setting : by default the one that tuning saved with the memory.
    index : as in `ResidualKNN`.
    max_weight : what one row may contribute at most; 1 does not limit it, and tells more of who is in the memory.
    hosts : names by which the server may be asked; "*" is any.
    examples : what the memory was built from, in the order of its ids, to be shown with its rows: a data set of (image,
        label), or a data frame.
    tokenizer : of a language model.
    text : of a language model's memory, the documents that it was built from, as lists of tokens: its rows are shown
        in their context.
    limits : sizes and times.

    Raises
    ------
    MissingExtra : if FastAPI is not installed.
    InvalidInput : if an option cannot be used.
    FingerprintMismatch : if the memory was built with another model.
    """
    access, bounds, observer = Access.of(token, hosts), limits or Limits(), Observer()
    service = service_for(
        memory, model, setting=setting, index=index, max_weight=max_weight, tokenizer=tokenizer, text=text
    )
    batcher: Batcher[Query, Answer] = Batcher(
        service.answers, len, rows_at_a_time=bounds.rows_a_search, rows_waiting=bounds.rows, begin=leave_a_core
    )

    @contextlib.asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        refreshing = asyncio.create_task(_refreshing(service))
        yield
        refreshing.cancel()
        await run_in_threadpool(batcher.stop)

    app = FastAPI(
        title="residual-memory",
        version=__version__,
        docs_url=None,  # it loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=operation_id,
        lifespan=running,
        exception_handlers={RequestValidationError: _misasked, HTTPException: _unknown},
    )
    app.state.token, app.state.limits, app.state.service = access.token, bounds, service
    shown = examples_for(examples)
    app.include_router(answering(service, batcher, observer, pictures=shown is not None and shown.pictures))
    app.include_router(exploring(service, shown))
    name = "memory" if memory.path is None else memory.path.name
    if isinstance(service, ArrayService):
        app.include_router(inferring(service, batcher, name))
    else:  # of transformers, which are imported only for such a model
        from residual_memory.server.completions import completing
        from residual_memory.server.text_service import TextService

        assert isinstance(service, TextService)
        app.include_router(completing(service, name))
    describe(app)
    _watch_figures(observer, service, batcher)
    app.add_middleware(Guard, access=access, limits=bounds, observer=observer, login_page=LOGIN_PAGE)
    return app


async def _refreshing(service: Service) -> None:
    """See what other processes write to the memory; a failure is noted, and tried again."""
    while True:
        await asyncio.sleep(REFRESH_SECONDS)
        try:
            await run_in_threadpool(service.refresh)
        except Exception:
            LOG.exception("refresh failed")


async def _misasked(request: Request, error: Exception) -> Response:
    """A parameter in the address that does not fit; `Guard` answers."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    raise InvalidInput(f"{first['loc'][-1]}: {first['msg']}")


async def _unknown(request: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(error, HTTPException)
    refused = NoSuchRoute(f"{error.detail}; GET /openapi.json lists what there is")
    status, headers, body = refusal(refused, request.scope["path"], 0, error.status_code)
    return Response(body, status, {**headers, **(error.headers or {})})


def _watch_figures(observer: Observer, service: Service, batcher: Batcher[Query, Answer]) -> None:
    observer.gauge("resmem_rows", "Rows of the memory.", lambda: len(service.memory))
    observer.gauge("resmem_version", "Version of the memory.", lambda: service.memory.version)
    observer.gauge("resmem_queries_waiting", "Queries that wait for a search, or are searched.", lambda: batcher.rows)
