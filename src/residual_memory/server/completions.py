"""Text that goes on, as OpenAI's `/v1/completions` has it: whole or streamed, with log-probabilities and echo."""

import asyncio
import inspect
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import orjson
import torch
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from residual_memory.errors import InvalidInput, ResidualMemoryError, UnknownId
from residual_memory.models.tokens import LOGIT_BYTES
from residual_memory.server import answered, asked
from residual_memory.server.answering import as_json, body_of, needs
from residual_memory.server.openapi import described
from residual_memory.server.refusals import Overloaded, told
from residual_memory.server.text_service import UNFINISHED, TextService

MOST_TOKENS = 4096
MOST_PROMPTS = 64
COLDEST = 1e-4  # a temperature below this is 0: logits over it would be too large for single precision
ROOM = 8192  # tokens of prompt and completion, of a model that names no limit
TOGETHER = 2  # requests that are worked on at a time: each takes a core
WAITING = 16  # requests that wait for their turn; more are refused
CONTEXT = 8  # tokens of the prompt with which the first new ones are read: some differ at the beginning of a text
CACHES = {"cache", "past_key_values"}  # what newer and older transformers call it, coming and going
EVENTS = "text/event-stream"
GONE = 499  # the status that is noted of a client that did not wait

Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Field(max_length=256)]
Zero = Annotated[float, Field(ge=0, le=0)]


class StreamOptions(asked.Asked):
    """What a stream tells beside the text."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = False


class Completion(asked.Asked):
    """A request as OpenAI's clients send it; what is not served must be left out, or be without effect."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str = ""
    prompt: str | list[str] | list[Token] | list[list[Token]] = ""
    max_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = 16
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    n: Annotated[int, Field(ge=1, le=16)] | None = 1
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: int | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


# ---------------------------------------------------------------------- one text


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float
    top_p: float
    generator: torch.Generator | None

    def __call__(self, logits: Tensor) -> int:
        if self.temperature < COLDEST:
            return int(logits.argmax())
        shares = ((logits - logits.max()).double() / self.temperature).softmax(0)  # finite, however cold
        if self.top_p < 1:
            ordered, order = shares.sort(descending=True)
            kept = ordered.cumsum(0) - ordered < self.top_p
            kept[0] = True  # though top_p may be 0 in single precision
            shares = torch.zeros_like(shares).scatter(0, order[kept], ordered[kept])
        return int(torch.multinomial(shares, 1, generator=self.generator))


@dataclass(frozen=True)
class Said:
    """One token: where it begins, counted from the prompt's beginning, and how likely it and others were there."""

    token: int
    offset: int
    log_probability: float | None = None
    top: dict[str, float] | None = None


@dataclass(frozen=True)
class Chunk:
    """A stretch of text, and the tokens that begin in it."""

    text: str = ""
    tokens: tuple[Said, ...] = ()


class Text:
    """A text that grows token by token, and ends before a stop.

    Characters are held back while they are not whole, or may be the beginning of a stop; their tokens with them.

    Parameters
    ----------
    before : tokens that it goes on from.
    offset : characters of these.
    """

    def __init__(self, service: TextService, before: Sequence[int], offset: int, stops: Sequence[str] = ()) -> None:
        self._service, self._stops, self._offset = service, stops, offset
        self._tokens = list(before[-CONTEXT:])
        self._start, self._read = 0, len(self._tokens)
        self._held, self._waiting = "", list[Said]()
        self.stopped = False

    @property
    def end(self) -> int:
        """Where the next token begins."""
        return self._offset + len(self._held)

    def add(self, said: Said) -> Chunk:
        """What can be said of the text now, and could not before."""
        self._tokens.append(said.token)
        self._waiting.append(said)
        new = self._unread()
        if not new.endswith(UNFINISHED):
            self._held += new
            self._start, self._read = self._read, len(self._tokens)
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self._given(min(places))
        return self._given(len(self._held) - max((_begun(self._held, stop) for stop in self._stops), default=0))

    def rest(self) -> Chunk:
        """What was held back, when no token comes any more."""
        if self.stopped:
            return Chunk()
        self._held += self._unread()
        chunk = self._given(len(self._held))
        return Chunk(chunk.text, (*chunk.tokens, *self._waiting))

    def _unread(self) -> str:
        """The text of the last tokens, as it stands after the ones before."""
        before = self._service.decoded(self._tokens[self._start : self._read])
        return self._service.decoded(self._tokens[self._start :])[len(before) :]

    def _given(self, n: int) -> Chunk:
        text, self._held = self._held[:n], self._held[n:]
        self._offset += n
        tokens = tuple(said for said in self._waiting if said.offset < self._offset)
        self._waiting = self._waiting[len(tokens) :]
        return Chunk(text, tokens)


def _begun(text: str, stop: str) -> int:
    """Characters at the end of a text that are the beginning of a stop."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Continuation:
    """One completion of one prompt.

    Parameters
    ----------
    prompt : token numbers, at least one.
    copy : its number among the completions of this prompt.
    """

    def __init__(self, service: TextService, prompt: Sequence[int], wanted: Completion, copy: int) -> None:
        self._service, self._prompt, self._wanted = service, list(prompt), wanted
        generator = None if wanted.seed is None else torch.Generator().manual_seed((wanted.seed + copy) % (1 << 63))
        temperature = 1.0 if wanted.temperature is None else wanted.temperature
        self._choose = Sampling(temperature, wanted.top_p or 1.0, generator)
        stops = [wanted.stop] if isinstance(wanted.stop, str) else wanted.stop or []
        self._stops = [stop for stop in stops if stop]
        self._can_keep = "logits_to_keep" in inspect.signature(service.lm.model.forward).parameters
        self.n_prompt, self.n_made = len(self._prompt), 0
        self.finish = "length"

    def chunks(self) -> Iterator[Chunk]:
        """The prompt, if it is to be echoed, and what comes after it, token by token."""
        limit = 16 if self._wanted.max_tokens is None else self._wanted.max_tokens
        tokens, n_read = list(self._prompt), 0
        logits, past = None, dict[str, Any]()
        if self._wanted.echo and self._wanted.logprobs is not None:
            echo = Text(self._service, (), 0)
            yield echo.add(Said(tokens[0], 0))
            step = max(1, LOGIT_BYTES // (4 * self._service.lm.watch.vocabulary))
            while n_read < len(tokens):
                start, n_read = n_read, min(n_read + step, len(tokens))
                logits, past = self._logits(tokens[start if past else 0 : n_read], past, n_read - start)
                for token, said in zip(tokens[start + 1 : n_read + 1], logits, strict=False):
                    yield echo.add(self._said(token, echo.end, said))
            yield echo.rest()
        elif self._wanted.echo:
            yield Chunk(self._service.decoded(tokens))
        text = Text(self._service, tokens, len(self._service.decoded(tokens)), self._stops)
        end: tuple[int, Tensor] | None = None
        for _ in range(limit):
            if n_read < len(tokens):
                logits, past = self._logits(tokens[n_read if past else 0 :], past, 1)
                n_read = len(tokens)
            assert logits is not None
            token = self._choose(logits[-1])
            self.n_made += 1
            if token in self._service.ends:
                self.finish, end = "stop", (token, logits[-1])
                break
            yield text.add(self._said(token, text.end, logits[-1]))
            if text.stopped:
                self.finish = "stop"
                break
            tokens.append(token)
        yield text.rest()
        if end is not None:  # it has no text, but a probability
            yield Chunk("", (self._said(end[0], text.end, end[1]),))

    def _logits(self, tokens: Sequence[int], past: dict[str, Any], n: int) -> tuple[Tensor, dict[str, Any]]:
        """Logits with the memory [n v] of the last n of these tokens, and the cache of a model that has one."""
        options = {"logits_to_keep": n, **past} if self._can_keep else past
        with torch.inference_mode():
            read = torch.tensor([tokens], device=self._service.lm.device)
            result = self._service.lm(input_ids=read, use_cache=True, **options)
            past = {name: result[name] for name in CACHES & set(result)}
            return result.logits[0, -n:].float().cpu(), past

    def _said(self, token: int, offset: int, logits: Tensor) -> Said:
        if self._wanted.logprobs is None:
            return Said(token, offset)
        said = logits.log_softmax(0)
        values, tokens = said.topk(min(self._wanted.logprobs, len(said)))
        likely = {token: float(said[token]), **dict(zip(tokens.tolist(), values.tolist(), strict=True))}
        return Said(token, offset, likely[token], {self._service.name_of(one): value for one, value in likely.items()})


# ---------------------------------------------------------------------- all that a request asks for


@dataclass(frozen=True)
class Part:
    """A stretch of one of the completions; the last of each says how it ended."""

    index: int
    chunk: Chunk
    finish: str | None = None


class Answer:
    """What a client is told, whole or event by event.

    Parameters
    ----------
    name : of the model.
    """

    def __init__(self, service: TextService, wanted: Completion, name: str) -> None:
        self._service, self._wanted = service, wanted
        self._continuations = _continuations(service, wanted)
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
        }

    def parts(self) -> Iterator[Part]:
        """One completion after the other, a token at a time."""
        for index, continuation in enumerate(self._continuations):
            for chunk in continuation.chunks():
                yield Part(index, chunk)
            yield Part(index, Chunk(), continuation.finish)

    def whole(self, parts: Sequence[Part]) -> dict[str, Any]:
        """One object with all parts."""
        chunks, finishes = defaultdict[int, list[Chunk]](list), dict[int, str | None]()
        for part in parts:
            chunks[part.index].append(part.chunk)
            finishes[part.index] = part.finish
        choices = []
        for index, some in chunks.items():
            joined = Chunk(
                "".join(chunk.text for chunk in some), tuple(said for chunk in some for said in chunk.tokens)
            )
            choices.append(self._choice(index, joined, finishes[index]))
        return {**self._head, "choices": choices, "usage": self._usage}

    async def events(self, parts: AsyncGenerator[Part, None]) -> AsyncGenerator[bytes, None]:
        """One event a part that says something, and at the end that it is one."""
        async with aclosing(parts):
            try:
                async for part in parts:
                    if part.chunk != Chunk() or part.finish is not None:
                        yield _event({**self._head, "choices": [self._choice(part.index, part.chunk, part.finish)]})
            except ResidualMemoryError as error:
                yield _event(told(error, "/v1/completions"))
                return
            if self._wanted.stream_options is not None and self._wanted.stream_options.include_usage:
                yield _event({**self._head, "choices": [], "usage": self._usage})
            yield b"data: [DONE]\n\n"

    @property
    def _usage(self) -> dict[str, int]:
        asked_for = sum(continuation.n_prompt for continuation in self._continuations)
        made = sum(continuation.n_made for continuation in self._continuations)
        return {"prompt_tokens": asked_for, "completion_tokens": made, "total_tokens": asked_for + made}

    def _choice(self, index: int, chunk: Chunk, finish: str | None) -> dict[str, Any]:
        likelihoods = None
        if self._wanted.logprobs is not None:
            likelihoods = {
                "tokens": [self._service.name_of(said.token) for said in chunk.tokens],
                "token_logprobs": [said.log_probability for said in chunk.tokens],
                "top_logprobs": [said.top for said in chunk.tokens],
                "text_offset": [said.offset for said in chunk.tokens],
            }
        return {"index": index, "text": chunk.text, "logprobs": likelihoods, "finish_reason": finish}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


def _continuations(service: TextService, wanted: Completion) -> list[Continuation]:
    """All that is to be made: n of each prompt.

    Raises
    ------
    InvalidInput : if there is no prompt, or one has no tokens, or unknown ones, or leaves no room for what is to come.
    """
    given: Any = wanted.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not 0 < len(given) <= MOST_PROMPTS:
        raise InvalidInput(f"there are {len(given):,} prompts, expected 1 to {MOST_PROMPTS}")
    room = service.lm.watch.longest or ROOM
    made = []
    for number, prompt in enumerate(given):
        tokens = service.encoded(prompt) if isinstance(prompt, str) else np.asarray(prompt, np.int64)
        if not len(tokens):
            raise InvalidInput(f"prompt {number} holds no token, expected at least one")
        service.lm.watch.checked(tokens, f"prompt {number}")
        limit = 16 if wanted.max_tokens is None else wanted.max_tokens
        if len(tokens) + max(0, limit - 1) > room:  # the last token that is made is not read again
            raise InvalidInput(
                f"prompt {number} has {len(tokens):,} tokens and max_tokens is {limit:,}, but the model reads at most "
                f"{room:,}; send a shorter prompt or ask for less"
            )
        made += [Continuation(service, tokens.tolist(), wanted, copy) for copy in range(wanted.n or 1)]
    return made


# ---------------------------------------------------------------------- routes


class Turns:
    """Requests that are worked on: a few at a time, and a few more that wait."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(TOGETHER)
        self._waiting = 0

    async def steps(self, parts: Iterator[Part]) -> AsyncGenerator[Part, None]:
        """The parts, each made on a thread, until nobody wants the next one.

        Raises
        ------
        Overloaded : if too many wait already.
        """
        if self._waiting >= WAITING:
            raise Overloaded(f"{TOGETHER} completions are under way and {WAITING} wait; come again in a moment")
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        try:
            while (part := await run_in_threadpool(next, parts, None)) is not None:
                yield part
        finally:
            self._places.release()


class EventStream(StreamingResponse):
    """Events of an answer; when the client leaves no more of it is made."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, media_type=EVENTS)
        self._events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


def completing(service: TextService, name: str) -> APIRouter:
    """Routes that OpenAI's clients know.

    Parameters
    ----------
    name : of the model, as clients name it.
    """
    router = APIRouter(prefix="/v1")
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "residual-memory"}
    turns = Turns()

    def check(given: str) -> None:
        if given != name:
            raise UnknownId(f"there is no model {given[:80]!r}; the one that is served is {name!r}")

    @router.get("/models", **described("The model, with its memory.", answer=answered.ModelCards))
    async def models(request: Request) -> Response:
        return as_json({"object": "list", "data": [card]})

    @router.get("/models/{model}", **described("The model, with its memory.", answer=answered.ModelCard))
    async def model(request: Request, model: str) -> Response:
        check(model)
        return as_json(card)

    @router.post("/completions", **described("Text that goes on.", Completion, answered.Completed, others=[EVENTS]))
    async def completions(request: Request) -> Response:
        needs(request, "predict")
        wanted = await body_of(request, Completion)
        check(wanted.model or name)
        answer = await run_in_threadpool(Answer, service, wanted, name)
        steps = turns.steps(answer.parts())
        if wanted.stream:
            first = await anext(steps)  # so that what goes wrong at once is refused with its own status
            return EventStream(answer.events(_after(first, steps)))
        parts = []
        async with aclosing(steps):
            async for part in steps:
                if await request.is_disconnected():
                    return Response(status_code=GONE)
                parts.append(part)
        return as_json(answer.whole(parts))

    return router


async def _after(first: Part, steps: AsyncGenerator[Part, None]) -> AsyncGenerator[Part, None]:
    async with aclosing(steps):
        yield first
        async for part in steps:
            yield part
