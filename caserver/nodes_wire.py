"""Consul's JSON names of what it knows about servers: members, nodes, their checks, and an agent's description of itself.

Gossip is no part of this CA: who is a member says the configuration, who is alive say the links of the log.
"""

from __future__ import annotations

import json
import os
import platform
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from caserver import gojson
from caserver.environment import release
from caserver.errors import InvalidRequest
from caserver.raft.status import RaftStatus
from caserver.requests import ServersRead, ServerStatus
from caserver.wire import UNMARSHAL, Document, contact_text

CONSUL_VERSION = "1.8.7"  # the one whose interface this is: clients decide by it what they may ask for
SERF_CHECK = "serfHealth"
ALIVE, FAILED = 1, 4  # Serf's numbers for the status of a member


@dataclass(frozen=True, slots=True)
class Site:
    """What the documents say of the cluster beside its servers."""

    datacenter: str
    addresses: Mapping[str, tuple[str, int]]  # name -> Raft address and port
    acls: bool = False

    def address(self, name: str) -> str:
        """The address of a server."""
        return self.addresses[name][0]


@dataclass(frozen=True, slots=True)
class Server:
    """A server, and whether the node that is asked finds it alive."""

    name: str
    connected: bool


def node_id(name: str, datacenter: str) -> str:
    """A UUID that is the same wherever and whenever it is asked for: that of the node's name in Consul's DNS."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.node.{datacenter}.consul"))


def revision() -> str:
    """What stands where Consul names its commit."""
    return f"caserver-{release()}"


def encode_members(found: Sequence[Server], site: Site, *, wan: bool) -> list[Document]:
    """Body of the members; across datacenters a name carries that of its own."""
    members = [encode_member(each, site) for each in found]
    return [each | {"Name": f"{each['Name']}.{site.datacenter}"} for each in members] if wan else members


def encode_member(server: Server, site: Site) -> Document:
    """One member. Its port is Raft's: there is none for gossip."""
    host, port = site.addresses[server.name]
    tags = {
        "acls": "1" if site.acls else "0",
        "build": f"{CONSUL_VERSION}:{revision()}",
        "dc": site.datacenter,
        "expect": str(len(site.addresses)),
        "id": node_id(server.name, site.datacenter),
        "port": str(port),
        "raft_vsn": "3",
        "role": "consul",
        "segment": "",
        "vsn": "2",
        "vsn_max": "3",
        "vsn_min": "2",
    }
    if len(site.addresses) == 1:
        del tags["expect"]
    return {
        "Name": server.name,
        "Addr": host,
        "Port": port,
        "Tags": tags,
        "Status": ALIVE if server.connected else FAILED,
        "ProtocolMin": 1,
        "ProtocolMax": 5,
        "ProtocolCur": 2,
        "DelegateMin": 2,
        "DelegateMax": 5,
        "DelegateCur": 4,
    }


def encode_nodes(found: Sequence[Server], site: Site, *, index: int) -> list[Document]:
    """Body of the catalog's nodes: the servers."""
    return [
        {
            "ID": node_id(each.name, site.datacenter),
            "Node": each.name,
            "Address": site.address(each.name),
            "Datacenter": site.datacenter,
            "TaggedAddresses": tagged(site.address(each.name)),
            "Meta": dict(META),
            "CreateIndex": 1,
            "ModifyIndex": index,
        }
        for each in found
    ]


_AUTHORIZE = "structs.ConnectAuthorizeRequest"
_AUTHORIZE_KEYS = {name.lower(): name for name in ("Target", "ClientCertURI", "ClientCertSerial")}
META: Mapping[str, str] = {"consul-network-segment": ""}


def tagged(address: str) -> dict[str, str]:
    """An address under the names that Consul's nodes have for theirs."""
    family = "ipv6" if ":" in address else "ipv4"
    literal = ":" in address or address.replace(".", "").isdigit()
    tagged = {"lan": address, "wan": address}
    return dict(sorted((tagged | {f"{each}_{family}": address for each in tagged if literal}).items()))


def encode_checks(server: Server, *, index: int) -> list[Document]:
    """Body of a node's checks: the one that every node of Consul has."""
    return [
        {
            "Node": server.name,
            "CheckID": SERF_CHECK,
            "Name": "Serf Health Status",
            "Status": "passing" if server.connected else "critical",
            "Notes": "",
            "Output": "Agent alive and reachable" if server.connected else "Agent not live or unreachable",
            "ServiceID": "",
            "ServiceName": "",
            "ServiceTags": [],
            "Type": "",
            "Definition": {},
            "CreateIndex": 1,
            "ModifyIndex": index,
        }
    ]


@dataclass(frozen=True, slots=True)
class AuthorizeBody:
    """Who wants to connect to what."""

    target: str
    client_uri: str


def decode_authorize(body: str) -> AuthorizeBody:
    """Read the body of an authorize request; InvalidRequest with Consul's text."""
    try:
        document = gojson.decode(body)
    except ValueError as exc:
        raise InvalidRequest(f"{UNMARSHAL}{exc}") from exc
    if not isinstance(document, dict):
        got = gojson.type_name(document)
        raise InvalidRequest(f"{UNMARSHAL}json: cannot unmarshal {got} into Go value of type {_AUTHORIZE}")
    found: dict[str, str] = {}
    for key, value in document.items():
        name = _AUTHORIZE_KEYS.get(key.lower())
        if name is None:
            raise InvalidRequest(f"{UNMARSHAL}json: unknown field {json.dumps(key, ensure_ascii=False)}")
        if not isinstance(value, str | None):
            got = gojson.type_name(value)
            raise InvalidRequest(
                f"{UNMARSHAL}json: cannot unmarshal {got} into Go struct field ConnectAuthorizeRequest.{name} of type string"
            )
        found[name] = value or ""
    if not found.get("Target"):
        raise InvalidRequest("Bad request: Target service must be specified")
    return AuthorizeBody(found["Target"], found.get("ClientCertURI", ""))


def encode_authorization(*, authorized: bool, reason: str) -> Document:
    """Body of the answer whether a connection may be made."""
    return {"Authorized": authorized, "Reason": reason}


def encode_self(settings: Document, status: RaftStatus, found: ServersRead, site: Site) -> Document:
    """Body of an agent's description; ``settings`` are its own under Consul's names (``DebugConfig``)."""
    own = next(each for each in found.servers if each.name == status.leadership.node)
    return {
        "Config": {
            "Datacenter": site.datacenter,
            "NodeName": own.name,
            "NodeID": node_id(own.name, site.datacenter),
            "Revision": revision(),
            "Server": True,
            "Version": CONSUL_VERSION,
        },
        "DebugConfig": settings,
        "Coord": None,  # as of an agent with coordinates switched off
        "Member": encode_member(Server(own.name, connected=True), site),
        "Stats": _stats(status, found.servers, site),
        "Meta": dict(META),
    }


def _stats(status: RaftStatus, servers: Sequence[ServerStatus], site: Site) -> Document:
    leadership = status.leadership
    state = "Leader" if leadership.is_leader else "Follower" if leadership.leader is not None else "Candidate"
    addresses = {
        name: f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for name, (host, port) in site.addresses.items()
    }
    configuration = " ".join(
        f"{{Suffrage:{'Voter' if each.voter else 'Nonvoter'} ID:{each.name} Address:{addresses[each.name]}}}"
        for each in servers
    )
    return {
        "agent": dict.fromkeys(("check_monitors", "check_ttls", "checks", "services"), "0"),
        "build": {"prerelease": "", "revision": revision(), "version": CONSUL_VERSION},
        "consul": {
            "acl": "enabled" if site.acls else "disabled",
            "bootstrap": _text(len(servers) == 1),
            "known_datacenters": "1",
            "leader": _text(leadership.is_leader),
            "leader_addr": addresses.get(leadership.leader or "", ""),
            "server": "true",
        },
        "raft": {
            "applied_index": str(status.applied_index),
            "commit_index": str(status.commit_index),
            "fsm_pending": str(status.queue),
            "last_contact": "0" if leadership.is_leader else contact_text(leadership.last_contact),
            "last_log_index": str(status.last_index),
            "last_log_term": str(status.last_term),
            "latest_configuration": f"[{configuration}]",
            "latest_configuration_index": "0",
            "num_peers": str(len(servers) - 1),
            "protocol_version": "3",
            "protocol_version_max": "3",
            "protocol_version_min": "0",
            "state": state,
            "term": str(leadership.term),
        },
        "runtime": {
            "arch": platform.machine(),
            "cpu_count": str(os.cpu_count() or 1),
            "os": platform.system().lower(),
            "version": f"python{platform.python_version()}",
        },
    }


def _text(value: bool) -> str:  # noqa: FBT001 - the value is all there is to it
    return "true" if value else "false"
