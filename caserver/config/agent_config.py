"""The settings of one node, fixed while it runs: read from files, environment and flags, judged all at once.

``connect { ca_config }`` is handed on untouched: it seeds the replicated CA configuration at the first bootstrap, which
has its own rules (``state.configuration``); who loads an ``AgentConfig`` passes them in as ``judge_ca``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from caserver.config import sources
from caserver.config.acl_settings import ACLSettings, read_acl
from caserver.config.addresses import read_address
from caserver.config.consul_keys import JOIN_KEYS
from caserver.config.listeners import (
    HTTPSettings,
    Limits,
    ListenOn,
    Ports,
    read_http,
    read_limits,
    read_listen_on,
    read_ports,
)
from caserver.config.reading import Reading
from caserver.config.servers import Peer, check_joins, read_node_name, read_own_address, read_peers, read_secrets
from caserver.config.sources import Keys
from caserver.config.tls_settings import JudgeTLS, TLSFiles, read_tls
from caserver.errors import InvalidConfig
from caserver.fields import Fault, Fields, Secret

KEYS = Keys(
    scalars=(
        "node_name",
        "datacenter",
        "data_dir",
        "bind_addr",
        "advertise_addr",
        "client_addr",
        "addresses.http",
        "addresses.https",
        "unix_sockets.user",
        "unix_sockets.group",
        "unix_sockets.mode",
        "cluster_secret",
        "log_level",
        "log_json",
        "ca_file",
        "ca_path",
        "cert_file",
        "key_file",
        "verify_incoming",
        "verify_incoming_https",
        "tls_cipher_suites",
        "tls_min_version",
        "tls_prefer_server_cipher_suites",
        "acl.enabled",
        "acl.default_policy",
        "acl.down_policy",
        "acl.tokens.initial_management",
        "acl.tokens.master",
        "acl.tokens.agent",
        "connect.enabled",
        "connect.ca_provider",
        "connect.file_dir",
        "connect.authorize_default",
        "default_intention_policy",
        "ports.http",
        "ports.https",
        "ports.server",
        "ports.forward",
        "performance.raft_multiplier",
        "performance.rpc_hold_timeout",
        "limits.http_max_conns_per_client",
        "limits.http_max_blocked_queries",
        "limits.http_strangers_per_second",
        "limits.leaf_cache_max",
        "http_config.allow_insecure_http",
        "http_config.allowed_hosts",
        "http_config.block_endpoints",
        "http_config.allow_write_http_from",
    ),
    lists=(
        "cluster_secret",
        "http_config.allowed_hosts",
        "http_config.block_endpoints",
        "http_config.allow_write_http_from",
    ),
    open_tables=("connect.ca_config", "http_config.response_headers", "peer"),
)

_DATACENTER = re.compile(r"[A-Za-z0-9_-]{1,63}")
LOG_LEVELS = {"TRACE": "trace", "DEBUG": "debug", "INFO": "info", "WARN": "warn", "ERR": "error", "ERROR": "error"}
JudgeCA = Callable[["ConnectSettings"], object]


@dataclass(frozen=True, slots=True)
class ConnectSettings:
    """Whether this cluster has a CA, and what seeds it at the first bootstrap."""

    enabled: bool
    ca_provider: str | None
    ca_config: Mapping[str, object] = field(repr=False)  # may hold a private key
    file_dir: Path | None = None  # where files that a CA configuration names are looked for; None: it may name none
    authorize_default: str | None = None  # allow or deny: whether services may connect; None: as ACLs have it


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """One node's settings, checked."""

    node_name: str
    datacenter: str
    data_dir: Path | None  # None = memory only (-dev)
    dev: bool
    rejoin: bool  # start although this node's data is gone and its peers know it
    bind_addr: str
    own_address: str  # what this server is known by
    listen: ListenOn
    ports: Ports
    peers: Mapping[str, Peer]  # by name, this node included; empty = a single node
    cluster_secrets: tuple[Secret, ...]  # first seals and issues; empty = a single node that keeps its own
    connect: ConnectSettings
    acl: ACLSettings
    tls: TLSFiles | None
    raft_multiplier: int
    rpc_hold_timeout: float  # seconds
    limits: Limits
    http: HTTPSettings
    log_level: str  # trace, debug, info, warn or error
    log_json: bool
    warnings: tuple[str, ...] = ()

    @property
    def exposed(self) -> tuple[str, ...]:
        """Where others may read along on the plain listener and the operator did not say that this is meant."""
        return tuple(str(each) for each in self.listen.http if self.ports.http and self.http.exposes(each))

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

        ``flags`` maps dotted keys to values, and may hold what only a flag can give: ``dev``, ``rejoin``, ``hcl`` (texts,
        over everything else) and ``config_format`` (of all files, whatever their names).
        InvalidConfig carries every fault, one a line. ``judge_ca`` raises InvalidConfig for a CA configuration that
        could not be bootstrapped, ``judge_tls`` for files that no listener could serve with.
        """
        given = dict(flags)
        dev, rejoin = bool(given.pop("dev", False)), bool(given.pop("rejoin", False))
        pieces, file_format = _texts(given.pop("hcl", ())), given.pop("config_format", None)
        settings = sources.gather(
            paths,
            flags=given,
            environ=environ,
            keys=KEYS,
            pieces=pieces,
            file_format=None if file_format is None else str(file_format),
        )
        reading = Reading(settings, dev=dev, hostname=hostname)
        config = _read(reading, judge_ca, judge_tls, rejoin=rejoin)
        faults = [*settings.faults, *map(settings.located, reading.faults)]
        if faults:
            raise InvalidConfig("\n".join(map(str, faults)))
        return config


def _texts(given: object) -> tuple[str, ...]:
    return tuple(map(str, given)) if isinstance(given, Sequence) else ()


def _read(reading: Reading, judge_ca: JudgeCA | None, judge_tls: JudgeTLS | None, *, rejoin: bool) -> AgentConfig:
    """The whole configuration; what is wrong with it is in ``reading``."""
    top, given = reading.top(), reading.settings.values
    peers = read_peers(reading, top.mapping("peer"))
    node_name = read_node_name(reading, top, peers)
    check_joins(reading, {key: given[key] for key in JOIN_KEYS if key in given}, peers, node_name)
    tls = read_tls(reading, top, judge_tls)
    multiplier, hold_timeout = _performance(reading, top.mapping("performance"))
    bind_addr = read_address(top, "bind_addr", peers[node_name].address if node_name in peers else "127.0.0.1")
    config = AgentConfig(
        node_name=node_name,
        datacenter=_datacenter(top),
        data_dir=_data_dir(reading, top),
        dev=reading.dev,
        rejoin=rejoin,
        bind_addr=bind_addr,
        own_address=read_own_address(reading, top, peers.get(node_name), bind_addr=bind_addr),
        listen=read_listen_on(reading, top),
        ports=read_ports(reading, top.mapping("ports"), peers.get(node_name), has_tls=tls is not None),
        peers=peers,
        cluster_secrets=read_secrets(reading, top, peers),
        connect=_connect(reading, top, judge_ca),
        acl=read_acl(reading, top.mapping("acl")),
        tls=tls,
        raft_multiplier=multiplier,
        rpc_hold_timeout=hold_timeout,
        limits=read_limits(reading, top.mapping("limits")),
        http=read_http(reading, top.mapping("http_config")),
        log_level=_log_level(top),
        log_json=top.flag("log_json"),
    )
    reading.done(top)
    if config.exposed:
        reading.warnings.append(
            f"client_addr: {', '.join(config.exposed)} is not loopback and port {config.ports.http} is plain HTTP, so "
            "private keys and configuration are not served there; use HTTPS, or set "
            "http_config { allow_insecure_http = true }"
        )
    if reading.ignored:
        reading.warnings.append(f"keys of Consul without a meaning here, ignored: {', '.join(sorted(reading.ignored))}")
    return replace(config, warnings=tuple(reading.warnings))


def _datacenter(top: Fields) -> str:
    datacenter = (top.text("datacenter") or "dc1").lower()  # lower case as in Consul: it is part of every identity
    if not _DATACENTER.fullmatch(datacenter):
        top.fault("datacenter", f'"{datacenter}" is no datacenter name', "use letters, digits, hyphens, underscores")
    return datacenter


def _data_dir(reading: Reading, top: Fields) -> Path | None:
    text = top.text("data_dir")
    if reading.dev:
        if text:
            reading.warnings.append("data_dir: ignored, -dev keeps everything in memory")
        return None
    if not text:
        if not reading.incomplete:
            top.fault("data_dir", "missing", 'name a directory of this node alone, data_dir = "/var/lib/caserver"')
        return None
    path = Path(text)
    if path.exists() and not path.is_dir():
        top.fault("data_dir", f"{path} is not a directory", "name a directory of this node alone")
    return path


def _log_level(top: Fields) -> str:
    text = top.text("log_level") or "INFO"
    if text.upper() not in LOG_LEVELS:
        top.fault("log_level", f'"{text}" is no level', "use trace, debug, info, warn or error")
    return LOG_LEVELS.get(text.upper(), "info")


def _performance(reading: Reading, given: Mapping[str, object]) -> tuple[int, float]:
    fields = reading.section("performance", given)
    multiplier = fields.integer("raft_multiplier", 3, low=1, high=10)
    hold_timeout = fields.duration("rpc_hold_timeout", 7.0, low=0.1, high=60.0)
    reading.done(fields)
    return multiplier, hold_timeout


def _connect(reading: Reading, top: Fields, judge_ca: JudgeCA | None) -> ConnectSettings:
    fields = reading.section("connect", top.mapping("connect"))
    # Consul's key since 1.17, for the same question.
    newer = top.text("default_intention_policy", one_of=("allow", "deny"))
    connect = ConnectSettings(
        enabled=fields.flag("enabled", default=reading.dev),
        ca_provider=fields.text("ca_provider"),
        ca_config=fields.mapping("ca_config"),
        file_dir=_file_dir(fields),
        authorize_default=fields.text("authorize_default", newer, one_of=("allow", "deny")),
    )
    reading.done(fields)
    if judge_ca is not None and not fields.faults:
        try:
            judge_ca(connect)
        except InvalidConfig as exc:
            reading.faults.extend(_ca_faults(exc.detail))
    if not connect.enabled:
        reading.warnings.append(
            "connect.enabled: false, so this cluster has no CA; set connect { enabled = true } to have one"
        )
    return connect


def _file_dir(fields: Fields) -> Path | None:
    text = fields.text("file_dir")
    if not text:
        return None
    path = Path(text)
    if not path.is_absolute():
        fields.fault("file_dir", f'"{text}" is not absolute', 'name a directory, file_dir = "/etc/caserver/vault"')
    elif not path.is_dir():
        fields.fault("file_dir", f"{path} is not a directory", "create it, or leave it out to refuse such files")
    return path


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
