"""An agent's own settings under Consul's names, as its description of itself shows them (``DebugConfig``).

Of Consul's keys those that can be said truthfully: what is set here, and what is certainly not there (an empty list, a
port that is off). How the rest of Consul is tuned (gossip, DNS, checks) has no value here, so its keys are left out.
Secrets read ``hidden``, whether they are set or not.
"""

from __future__ import annotations

from collections.abc import Iterable

from caserver.authority.operations import TRAILING_MAX
from caserver.config.agent_config import AgentConfig
from caserver.config.listeners import DISABLED, Where
from caserver.nodes_wire import CONSUL_VERSION, node_id, revision, tagged
from caserver.unix_socket import UnixSocket
from caserver.wire import Document, contact_text

_HIDDEN = (
    "ACLAgentMasterToken",
    "ACLAgentToken",
    "ACLMasterToken",
    "ACLReplicationToken",
    "ACLToken",
    "EncryptKey",
    "KeyFile",
)
_NOTHING: tuple[tuple[object, tuple[str, ...]], ...] = (
    (
        False,
        (
            "ACLEnableKeyListPolicy",
            "ACLEnableTokenPersistence",
            "ACLTokenReplication",
            "AutoEncryptAllowTLS",
            "AutoEncryptTLS",
            "AutopilotCleanupDeadServers",
            "AutopilotDisableUpgradeMigration",
            "ConnectMeshGatewayWANFederationEnabled",
            "DNSUseCache",
            "EnableAgentTLSForChecks",
            "EnableCentralServiceConfig",
            "EnableDebug",
            "EnableLocalScriptChecks",
            "EnableRemoteScriptChecks",
            "EncryptVerifyIncoming",
            "EncryptVerifyOutgoing",
            "LeaveOnTerm",
            "NonVotingServer",
            "RejoinAfterLeave",
            "TranslateWANAddrs",
        ),
    ),
    (
        True,
        (
            "DisableAnonymousSignature",
            "DisableCoordinates",
            "DisableHostNodeID",
            "DisableKeyringFile",
            "DisableRemoteExec",
            "DisableUpdateCheck",
            "ServerMode",
            "SkipLeaveOnInt",
        ),
    ),
    (
        "",
        (
            "AutopilotRedundancyZoneTag",
            "AutopilotUpgradeVersionTag",
            "PidFile",
            "SegmentName",
            "ServerName",
            "UIDir",
            "VersionPrerelease",
        ),
    ),
    (DISABLED, ("DNSPort", "GRPCPort", "SerfPortLAN", "SerfPortWAN")),
    (0, ("AutopilotMinQuorum",)),
)
_NO_LISTS = (
    "Checks",
    "ConfigEntryBootstrap",
    "DNSAddrs",
    "DNSRecursors",
    "GRPCAddrs",
    "PrimaryGateways",
    "RetryJoinLAN",
    "RetryJoinWAN",
    "Segments",
    "Services",
    "StartJoinAddrsLAN",
    "StartJoinAddrsWAN",
    "Watches",
)


def encode_settings(config: AgentConfig, *, contact_max: float) -> Document:
    """The settings by name; ``contact_max`` is the silence in seconds after which a server counts as unhealthy."""
    absent = {name: value for value, names in _NOTHING for name in names}
    lists: Document = {name: [] for name in _NO_LISTS}
    hidden: Document = dict.fromkeys(_HIDDEN, "hidden")
    return dict(sorted((absent | lists | hidden | _own(config, contact_max) | _served(config)).items()))


def _own(config: AgentConfig, contact_max: float) -> Document:
    host = config.own_address
    port = config.peers[config.node_name].server_port if config.node_name in config.peers else config.ports.server
    return {
        "ACLDatacenter": config.datacenter,
        "ACLDefaultPolicy": "allow" if config.acl.default_allow else "deny",
        "ACLDownPolicy": "deny" if config.acl.down_deny else "extend-cache",
        "ACLsEnabled": config.acl.enabled,
        "AdvertiseAddrLAN": host,
        "AdvertiseAddrWAN": host,
        "AutopilotLastContactThreshold": contact_text(contact_max),
        "AutopilotMaxTrailingLogs": TRAILING_MAX,
        "AutopilotServerStabilizationTime": "0s",
        "BindAddr": config.bind_addr,
        "Bootstrap": len(config.peers) <= 1,
        "BootstrapExpect": len(config.peers) if len(config.peers) > 1 else 0,
        "ConnectCAConfig": {},  # seeds the CA once; what is in force is at /v1/connect/ca/configuration, without secrets
        "ConnectCAProvider": config.connect.ca_provider or "",
        "ConnectEnabled": config.connect.enabled,
        "DNSDomain": "consul.",  # what trust domains end with
        "DataDir": "" if config.data_dir is None else str(config.data_dir),
        "Datacenter": config.datacenter,
        "DevMode": config.dev,
        "Logging": {"LogJSON": config.log_json, "LogLevel": config.log_level},
        "NodeID": node_id(config.node_name, config.datacenter),
        "NodeMeta": {},
        "NodeName": config.node_name,
        "PrimaryDatacenter": config.datacenter,
        "RPCAdvertiseAddr": _tcp(host, port),
        "RPCBindAddr": _tcp(config.bind_addr, config.ports.server),
        "RPCHoldTimeout": contact_text(config.rpc_hold_timeout),
        "Revision": revision(),
        "ServerPort": config.ports.server,
        "TaggedAddresses": tagged(host),
        "Version": CONSUL_VERSION,
    }


def _served(config: AgentConfig) -> Document:
    tls, sockets = config.tls, [each for each in config.listen.http if isinstance(each, UnixSocket)]
    dress = sockets[0] if sockets else None
    return {
        "AllowWriteHTTPFrom": [str(each) for each in config.http.write_from],
        "CAFile": "" if tls is None or tls.ca_file is None else str(tls.ca_file),
        "CAPath": "" if tls is None or tls.ca_path is None else str(tls.ca_path),
        "CertFile": "" if tls is None else str(tls.cert_file),
        "ClientAddrs": list(config.listen.hosts),
        "HTTPAddrs": _addresses(config.listen.http, config.ports.http),
        "HTTPMaxConnsPerClient": config.limits.http_max_conns_per_client,
        "HTTPPort": config.ports.http or DISABLED,
        "HTTPSAddrs": _addresses(config.listen.https, config.ports.https) if tls is not None else [],
        "HTTPSPort": config.ports.https or DISABLED,
        "HTTPBlockEndpoints": list(config.http.block_endpoints),
        "HTTPResponseHeaders": dict(config.http.response_headers),
        "TLSCipherSuites": [] if tls is None else list(tls.cipher_suites),
        "TLSMinVersion": "tls12" if tls is None else tls.min_version,
        "TLSPreferServerCipherSuites": tls is not None and tls.prefer_server_ciphers,
        "UnixSocketGroup": "" if dress is None or dress.group is None else str(dress.group),
        "UnixSocketMode": "" if dress is None or dress.mode is None else f"{dress.mode:04o}",
        "UnixSocketUser": "" if dress is None or dress.user is None else str(dress.user),
        "VerifyIncoming": tls is not None and tls.verify_incoming,
        "VerifyIncomingHTTPS": tls is not None and tls.verify_incoming,
    }


def _addresses(places: Iterable[Where], port: int | None) -> list[str]:
    found = [_tcp(each, port) if isinstance(each, str) and port else str(each) for each in places]
    return [each for each in found if "://" in each]


def _tcp(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
