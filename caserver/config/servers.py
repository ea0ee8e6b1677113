"""The servers of the cluster as the configuration lists them, and the secret that they share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from caserver.config.addresses import is_host, is_wildcard, read_address
from caserver.config.interfaces import Interface, expand, interfaces_here
from caserver.config.reading import Reading
from caserver.fields import Fault, Fields, Secret
from caserver.internode.keyring import decode_secret

SERVER_PORT = 8300
FORWARD_PORT = 8303
PORT_MAX = 65535
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62})")


@dataclass(frozen=True, slots=True)
class Peer:
    """One server of the cluster, as the others dial it."""

    name: str
    address: str  # IP literal (no brackets) or DNS name
    server_port: int = SERVER_PORT
    forward_port: int = FORWARD_PORT


def read_node_name(reading: Reading, top: Fields, peers: Mapping[str, Peer]) -> str:
    """The name of this server, which has to be one of ``peers`` if there are any."""
    name = top.text("node_name") or reading.hostname
    if not _NAME.fullmatch(name):
        top.fault("node_name", f'"{name}" is no node name', "use up to 63 letters, digits, dots, hyphens, underscores")
    elif peers and name not in peers:
        top.fault(
            "node_name",
            f'"{name}" is not among the peer blocks ({", ".join(sorted(peers))})',
            f'set node_name to one of them, or add peer "{name}" {{ address = "..." }} on every node',
        )
    return name


def read_peers(reading: Reading, given: Mapping[str, object]) -> dict[str, Peer]:
    """The ``peer`` blocks by name; none = a single node."""
    peers: dict[str, Peer] = {}
    for name, body in given.items():
        where = f"peer.{name}"
        if not _NAME.fullmatch(name):
            reading.faults.append(Fault(where, "no node name", "use letters, digits, dots, hyphens, underscores"))
        elif not isinstance(body, Mapping):
            reading.faults.append(Fault(where, "expected an object", f'write peer "{name}" {{ address = "..." }}'))
        else:
            peers[name] = _peer(reading, name, Fields(body, where=where, exact=True))
    if peers and reading.dev:
        reading.faults.append(
            Fault("peer", "-dev is a single node", "leave the peer blocks out, or start without -dev")
        )
    _check_endpoints(reading, peers)
    if peers and len(peers) % 2 == 0:
        reading.warnings.append(
            f"peer: {len(peers)} servers survive no more failures than {len(peers) - 1}; use 3 or 5"
        )
    return peers


def _peer(reading: Reading, name: str, fields: Fields) -> Peer:
    address = read_address(fields, "address", "")
    if not address:
        fields.fault("address", "missing", "give the IP address or DNS name that the other servers dial")
    elif is_wildcard(address):
        fields.fault("address", f'"{address}" cannot be dialled', "give the address that the other servers dial")
    peer = Peer(
        name,
        address,
        fields.integer("server_port", SERVER_PORT, low=1, high=PORT_MAX),
        fields.integer("forward_port", FORWARD_PORT, low=1, high=PORT_MAX),
    )
    reading.done(fields)
    return peer


def read_own_address(reading: Reading, top: Fields, own: Peer | None, *, bind_addr: str) -> str:
    """What this server is known by: its peer block says so, else ``advertise_addr``, else what it binds."""
    if own is not None:
        if top.has("advertise_addr"):
            reading.ignored.append("advertise_addr")
        return own.address
    advertised = read_address(top, "advertise_addr", "")
    if is_wildcard(advertised):
        problem = f'"{advertised}" stands for every address'
        top.fault("advertise_addr", problem, "give the one that this server is known by")
    if advertised or not is_wildcard(bind_addr):
        return advertised or bind_addr
    here = sorted(
        interfaces_here(), key=lambda each: (not each.private, each.address.is_loopback, each.address.version)
    )
    return str(here[0].address) if here else "127.0.0.1"


def _check_endpoints(reading: Reading, peers: Mapping[str, Peer]) -> None:
    taken: dict[tuple[str, int], str] = {}
    for name, peer in peers.items():
        for key, port in (("server_port", peer.server_port), ("forward_port", peer.forward_port)):
            where = f"peer.{name}.{key}"
            first = taken.setdefault((peer.address.lower(), port), where)
            if first != where and peer.address:
                problem = f"{peer.address}:{port} is also {first}"
                reading.faults.append(Fault(where, problem, "give every peer its own address or ports"))


def check_joins(reading: Reading, joins: Mapping[str, object], peers: Mapping[str, Peer], node_name: str) -> None:
    """Consul's ways to find other servers (``joins``): no effect beside peer blocks, a fault without them."""
    meant = {key: value for key, value in joins.items() if key != "bootstrap_expect" or _count(value) > 1}
    if peers or reading.dev or reading.incomplete or not meant or _joins_itself(reading, meant, node_name):
        reading.ignored.extend(joins)
        return
    reading.faults.append(
        Fault(
            next(iter(meant)),
            f"servers find each other by peer blocks, not by {', '.join(meant)}, and there are none",
            "write one block for every server, this one included, the same on every node:\n\n"
            + _blocks_for(meant, node_name),
        )
    )


def _joins_itself(reading: Reading, joins: Mapping[str, object], node_name: str) -> bool:
    """Whether this is a single server's file all the same: it says that there is one, and names no other."""
    given = reading.settings.values
    says_one = _count(given.get("bootstrap_expect")) == 1 or given.get("bootstrap") is True
    if not says_one or "bootstrap_expect" in joins:
        return False
    here = interfaces_here()
    own = {str(each.address) for each in here} | {"localhost", node_name.lower(), reading.hostname.lower()}
    for key in ("bind_addr", "advertise_addr", "advertise_addr_wan"):
        own.add(_expanded(given.get(key), here).lower())
    return all(
        "provider=" in item or host in own or host.partition(".")[0] in {node_name.lower(), reading.hostname.lower()}
        for item in _items(joins)
        if (host := _host_of(_expanded(item, here)).lower())
    )


def _expanded(value: object, here: Sequence[Interface]) -> str:
    try:
        return expand(value, here) if isinstance(value, str) else ""
    except ValueError:
        return ""


def _items(joins: Mapping[str, object]) -> list[str]:
    """What the ways to join name, one after the other."""
    lists = [value if isinstance(value, list) else [value] for key, value in joins.items() if key != "bootstrap_expect"]
    return [item for items in lists for item in items if isinstance(item, str)]


def read_secrets(reading: Reading, top: Fields, peers: Mapping[str, Peer]) -> tuple[Secret, ...]:
    """``cluster_secret``, one or several; the first seals and issues."""
    texts = top.texts("cluster_secret")
    for index, text in enumerate(texts):
        name = f"cluster_secret[{index}]" if len(texts) > 1 else "cluster_secret"
        try:
            decode_secret(text)
        except ValueError as exc:
            top.fault("cluster_secret", str(exc), name=name)
    if len(set(texts)) < len(texts):
        top.fault("cluster_secret", "the same secret is listed twice", "keep one of them")
    if not texts and peers and not reading.incomplete:
        top.fault("cluster_secret", "missing", "make one with `caserver keygen` and give it to every peer")
    if not texts and not peers and not reading.dev:
        reading.warnings.append(
            "cluster_secret: not set; one is generated in data_dir, beside what it seals: set it to keep them apart"
        )
    return tuple(map(Secret, texts))


def _count(value: object) -> int:
    text = str(value)
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0


def _blocks_for(joins: Mapping[str, object], node_name: str) -> str:
    """The peer blocks that stand for Consul's ways to find servers, to be completed by the reader."""
    hosts = dict.fromkeys(map(_host_of, _items(joins)))
    blocks = [(f"<node_name of {host}>", host) for host in hosts if is_host(host)]
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
