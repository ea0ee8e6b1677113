"""What a node listens on: addresses and ports, Unix sockets, and who may hold how much of what is served there."""

from __future__ import annotations

import grp
import ipaddress
import os
import pwd
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from caserver.config.addresses import is_loopback, read_hosts
from caserver.config.reading import Reading
from caserver.config.servers import FORWARD_PORT, PORT_MAX, SERVER_PORT, Peer
from caserver.fields import Fields
from caserver.unix_socket import PATH_MAX, SCHEME, UnixSocket

HTTP_PORT = 8500
HTTPS_PORT = 8501
DISABLED = -1  # as a port number, in the file
_MODE = re.compile(r"0?[0-7]{3}")

_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")
_HEADER_VALUE = re.compile(r"[\x20-\x7e\t]{0,4096}")
_OWN_HEADERS = {"content-length", "content-type", "content-encoding", "transfer-encoding", "connection", "date"}

Where = str | UnixSocket  # a host, or a socket
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Ports:
    """What this node binds; None = that listener is off."""

    http: int | None
    https: int | None  # off unless TLS is configured
    server: int
    forward: int


@dataclass(frozen=True, slots=True)
class ListenOn:
    """Where the HTTP API is served."""

    http: tuple[Where, ...] = ("127.0.0.1",)
    https: tuple[Where, ...] = ("127.0.0.1",)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The addresses among them."""
        return tuple(dict.fromkeys(each for each in (*self.http, *self.https) if isinstance(each, str)))


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what clients may hold."""

    http_max_conns_per_client: int  # 0 = no limit but that of the process, as in Consul
    http_max_blocked_queries: int
    http_strangers_per_second: int  # requests without a valid token, where ACLs are on; 0 = no limit
    leaf_cache_max: int  # leaves kept by this node


@dataclass(frozen=True, slots=True)
class HTTPSettings:
    """Who may talk to the plain and the browser-facing parts of the API."""

    allow_insecure_http: bool
    allowed_hosts: tuple[str, ...]
    block_endpoints: tuple[str, ...] = ()  # beginnings of paths that are not served
    write_from: tuple[Network, ...] = ()  # networks from which something may be changed; none = all
    response_headers: tuple[tuple[str, str], ...] = ()  # put on every answer

    def exposes(self, where: Where) -> bool:
        """Whether others may read along on a plain listener there, and the operator did not say that this is meant."""
        return isinstance(where, str) and not (self.allow_insecure_http or is_loopback(where))


def read_listen_on(reading: Reading, top: Fields) -> ListenOn:
    """``client_addr``, over it ``addresses``; sockets get the owner and mode of ``unix_sockets``."""
    dress = _sockets(reading, top.mapping("unix_sockets"))
    default = _places(top, "client_addr", ("127.0.0.1",), dress)
    fields = reading.section("addresses", top.mapping("addresses"))
    http, https = _places(fields, "http", default, dress), _places(fields, "https", default, dress)
    shared = [each for each in http if isinstance(each, UnixSocket) and each in https]
    if shared and fields.has("https"):
        fields.fault("https", f"{shared[0]} serves http already", "give each listener its own socket")
    reading.done(fields)
    # A client_addr that names a socket cannot serve two protocols there: it is the one of http.
    return ListenOn(http, tuple(each for each in https if each not in shared))


def _places(
    fields: Fields, key: str, default: tuple[Where, ...], dress: Callable[[Path], UnixSocket]
) -> tuple[Where, ...]:
    """The addresses under ``key``, several of them separated by blanks, as Consul takes them."""
    found: list[Where] = []
    for each in read_hosts(fields, key):
        if not each.startswith(SCHEME):
            found.append(each)
            continue
        path = each.removeprefix(SCHEME)
        if not path or len(os.fsencode(path)) > PATH_MAX:
            fields.fault(key, f'"{each}" is no path of a socket', f"give one of up to {PATH_MAX} bytes")
        else:
            found.append(dress(Path(path)))
    return tuple(found) or default


def _sockets(reading: Reading, given: Mapping[str, object]) -> Callable[[Path], UnixSocket]:
    """How every Unix socket is made, as Consul's ``unix_sockets`` says."""
    fields = reading.section("unix_sockets", given)
    mode = fields.text("mode")
    if mode and not _MODE.fullmatch(mode):
        fields.fault("mode", f'"{mode}" is no file mode', 'give three octal digits, such as "0660"')
        mode = None
    user = _identity(fields, "user", lambda name: pwd.getpwnam(name).pw_uid)
    group = _identity(fields, "group", lambda name: grp.getgrnam(name).gr_gid)
    reading.done(fields)
    return lambda path: UnixSocket(path, int(mode, 8) if mode else None, user, group)


def _identity(fields: Fields, key: str, look_up: Callable[[str], int]) -> int | None:
    text = fields.text(key)
    if not text:
        return None
    if re.fullmatch(r"[0-9]{1,9}", text):
        return int(text)
    try:
        return look_up(text)
    except KeyError:
        fields.fault(key, f'"{text}" is no {key} of this machine', "give a name that exists, or a number")
        return None


def read_ports(reading: Reading, given: Mapping[str, object], own: Peer | None, *, has_tls: bool) -> Ports:
    """The ``ports`` table; ``own`` is this node's peer block, whose ports are the default."""
    fields = reading.section("ports", given)
    http = _port(fields, "http", HTTP_PORT)
    https = _port(fields, "https", HTTPS_PORT if has_tls else DISABLED)
    server = _port(fields, "server", own.server_port if own else SERVER_PORT)
    forward = _port(fields, "forward", own.forward_port if own else FORWARD_PORT)
    if https is not None and not has_tls:
        fields.fault("https", "needs cert_file and key_file", "set them, or leave the port out")
    for key, port in (("server", server), ("forward", forward)):
        if port is None and own:
            fields.fault(key, "cannot be off: the peers dial it", "give a port number")
    _check_ports(fields, {"http": http, "https": https, "server": server, "forward": forward})
    reading.done(fields)
    return Ports(http, https, server or SERVER_PORT, forward or FORWARD_PORT)


def _port(fields: Fields, key: str, default: int) -> int | None:
    port = fields.integer(key, default, low=DISABLED, high=PORT_MAX)
    if port == 0:
        fields.fault(key, "0 is no port", f"give a port number, or {DISABLED} to turn the listener off")
    return None if port == DISABLED else port


def _check_ports(fields: Fields, ports: Mapping[str, int | None]) -> None:
    taken: dict[int, str] = {}
    for key, port in ports.items():
        if port and taken.setdefault(port, key) != key:
            fields.fault(key, f"{port} is also ports.{taken[port]}", "give each listener its own port")


def read_limits(reading: Reading, given: Mapping[str, object]) -> Limits:
    """The ``limits`` table."""
    fields = reading.section("limits", given)
    limits = Limits(
        http_max_conns_per_client=fields.integer("http_max_conns_per_client", 200, low=0),
        http_max_blocked_queries=fields.integer("http_max_blocked_queries", 5000, low=1),
        http_strangers_per_second=fields.integer("http_strangers_per_second", 100, low=0),
        leaf_cache_max=fields.integer("leaf_cache_max", 10_000, low=1),
    )
    reading.done(fields)
    return limits


def read_http(reading: Reading, given: Mapping[str, object]) -> HTTPSettings:
    """The ``http_config`` table."""
    fields = reading.section("http_config", given)
    http = HTTPSettings(
        fields.flag("allow_insecure_http"),
        fields.texts("allowed_hosts"),
        fields.texts("block_endpoints"),
        _networks(fields, "allow_write_http_from"),
        _headers(fields, "response_headers"),
    )
    reading.done(fields)
    return http


def _networks(fields: Fields, key: str) -> tuple[Network, ...]:
    found = []
    for each in fields.texts(key):
        try:
            found.append(ipaddress.ip_network(each, strict=False))
        except ValueError:
            fields.fault(key, f'"{each}" is no network', 'write it as "10.0.0.0/8"')
    return tuple(found)


def _headers(fields: Fields, key: str) -> tuple[tuple[str, str], ...]:
    found = []
    for name, value in fields.mapping(key).items():
        if not _HEADER.fullmatch(name) or not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            fields.fault(key, f'"{name}" is no header', "give a name and one line of text")
        elif name.lower() in _OWN_HEADERS:
            fields.fault(key, f"{name} is what the answer itself says", "leave it out")
        else:
            found.append((name, value))
    return tuple(found)
