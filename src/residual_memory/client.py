"""A served memory from Python: `Client` asks a server that `resmem serve` or `create_app` runs."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory import errors
from residual_memory.errors import InvalidInput, MissingExtra, ResidualMemoryError, ServerFailure

try:
    import httpx
except ImportError as error:
    raise MissingExtra("the client", "client") from error

RETRIED = frozenset({429, 503})
TRIES = 4
RAISED = (InvalidInput, errors.ReadOnlyMemory, errors.MemoryLocked, errors.StorageFailure)  # here as they were there


@dataclass(frozen=True)
class Served:
    """Predictions of a server.

    Attributes
    ----------
    base, corrected : probabilities, or values.
    version : of the memory that answered.
    """

    base: Float[ndarray, "q c"]
    corrected: Float[ndarray, "q c"]
    version: int


class Client:
    """A connection to a server; also a context manager. Safe to use from several threads.

    A server that is too busy is asked again, up to three times, after the time that it names.

    Parameters
    ----------
    url : such as "http://127.0.0.1:8000".
    token : that the server printed, or one of its own.
    timeout : seconds for an answer.
    transport : of httpx, for a server that is reached in another way.

    Raises
    ------
    InvalidInput : if the url is none.
    ServerFailure : from every method, if the server does not answer, or fails.
    """

    def __init__(
        self, url: str, token: str, *, timeout: float = 30.0, transport: "httpx.BaseTransport | None" = None
    ) -> None:
        headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
        try:
            self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout, transport=transport)
        except httpx.InvalidURL as error:
            raise InvalidInput(f"url is {url!r}, which is none: {error}; expected what the server printed") from None

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(
        self,
        keys: ArrayLike | None = None,
        predictions: ArrayLike | None = None,
        *,
        inputs: ArrayLike | Sequence[Any] | None = None,
        ids: Sequence[int | str] | None = None,
    ) -> Served:
        """Base and corrected predictions.

        Parameters
        ----------
        keys, predictions : queries [q d] and what the base says of them [q c], at temperature 1.
        inputs : in their place, where the server has a model: arrays, rows of a table, or texts.
        ids : in their place, rows of the memory, each asked without itself.

        Raises
        ------
        InvalidInput, DimensionMismatch, UnknownId : if the queries do not fit the memory.
        """
        told = self._post("/predict", _queries(keys, predictions, inputs, ids))
        return Served(np.asarray(told["base"]), np.asarray(told["corrected"]), told["version"])

    def neighbors(
        self,
        keys: ArrayLike | None = None,
        predictions: ArrayLike | None = None,
        *,
        inputs: ArrayLike | Sequence[Any] | None = None,
        ids: Sequence[int | str] | None = None,
        n_neighbors: int | None = None,
        without: Sequence[int | str] = (),
    ) -> list[list[dict[str, Any]]]:
        """The nearest memories of each query: id, label, name, distance, weight.

        Parameters
        ----------
        keys, predictions, inputs, ids : as in `predict`.
        n_neighbors : by default as many as the setting uses.
        without : rows that are passed over.
        """
        body = {**_queries(keys, predictions, inputs, ids), "n_neighbors": n_neighbors, "without": list(without)}
        return self._post("/neighbors", body)["queries"]

    def explain(
        self,
        keys: ArrayLike | None = None,
        predictions: ArrayLike | None = None,
        *,
        inputs: ArrayLike | Sequence[Any] | None = None,
        ids: Sequence[int | str] | None = None,
        without: Sequence[int | str] = (),
        neighbors: int = 10,
        outputs: int = 5,
        order: Literal["distance", "share", "answer"] = "distance",
    ) -> list[dict[str, Any]]:
        """Of each query base and corrected `outputs`, and the `neighbors` that made the difference.

        Parameters
        ----------
        keys, predictions, inputs, ids : as in `predict`.
        without : rows that are passed over this once, as if they were forgotten.
        neighbors, outputs : how many are listed.
        order : of the memories, the nearest first, those with the largest share of the correction, or those whose
            label is the corrected answer.
        """
        body = {
            **_queries(keys, predictions, inputs, ids),
            "without": list(without),
            "neighbors": neighbors,
            "outputs": outputs,
            "order": order,
        }
        return self._post("/explain", body)["queries"]

    def add(
        self,
        keys: ArrayLike | None = None,
        labels: ArrayLike | Sequence[Any] | None = None,
        predictions: ArrayLike | None = None,
        *,
        inputs: ArrayLike | Sequence[Any] | None = None,
        ids: Sequence[int | str] | ArrayLike | None = None,
        groups: Sequence[int | str] | ArrayLike | None = None,
        owner: str | None = None,
        tags: Sequence[str] = (),
        snippets: Sequence[str] | None = None,
    ) -> Shaped[ndarray, " b"]:
        """Append examples; they are durable when it returns.

        Parameters
        ----------
        keys, predictions, inputs : as in `predict`.
        labels : class indices or names, or values; None for texts, which say themselves what comes next.
        ids, groups, owner, tags, snippets : as in `Memory.append`.

        Returns
        -------
        The ids of the new rows.
        """
        body = {
            **_queries(keys, predictions, inputs, None),
            "labels": None if labels is None else _plain(labels),
            "ids": None if ids is None else _plain(ids),
            "groups": None if groups is None else _plain(groups),
            "owner": owner,
            "tags": list(tags),
            "snippets": snippets,
        }
        return np.asarray(self._post("/add", body)["ids"])

    def forget(
        self, ids: Sequence[int | str] | ArrayLike | None = None, *, where: Mapping[str, Any] | None = None
    ) -> int:
        """Take rows out of use at once, all or none; gives how many.

        Raises
        ------
        UnknownId : if the memory does not hold one of the ids.
        ReadOnlyMemory : if the server may not change it.
        """
        return self._post("/forget", {"ids": None if ids is None else _plain(ids), "where": where})["forgotten"]

    def complete(self, prompt: str, **options: Any) -> str:
        """A text that goes on, from a language model; options are those of `/v1/completions`."""
        return self._post("/v1/completions", {"prompt": prompt, **options})["choices"][0]["text"]

    def info(self) -> dict[str, Any]:
        """What the memory holds, and how it is used."""
        return _plain_values(self._ask("GET", "/info"))

    def metrics(self) -> str:
        """Counters, in the text format of Prometheus."""
        return self._ask("GET", "/metrics").text

    def health(self) -> bool:
        """Whether the server answers."""
        try:
            return bool(_plain_values(self._ask("GET", "/health")).get("status") == "ok")
        except ServerFailure:
            return False

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        try:
            content = json.dumps({name: value for name, value in body.items() if value is not None}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"the request cannot be sent as JSON: {error}; send finite numbers and texts") from None
        return _plain_values(self._ask("POST", path, content))

    def _ask(self, method: str, path: str, content: str | None = None) -> "httpx.Response":
        for attempt in range(TRIES):
            try:
                answer = self._http.request(method, path, content=content)
            except httpx.HTTPError as error:
                raise ServerFailure(
                    f"{self._http.base_url} does not answer: {error or type(error).__name__}"
                ) from error
            if answer.status_code not in RETRIED or attempt == TRIES - 1:
                break
            time.sleep(_seconds(answer.headers.get("retry-after")))
        if answer.is_success:
            return answer
        raise _error(answer)


def _queries(keys: Any, predictions: Any, inputs: Any, ids: Any) -> dict[str, Any]:
    given = {"keys": keys, "predictions": predictions, "inputs": inputs, "ids": ids}
    return {name: _plain(value) for name, value in given.items() if value is not None}


def _plain(values: Any) -> Any:
    """What JSON can say."""
    if hasattr(values, "to_dict") and hasattr(values, "columns"):
        return values.to_dict("records")
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _plain_values(answer: "httpx.Response") -> dict[str, Any]:
    """What an answer says.

    Raises
    ------
    ServerFailure : if it is none of such a server.
    """
    try:
        found = answer.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ServerFailure(f"{answer.url} answers, but not as a server of memories does; is it the right address?")
    return found


def _seconds(told: str | None) -> float:
    return min(float(told), 30.0) if told is not None and told.isdigit() else 1.0


def _error(answer: "httpx.Response") -> ResidualMemoryError:
    """The error that the server met, as it would have been raised here."""
    try:
        told = answer.json()["error"]
        kind, message = str(told["type"]), str(told["message"])
    except (ValueError, KeyError, TypeError):
        return ServerFailure(f"the server answered {answer.status_code}")
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, RAISED):
        return known(message)
    return ServerFailure(f"the server answered {answer.status_code}: {message}")
