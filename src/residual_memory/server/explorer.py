"""The page and what it asks for beside the routes of `answering`: rows, pictures, the map, and what a survey found."""

import math
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import APIRouter, Request
from fastapi import Query as Param
from fastapi.responses import Response
from jaxtyping import Int64
from numpy import ndarray
from starlette.concurrency import run_in_threadpool

from residual_memory.errors import InvalidInput, UnknownId
from residual_memory.examples import Examples
from residual_memory.memory import Snapshot
from residual_memory.metrics import binned_calibration
from residual_memory.server import asked
from residual_memory.server.answering import as_json, body_of, needs
from residual_memory.server.atlas import Atlas, atlas
from residual_memory.server.background import Background
from residual_memory.server.openapi import BYTES, described
from residual_memory.server.service import ArrayService, Service
from residual_memory.surveying import Survey
from residual_memory.validation import as_ids

PAGE = files("residual_memory.server") / "page"
ASSETS = {
    "explorer.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    **{
        f"{name}.js": "text/javascript; charset=utf-8"
        for name in ("main", "api", "dom", "explain", "cards", "map", "panels")
    },
}
LOGIN_PAGE = (PAGE / "login.html").read_bytes()
ROSES, ISSUES = 24, 100
A_LABEL = 2  # roses, before others have had their turn
WORKING = 202  # the result is being worked out: come again


def exploring(service: Service, examples: Examples | None) -> APIRouter:
    """Routes of the page."""
    router = APIRouter()
    memory = service.memory
    laid_out: Background[Atlas] = Background(
        lambda advance: atlas(memory.snapshot, progress=advance),
        lambda: (memory.snapshot.generation, math.ceil(math.log(memory.snapshot.n_rows + 1, 1.02))),
    )
    surveyed: Background[Survey | None] = Background(service.survey, lambda: memory.version)

    def asset(name: str, media_type: str) -> Callable[[Request], Any]:
        content = (PAGE / name).read_bytes()

        async def answer(request: Request) -> Response:
            return Response(content, media_type=media_type)

        return answer

    for path, name, media_type in (
        ("/", "index.html", "text/html; charset=utf-8"),
        *((f"/page/{name}", name, kind) for name, kind in ASSETS.items()),
    ):
        router.add_api_route(path, asset(name, media_type), methods=["GET"], include_in_schema=False)

    @router.post("/rows", **described("What rows hold, to be shown.", asked.Cards))
    async def rows(request: Request) -> Response:
        needs(request, "explain")
        body = await body_of(request, asked.Cards)
        return as_json({"rows": await run_in_threadpool(cards, service, examples, body.ids)})

    @router.get("/picture", **described("The image that a row was made of, as PNG.", media="image/png"))
    async def picture(request: Request, id: str) -> Response:  # as clients know it
        needs(request, "explain")
        content = await run_in_threadpool(pictured, service, examples, id)
        return Response(content, media_type="image/png", headers={"cache-control": "private, max-age=3600"})

    @router.post("/observe", **described("An image file as keys and predictions, to be asked about or added."))
    async def observe(request: Request) -> Response:
        needs(request, "predict")
        if examples is None or not isinstance(service, ArrayService) or service.model is None:
            raise InvalidInput("no model and examples are served, so a file cannot be read; send inputs")
        content = await request.body()
        keys, said = await run_in_threadpool(
            lambda: service.observed(service.query(inputs=[examples.uploaded(content)]))
        )
        return as_json({"keys": keys, "predictions": said})

    @router.get("/sample", **described("Ids of rows, drawn at random."))
    async def sample(request: Request, n: Annotated[int, Param(ge=1, le=1000)] = 1) -> Response:
        needs(request, "explain")
        return as_json({"ids": await run_in_threadpool(drawn, service, n)})

    @router.get("/log", **described("The last changes of the memory, newest first."))
    async def log(request: Request) -> Response:
        needs(request, "explain")
        changes = [{"version": c.version, "at": c.at, "what": c.what, "rows": c.rows} for c in reversed(memory.history)]
        return as_json({"changes": changes})

    @router.get("/map", **described("A place in the plane for each row.", media=BYTES, later=True))
    async def map_of_rows(request: Request) -> Response:
        needs(request, "explain")
        laid, found, snapshot = laid_out.get(), surveyed.get(), memory.snapshot
        if laid is None or laid.generation != snapshot.generation:  # rows have other numbers since a compaction
            return working(laid_out.progress)
        return Response(await run_in_threadpool(packed_map, snapshot, laid, found), media_type=BYTES)

    @router.get("/survey", **described("Reliability, roses and doubtful labels.", later=True))
    async def survey_of_rows(request: Request) -> Response:
        needs(request, "explain")
        found = surveyed.get()
        if found is None and surveyed.ready:
            raise InvalidInput("there is no survey of this memory: it is empty, or of values, or of a text")
        if found is None:
            return working(surveyed.progress)
        return as_json(await run_in_threadpool(told_survey, service, found))

    return router


def drawn(service: Service, n: int) -> list[Any]:
    """Ids of some rows; fewer where there are fewer."""
    snapshot = service.memory.snapshot
    alive = np.flatnonzero(snapshot.alive)
    rows = np.random.default_rng().choice(alive, min(n, len(alive)), replace=False)
    return snapshot.id_column.take(rows).tolist()


def working(progress: float) -> Response:
    """How far the work has come."""
    return Response(orjson.dumps({"progress": progress}), WORKING, media_type="application/json")


def named(service: Service, text: str) -> int | str:
    """An id from an address: a number where the memory's ids are numbers.

    Raises
    ------
    UnknownId : if it is none.
    """
    if service.memory.snapshot.manifest.id_kind == "string":
        return text
    if not text.isascii() or not text.isdigit() or len(text) > 19 or int(text) > np.iinfo(np.int64).max:
        raise UnknownId(f"the memory does not hold id {text[:80]!r}; its ids are numbers")
    return int(text)


def pictured(service: Service, examples: Examples | None, text: str) -> bytes:
    """The picture of a row.

    Raises
    ------
    UnknownId : if the memory does not hold the row, or there is no picture of it.
    """
    name, snapshot = named(service, text), service.memory.snapshot
    rows = snapshot.rows_of(as_ids([name]))
    content = None
    if examples is not None and rows[0] >= 0:
        example = examples.find(name, snapshot.groups(rows)[0])
        content = None if example is None else examples.picture(example)
    if content is None:
        raise UnknownId(
            f"there is no picture of row {text[:80]!r}; serve with the examples that the memory was built from"
        )
    return content


def cards(service: Service, examples: Examples | None, ids: list[Any]) -> list[dict[str, Any]]:
    """What is known of rows, in the order of the ids; those that the memory does not hold are left out."""
    memory, snapshot = service.memory, service.memory.snapshot
    names = as_ids(ids)
    rows = snapshot.rows_of(names)
    names, rows = names[rows >= 0], rows[rows >= 0]
    labels, missed = snapshot.targets(rows), snapshot.residual_sizes(rows)
    carried = snapshot.attributes(rows)
    groups = snapshot.groups(rows)
    classes = memory.layout.task == "classification"
    told = []
    for place, name in enumerate(names.tolist()):
        label = labels[place].tolist()
        example = None if examples is None else examples.find(name, groups[place])
        entry = {
            "id": name,
            "label": label,
            "name": service.name_of(label) if classes else None,
            "missed": float(missed[place]),
            "group": groups[place],
            "owner": carried.owners[place] or None,
            "tags": carried.tags[place],
            "snippet": carried.snippets[place] or None,
            "context": service.context(name, label, carried.snippets[place]),
            "cells": None if examples is None or example is None else examples.cells(example),
            "picture": example is not None and examples is not None and examples.pictures,
        }
        told.append(entry)
    return told


def packed_map(snapshot: Snapshot, laid: Atlas, found: Survey | None) -> bytes:
    """The map in bytes: the length of a header, the header as JSON, then a column after the other, little-endian.

    Columns are places as uint16, labels as int32, residuals and gains as uint8, and ids as int64 where they are
    numbers; other ids are in the header.
    """
    classes = snapshot.layout.task == "classification"
    kept = snapshot.alive[laid.rows]
    rows, places = laid.rows[kept], laid.places[kept]
    ids = snapshot.id_column.take(rows)
    columns: list[tuple[str, ndarray]] = [
        ("x", np.rint(65535 * places[:, 0]).astype("<u2")),
        ("y", np.rint(65535 * places[:, 1]).astype("<u2")),
    ]
    ranges: dict[str, list[float]] = {}
    if classes:
        columns.append(("label", snapshot.targets(rows).astype("<i4")))
    missed = snapshot.residual_sizes(rows)
    largest = 1.0 if classes or not len(rows) else float(np.quantile(missed, 0.99))
    columns.append(("residual", scaled("residual", missed, ranges, 0.0, largest)))
    if found is not None:
        gain = np.full(len(rows), np.nan)
        places_of = {name: place for place, name in enumerate(found.ids.tolist())}
        known = np.array([places_of.get(name, -1) for name in ids.tolist()], np.int64)
        gain[known >= 0] = found.gain[known[known >= 0]]
        columns.append(("gain", scaled("gain", gain, ranges, -2.0, 2.0)))
    header: dict[str, Any] = {"n": len(rows), "rows": len(snapshot), "method": laid.method, "ranges": ranges}
    if ids.dtype.kind == "U":
        header["ids"] = ids.tolist()
    else:
        columns.append(("id", ids.astype("<i8")))
    header["columns"] = [{"name": name, "type": column.dtype.str} for name, column in columns]
    head = orjson.dumps(header)
    head += b" " * (-(len(head) + 4) % 8)  # so that the columns are aligned
    parts = [len(head).to_bytes(4, "little"), head]
    for _, column in columns:
        content = column.tobytes()
        parts.append(content + b"\0" * (-len(content) % 8))
    return b"".join(parts)


def scaled(name: str, values: ndarray, ranges: dict[str, list[float]], low: float, high: float) -> ndarray:
    """From 1 to 255 over a range; 0 where nothing is known."""
    ranges[name] = [low, high]
    part = np.clip((values - low) / ((high - low) or 1.0), 0, 1)
    return np.where(np.isnan(part), 0, 1 + np.rint(254 * np.nan_to_num(part))).astype(np.uint8)


def varied(rows: Int64[ndarray, " r"], labels: Int64[ndarray, " s"]) -> Int64[ndarray, " r"]:
    """The rows in their order, those that are the third or later of their label behind the others."""
    seen: Counter[int] = Counter()
    turns = []
    for label in labels[rows].tolist():
        turns.append(seen[label] // A_LABEL)
        seen[label] += 1
    return rows[np.argsort(turns, kind="stable")]


def told_survey(service: Service, found: Survey) -> dict[str, Any]:
    """What a survey found, for the page."""
    bins = {
        "base": binned_calibration(found.said_confidence, found.said == found.labels),
        "corrected": binned_calibration(found.corrected_confidence, found.corrected == found.labels),
    }
    right = np.flatnonzero(found.put_right)
    roses = varied(right[np.argsort(-found.agreement[right], kind="stable")], found.labels)[:ROSES]
    doubtful = np.flatnonzero(found.suggestion != found.labels)
    doubtful = doubtful[np.argsort(-found.doubt[doubtful], kind="stable")][:ISSUES]

    return {
        "rows": len(found),
        "accuracy": {
            "base": float((found.said == found.labels).mean()),
            "corrected": float((found.corrected == found.labels).mean()),
        },
        "reliability": bins,
        "roses": [
            {
                "id": found.ids[row].item(),
                "label": service.name_of(int(found.labels[row])),
                "said": service.name_of(int(found.said[row])),
                "base": float(found.said_label[row]),
                "corrected": float(found.corrected_label[row]),
                "agreement": float(found.agreement[row]),
            }
            for row in roses
        ],
        "issues": [
            {
                "id": found.ids[row].item(),
                "label": service.name_of(int(found.labels[row])),
                "suggestion": service.name_of(int(found.suggestion[row])),
                "doubt": float(found.doubt[row]),
                "agreement": float(found.agreement[row]),
            }
            for row in doubtful
        ],
    }
