"""The public HTTP API from outside: synchronous, on the standard library alone, as the command line uses it.

Answers come back as the JSON that the server sent; this module knows paths and errors, not what the documents mean.
Errors read as Consul's own client words them, since scripts match on them.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode, urlsplit

from caserver.fields import Secret
from caserver.unix_socket import PATH_MAX
from caserver.unix_socket import SCHEME as _UNIX

DEFAULT_ADDRESS = "127.0.0.1:8500"
CONNECT_TIMEOUT = 5.0  # seconds
# A rotation may generate an RSA-4096 key and wait out a fail-over before it answers.
READ_TIMEOUT = 60.0
ANSWER_MAX = 64 << 20  # bytes; no document of this API comes near
_PIECE = 64 << 10  # bytes of a file at once
_AGENT = "caserver"
_HTTP_OK = 200
_TOKEN = re.compile(r"[\x20-\x7e]*")
_UNFIT = re.compile(r"[\x00-\x20\x7f]")  # in an address; urlsplit drops some of them in silence


class ClientError(Exception):
    """A call that did not succeed; the message is what Consul's client says, ``remedy`` what to try (or nothing)."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class UnexpectedResponse(ClientError):
    """The server answered, and not with 200."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"Unexpected response code: {status} ({text})")
        self.status = status
        self.text = text


class ConnectionFailed(ClientError):
    """No answer was had."""


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Where the API is and how to reach it."""

    address: str = DEFAULT_ADDRESS  # host:port, a URL, or unix:// and the path of a socket
    token: Secret | None = None
    https: bool = False  # for an address without a scheme
    ca_file: Path | None = None  # PEM; the system's trust store if neither is given
    ca_path: Path | None = None  # directory of PEM files
    client_cert: Path | None = None
    client_key: Path | None = None
    tls_server_name: str | None = None
    verify: bool = True
    read_timeout: float = READ_TIMEOUT  # seconds


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful answer."""

    headers: Message
    body: bytes = field(repr=False)  # may hold a private key

    def json(self) -> Any:
        """The body as JSON; ClientError if it is something else."""
        try:
            return json.loads(self.body)
        except ValueError as exc:
            raise ClientError("the answer is not JSON", "is this the address of a caserver or Consul agent?") from exc


class Client:
    """Speaks to one agent; every call opens its own connection, so an instance may be kept and shared."""

    def __init__(self, settings: ClientSettings) -> None:
        """ClientError for an address that is none, or a token that no header can carry."""
        self._settings = settings
        if settings.token is not None and not _TOKEN.fullmatch(settings.token.reveal()):
            raise ClientError(
                "the token holds characters that no header can carry",
                "give one line of printable ASCII with -token, -token-file, CONSUL_HTTP_TOKEN or CONSUL_HTTP_TOKEN_FILE",
            )
        self._socket: str | None = None
        if settings.address.startswith(_UNIX):
            self._over_socket(settings.address.removeprefix(_UNIX))
            return
        address = settings.address if "://" in settings.address else f"{_scheme(settings)}://{settings.address}"
        try:
            parts = urlsplit(address)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise _invalid(settings) from None
        if parts.scheme not in ("http", "https") or not host or port == 0 or _UNFIT.search(address):
            raise _invalid(settings)
        self._https = parts.scheme == "https"
        self._host = host
        self._port = port or (443 if self._https else 8500)
        shown_host = f"[{self._host}]" if ":" in self._host else self._host
        self._authority = f"{shown_host}:{self._port}"

    def _over_socket(self, path: str) -> None:
        # Consul's client, too, takes CONSUL_HTTP_SSL to mean TLS inside the socket.
        if not path or len(os.fsencode(path)) > PATH_MAX or "\0" in path:
            raise _invalid(self._settings)
        self._socket, self._https = path, self._settings.https
        self._host, self._port, self._authority = "localhost", 0, path

    def roots(self, **query: str) -> Answer:
        """Every root certificate of the cluster."""
        return self.call("GET", "/v1/connect/ca/roots", query=query)

    def configuration(self, **query: str) -> Answer:
        """The CA configuration in force; secrets are redacted."""
        return self.call("GET", "/v1/connect/ca/configuration", query=query)

    def set_configuration(self, body: str, **query: str) -> Answer:
        """Replace the CA configuration with the JSON object ``body``."""
        return self.call("PUT", "/v1/connect/ca/configuration", query=query, body=body.encode())

    def leaf(self, service: str, **query: str) -> Answer:
        """The certificate and private key of ``service`` from the agent's cache."""
        return self.call("GET", f"/v1/agent/connect/ca/leaf/{quote(service, safe='')}", query=query)

    def sign(self, csr_pem: str, **query: str) -> Answer:
        """Have a certificate signing request (PEM) signed."""
        return self.call("PUT", "/v1/connect/ca/sign", query=query, body=csr_pem.encode())

    def raft_configuration(self, **query: str) -> Answer:
        """The servers of the cluster."""
        return self.call("GET", "/v1/operator/raft/configuration", query=query)

    def cleanups(self, **query: str) -> Answer:
        """What is still owed at the backends of former CA providers."""
        return self.call("GET", "/v1/connect/ca/cleanup", query=query)

    def forget_cleanup(self, cleanup_id: str, **query: str) -> Answer:
        """Give up a clean-up that is owed."""
        return self.call("PUT", "/v1/connect/ca/cleanup/forget", query={**query, "id": cleanup_id})

    def keyring(self, **query: str) -> Answer:
        """Which node holds which keys of the cluster secret, and which of them may go."""
        return self.call("GET", "/v1/operator/keyring", query=query)

    def transfer_leader(self, to: str | None = None) -> Answer:
        """Let another server lead: ``to`` (an id of the Raft configuration), or whichever is furthest."""
        return self.call("PUT", "/v1/operator/raft/transfer-leader", query={"id": to} if to else {})

    def reload(self) -> Answer:
        """Have the agent read its settings and TLS files again."""
        return self.call("PUT", "/v1/agent/reload", query={})

    def remove_peer(self, **query: str) -> Answer:
        """Ask for a server, by ``address`` or ``id``, to be forgotten."""
        return self.call("DELETE", "/v1/operator/raft/peer", query=query)

    def members(self, **query: str) -> Answer:
        """The servers, and which of them are alive."""
        return self.call("GET", "/v1/agent/members", query=query)

    def self(self) -> Answer:
        """What the agent says of itself."""
        return self.call("GET", "/v1/agent/self", query={})

    def autopilot_configuration(self, **query: str) -> Answer:
        """What the health of servers is judged by."""
        return self.call("GET", "/v1/operator/autopilot/configuration", query=query)

    def save_snapshot(self, file: BinaryIO, **query: str) -> Answer:
        """Write a snapshot of the whole state into ``file`` as it comes; the answer has no body."""
        return self.call("GET", "/v1/snapshot", query=query, into=file)

    def restore_snapshot(self, file: BinaryIO, **query: str) -> Answer:
        """Let the snapshot in ``file`` take the place of the state."""
        return self.call("PUT", "/v1/snapshot", query=query, body=file)

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str],
        body: bytes | BinaryIO | None = None,
        into: BinaryIO | None = None,
    ) -> Answer:
        """One request; ``UnexpectedResponse`` for any status but 200, ``ConnectionFailed`` if none came.

        A file as ``body`` is sent in chunks; ``into`` takes what a successful answer holds. OSError of those two files comes
        as it is.
        """
        target = path + (f"?{urlencode(sorted(query.items()))}" if query else "")
        headers = {"User-Agent": _AGENT, "Accept": "*/*"}
        if self._settings.token is not None:
            headers["X-Consul-Token"] = self._settings.token.reveal()
        connection = self._connection()
        try:
            self._connect(connection, method, target)
            response = _exchange(connection, method, target, body, headers)
            answer = b"" if into is not None and response.status == _HTTP_OK else response.read(ANSWER_MAX)
            if into is not None and response.status == _HTTP_OK:
                _copy(response, into)
        except _FileFailed as exc:
            raise exc.error from None
        except (OSError, http.client.HTTPException) as exc:
            raise self._failed(method, target, exc) from exc
        except ValueError:  # a name that no resolver takes; from None, because texts of http.client quote headers
            raise _invalid(self._settings) from None
        finally:
            connection.close()
        if response.status != _HTTP_OK:
            raise UnexpectedResponse(response.status, answer.decode("utf-8", "replace").strip())
        return Answer(response.headers, answer)

    def _connection(self) -> http.client.HTTPConnection:
        context = _tls_context(self._settings) if self._https else None
        name = self._settings.tls_server_name or self._host
        return _Connection(self._host, self._port or None, socket_path=self._socket, tls=context, server_name=name)

    def _connect(self, connection: http.client.HTTPConnection, method: str, target: str) -> None:
        try:
            connection.connect()
        except ssl.SSLError as exc:
            remedy = "name the CA that signed the server's certificate with -ca-file or CONSUL_CACERT"
            raise ConnectionFailed(f"{self._shown(method, target)}: {_tls_reason(exc)}", remedy) from exc
        except OSError as exc:
            network = "tcp" if self._socket is None else "unix"
            dial = f"dial {network} {self._authority}: {_dial_reason(exc)}"
            raise ConnectionFailed(f"{self._shown(method, target)}: {dial}", _dial_remedy(exc)) from exc
        connection.sock.settimeout(self._settings.read_timeout)

    def _failed(self, method: str, target: str, exc: Exception) -> ClientError:
        if isinstance(exc, TimeoutError):
            reason = f"no answer within {self._settings.read_timeout:g} seconds"
            remedy = "the change may have been made all the same: read before repeating it" if method != "GET" else ""
        else:
            reason, remedy = (
                str(exc) or type(exc).__name__,
                "is that a plain HTTP address? for HTTPS write https://host:port",
            )
        return ConnectionFailed(f"{self._shown(method, target)}: {reason}", remedy)

    def _shown(self, method: str, target: str) -> str:
        scheme = "https" if self._https else "http"
        # Consul's client shows the path of a socket as the host of a URL.
        shown = self._authority if self._socket is None else quote(self._socket, safe="")
        return f'{method.capitalize()} "{scheme}://{shown}{target}"'


class _FileFailed(Exception):
    """The caller's file could not be written: nothing that the connection has to do with."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error


def _exchange(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    body: bytes | BinaryIO | None,
    headers: Mapping[str, str],
) -> http.client.HTTPResponse:
    try:
        connection.request(method, target, body=body, headers=headers)
    except (BrokenPipeError, ConnectionResetError):
        if body is None or isinstance(body, bytes):
            raise
        # The server refused without reading on: it has said why.
    return connection.getresponse()


def _copy(response: http.client.HTTPResponse, into: BinaryIO) -> None:
    while piece := response.read(_PIECE):
        try:
            into.write(piece)
        except OSError as exc:
            raise _FileFailed(exc) from exc


class _Connection(http.client.HTTPConnection):
    """A connection over TCP or to a Unix socket, plain or TLS; the name to verify may differ from the host to dial."""

    def __init__(
        self, host: str, port: int | None, *, socket_path: str | None, tls: ssl.SSLContext | None, server_name: str
    ) -> None:
        super().__init__(host, port, timeout=CONNECT_TIMEOUT)
        self._socket_path = socket_path
        self._tls = tls
        self._server_name = server_name

    def connect(self) -> None:
        if self._socket_path is None:
            super().connect()
        else:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(CONNECT_TIMEOUT)
            self.sock.connect(self._socket_path)
        if self._tls is not None:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._server_name)


def _invalid(settings: ClientSettings) -> ClientError:
    remedy = "use host:port, http://host:port, https://host:port or unix:///path"
    if settings.tls_server_name:
        remedy += "; check -tls-server-name, too"
    return ClientError(f'invalid address "{settings.address}"', remedy)


def _scheme(settings: ClientSettings) -> str:
    return "https" if settings.https else "http"


def _tls_context(settings: ClientSettings) -> ssl.SSLContext:
    # Loads the certificate library, which plain HTTP has no use for.
    from caserver.pki import tls  # noqa: PLC0415

    cert, key = settings.client_cert, settings.client_key
    try:
        context = tls.client_context(
            cert.read_text() if cert else None,
            Secret(key.read_text()) if key else None,
            ca_pems=_authorities(settings),
            check_hostname=settings.verify,
            minimum=tls.TLS12,
        )
    except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
        raise ClientError(f"cannot set up TLS: {exc}", "check the CA, certificate and key files") from exc
    if settings.ca_file is None and settings.ca_path is None:
        context.load_default_certs()
    if not settings.verify:
        context.verify_mode = ssl.CERT_NONE
    return context


def _authorities(settings: ClientSettings) -> list[str]:
    files = [settings.ca_file] if settings.ca_file else []
    if settings.ca_path:
        files.extend(sorted(each for each in settings.ca_path.iterdir() if each.is_file()))
    return [file.read_text() for file in files]


def _tls_reason(exc: ssl.SSLError) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"x509: {exc.verify_message}"
    return f"tls: {exc.reason or exc}"


def _dial_reason(exc: OSError) -> str:
    if isinstance(exc, ConnectionRefusedError):
        return "connect: connection refused"
    if isinstance(exc, socket.gaierror):
        return "no such host"
    if isinstance(exc, TimeoutError):
        return "i/o timeout"
    return f"connect: {(exc.strerror or str(exc)).lower()}"


def _dial_remedy(exc: OSError) -> str:
    if isinstance(exc, socket.gaierror):
        return "check the address given with -http-addr or CONSUL_HTTP_ADDR"
    return (
        "is an agent running there? `caserver agent -dev` starts one to try things on; "
        "-http-addr or CONSUL_HTTP_ADDR name another address"
    )
