"""The verbs of one node: ``agent``, ``validate``, ``reload``, ``keygen``, ``version``."""

from __future__ import annotations

import base64
import socket
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from caserver.cli.flags import HTTP_GROUP, Command, Flag, Parsed, Takes, UsageError, client
from caserver.cli.output import complain, failed, say
from caserver.client import ClientError
from caserver.errors import InvalidConfig
from caserver.fields import Fault, fault_text, fold

if TYPE_CHECKING:
    from caserver.config.agent_config import AgentConfig, ConnectSettings

# Flags that set a key of the configuration.
_KEY_OF_FLAG = {
    "advertise": "advertise_addr",
    "bind": "bind_addr",
    "client": "client_addr",
    "data-dir": "data_dir",
    "datacenter": "datacenter",
    "forward-port": "ports.forward",
    "http-port": "ports.http",
    "https-port": "ports.https",
    "log-level": "log_level",
    "node": "node_name",
    "server-port": "ports.server",
}
# Flags of `consul agent` that a start script may carry, for the same keys in a file.
_CONSUL_VALUES = {
    "advertise-wan": "advertise_addr_wan",
    "alt-domain": "alt_domain",
    "bootstrap-expect": "bootstrap_expect",
    "check_output_max_size": "check_output_max_size",
    "default-query-time": "default_query_time",
    "dns-port": "ports.dns",
    "domain": "domain",
    "encrypt": "encrypt",
    "grpc-port": "ports.grpc",
    "log-file": "log_file",
    "log-rotate-bytes": "log_rotate_bytes",
    "log-rotate-duration": "log_rotate_duration",
    "log-rotate-max-files": "log_rotate_max_files",
    "max-query-time": "max_query_time",
    "node-id": "node_id",
    "pid-file": "pid_file",
    "protocol": "protocol",
    "raft-protocol": "raft_protocol",
    "retry-interval": "retry_interval",
    "retry-interval-wan": "retry_interval_wan",
    "retry-max": "retry_max",
    "retry-max-wan": "retry_max_wan",
    "segment": "segment",
    "serf-lan-bind": "serf_lan",
    "serf-lan-port": "ports.serf_lan",
    "serf-wan-bind": "serf_wan",
    "serf-wan-port": "ports.serf_wan",
    "ui-content-path": "ui_content_path",
    "ui-dir": "ui_dir",
}
_CONSUL_LISTS = {
    "join": "start_join",
    "join-wan": "start_join_wan",
    "node-meta": "node_meta",
    "primary-gateway": "primary_gateways",
    "recursor": "recursors",
    "retry-join": "retry_join",
    "retry-join-wan": "retry_join_wan",
    "serf-lan-allowed-cidrs": "serf_lan_allowed_cidrs",
    "serf-wan-allowed-cidrs": "serf_wan_allowed_cidrs",
}
_CONSUL_SWITCHES = {
    "bootstrap": "bootstrap",
    "disable-host-node-id": "disable_host_node_id",
    "disable-keyring-file": "disable_keyring_file",
    "enable-local-script-checks": "enable_local_script_checks",
    "enable-script-checks": "enable_script_checks",
    "non-voting-server": "non_voting_server",
    "server": "server",
    "syslog": "enable_syslog",
    "ui": "ui",
}
_CONSUL_ABOUT_PEERS = {"bootstrap-expect", "join", "join-wan", "retry-join", "retry-join-wan"}
_CONSUL_NO_EFFECT = "No effect; accepted so that a start script can be kept."
_CONSUL_PEERS = "No effect beside peer blocks, which replace it; refused without them."

SOURCES = (
    Flag(
        "config-file",
        "File (*.hcl or *.json) to read configuration from, or a directory of such files. May be given several times; "
        "what comes later wins.",
        takes=Takes.VALUES,
        placeholder="path",
    ),
    Flag(
        "config-dir",
        "Directory whose *.hcl and *.json files are read in alphabetical order. May be given several times.",
        takes=Takes.VALUES,
        placeholder="path",
        list_of="config-file",
    ),
    Flag(
        "config-format",
        "Format of the configuration files whatever their names, hcl or json; all files of a directory are read then.",
        placeholder="hcl|json",
    ),
)
_SETTINGS = (
    Flag("advertise", "Address that clients are told of a single server. Defaults to what it binds."),
    Flag(
        "allow-write-http-from",
        "Network from which something may be changed over HTTP, such as 10.0.0.0/8. May be given several times. The "
        "default is any.",
        takes=Takes.VALUES,
        placeholder="network",
    ),
    Flag("bind", "Address that the other servers reach this node at. Defaults to that of its peer block."),
    Flag("client", "Address of the HTTP listeners. The default is 127.0.0.1."),
    Flag("data-dir", "Directory of this node's log and snapshots.", placeholder="path"),
    Flag("datacenter", "Datacenter of the cluster, part of every service's identity. The default is dc1."),
    Flag(
        "dev",
        "Starts a single node in memory with Connect enabled, ready at once, to try things on. Nothing is kept.",
        takes=Takes.NOTHING,
    ),
    Flag("forward-port", "Port that forwarded requests arrive at. The default is 8303.", placeholder="port"),
    Flag(
        "hcl",
        "A piece of configuration, such as 'connect { enabled = true }'; it wins over everything else. May be given several "
        "times. Secrets have no place here: others see them in the process list.",
        takes=Takes.VALUES,
    ),
    Flag("http-port", "Port of the HTTP API. The default is 8500; -1 turns it off.", placeholder="port"),
    Flag("https-port", "Port of the HTTPS API. The default is 8501 if TLS is configured.", placeholder="port"),
    Flag("log-json", "Output logs in JSON.", takes=Takes.NOTHING),
    Flag("log-level", "Log level: trace, debug, info, warn or error. The default is info."),
    Flag("node", "Name of this node. Defaults to the host name."),
    Flag(
        "rejoin",
        "Start although this node's data is gone and its peers know it: it takes part again once it has caught up.",
        takes=Takes.NOTHING,
    ),
    Flag("server-port", "Port of Raft. The default is 8300.", placeholder="port"),
)
_CONSUL = tuple(
    Flag(name, _CONSUL_PEERS if name in _CONSUL_ABOUT_PEERS else _CONSUL_NO_EFFECT, takes=takes)
    for name, takes in sorted(
        [(name, Takes.VALUE) for name in _CONSUL_VALUES]
        + [(name, Takes.VALUES) for name in _CONSUL_LISTS]
        + [(name, Takes.NOTHING) for name in _CONSUL_SWITCHES],
        key=lambda each: each[0],
    )
)
_AGENT_FLAGS = (
    ("Configuration (every key also has a variable: CASERVER_PORTS_HTTP is ports.http)", (*SOURCES, *_SETTINGS)),
    ("Flags of Consul", _CONSUL),
)


def load(
    parsed: Parsed,
    environ: Mapping[str, str],
    extra: tuple[str, ...] = (),
    *,
    new: bool = False,
    founds: bool = True,
) -> AgentConfig:
    """The configuration that flags, files (``extra`` after those of the flags) and environment give; InvalidConfig.

    ``new`` judges it as that of a cluster that is yet to be founded, ``founds=False`` as one that founds nothing any more.
    """
    # These load the certificate library, which `version` has no use for.
    from caserver.config.agent_config import AgentConfig  # noqa: PLC0415
    from caserver.pki.tls import context_of_files  # noqa: PLC0415

    values = {**_KEY_OF_FLAG, **_CONSUL_VALUES}
    switches = {**_CONSUL_SWITCHES, "log-json": "log_json", "dev": "dev", "rejoin": "rejoin"}
    flags: dict[str, object] = {key: parsed.values[flag] for flag, key in values.items() if flag in parsed.values}
    lists = {**_CONSUL_LISTS, "allow-write-http-from": "http_config.allow_write_http_from", "hcl": "hcl"}
    flags |= {key: list(parsed.lists[flag]) for flag, key in lists.items() if flag in parsed.lists}
    if file_format := parsed.values.get("config-format"):
        if file_format not in ("hcl", "json"):
            raise UsageError("-config-format must be either 'hcl' or 'json'")
        flags["config_format"] = file_format
    flags |= {key: parsed.switches[flag] for flag, key in switches.items() if flag in parsed.switches}
    paths = [*parsed.lists.get("config-file", ()), *extra]
    return AgentConfig.load(
        paths,
        flags=flags,
        environ=environ,
        hostname=socket.gethostname(),
        judge_ca=partial(_judge_ca, environ=environ, new=new, founds=founds),
        judge_tls=context_of_files,
    )


def load_to_run(parsed: Parsed, environ: Mapping[str, str]) -> AgentConfig:
    """As ``load``, for a node that may have been in its cluster for long.

    Key and root in its files founded that cluster once, or did not: what is wrong with them is a warning then.
    """
    extra = tuple(parsed.arguments)
    try:
        return load(parsed, environ, extra)
    except InvalidConfig as exc:
        config = load(parsed, environ, extra, founds=False)
        # The engine comes with it, which an agent needs and no other verb.
        from caserver.raft.data_dir import cluster_of  # noqa: PLC0415

        cluster_id = None if config.data_dir is None else cluster_of(config.data_dir)
        if cluster_id is None:
            raise
        remark = f"of no consequence, this node is of cluster {cluster_id}, which was founded"
        faults = [line.partition("; ")[0] for line in exc.detail.splitlines() if "ca_config" in line]  # no remedies
        return replace(config, warnings=(*config.warnings, *(f"{fault} ({remark})" for fault in faults)))


def _judge_ca(connect: ConnectSettings, *, environ: Mapping[str, str], new: bool, founds: bool) -> None:
    """InvalidConfig with everything that keeps ``ca_config`` from founding a cluster."""
    from caserver.environment import SystemClock, SystemEntropy  # noqa: PLC0415 - see ``load``
    from caserver.pki.spiffe import cluster_id_from  # noqa: PLC0415
    from caserver.providers.builtin import seed_faults  # noqa: PLC0415
    from caserver.state.configuration import parse_bootstrap  # noqa: PLC0415
    from caserver.state.vault_configuration import VaultLocal  # noqa: PLC0415

    spare_id = cluster_id_from(SystemEntropy().bytes(16))
    local = VaultLocal.from_environ(environ, file_dir=connect.file_dir)
    configuration = parse_bootstrap(connect.ca_provider, connect.ca_config, local=local)
    found = []
    if founds:
        found = seed_faults(configuration, now=SystemClock().now(), spare_id=spare_id, validity=new)
    files = {} if configuration.vault is None else configuration.vault.files
    for key, name in files.items():
        if connect.file_dir is not None and not (connect.file_dir / name).exists():
            found.append(Fault(key, f'there is no "{name}" below {connect.file_dir}', "put it there on every server"))
    if found:
        spelled = {fold(key): key for key in connect.ca_config}
        named = [replace(each, field=f"ca_config.{spelled.get(fold(each.field), each.field)}") for each in found]
        raise InvalidConfig(fault_text(named))


def _agent(parsed: Parsed, environ: Mapping[str, str]) -> int:
    try:
        config = load_to_run(parsed, environ)
    except InvalidConfig as exc:
        complain(faults("==> The configuration has faults:", exc))
        return 1
    # The daemon logs the configuration's warnings. It brings the Raft engine and the HTTP server with it.
    from caserver import daemon  # noqa: PLC0415

    return daemon.run(config, read=lambda: load_to_run(parsed, environ))


def _validate(parsed: Parsed, environ: Mapping[str, str]) -> int:
    if not parsed.arguments and not parsed.lists:
        complain("Must specify at least one config file or directory")
        return 1
    try:
        config = load(parsed, environ, tuple(parsed.arguments), new=True)
    except InvalidConfig as exc:
        complain(faults("Config validation failed:", exc))
        return 1
    for warning in config.warnings:
        complain(f"Warning: {warning}")
    if not parsed.switch("quiet"):
        say("Configuration is valid!")
    return 0


def faults(heading: str, exc: InvalidConfig) -> str:
    """The faults of a configuration, one a line, below a heading."""
    return heading + "".join(f"\n    {line}".rstrip(" ") for line in exc.detail.splitlines())


def _keygen(_: Parsed, __: Mapping[str, str]) -> int:
    # Loads the certificate library, which the other verbs of this file may not need.
    from caserver.environment import SystemEntropy  # noqa: PLC0415
    from caserver.internode.keyring import SECRET_BYTES  # noqa: PLC0415

    say(base64.b64encode(SystemEntropy().bytes(SECRET_BYTES)).decode())
    return 0


def _reload(parsed: Parsed, environ: Mapping[str, str]) -> int:
    try:
        client(parsed, environ).reload()
    except ClientError as exc:
        return failed("Error reloading", exc)
    say("Configuration reload triggered")
    return 0


def _version(_: Parsed, __: Mapping[str, str]) -> int:
    say(f"caserver v{version('caserver')}")
    return 0


COMMANDS = {
    command.words: command
    for command in (
        Command(
            words="agent",
            usage="[options]",
            description="Runs a node of the certificate authority until it is interrupted.",
            example="caserver agent -config-file=/etc/caserver/node1.hcl",
            flags=_AGENT_FLAGS,
            run=_agent,
        ),
        Command(
            words="validate",
            usage="[options] FILE_OR_DIRECTORY...",
            description="Reads the configuration as `caserver agent` would with the same options and environment, and "
            "reports every fault at once. Nothing is started.",
            example="caserver validate /etc/caserver/node1.hcl",
            flags=(
                *_AGENT_FLAGS,
                (
                    "Command Options",
                    (Flag("quiet", "Print nothing if the configuration is valid.", takes=Takes.NOTHING),),
                ),
            ),
            run=_validate,
        ),
        Command(
            words="keygen",
            usage="",
            description="Generates a cluster secret: what every server of a cluster must hold, and nobody else may.",
            example="caserver keygen",
            flags=(),
            run=_keygen,
        ),
        Command(
            words="reload",
            usage="[options]",
            description="Has a running agent read its configuration and TLS files again, as SIGHUP does. What it cannot "
            "take over while it runs is named in its log; if anything read has a fault, nothing changes.",
            example="caserver reload",
            flags=(HTTP_GROUP,),
            run=_reload,
        ),
        Command(
            words="version",
            usage="",
            description="Prints the version.",
            example="caserver version",
            flags=(),
            run=_version,
        ),
    )
}
