"""Handlers of ``/v1/operator`` and ``/v1/status``: who is in the cluster, who leads, is this node fit to serve."""

from __future__ import annotations

from caserver import wire
from caserver.api import status
from caserver.api.query import Body, Call, NodeView, Reply, check_datacenter, fresh_state, known_leader
from caserver.authority.operations import TRAILING_MAX, servers
from caserver.errors import InvalidRequest
from caserver.requests import ReadServers, ServersRead, TransferLeadership
from caserver.state.key_change import keyring_status


def _address(node: NodeView, name: str | None) -> str:
    if name is None or name not in node.peers:
        return ""
    host, port = node.peers[name]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _json(node: NodeView, call: Call, document: object, code: int = status.OK) -> Reply:
    return Reply(Body(wire.render(document, pretty=call.options.pretty or node.dev)), status=code)


async def get_leader(node: NodeView, call: Call) -> Reply:
    """Raft address of the leader as this node knows it, an empty text if it knows none."""
    check_datacenter(node, call.options)
    return _json(node, call, _address(node, node.log.leadership.leader))


async def get_peers(node: NodeView, call: Call) -> Reply:
    """Raft addresses of all servers."""
    check_datacenter(node, call.options)
    return _json(node, call, [_address(node, name) for name in sorted(node.peers)])


async def get_live(node: NodeView, call: Call) -> Reply:
    """This process answers."""
    return _json(node, call, {"Live": True})


async def get_ready(node: NodeView, call: Call) -> Reply:
    """Whether this node can serve, and what is amiss; 503 if it cannot."""
    readiness = node.ready()
    document = wire.encode_readiness(ready=readiness.ready, degraded=readiness.degraded)
    return _json(node, call, document, status.OK if readiness.ready else status.NOT_READY)


async def get_raft_configuration(node: NodeView, call: Call) -> Reply:
    """All servers with their Raft addresses, who leads and who votes; held a while for a leader unless it may be stale."""
    check_datacenter(node, call.options)
    found = await _servers(node, call)
    return _json(node, call, wire.encode_raft_configuration(found, _addresses(node)))


async def _servers(node: NodeView, call: Call) -> ServersRead:
    """The servers as the leader sees them, or with ``?stale`` as this node does."""
    if call.options.stale:
        return servers(await node.raft.status(), now=node.clock.now().timestamp())
    answer = await node.leader.execute(call.caller(node), ReadServers(consistent=call.options.consistent))
    if not isinstance(answer, ServersRead):
        raise TypeError(f"reading the servers was answered by {type(answer).__name__}")
    return answer


def _addresses(node: NodeView) -> dict[str, str]:
    return {name: _address(node, name) for name in node.peers}


async def transfer_leader(node: NodeView, call: Call) -> Reply:
    """Let another server lead, the one named by ``?id=`` or the one that is furthest; done when it does."""
    check_datacenter(node, call.options)
    await known_leader(node)
    request = TransferLeadership(
        to=call.options.flags.get("id") or None, away_from=node.log.leadership.leader or node.node_name
    )
    await node.leader.execute(call.caller(node), request)
    return _json(node, call, wire.encode_transfer())


async def remove_peer(node: NodeView, call: Call) -> Reply:
    """Refuse to forget a server, and say how the list of servers changes."""
    check_datacenter(node, call.options)
    flags = call.options.flags
    wanted = [(kind, flags[kind]) for kind in ("id", "address") if flags.get(kind)]
    if len(wanted) > 1:
        raise InvalidRequest("Must specify only one of ?id or ?address")
    if not wanted:
        raise InvalidRequest("Must specify either ?id with the server's ID or ?address with IP:port of peer to remove")
    kind, value = wanted[0]
    known = node.peers if kind == "id" else _addresses(node).values()
    if value not in known:
        raise InvalidRequest(f'{kind} "{value[:128]}" was not found in the Raft configuration')
    raise InvalidRequest(
        "the servers of a cluster are those of the peer blocks of their files and do not change while it runs\n"
        "a server that died is replaced under its own name: start the replacement with -rejoin\n"
        "to do with fewer servers, stop all, `caserver operator recover export`, and `import` with the shorter list"
    )


async def get_autopilot_health(node: NodeView, call: Call) -> Reply:
    """How the servers are, as the leader sees them; 429 if one is not well."""
    check_datacenter(node, call.options)
    found = await _servers(node, call)
    document = wire.encode_health(found, _addresses(node))
    return _json(node, call, document, status.OK if found.healthy else status.UNHEALTHY)


async def get_autopilot_configuration(node: NodeView, call: Call) -> Reply:
    """What the health of servers is judged by; fixed by the configuration files."""
    check_datacenter(node, call.options)
    found = await node.raft.status()
    return _json(node, call, wire.encode_autopilot(contact_max=found.contact_max, trailing_max=TRAILING_MAX))


async def get_keyring(node: NodeView, call: Call) -> Reply:
    """Which keys of the cluster secret every node holds and stores, and which may be taken off the lists."""
    check_datacenter(node, call.options)
    state = await fresh_state(node, call)
    return _json(node, call, wire.encode_keyring(keyring_status(state, node.log.leadership)))
