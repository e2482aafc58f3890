"""Text that goes on, as OpenAI's `/v1/completions` has it: whole or streamed, with log-probabilities and echo."""

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Any

import numpy as np
import orjson
import torch
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import ConfigDict, Field
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from torch import Tensor

from residual_memory.errors import InvalidInput, UnknownId
from residual_memory.server import asked
from residual_memory.server.answering import as_json, body_of, needs
from residual_memory.server.openapi import described
from residual_memory.server.refusals import Overloaded
from residual_memory.server.text_service import TextService

MOST_TOKENS = 4096
TOGETHER = 2  # completions at a time: each takes a core
UNFINISHED = "\ufffd"  # stands at the end of a text that breaks off within a character


class Completion(asked.Asked):
    """A request as OpenAI's clients send it."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str = ""
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    max_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = 16
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    n: Annotated[int, Field(ge=1, le=16)] | None = 1
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = False
    stream: bool | None = False
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: int | None = None


@dataclass
class Sampling:
    """How the next token is chosen."""

    temperature: float
    top_p: float
    generator: torch.Generator | None

    def __call__(self, log_probabilities: Tensor) -> int:
        if self.temperature == 0:
            return int(log_probabilities.argmax())
        shares = (log_probabilities / self.temperature).softmax(0)
        if self.top_p < 1:
            ordered, order = shares.sort(descending=True)
            kept = ordered.cumsum(0) - ordered < self.top_p
            shares = torch.zeros_like(shares).scatter(0, order[kept], ordered[kept])
        return int(torch.multinomial(shares, 1, generator=self.generator))


@dataclass(frozen=True)
class Step:
    """One token, its text, and how likely it was."""

    token: int
    text: str
    log_probability: float | None = None
    top: dict[str, float] = field(default_factory=dict)


class Text:
    """A text that grows token by token, cut where it should stop."""

    def __init__(self, service: TextService, stops: Sequence[str]) -> None:
        self._service, self._stops = service, stops
        self._tokens: list[int] = []
        self._given = 0  # characters that were given out
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be said of the text now, and could not before."""
        self._tokens.append(token)
        return self._new(last=False)

    def end(self) -> str:
        """What is left when no token comes any more."""
        return self._new(last=True)

    def _new(self, *, last: bool) -> str:
        whole = self._service.decoded(self._tokens) if self._tokens else ""
        places = [place for stop in self._stops if (place := whole.find(stop)) >= 0]
        if places:
            self.stopped = True
            whole = whole[: min(places)]
        elif not last:
            held = max((len(stop) - 1 for stop in self._stops), default=0)
            whole = whole[: max(self._given, len(whole) - held)]
            whole = whole.rstrip(UNFINISHED)
        new, self._given = whole[self._given :], max(self._given, len(whole))
        return new


class Continuation:
    """One completion of one prompt: what is made of it, step by step.

    Parameters
    ----------
    prompt : token numbers, at least one.
    """

    def __init__(self, service: TextService, prompt: Sequence[int], wanted: Completion, seed: int | None) -> None:
        self._service, self._prompt, self._wanted = service, list(prompt), wanted
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        temperature = 1.0 if wanted.temperature is None else wanted.temperature
        self._choose = Sampling(temperature, wanted.top_p or 1.0, generator)
        stops = [wanted.stop] if isinstance(wanted.stop, str) else wanted.stop or []
        self._text = Text(service, [stop for stop in stops if stop])
        self.n_tokens = 0
        self.finish = "length"

    @property
    def n_prompt(self) -> int:
        return len(self._prompt)

    @property
    def tells(self) -> bool:
        """Whether log-probabilities were asked for."""
        return self._wanted.logprobs is not None

    def name_of(self, token: int) -> str:
        return self._service.name_of(token)

    def steps(self) -> Iterator[Step]:
        """The prompt, if it is to be echoed, and what comes after it."""
        limit = 16 if self._wanted.max_tokens is None else self._wanted.max_tokens
        whole = torch.tensor([self._prompt], device=self._service.lm.device)
        read, past = whole, None
        if self._wanted.echo:
            said, past = self._said(read, past, everywhere=True)
            yield from self._echoed(said)
        elif limit:
            said, past = self._said(read, past)
        for place in range(limit):
            if place:
                said, past = self._said(read, past)
            token = self._choose(said[-1])
            if token == self._service.tokenizer.eos_token_id:
                self.finish = "stop"
                break
            self.n_tokens += 1
            yield Step(token, self._text.add(token), *self._likelihood(said[-1], token))
            if self._text.stopped:
                self.finish = "stop"
                return
            new = torch.tensor([[token]], device=whole.device)
            whole = torch.cat([whole, new], dim=1)
            read = whole if past is None else new
        if rest := self._text.end():
            yield Step(-1, rest)

    def _said(self, read: Tensor, past: Any, *, everywhere: bool = False) -> tuple[Tensor, Any]:
        """Log-probabilities with the memory [t v], of the last place or of all."""
        options = {} if past is None else {"past_key_values": past}
        with torch.inference_mode():
            result = self._service.lm(input_ids=read, use_cache=True, **options)
            logits = result.logits[0] if everywhere else result.logits[0, -1:]
            return logits.float().log_softmax(1).cpu(), getattr(result, "past_key_values", None)

    def _echoed(self, said: Tensor) -> Iterator[Step]:
        written = Text(self._service, ())
        for place, token in enumerate(self._prompt):
            likelihood = self._likelihood(said[place - 1], token) if place else (None, {})
            yield Step(token, written.add(token), *likelihood)
        if rest := written.end():
            yield Step(-1, rest)

    def _likelihood(self, said: Tensor, token: int) -> tuple[float | None, dict[str, float]]:
        if self._wanted.logprobs is None:
            return None, {}
        values, tokens = said.topk(min(self._wanted.logprobs, len(said)))
        top = {
            self._service.name_of(place): value for place, value in zip(tokens.tolist(), values.tolist(), strict=True)
        }
        return float(said[token]), top


def completing(service: TextService, name: str) -> APIRouter:
    """Routes that OpenAI's clients know.

    Parameters
    ----------
    name : of the model, as clients name it.
    """
    router = APIRouter(prefix="/v1")
    created = int(time.time())
    card = {"id": name, "object": "model", "created": created, "owned_by": "residual-memory"}
    places = threading.BoundedSemaphore(TOGETHER)

    @router.get("/models", **described("The model, with its memory."))
    async def models(request: Request) -> Response:
        return as_json({"object": "list", "data": [card]})

    @router.get("/models/{model}", **described("The model, with its memory."))
    async def model(request: Request, model: str) -> Response:
        _check_name(model, name)
        return as_json(card)

    @router.post("/completions", **described("Text that goes on.", Completion))
    async def completions(request: Request) -> Response:
        needs(request, "predict")
        wanted = await body_of(request, Completion)
        _check_name(wanted.model or name, name)
        continuations = await run_in_threadpool(_continuations, service, wanted)
        if not places.acquire(blocking=False):
            raise Overloaded(f"{TOGETHER} completions are under way; come again in a moment")
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        answers = _released(_events(head, continuations) if wanted.stream else _whole(head, continuations), places)
        first = await run_in_threadpool(next, answers)  # from here on the place is given back whatever happens
        if not wanted.stream:
            return as_json(first)
        events = (b"data: " + orjson.dumps(event) + b"\n\n" for event in chain([first], answers))
        closed = chain(events, [b"data: [DONE]\n\n"])
        return StreamingResponse(iterate_in_threadpool(closed), media_type="text/event-stream")

    return router


def _check_name(given: str, name: str) -> None:
    if given != name:
        raise UnknownId(f"there is no model {given[:80]!r}; the one that is served is {name!r}")


def _released(answers: Iterator[dict[str, Any]], places: threading.BoundedSemaphore) -> Iterator[dict[str, Any]]:
    try:
        yield from answers
    finally:
        places.release()


def _continuations(service: TextService, wanted: Completion) -> list[Continuation]:
    """All that is to be made: n of each prompt.

    Raises
    ------
    InvalidInput : if a prompt is empty, holds no tokens, or leaves no room for what is to come.
    """
    given: Any = wanted.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise InvalidInput("there is no prompt, expected a text, or tokens, or a list of them")
    made = []
    for number, prompt in enumerate(given):
        tokens = service.encoded(prompt) if isinstance(prompt, str) else np.asarray(prompt, np.int64)
        if not len(tokens):
            raise InvalidInput(f"prompt {number} holds no token, expected at least one")
        service.lm.watch.checked(tokens, "the prompt")
        room = service.lm.watch.longest
        if room is not None and len(tokens) + (wanted.max_tokens or 0) > room:
            raise InvalidInput(
                f"prompt {number} has {len(tokens):,} tokens and max_tokens is {wanted.max_tokens}, but the model "
                f"reads at most {room:,}; send a shorter prompt or ask for less"
            )
        for copy in range(wanted.n or 1):
            seed = None if wanted.seed is None else (wanted.seed + copy) % (1 << 63)
            made.append(Continuation(service, tokens.tolist(), wanted, seed))
    return made


def _whole(head: dict[str, Any], continuations: Sequence[Continuation]) -> Iterator[dict[str, Any]]:
    """One object with all of it."""
    choices = []
    for index, continuation in enumerate(continuations):
        steps = list(continuation.steps())
        text = "".join(step.text for step in steps)
        choices.append(_choice(index, text, _log_probabilities(steps, continuation), continuation.finish))
    made = sum(continuation.n_tokens for continuation in continuations)
    asked_for = sum(continuation.n_prompt for continuation in continuations)
    usage = {"prompt_tokens": asked_for, "completion_tokens": made, "total_tokens": asked_for + made}
    yield {**head, "choices": choices, "usage": usage}


def _events(head: dict[str, Any], continuations: Sequence[Continuation]) -> Iterator[dict[str, Any]]:
    """An object a token, and one at the end of each completion."""
    for index, continuation in enumerate(continuations):
        offset = 0
        for step in continuation.steps():
            told = _log_probabilities([step], continuation, offset)
            offset += len(step.text)
            yield {**head, "choices": [_choice(index, step.text, told, None)]}
        yield {**head, "choices": [_choice(index, "", None, continuation.finish)]}


def _choice(index: int, text: str, told: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": told, "finish_reason": finish}


def _log_probabilities(steps: Sequence[Step], continuation: Continuation, offset: int = 0) -> dict[str, Any] | None:
    if not continuation.tells:
        return None
    tokens = [step for step in steps if step.token >= 0]
    ends = np.cumsum([0, *(len(step.text) for step in tokens)])
    return {
        "tokens": [continuation.name_of(step.token) for step in tokens],
        "token_logprobs": [step.log_probability for step in tokens],
        "top_logprobs": [step.top or None for step in tokens],
        "text_offset": [offset + int(end) for end in ends[:-1]],
    }
