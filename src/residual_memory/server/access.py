"""Who may ask for what: tokens with scopes, and the hosts and origins that are served."""

import hmac
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import parse_qs

from residual_memory.errors import InvalidInput
from residual_memory.server.refusals import Forbidden, Unauthorized

Scope = Literal["predict", "explain", "write"]
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))

# The last is the name that Starlette's TestClient gives; no name without a dot is anybody's on the internet.
HOSTS = ("127.0.0.1", "localhost", "[::1]", "testserver")
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
FEWEST_CHARACTERS = 16

Headers = Mapping[bytes, bytes]


@dataclass(frozen=True)
class Access:
    """What a request must show before anything of it is read.

    Attributes
    ----------
    tokens : and the scopes of each.
    hosts : that the server answers as, without ports; "*" is any.
    """

    tokens: Mapping[str, frozenset[Scope]]
    hosts: tuple[str, ...] = HOSTS

    @staticmethod
    def of(token: str | Mapping[str, Collection[str]] | None, hosts: Sequence[str] = HOSTS) -> "Access":
        """From what the user gives; None makes a random token.

        Raises
        ------
        InvalidInput : if there is no token, one is short, or a scope unknown.
        """
        given: Mapping[str, Collection[str]]
        given = {token or secrets.token_urlsafe(32): SCOPES} if token is None or isinstance(token, str) else token
        if not given:
            raise InvalidInput("there is no token, expected at least one; leave it out to have a random one made")
        for name, scopes in given.items():
            if len(name) < FEWEST_CHARACTERS or not name.isascii() or not name.isprintable() or " " in name:
                raise InvalidInput(
                    f"a token has {len(name)} characters, expected at least {FEWEST_CHARACTERS} printable ones; "
                    "leave it out to have a random one made"
                )
            if unknown := set(scopes) - SCOPES:
                raise InvalidInput(f"a token has scope {min(unknown)!r}, expected some of {', '.join(sorted(SCOPES))}")
        return Access({name: frozenset(scopes) for name, scopes in given.items()}, tuple(hosts))  # type: ignore[arg-type]

    @property
    def token(self) -> str:
        """The one that may do most."""
        return max(self.tokens, key=lambda token: len(self.tokens[token]))

    def scopes_of(self, shown: str) -> frozenset[Scope] | None:
        """Of a token; None for one that is none. Takes as long for any wrong one."""
        found = None
        for token, scopes in self.tokens.items():
            if hmac.compare_digest(token.encode(), shown.encode()):
                found = scopes
        return found

    def check(self, method: str, headers: Headers, port: int) -> frozenset[Scope]:
        """The scopes of a request.

        Raises
        ------
        Unauthorized : without a token, or with a wrong one.
        Forbidden : if it comes through a host or from an origin that is not served.
        """
        cookie = cookie_in(headers, port)
        kind, _, shown = _text(headers.get(b"authorization", b"")).partition(" ")
        scopes = self.scopes_of(shown.strip()) if kind.lower() == "bearer" else self.scopes_of(cookie or "")
        if scopes is None:
            raise Unauthorized("the request has no valid token; send the header 'Authorization: Bearer TOKEN'")
        self.check_host(headers)
        by_cookie = kind.lower() != "bearer"
        if by_cookie and method not in SAFE_METHODS and b"origin" not in headers:
            raise Forbidden("a change with a cookie needs an Origin; send the token as 'Authorization: Bearer TOKEN'")
        return scopes

    def check_host(self, headers: Headers) -> None:
        """Refuse other names of this machine, and pages of other sites.

        Raises
        ------
        Forbidden : naming what was found.
        """
        host = _text(headers.get(b"host", b""))
        if not self._serves(host):
            raise Forbidden(f"the request is for host {host[:80]!r}, which is not served; start with --allow-host NAME")
        origin = headers.get(b"origin")
        if origin is not None and _text(origin).partition("://")[2].lower() != host.lower():
            raise Forbidden("the request comes from the page of another site; ask from the server's own page")

    def _serves(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        return "*" in self.hosts or name.lower() in self.hosts


def cookie_name(port: int) -> str:
    """Cookies do not know ports, so that their names must."""
    return f"resmem-{port}"


def cookie_in(headers: Headers, port: int) -> str | None:
    """The token that a browser was given."""
    wanted = cookie_name(port)
    for part in _text(headers.get(b"cookie", b"")).split(";"):
        name, _, value = part.strip().partition("=")
        if name == wanted:
            return value
    return None


def token_in_query(query: bytes) -> str | None:
    """The token in the address that the server prints when it starts."""
    return next(iter(parse_qs(_text(query)).get("token", [])), None)


def _text(value: bytes) -> str:
    return value.decode("latin-1")
