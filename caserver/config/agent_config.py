"""The settings of one node, fixed while it runs: read from files, environment and flags, judged all at once.

``connect { ca_config }`` is handed on untouched: it seeds the replicated CA configuration at the first bootstrap, which
has its own rules (``state.configuration``); who loads an ``AgentConfig`` passes them in as ``judge_ca``.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from caserver.config import sources
from caserver.config.consul_keys import IGNORED, JOIN_KEYS, REFUSED
from caserver.config.sources import Keys, Settings
from caserver.errors import InvalidConfig
from caserver.fields import Fault, Fields, Secret
from caserver.internode.keyring import decode_secret

SERVER_PORT = 8300
FORWARD_PORT = 8303
HTTP_PORT = 8500
HTTPS_PORT = 8501
PORT_MAX = 65535
DISABLED = -1  # as a port number, in the file

KEYS = Keys(
    scalars=(
        "node_name",
        "datacenter",
        "data_dir",
        "bind_addr",
        "client_addr",
        "cluster_secret",
        "log_level",
        "log_json",
        "ca_file",
        "cert_file",
        "key_file",
        "verify_incoming",
        "tls_min_version",
        "connect.enabled",
        "connect.ca_provider",
        "ports.http",
        "ports.https",
        "ports.server",
        "ports.forward",
        "performance.raft_multiplier",
        "performance.rpc_hold_timeout",
        "limits.http_max_conns_per_client",
        "limits.http_max_blocked_queries",
        "limits.leaf_cache_max",
        "http_config.allow_insecure_http",
        "http_config.allowed_hosts",
    ),
    lists=("cluster_secret", "http_config.allowed_hosts"),
    open_tables=("connect.ca_config", "peer"),
)

LOG_LEVELS = {"TRACE": "trace", "DEBUG": "debug", "INFO": "info", "WARN": "warn", "ERR": "error", "ERROR": "error"}
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62})")
_DATACENTER = re.compile(r"[A-Za-z0-9_-]{1,63}")
_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_-]{1,63})*\.?")

# Consul's spellings -> whether it is offered.
_TLS_VERSIONS = {"tls10": False, "tls11": False, "tls12": True, "tls13": True}
_TLS_MIN = "tls12"

JudgeCA = Callable[[str | None, Mapping[str, object]], object]
JudgeTLS = Callable[["TLSFiles"], object]


@dataclass(frozen=True, slots=True)
class Peer:
    """One server of the cluster, as the others dial it."""

    name: str
    address: str  # IP literal (no brackets) or DNS name
    server_port: int = SERVER_PORT
    forward_port: int = FORWARD_PORT


@dataclass(frozen=True, slots=True)
class Ports:
    """What this node binds; None = that listener is off."""

    http: int | None
    https: int | None  # off unless TLS is configured
    server: int
    forward: int


@dataclass(frozen=True, slots=True)
class TLSFiles:
    """PEM files of the public HTTPS listener."""

    cert_file: Path
    key_file: Path
    ca_file: Path | None  # accepts client certificates of these CAs
    verify_incoming: bool  # a client certificate is required
    min_version: str = _TLS_MIN  # or tls13


@dataclass(frozen=True, slots=True)
class ConnectSettings:
    """Whether this cluster has a CA, and what seeds it at the first bootstrap."""

    enabled: bool
    ca_provider: str | None
    ca_config: Mapping[str, object] = field(repr=False)  # may hold a private key


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


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """One node's settings, checked."""

    node_name: str
    datacenter: str
    data_dir: Path | None  # None = memory only (-dev)
    dev: bool
    rejoin: bool  # start although this node's data is gone and its peers know it
    bind_addr: str
    client_addr: str
    ports: Ports
    peers: Mapping[str, Peer]  # by name, this node included; empty = a single node
    cluster_secrets: tuple[Secret, ...]  # first seals and issues; empty = a single node that keeps its own
    connect: ConnectSettings
    tls: TLSFiles | None
    raft_multiplier: int
    rpc_hold_timeout: float  # seconds
    limits: Limits
    http: HTTPSettings
    log_level: str  # trace, debug, info, warn or error
    log_json: bool
    warnings: tuple[str, ...] = ()

    @property
    def http_exposed(self) -> bool:
        """Whether others may read along on the plain listener and the operator did not say that this is meant."""
        return not (self.http.allow_insecure_http or _is_loopback(self.client_addr))

    @classmethod
    def load(
        cls,
        paths: Sequence[str],
        *,
        flags: Mapping[str, object],
        environ: Mapping[str, str],
        hostname: str,
        judge_ca: JudgeCA | None = None,
        judge_tls: JudgeTLS | None = None,
    ) -> AgentConfig:
        """Read ``paths`` (files, or directories of files) in order, ``environ`` over them, ``flags`` over both.

        ``flags`` maps dotted keys to values, and may hold ``dev`` and ``rejoin``, which only a flag can give.
        InvalidConfig carries every fault, one a line. ``judge_ca`` raises InvalidConfig for a CA configuration that
        could not be bootstrapped, ``judge_tls`` for files that no listener could serve with.
        """
        given = dict(flags)
        dev, rejoin = bool(given.pop("dev", False)), bool(given.pop("rejoin", False))
        settings = sources.gather(paths, flags=given, environ=environ, keys=KEYS)
        reading = _Reading(settings, dev=dev, rejoin=rejoin, hostname=hostname)
        config = reading.config(judge_ca, judge_tls)
        faults = [*settings.faults, *map(settings.located, reading.faults)]
        if faults:
            raise InvalidConfig("\n".join(map(str, faults)))
        return config


class _Reading:
    """One reading of the merged tree, section by section; a value with a fault counts as its default."""

    def __init__(self, settings: Settings, *, dev: bool, rejoin: bool, hostname: str) -> None:
        self.faults: list[Fault] = []
        self._settings = settings
        self._dev = dev
        self._rejoin = rejoin
        self._hostname = hostname
        self._warnings = settings.warnings
        self._ignored: list[str] = []

    def config(self, judge_ca: JudgeCA | None, judge_tls: JudgeTLS | None) -> AgentConfig:
        """The whole configuration."""
        top = self._section("", settings := self._settings.values)
        joins = {key: settings[key] for key in JOIN_KEYS if key in settings}
        peers = self._peers(top.mapping("peer"))
        node_name = self._node_name(top, peers)
        self._check_joins(joins, peers, node_name)
        bind_addr = self._address(top, "bind_addr", peers[node_name].address if node_name in peers else "127.0.0.1")
        client_addr = self._address(top, "client_addr", "127.0.0.1")
        tls = self._tls(top, judge_tls)
        ports = self._ports(top.mapping("ports"), peers.get(node_name), has_tls=tls is not None)
        multiplier, hold_timeout = self._performance(top.mapping("performance"))
        config = AgentConfig(
            node_name=node_name,
            datacenter=self._datacenter(top),
            data_dir=self._data_dir(top),
            dev=self._dev,
            rejoin=self._rejoin,
            bind_addr=bind_addr,
            client_addr=client_addr,
            ports=ports,
            peers=peers,
            cluster_secrets=self._secrets(top, peers),
            connect=self._connect(top.mapping("connect"), judge_ca),
            tls=tls,
            raft_multiplier=multiplier,
            rpc_hold_timeout=hold_timeout,
            limits=self._limits(top.mapping("limits")),
            http=self._http(top.mapping("http_config")),
            log_level=self._log_level(top),
            log_json=top.flag("log_json"),
        )
        self._done(top)
        if ports.http is not None and config.http_exposed:
            self._warnings.append(
                f"client_addr: {client_addr} is not loopback and port {ports.http} is plain HTTP, so private keys and "
                "configuration are not served there; use HTTPS, or set http_config { allow_insecure_http = true }"
            )
        if self._ignored:
            self._warnings.append(f"keys of Consul without a meaning here, ignored: {', '.join(sorted(self._ignored))}")
        return replace(config, warnings=tuple(self._warnings))

    def _section(self, name: str, given: Mapping[str, object]) -> Fields:
        ignored = IGNORED.get(name, frozenset()).intersection(given)
        self._ignored.extend(f"{name}.{key}" if name else key for key in ignored)
        skipped = ignored if name else ignored.union(JOIN_KEYS, REFUSED)
        if not name:
            self.faults.extend(
                Fault(key, "not supported", remedy) for key, remedy in REFUSED.items() if given.get(key) is not None
            )
        return Fields({key: each for key, each in given.items() if key not in skipped}, where=name, exact=True)

    def _done(self, fields: Fields) -> None:
        fields.finish()
        self.faults.extend(fields.faults)

    def _node_name(self, top: Fields, peers: Mapping[str, Peer]) -> str:
        name = top.text("node_name") or self._hostname
        if not _NAME.fullmatch(name):
            top.fault(
                "node_name", f'"{name}" is no node name', "use up to 63 letters, digits, dots, hyphens, underscores"
            )
        elif peers and name not in peers:
            top.fault(
                "node_name",
                f'"{name}" is not among the peer blocks ({", ".join(sorted(peers))})',
                f'set node_name to one of them, or add peer "{name}" {{ address = "..." }} on every node',
            )
        return name

    def _datacenter(self, top: Fields) -> str:
        datacenter = (top.text("datacenter") or "dc1").lower()  # lower case as in Consul: it is part of every identity
        if not _DATACENTER.fullmatch(datacenter):
            top.fault(
                "datacenter", f'"{datacenter}" is no datacenter name', "use letters, digits, hyphens, underscores"
            )
        return datacenter

    def _data_dir(self, top: Fields) -> Path | None:
        text = top.text("data_dir")
        if self._dev:
            if text:
                self._warnings.append("data_dir: ignored, -dev keeps everything in memory")
            return None
        if not text:
            if not self._settings.incomplete:
                top.fault("data_dir", "missing", 'name a directory of this node alone, data_dir = "/var/lib/caserver"')
            return None
        path = Path(text)
        if path.exists() and not path.is_dir():
            top.fault("data_dir", f"{path} is not a directory", "name a directory of this node alone")
        return path

    def _log_level(self, top: Fields) -> str:
        text = top.text("log_level") or "INFO"
        if text.upper() not in LOG_LEVELS:
            top.fault("log_level", f'"{text}" is no level', "use trace, debug, info, warn or error")
        return LOG_LEVELS.get(text.upper(), "info")

    def _address(self, fields: Fields, key: str, default: str) -> str:
        text = fields.text(key)
        if not text:
            return default
        host = text.removeprefix("[").removesuffix("]")
        if "{{" in text:
            fields.fault(key, "holds a template, and templates are not evaluated", "write the address itself")
        elif not _is_host(host):
            fields.fault(key, f'"{text}" is no address', "give one IP address or DNS name, without a port")
        return host

    def _peers(self, given: Mapping[str, object]) -> dict[str, Peer]:
        peers: dict[str, Peer] = {}
        for name, body in given.items():
            where = f"peer.{name}"
            if not _NAME.fullmatch(name):
                self.faults.append(Fault(where, "no node name", "use letters, digits, dots, hyphens, underscores"))
            elif not isinstance(body, Mapping):
                self.faults.append(Fault(where, "expected an object", f'write peer "{name}" {{ address = "..." }}'))
            else:
                peers[name] = self._peer(name, Fields(body, where=where, exact=True))
        if peers and self._dev:
            self.faults.append(
                Fault("peer", "-dev is a single node", "leave the peer blocks out, or start without -dev")
            )
        self._check_endpoints(peers)
        if peers and len(peers) % 2 == 0:
            self._warnings.append(
                f"peer: {len(peers)} servers survive no more failures than {len(peers) - 1}; use 3 or 5"
            )
        return peers

    def _peer(self, name: str, fields: Fields) -> Peer:
        address = self._address(fields, "address", "")
        if not address:
            fields.fault("address", "missing", "give the IP address or DNS name that the other servers dial")
        elif _is_wildcard(address):
            fields.fault("address", f'"{address}" cannot be dialled', "give the address that the other servers dial")
        peer = Peer(
            name,
            address,
            fields.integer("server_port", SERVER_PORT, low=1, high=PORT_MAX),
            fields.integer("forward_port", FORWARD_PORT, low=1, high=PORT_MAX),
        )
        self._done(fields)
        return peer

    def _check_endpoints(self, peers: Mapping[str, Peer]) -> None:
        taken: dict[tuple[str, int], str] = {}
        for name, peer in peers.items():
            for key, port in (("server_port", peer.server_port), ("forward_port", peer.forward_port)):
                where = f"peer.{name}.{key}"
                first = taken.setdefault((peer.address.lower(), port), where)
                if first != where and peer.address:
                    problem = f"{peer.address}:{port} is also {first}"
                    self.faults.append(Fault(where, problem, "give every peer its own address or ports"))

    def _check_joins(self, joins: Mapping[str, object], peers: Mapping[str, Peer], node_name: str) -> None:
        meant = {key: value for key, value in joins.items() if key != "bootstrap_expect" or _count(value) > 1}
        if peers or self._dev or self._settings.incomplete or not meant:
            self._ignored.extend(joins)
            return
        self.faults.append(
            Fault(
                next(iter(meant)),
                f"servers find each other by peer blocks, not by {', '.join(meant)}, and there are none",
                "write one block for every server, this one included, the same on every node:\n\n"
                + _blocks_for(meant, node_name),
            )
        )

    def _secrets(self, top: Fields, peers: Mapping[str, Peer]) -> tuple[Secret, ...]:
        texts = top.texts("cluster_secret")
        for index, text in enumerate(texts):
            name = f"cluster_secret[{index}]" if len(texts) > 1 else "cluster_secret"
            try:
                decode_secret(text)
            except ValueError as exc:
                top.fault("cluster_secret", str(exc), name=name)
        if len(set(texts)) < len(texts):
            top.fault("cluster_secret", "the same secret is listed twice", "keep one of them")
        if not texts and peers and not self._settings.incomplete:
            top.fault("cluster_secret", "missing", "make one with `caserver keygen` and give it to every peer")
        if not texts and not peers and not self._dev:
            self._warnings.append(
                "cluster_secret: not set; one is generated in data_dir, beside what it seals: set it to keep them apart"
            )
        return tuple(map(Secret, texts))

    def _tls(self, top: Fields, judge_tls: JudgeTLS | None) -> TLSFiles | None:
        files = {key: self._file(top, key) for key in ("cert_file", "key_file", "ca_file")}
        verify = top.flag("verify_incoming")
        cert, key, ca = files.values()
        if (cert is None) != (key is None):
            missing = "key_file" if key is None else "cert_file"
            top.fault(missing, "missing", "HTTPS needs cert_file and key_file")
        if verify and (cert is None or ca is None):
            top.fault("verify_incoming", "needs cert_file, key_file and ca_file", "set them, or leave it out")
        min_version = self._tls_min_version(top)
        if cert is None or key is None:
            return None
        found = TLSFiles(cert, key, ca, verify, min_version)
        if judge_tls is not None and all(path is None or path.is_file() for path in files.values()):
            try:
                judge_tls(found)
            except InvalidConfig as exc:
                self.faults.extend(_named_faults(exc.detail))
        return found

    def _tls_min_version(self, top: Fields) -> str:
        text = top.text("tls_min_version") or _TLS_MIN
        if text not in _TLS_VERSIONS:
            top.fault("tls_min_version", f'"{text}" is no version of TLS', "use tls12 or tls13")
        elif not _TLS_VERSIONS[text]:
            top.fault("tls_min_version", f"{text} is not offered: it is broken", "use tls12 or tls13")
        return text if _TLS_VERSIONS.get(text) else _TLS_MIN

    def _file(self, top: Fields, key: str) -> Path | None:
        text = top.text(key)
        if not text:
            return None
        if not Path(text).is_file():
            top.fault(key, f"{text} is not a file", "check the path and its permissions")
        return Path(text)

    def _ports(self, given: Mapping[str, object], own: Peer | None, *, has_tls: bool) -> Ports:
        fields = self._section("ports", given)
        http = self._port(fields, "http", HTTP_PORT)
        https = self._port(fields, "https", HTTPS_PORT if has_tls else DISABLED)
        server = self._port(fields, "server", own.server_port if own else SERVER_PORT)
        forward = self._port(fields, "forward", own.forward_port if own else FORWARD_PORT)
        if https is not None and not has_tls:
            fields.fault("https", "needs cert_file and key_file", "set them, or leave the port out")
        for key, port in (("server", server), ("forward", forward)):
            if port is None and own:
                fields.fault(key, "cannot be off: the peers dial it", "give a port number")
        self._check_ports(fields, {"http": http, "https": https, "server": server, "forward": forward})
        self._done(fields)
        return Ports(http, https, server or SERVER_PORT, forward or FORWARD_PORT)

    def _port(self, fields: Fields, key: str, default: int) -> int | None:
        port = fields.integer(key, default, low=DISABLED, high=PORT_MAX)
        if port == 0:
            fields.fault(key, "0 is no port", f"give a port number, or {DISABLED} to turn the listener off")
        return None if port == DISABLED else port

    def _check_ports(self, fields: Fields, ports: Mapping[str, int | None]) -> None:
        taken: dict[int, str] = {}
        for key, port in ports.items():
            if port and taken.setdefault(port, key) != key:
                fields.fault(key, f"{port} is also ports.{taken[port]}", "give each listener its own port")

    def _performance(self, given: Mapping[str, object]) -> tuple[int, float]:
        fields = self._section("performance", given)
        multiplier = fields.integer("raft_multiplier", 3, low=1, high=10)
        hold_timeout = fields.duration("rpc_hold_timeout", 7.0, low=0.1, high=60.0)
        self._done(fields)
        return multiplier, hold_timeout

    def _limits(self, given: Mapping[str, object]) -> Limits:
        fields = self._section("limits", given)
        limits = Limits(
            http_max_conns_per_client=fields.integer("http_max_conns_per_client", 200, low=1),
            http_max_blocked_queries=fields.integer("http_max_blocked_queries", 5000, low=1),
            leaf_cache_max=fields.integer("leaf_cache_max", 10_000, low=1),
        )
        self._done(fields)
        return limits

    def _http(self, given: Mapping[str, object]) -> HTTPSettings:
        fields = self._section("http_config", given)
        http = HTTPSettings(fields.flag("allow_insecure_http"), fields.texts("allowed_hosts"))
        self._done(fields)
        return http

    def _connect(self, given: Mapping[str, object], judge_ca: JudgeCA | None) -> ConnectSettings:
        fields = self._section("connect", given)
        connect = ConnectSettings(
            enabled=fields.flag("enabled", default=self._dev),
            ca_provider=fields.text("ca_provider"),
            ca_config=fields.mapping("ca_config"),
        )
        self._done(fields)
        if judge_ca is not None and not fields.faults:
            try:
                judge_ca(connect.ca_provider, connect.ca_config)
            except InvalidConfig as exc:
                self.faults.extend(_ca_faults(exc.detail))
        if not connect.enabled:
            self._warnings.append(
                "connect.enabled: false, so this cluster has no CA; set connect { enabled = true } to have one"
            )
        return connect


def _named_faults(detail: str) -> list[Fault]:
    """The faults of a judge who names the key in front of each line."""
    return [Fault(name, problem) for name, _, problem in (line.partition(": ") for line in detail.splitlines())]


def _ca_faults(detail: str) -> list[Fault]:
    """What the judge said: Consul's sentences, then ``ca_config.LeafCertTTL: ...``, some with more lines to a remedy."""
    faults: list[Fault] = []
    named = False
    for line in filter(str.strip, detail.splitlines()):
        name, _, problem = line.partition(": ")
        if problem and name.split(".")[0] in ("ca_config", "ca_provider"):
            faults.append(Fault(f"connect.{name}", problem))
            named = True
        elif named:
            faults[-1] = replace(faults[-1], problem=f"{faults[-1].problem}\n{line}")
        else:
            faults.append(Fault("connect.ca_config", line))
    return faults


def _is_host(text: str) -> bool:
    try:
        ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        # Digits and dots alone are a mistyped IP address, not a name.
        return bool(_HOST.fullmatch(text)) and not re.fullmatch(r"[0-9.]+", text)
    return True


def _is_wildcard(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return False


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address.lower() == "localhost"


def _count(value: object) -> int:
    text = str(value)
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0


def _blocks_for(joins: Mapping[str, object], node_name: str) -> str:
    """The peer blocks that stand for Consul's ways to find servers, to be completed by the reader."""
    lists = [value if isinstance(value, list) else [value] for key, value in joins.items() if key != "bootstrap_expect"]
    hosts = dict.fromkeys(_host_of(item) for items in lists for item in items if isinstance(item, str))
    blocks = [(f"<node_name of {host}>", host) for host in hosts if _is_host(host)]
    if not blocks:
        servers = max(_count(joins.get("bootstrap_expect")), 3)
        blocks = [(node_name, "<address of this node>")]
        blocks += [(f"<node_name of server {each}>", "<its address>") for each in range(2, servers + 1)]
    return "\n".join(f'peer "{name}" {{\n  address = "{address}"\n}}' for name, address in blocks)


def _host_of(item: str) -> str:
    """The host of ``host``, ``host:port`` or ``[host]:port``."""
    if item.startswith("["):
        return item[1:].partition("]")[0]
    return item.partition(":")[0] if item.count(":") == 1 else item
