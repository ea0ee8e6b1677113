"""What a node listens on: its ports, and who may hold how much of what it serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from caserver.config.reading import Reading
from caserver.config.servers import FORWARD_PORT, PORT_MAX, SERVER_PORT, Peer
from caserver.fields import Fields

HTTP_PORT = 8500
HTTPS_PORT = 8501
DISABLED = -1  # as a port number, in the file


@dataclass(frozen=True, slots=True)
class Ports:
    """What this node binds; None = that listener is off."""

    http: int | None
    https: int | None  # off unless TLS is configured
    server: int
    forward: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what clients may hold."""

    http_max_conns_per_client: int
    http_max_blocked_queries: int
    leaf_cache_max: int  # leaves kept by this node


@dataclass(frozen=True, slots=True)
class HTTPSettings:
    """Who may talk to the plain and the browser-facing parts of the API."""

    allow_insecure_http: bool
    allowed_hosts: tuple[str, ...]


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
        http_max_conns_per_client=fields.integer("http_max_conns_per_client", 200, low=1),
        http_max_blocked_queries=fields.integer("http_max_blocked_queries", 5000, low=1),
        leaf_cache_max=fields.integer("leaf_cache_max", 10_000, low=1),
    )
    reading.done(fields)
    return limits


def read_http(reading: Reading, given: Mapping[str, object]) -> HTTPSettings:
    """The ``http_config`` table."""
    fields = reading.section("http_config", given)
    http = HTTPSettings(fields.flag("allow_insecure_http"), fields.texts("allowed_hosts"))
    reading.done(fields)
    return http
