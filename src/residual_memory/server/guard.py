"""What stands before every route: token, host, origin, size and time, and what is noted of each request."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect

from residual_memory.errors import ResidualMemoryError, ServerFailure
from residual_memory.server.access import Access, cookie_name, token_in_query
from residual_memory.server.limits import Limits
from residual_memory.server.observing import Observer
from residual_memory.server.refusals import OURS, BodyTooLarge, TooSlow, Unauthorized, refusal, status_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_CONTENT = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
SECURITY = (
    (b"content-security-policy", _CONTENT.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


class Guard:
    """ASGI middleware around the whole application.

    Parameters
    ----------
    app : what is guarded.
    access, limits, observer : who may ask, how much, and where it is noted.
    login_page : what a browser without a token is shown.
    """

    def __init__(self, app: App, *, access: Access, limits: Limits, observer: Observer, login_page: bytes) -> None:
        self._app, self._access, self._limits, self._observer = app, access, limits, observer
        self._login_page = login_page

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._guarded(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _guarded(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        answer = _Answer(send, scope["path"], self._limits)
        with self._observer.request(scope, lambda: answer.status) as failed:
            try:
                if not await self._logged_in(scope, headers, answer):
                    state = scope.setdefault("state", {})
                    state["scopes"] = self._access.check(scope["method"], headers, _port(scope))
                    state["take_time"] = answer.take_time
                    limited = _limited(receive, headers, self._limits.body_bytes)
                    await answer.within(self._app(scope, limited, answer.send))
            except Unauthorized as error:
                await self._unauthorized(scope, headers, answer, error)
            except ResidualMemoryError as error:
                if status_of(error) in OURS:
                    failed(error)
                await answer.refuse(error)
            except ClientDisconnect:
                pass  # nobody is there to be answered
            except Exception as error:
                failed(error)
                await answer.refuse(ServerFailure("the server failed at this request; its log says where"))

    async def _logged_in(self, scope: Mapping[str, Any], headers: Mapping[bytes, bytes], answer: "_Answer") -> bool:
        """Turn the token in the printed address into a cookie, so that it stays in no address bar."""
        if scope["path"] != "/" or scope["method"] != "GET" or not (query := scope["query_string"]):
            return False
        token = token_in_query(query)
        if token is None or self._access.scopes_of(token) is None:
            return False
        self._access.check_host(headers)
        secure = "; Secure" if scope.get("scheme") == "https" else ""
        cookie = f"{cookie_name(_port(scope))}={token}; Path=/; HttpOnly; SameSite=Strict{secure}"
        await answer.whole(303, {"location": "/", "set-cookie": cookie}, b"")
        return True

    async def _unauthorized(
        self, scope: Mapping[str, Any], headers: Mapping[bytes, bytes], answer: "_Answer", error: Unauthorized
    ) -> None:
        if scope["method"] == "GET" and b"text/html" in headers.get(b"accept", b""):
            more = {"content-type": "text/html; charset=utf-8", "www-authenticate": "Bearer"}
            await answer.whole(401, more, self._login_page)
        else:
            await answer.refuse(error)


class _Answer:
    """The way back to a client: what is sent gets its headers here, and its time."""

    def __init__(self, send: Send, path: str, limits: Limits) -> None:
        self._send, self._path, self._limits = send, path, limits
        self._deadline = asyncio.timeout(limits.answer_seconds)
        self.status: int | None = None

    async def within(self, work: Awaitable[None]) -> None:
        """Wait for what answers, as long as an answer may take.

        Raises
        ------
        TooSlow : if it takes longer.
        """
        try:
            async with self._deadline:
                await work
        except TimeoutError:
            if not self._deadline.expired():
                raise
            raise TooSlow("there was no answer in time; ask for less at once, or come again") from None

    def take_time(self) -> None:
        """Answer however long it takes: who is told that a change came too late would ask for it again."""
        self._deadline.reschedule(None)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = list(message.get("headers", []))
            names = {name.lower() for name, _ in given}
            message = {**message, "headers": [*given, *(pair for pair in SECURITY if pair[0] not in names)]}
        elif message.get("more_body") and not self._deadline.expired():
            self._deadline.reschedule(asyncio.get_running_loop().time() + self._limits.answer_seconds)
        await self._send(message)

    async def refuse(self, error: ResidualMemoryError) -> None:
        """Say why there is no answer; one that has begun is left unfinished, which ends the connection."""
        if self.status is None:
            status, headers, body = refusal(error, self._path, self._limits.retry_seconds)
            close = {"connection": "close"} if isinstance(error, TooSlow) else {}
            await self.whole(status, {**headers, **close}, body)

    async def whole(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Send one short answer."""
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        pairs.append((b"content-length", str(len(body)).encode()))
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})
        await self._send({"type": "http.response.body", "body": body})


def _limited(receive: Receive, headers: Mapping[bytes, bytes], most: int) -> Receive:
    """A request's body, as long as it is not too large.

    Raises
    ------
    BodyTooLarge : at once where the headers say how long it is, else when too much has come.
    """
    told = headers.get(b"content-length", b"")
    if told.isdigit() and int(told) > most:
        raise BodyTooLarge(_too_large(int(told), most))
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > most:
                raise BodyTooLarge(_too_large(seen, most))
        return message

    return limited


def _port(scope: Mapping[str, Any]) -> int:
    """Where the request came in: cookies of servers on one machine are told apart by it."""
    return (scope.get("server") or ("", 0))[1] or 0


def _too_large(found: int, most: int) -> str:
    return f"the body has {found:,} bytes or more, expected at most {most:,}; send fewer rows at a time"
