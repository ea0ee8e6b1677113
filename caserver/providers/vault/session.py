"""Requests to one Vault server, and the token that they carry: the only user of hvac.

Calls run in a bounded pool of threads, and none holds one past its deadline, whatever the server does. What the server says is
judged by status and by a fixed list of phrases: its bodies, tokens and anything that a network error quotes never reach a
message. Redirects are not followed and the environment (proxies, netrc, VAULT_*) is not consulted.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import hvac
import requests
import structlog
import urllib3

from caserver.environment import Clock, Workers, within
from caserver.errors import InvalidConfig, ProviderRefused, ProviderUnavailable
from caserver.fields import Secret
from caserver.providers.vault.endpoint import Endpoint, token_problem
from caserver.providers.vault.login import login_request
from caserver.providers.vault.tls_files import Material, context_of, read_material, text_of
from caserver.providers.vault.transport import ANSWER_MAX, Encoded, TooMuch, Transport, allowed

DEADLINE = 10.0  # seconds of one call, waiting for a thread included
LOGIN_PAUSE = 5.0  # seconds between two logins, so that a missing permission does not become a storm of them
_SLACK = 0.5  # seconds that a thread's own deadline lies behind the caller's, whose words are the better ones

_log = structlog.get_logger(__name__)


class Reason(StrEnum):
    """What a server can mean by a refusal, in our words."""

    NO_DEFAULT_ISSUER = "no issuer is the default there"
    UNKNOWN_ISSUER = "the issuer does not exist (any more)"
    NAME_IN_USE = "the name is in use already"
    PATH_IN_USE = "the path is in use already, or another engine is mounted above or below it"
    NO_SUCH_MOUNT = "nothing is mounted there"
    UNKNOWN_NAMESPACE = "the namespace does not exist"
    UNKNOWN_ROLE = "the role does not exist"
    SPEAKS_TLS = "the server speaks TLS there, the address must begin with https://"
    NOT_RENEWABLE = "the token cannot be renewed"
    BEYOND_ISSUER = "the certificate would outlive its issuer"
    PATH_LENGTH = "the issuer may not sign CA certificates (its path length is 0)"
    DENIED = "permission denied"
    NAMES = "the role does not allow the names"
    KEY = "the role does not allow the key"


# Longest first where one phrase holds another.
_PHRASES: tuple[tuple[str, Reason], ...] = (
    ("no default issuer", Reason.NO_DEFAULT_ISSUER),
    ("unable to find pki issuer", Reason.UNKNOWN_ISSUER),
    ("name already in use", Reason.NAME_IN_USE),
    ("path is already in use", Reason.PATH_IN_USE),
    ("existing mount at", Reason.PATH_IN_USE),
    ("no secret engine mount at", Reason.NO_SUCH_MOUNT),
    ("no handler for route", Reason.NO_SUCH_MOUNT),
    ("namespace not found", Reason.UNKNOWN_NAMESPACE),
    ("unknown role", Reason.UNKNOWN_ROLE),
    ("client sent an http request to an https server", Reason.SPEAKS_TLS),
    ("lease is not renewable", Reason.NOT_RENEWABLE),
    ("batch tokens cannot be renewed", Reason.NOT_RENEWABLE),
    ("is beyond the expiration of the ca certificate", Reason.BEYOND_ISSUER),
    ("max path length of zero", Reason.PATH_LENGTH),
    ("permission denied", Reason.DENIED),
    ("alternative names were provided", Reason.NAMES),
    ("common name", Reason.NAMES),
    ("requires keys of type", Reason.KEY),
)
_GOES_ON = frozenset({Reason.NO_DEFAULT_ISSUER, Reason.UNKNOWN_ISSUER})  # told with a 500, and yet an answer


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server said to one request."""

    status: int
    data: Mapping[str, Any] = field(default_factory=dict, repr=False)
    auth: Mapping[str, Any] = field(default_factory=dict, repr=False)  # of a login or a renewal
    text: str = field(default="", repr=False)  # the body, where it is not JSON
    reasons: frozenset[Reason] = frozenset()

    @property
    def ok(self) -> bool:
        """Whether the server did what it was asked."""
        return self.status < HTTPStatus.BAD_REQUEST

    @property
    def denied(self) -> bool:
        """Whether the token may not do it, or counts for nothing."""
        return self.status == HTTPStatus.FORBIDDEN

    @property
    def failed(self) -> bool:
        """Whether the server itself is in trouble."""
        return self.status >= HTTPStatus.INTERNAL_SERVER_ERROR

    @property
    def why(self) -> str:
        """The refusal in our words."""
        known = ", ".join(sorted(self.reasons))
        return known or f"status {self.status}; Vault's own log says why"


@dataclass(frozen=True, slots=True)
class Lease:
    """How long a token that expires lives."""

    ttl: int  # seconds left when it was learnt
    renewable: bool
    learnt_at: float  # monotonic instant

    def left(self, monotonic: float) -> float:
        """Seconds left; negative once it is over."""
        return self.ttl - (monotonic - self.learnt_at)


@dataclass(slots=True)
class _Wire:
    """Open connections: one pool for all namespaces, and a client for each."""

    http: requests.Session
    material: Material | None  # that its TLS was made of; None: it uses none
    clients: dict[str, Any] = field(default_factory=dict)


class VaultSession:
    """One server as one identity."""

    def __init__(self, endpoint: Endpoint, *, clock: Clock, workers: Workers, pool_size: int) -> None:
        self.endpoint = endpoint
        self._clock = clock
        self._workers = workers
        self._pool_size = pool_size
        self._wire: _Wire | None = None
        self._opening = asyncio.Lock()
        self._token: Secret | None = endpoint.token
        self._lease: Lease | None = None
        self._logged_in_at: float | None = None
        self._login_lock = asyncio.Lock()

    @property
    def lease(self) -> Lease | None:
        """What is known of the token's end; None: nothing, or that there is none."""
        return self._lease

    @property
    def logs_in(self) -> bool:
        """Whether another token can be had without an operator."""
        return self.endpoint.login is not None or self.endpoint.token_file is not None

    async def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        namespace: str | None = None,
        deadline: float = DEADLINE,
    ) -> Answer:
        """One request below ``/v1/``, with a fresh login where the token was refused and one can be had.

        A refusal (400, 403, 404) is an answer. ProviderUnavailable if there is none: unreachable, too late, sealed, failing.
        InvalidConfig if this node's files cannot be used.
        """
        try:
            return await within(self._clock, deadline, self._call(method, path, body, namespace, self._ends(deadline)))
        except TimeoutError:
            raise self._late(deadline) from None

    async def post_all(
        self, path: str, bodies: Sequence[Mapping[str, Any]], *, namespace: str | None, deadline: float
    ) -> list[Answer | ProviderUnavailable]:
        """Many requests to one path, each with its own outcome, in order: as many at once as there are connections.

        A thread takes a share of them rather than one, and one deadline is that of all, which costs a third less per request.
        """
        outcomes: list[Answer | ProviderUnavailable] = [self._late(deadline) for _ in bodies]
        try:
            work = self._post_all(path, bodies, self._namespace(namespace), self._ends(deadline), outcomes)
            await within(self._clock, deadline, work)
        except TimeoutError:
            pass  # what has come until now counts
        except ProviderUnavailable as exc:
            return [ProviderUnavailable(exc.detail) for _ in bodies]
        return outcomes

    async def look_up(self) -> Answer:
        """Ask the server about the token in use, and remember its lease."""
        answer = await self.call("get", "auth/token/lookup-self")
        if answer.ok:
            ends = answer.data.get("expire_time") is not None  # a ttl of 0 may also be what is left of the last second
            self._learn(answer.data.get("ttl") if ends else None, answer.data.get("renewable"))
        return answer

    async def renew(self) -> Answer:
        """Prolong the token by as much as it was made for."""
        answer = await self.call("post", "auth/token/renew-self", {})
        if answer.ok:
            self._learn(answer.auth.get("lease_duration") or None, answer.auth.get("renewable"))
        return answer

    async def log_in(self) -> None:
        """Obtain a new token; ProviderRefused if the server does not give one."""
        async with self._login_lock:
            try:
                await within(self._clock, DEADLINE, self._log_in(self._ends(DEADLINE)))
            except TimeoutError:
                raise self._late(DEADLINE) from None

    async def refresh(self) -> None:
        """Go on with what the files of the endpoint hold by now; InvalidConfig if that cannot be used, and nothing changes."""
        async with self._opening:
            wire = self._wire
            if wire is None:
                return
            renewed = await self._workers.run(_renewed_wire, self.endpoint, self._pool_size, wire)
            if renewed is None:
                return
            retired = wire if self._wire is wire else renewed  # it may have been closed in the meantime
            if retired is wire:
                self._wire = renewed
                _log.info("the TLS files for Vault have changed and are in use", address=self.endpoint.address)
            retired.http.close()  # what is under way there comes to its end

    def close(self) -> None:
        """Give the connections up."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.http.close()

    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None, namespace: str | None, ends: float
    ) -> Answer:
        wire = await self._open()
        if self._token is None:
            await self._renewed_token(None, ends)
        used = self._token
        send = partial(self._send, wire, method, path, body, self._namespace(namespace), ends)
        answer = await send(used)
        if answer.denied and self.logs_in and await self._renewed_token(used, ends):
            answer = await send(self._token)
        if answer.failed:
            raise self._unavailable(await self._health(wire, ends) or "failed")
        return answer

    async def _post_all(
        self,
        path: str,
        bodies: Sequence[Mapping[str, Any]],
        namespace: str,
        ends: float,
        outcomes: list[Answer | ProviderUnavailable],
    ) -> None:
        wire = await self._open()
        if self._token is None:
            await self._renewed_token(None, ends)
        used = self._token
        await self._lanes(wire, path, dict(enumerate(bodies)), namespace, ends, outcomes)
        refused = [at for at, each in enumerate(outcomes) if isinstance(each, Answer) and each.denied]
        if refused and self.logs_in and await self._renewed_token(used, ends):
            await self._lanes(wire, path, {at: bodies[at] for at in refused}, namespace, ends, outcomes)
        failed = [at for at, each in enumerate(outcomes) if isinstance(each, Answer) and each.failed]
        if failed:
            words = await self._health(wire, ends) or "failed"
            for at in failed:
                outcomes[at] = self._unavailable(words)

    async def _lanes(
        self,
        wire: _Wire,
        path: str,
        bodies: Mapping[int, Mapping[str, Any]],
        namespace: str,
        ends: float,
        outcomes: list[Answer | ProviderUnavailable],
    ) -> None:
        """Send the requests through as many threads as there are connections, and put the outcomes into their places."""
        client, headers = _client(wire, self.endpoint, namespace), _headers(self._token)

        def lane(share: Sequence[int]) -> None:
            for at in share:
                if self._clock.monotonic() >= ends:
                    return
                try:
                    outcomes[at] = self._exchange(client, "post", path, bodies[at], dict(headers), ends)
                except _Unreachable as exc:
                    outcomes[at] = self._unavailable(exc.words)

        places = list(bodies)
        shares = [share for first in range(self._pool_size) if (share := places[first :: self._pool_size])]
        await asyncio.gather(*(self._workers.run(lane, share) for share in shares))

    def _ends(self, deadline: float) -> float:
        return self._clock.monotonic() + deadline

    def _late(self, deadline: float) -> ProviderUnavailable:
        return self._unavailable(f"did not answer within {deadline:g} s")

    def _namespace(self, namespace: str | None) -> str:
        return self.endpoint.namespace if namespace is None else namespace

    async def _renewed_token(self, refused: Secret | None, ends: float) -> bool:
        """Whether there is another token now than the one that was refused; logins come one at a time, not in storms."""
        async with self._login_lock:
            if self._token is not None and self._token != refused:
                return True  # somebody else was here before
            last = self._logged_in_at
            if last is not None and self._clock.monotonic() - last < LOGIN_PAUSE:
                return False
            await self._log_in(ends)
            return self._token != refused

    async def _log_in(self, ends: float) -> None:
        login, path = self.endpoint.login, self.endpoint.token_file
        if login is None:
            self._token = None if path is None else await self._workers.run(_token_in, path)
            self._lease = None
            return
        self._logged_in_at = self._clock.monotonic()
        params = {key: secret.reveal() for key, secret in login.params}
        for key, path in login.files:
            params[key] = (await self._workers.run(text_of, path, f"AuthMethod.Params, the file of {key}")).strip()
        request = login_request(login, params)
        answer = await self._send(
            await self._open(), "post", request.path, request.body, self.endpoint.namespace, ends, None
        )
        token = answer.auth.get("client_token")
        if not answer.ok or not isinstance(token, str) or token_problem(token) is not None:
            raise ProviderRefused(
                f"Vault at {self.endpoint.address} refused the {login.type} login at auth/{login.mount_path}: {answer.why}"
            )
        self._token = Secret(token)
        self._learn(answer.auth.get("lease_duration") or None, answer.auth.get("renewable"))
        _log.info("logged in to Vault", address=self.endpoint.address, method=login.type)

    def _learn(self, ttl: object, renewable: object) -> None:
        at = self._clock.monotonic()
        self._lease = Lease(ttl, renewable is True, at) if isinstance(ttl, int) else None

    async def _open(self) -> _Wire:
        if self._wire is not None:
            return self._wire
        async with self._opening:
            if self._wire is None:
                self._wire = await self._workers.run(_open_wire, self.endpoint, self._pool_size)
            return self._wire

    async def _send(
        self,
        wire: _Wire,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        namespace: str,
        ends: float,
        token: Secret | None,
    ) -> Answer:
        client = _client(wire, self.endpoint, namespace)
        # The token travels with the request and not with the client: it may be replaced while others are on their way.
        exchange = partial(self._exchange, client, method, path, body, _headers(token), ends)
        try:
            return await self._workers.run(exchange)
        except _Unreachable as exc:
            raise self._unavailable(exc.words) from None

    def _exchange(
        self,
        client: Any,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        headers: dict[str, str],
        ends: float,
    ) -> Answer:
        """One request, in a worker's thread, which is free again soon after ``ends`` whatever the server does."""
        with allowed(self._clock, ends + _SLACK):
            return _exchanged(client, method, path, body, headers)

    async def _health(self, wire: _Wire, ends: float) -> str | None:
        """Why a server fails, in its own health check's terms."""
        answer = await self._send(wire, "get", "sys/health", None, "", ends, None)
        return _HEALTH.get(answer.status)

    def _unavailable(self, words: str) -> ProviderUnavailable:
        return ProviderUnavailable(f"Vault at {self.endpoint.address} {words}")


_HEALTH: Mapping[int, str] = {
    HTTPStatus.SERVICE_UNAVAILABLE: "is sealed",
    HTTPStatus.NOT_IMPLEMENTED: "is not initialized",
    HTTPStatus.TOO_MANY_REQUESTS: "is a standby that does not reach the active node",
}


class _Unreachable(Exception):
    """No answer came; ``words`` say why and were written here."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.words = words


def _headers(token: Secret | None) -> dict[str, str]:
    return {} if token is None else {"X-Vault-Token": token.reveal()}


def _exchanged(client: Any, method: str, path: str, body: Mapping[str, Any] | None, headers: dict[str, str]) -> Answer:
    try:
        response = client.adapter.request(method, f"/v1/{path}", headers=headers, json=body, raise_exception=False)
        return _judge(response)
    except requests.RequestException as exc:
        # Never its own text: that of a bad header quotes the token, that of a bad URL its credentials.
        raise _Unreachable(_network_words(exc)) from None
    except (urllib3.exceptions.HTTPError, UnicodeError, RecursionError):
        raise _Unreachable("broke off in the middle of an answer, or does not speak HTTP") from None
    except TooMuch:
        raise _Unreachable(
            f"sends more than {ANSWER_MAX >> 20} MiB for an answer, which is no answer of Vault"
        ) from None
    except Encoded:
        raise _Unreachable(
            "or a proxy before it compresses what it was asked to send as it is: turn that off there"
        ) from None


def _judge(response: requests.Response) -> Answer:
    status = response.status_code
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        raise _Unreachable(
            f"redirects ({status}), which is not followed: give the address of the active node or of what stands before all"
        )
    content = _decoded(response)
    errors = content.get("errors") if isinstance(content, Mapping) else None
    plain = response.content.decode("utf-8", "replace")
    said = " ".join(str(each) for each in errors) if isinstance(errors, list) else plain
    reasons = frozenset() if status < HTTPStatus.BAD_REQUEST else _reasons(said)
    if Reason.SPEAKS_TLS in reasons:
        raise _Unreachable("speaks TLS at this port: the address must begin with https://")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR and reasons & _GOES_ON:
        status = HTTPStatus.NOT_FOUND
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        raise _Unreachable("turns requests away: its rate limit is reached")
    if not isinstance(content, Mapping):
        return Answer(status, text=plain if status < HTTPStatus.BAD_REQUEST else "", reasons=reasons)
    data, auth = content.get("data"), content.get("auth")
    return Answer(
        status,
        data=data if isinstance(data, Mapping) else {},
        auth=auth if isinstance(auth, Mapping) else {},
        reasons=reasons,
    )


def _reasons(said: str) -> frozenset[Reason]:
    folded = said.lower()
    return frozenset(reason for phrase, reason in _PHRASES if phrase in folded)


def _decoded(response: requests.Response) -> object:
    if not response.headers.get("Content-Type", "").startswith("application/json"):
        return None
    try:
        return response.json()
    except ValueError:
        return None


def _network_words(error: BaseException) -> str:
    """Why nobody answered, in words of our own."""
    seen: BaseException | None = error
    timed_out = isinstance(error, requests.Timeout)
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return f"shows a certificate that is not accepted: {seen.verify_message}"
        if isinstance(seen, ssl.SSLError):
            return f"cannot be talked to through TLS ({seen.reason or 'handshake failed'})"
        if isinstance(seen, socket.gaierror):
            return "cannot be found: its name does not resolve"
        timed_out = timed_out or isinstance(seen, TimeoutError)
        if isinstance(seen, OSError) and seen.strerror and not isinstance(seen, requests.RequestException):
            return f"cannot be reached: {seen.strerror}"
        seen = _beneath(seen)
    return "did not answer in time" if timed_out else "cannot be reached"


def _beneath(error: BaseException) -> BaseException | None:
    """What caused an error of urllib3 or requests, which wrap in three ways."""
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):
        return reason
    nested = next((each for each in error.args if isinstance(each, BaseException)), None)
    return nested or error.__cause__ or error.__context__


def _open_wire(endpoint: Endpoint, pool_size: int) -> _Wire:
    """The connection pool; reads the files that the endpoint names."""
    if endpoint.tls_skip_verify and endpoint.is_https:
        _log.warning("the certificate of Vault is not verified, anybody may answer for it", address=endpoint.address)
    return _wire_of(endpoint, pool_size, read_material(endpoint) if endpoint.is_https else None)


def _wire_of(endpoint: Endpoint, pool_size: int, material: Material | None) -> _Wire:
    context = None if material is None else context_of(material, verify=not endpoint.tls_skip_verify)
    http = requests.Session()
    http.trust_env = False
    http.verify = not endpoint.tls_skip_verify
    transport = Transport(pool_size, context, endpoint.tls_server_name)
    for prefix in ("https://", "http://"):
        http.mount(prefix, transport)
    if endpoint.tls_skip_verify:
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    return _Wire(http, material)


def _renewed_wire(endpoint: Endpoint, pool_size: int, wire: _Wire) -> _Wire | None:
    """Another connection pool if the endpoint's files hold something else now."""
    if wire.material is None or (material := read_material(endpoint)) == wire.material:
        return None
    return _wire_of(endpoint, pool_size, material)


def _client(wire: _Wire, endpoint: Endpoint, namespace: str) -> Any:
    client = wire.clients.get(namespace)
    if client is None:
        client = hvac.Client(
            url=endpoint.address,
            token="",  # none of the environment's; each request carries its own
            verify=not endpoint.tls_skip_verify,  # both this and the session's are needed: a true one wins
            session=wire.http,
            adapter=hvac.adapters.RawAdapter,
            namespace=namespace or None,
            allow_redirects=False,
            strict_http=True,
        )
        wire.clients[namespace] = client
    return client


def _token_in(path: Path) -> Secret:
    token = text_of(path, "TokenFile").strip()
    problem = token_problem(token)
    if problem is not None:
        raise InvalidConfig(f"TokenFile: the token in {path} {problem}; write the token alone into it")
    return Secret(token)
