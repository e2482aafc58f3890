"""The Open Inference Protocol, version 2, as KServe and Triton speak it: `/v2/models/NAME/infer`, JSON and binary.

Inputs are `keys` with `predictions`, or `inputs` where a model is served. Outputs are `corrected` and `base`, and on
request of the neighbours `neighbor_ids`, `neighbor_distances` and `neighbor_weights`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from numpy import ndarray
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from residual_memory._version import __version__
from residual_memory.errors import InvalidInput, UnknownId
from residual_memory.server import asked
from residual_memory.server.answering import answerable, as_json, needs, read
from residual_memory.server.batching import Batcher
from residual_memory.server.openapi import BYTES, described
from residual_memory.server.service import Answer, ArrayService, Query

TYPES = {
    "BOOL": np.dtype("?"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
OF_DTYPE = {dtype: name for name, dtype in TYPES.items()}
NEIGHBORS = ("neighbor_ids", "neighbor_distances", "neighbor_weights")
HEADER = "inference-header-content-length"
MOST_AXES = 8


class Tensor(asked.Asked):
    """An input: its numbers as JSON, or as so many of the bytes behind the header."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, le=1 << 31)]], Field(max_length=MOST_AXES)]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


class Wanted(asked.Asked):
    """An output that is asked for."""

    model_config = ConfigDict(extra="ignore")

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class Inference(asked.Asked):
    """A request of the protocol."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    id: str | None = None
    inputs: Annotated[list[Tensor], Field(min_length=1, max_length=8)]
    outputs: list[Wanted] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


class Server(BaseModel):
    """The server's metadata."""

    name: str
    version: str
    extensions: list[str]


class About(BaseModel):
    """A tensor of the model's; −1 is any length."""

    name: str
    datatype: str
    shape: list[int]


class Metadata(BaseModel):
    """The model's metadata."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[About]
    outputs: list[About]


class OutputTensor(BaseModel):
    """An output: its numbers as JSON, or as so many of the bytes behind the header."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class Inferred(BaseModel):
    """An answer of the protocol."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


class Failed(BaseModel):
    """An error of the protocol."""

    error: str


_described = partial(described, error=Failed)


def inferring(service: ArrayService, batcher: Batcher[Query, Answer], name: str) -> APIRouter:
    """Routes of the protocol.

    Parameters
    ----------
    name : of the model, as clients name it.
    """
    router = APIRouter(prefix="/v2")

    @router.get("", **_described("The server.", answer=Server))
    async def server(request: Request) -> Response:
        return as_json({"name": "residual-memory", "version": __version__, "extensions": ["binary_tensor_data"]})

    @router.get("/health/live", **_described("Whether the server is live."))
    async def live(request: Request) -> Response:
        return as_json({"live": True})

    @router.get("/health/ready", **_described("Whether the server is ready."))
    async def server_ready(request: Request) -> Response:
        return as_json({"ready": True})

    async def check_model(model: str) -> None:
        if model != name:
            raise UnknownId(f"there is no model {model[:80]!r}; the one that is served is {name!r}")

    async def check_version(version: str) -> None:
        if version != str(service.memory.version):
            raise UnknownId(f"there is no version {version[:80]!r}; the memory's is {service.memory.version}")

    this_model, this_version = Depends(check_model), Depends(check_version)
    for path, suffix, checks in (
        ("/models/{model}", "", [this_model]),
        ("/models/{model}/versions/{version}", "_version", [this_model, this_version]),
    ):
        told = _described("What the model takes and gives.", answer=Metadata)

        @router.get(path, name=f"model{suffix}", dependencies=checks, **told)
        async def metadata(request: Request) -> Response:
            return as_json(_metadata(service, name))

        told = _described("Whether the model is ready.")

        @router.get(f"{path}/ready", name=f"model{suffix}_ready", dependencies=checks, **told)
        async def ready(request: Request) -> Response:
            return as_json({"name": name, "ready": True})

        summary = "Corrected predictions; and the neighbours, where they are wanted."
        told = _described(summary, Inference, Inferred, others=[BYTES])

        @router.post(f"{path}/infer", name=f"infer{suffix}", dependencies=checks, **told)
        async def infer(request: Request) -> Response:
            needs(request, "predict")
            wanted, arrays = _read(await request.body(), request.headers.get(HEADER))
            outputs = _outputs(wanted)
            if set(outputs) & set(NEIGHBORS):
                needs(request, "explain")
            query = answerable(service, service.query(**arrays))
            answer = await batcher(query)
            found: dict[str, ndarray] = {"corrected": answer.corrected, "base": answer.base}
            if set(outputs) & set(NEIGHBORS):
                near = await run_in_threadpool(lambda: service.knn.neighbors(service.observed(query)[0]))
                there = np.isfinite(near.distances).all(axis=0)  # a memory may have fewer rows than are asked for
                columns = (near.ids, near.distances, near.weights)
                found |= {name: column[:, there] for name, column in zip(NEIGHBORS, columns, strict=True)}
            answered = {"model_name": name, "model_version": str(service.memory.version)}
            return _written(wanted, answered, {output: found[output] for output in outputs})

    return router


def _metadata(service: ArrayService, name: str) -> dict[str, Any]:
    """Of numbers the type is the one that is usual: any that holds them is taken, and an answer names its own."""
    layout = service.memory.layout
    ids = "BYTES" if service.memory.snapshot.manifest.id_kind == "string" else "INT64"
    inputs = [("keys", "FP32", [-1, layout.dim]), ("predictions", "FP32", [-1, -1])]
    if service.model is not None:
        inputs.append(("inputs", "FP32", [-1, -1]))
    outputs = [
        ("corrected", "FP32", [-1, layout.n_outputs]),
        ("base", "FP32", [-1, layout.n_outputs]),
        ("neighbor_ids", ids, [-1, -1]),
        ("neighbor_distances", "FP64", [-1, -1]),
        ("neighbor_weights", "FP64", [-1, -1]),
    ]
    tensors = [
        [{"name": tensor, "datatype": kind, "shape": shape} for tensor, kind, shape in listed]
        for listed in (inputs, outputs)
    ]
    return {
        "name": name,
        "versions": [str(service.memory.version)],
        "platform": "residual-memory",
        "inputs": tensors[0],
        "outputs": tensors[1],
    }


def _read(body: bytes, header: str | None) -> tuple[Inference, dict[str, Any]]:
    """A request and its arrays, which may lie behind its JSON as bytes.

    Raises
    ------
    InvalidInput : if it does not say what it holds.
    """
    end = len(body)
    if header is not None:
        if not header.isascii() or not header.isdigit() or len(header) > 12 or int(header) > len(body):
            raise InvalidInput(f"{HEADER} is {header[:40]!r}, expected the length of the JSON before the bytes")
        end = int(header)
    wanted = read(Inference, body[:end])
    arrays: dict[str, Any] = {}
    for tensor in wanted.inputs:
        if tensor.name not in ("keys", "predictions", "inputs"):
            raise InvalidInput(f"there is no input {tensor.name[:80]!r}, expected keys and predictions, or inputs")
        dtype = TYPES.get(tensor.datatype)
        if dtype is None:
            raise InvalidInput(
                f"input {tensor.name} is of type {tensor.datatype[:40]!r}, expected one of {', '.join(TYPES)}"
            )
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            arrays[tensor.name] = _from_json(tensor, dtype)
            continue
        if not isinstance(size, int) or not 0 <= size <= len(body) - end:
            raise InvalidInput(
                f"input {tensor.name} has binary_data_size {size!r}, but {len(body) - end} bytes are left"
            )
        arrays[tensor.name] = _shaped(tensor, body[end : end + size], dtype)
        end += size
    return wanted, arrays


def _from_json(tensor: Tensor, dtype: np.dtype) -> ndarray:
    try:
        with np.errstate(over="ignore"):
            values = np.asarray(tensor.data, dtype).reshape(-1)
    except (ValueError, TypeError, OverflowError):
        raise InvalidInput(f"input {tensor.name} is no list of numbers of type {tensor.datatype}") from None
    return _shaped(tensor, values.tobytes(), dtype)


def _shaped(tensor: Tensor, content: bytes, dtype: np.dtype) -> ndarray:
    wanted = int(np.prod([float(side) for side in tensor.shape]))
    if len(content) != wanted * dtype.itemsize:
        raise InvalidInput(
            f"input {tensor.name} has {len(content) // dtype.itemsize} numbers, expected {wanted} for shape "
            f"{tensor.shape}"
        )
    return np.frombuffer(content, dtype).reshape(tensor.shape)


def _outputs(wanted: Inference) -> list[str]:
    """Names of the outputs that are asked for.

    Raises
    ------
    InvalidInput : if there is no such output.
    """
    names = ["corrected", "base"] if wanted.outputs is None else [output.name for output in wanted.outputs]
    known = ("corrected", "base", *NEIGHBORS)
    if unknown := [name for name in names if name not in known]:
        raise InvalidInput(f"there is no output {unknown[0][:80]!r}, expected some of {', '.join(known)}")
    return list(dict.fromkeys(names))


def _written(wanted: Inference, answer: dict[str, Any], found: Mapping[str, ndarray]) -> Response:
    """The answer in JSON, with those outputs behind it as bytes that were asked for as bytes."""
    everything = bool(wanted.parameters.get("binary_data_output"))
    chosen = {output.name: output.parameters.get("binary_data", everything) for output in wanted.outputs or ()}
    tensors: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for output, values in found.items():
        kind = "BYTES" if values.dtype.kind == "U" else OF_DTYPE[values.dtype.newbyteorder("<")]
        tensor: dict[str, Any] = {"name": output, "datatype": kind, "shape": list(values.shape)}
        if chosen.get(output, everything):
            content = _as_bytes(values)
            tensor["parameters"] = {"binary_data_size": len(content)}
            tail.append(content)
        else:
            tensor["data"] = values.ravel().tolist()
        tensors.append(tensor)
    named = {} if wanted.id is None else {"id": wanted.id}
    head = orjson.dumps({**answer, **named, "outputs": tensors})
    if not tail:
        return Response(head, media_type="application/json")
    return Response(b"".join([head, *tail]), media_type="application/octet-stream", headers={HEADER: str(len(head))})


def _as_bytes(values: ndarray) -> bytes:
    """Little-endian; of strings each after its length."""
    if values.dtype.kind != "U":
        return np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
    coded = [value.encode() for value in values.ravel().tolist()]
    return b"".join(len(value).to_bytes(4, "little") + value for value in coded)
