"""Handlers of ``/v1/operator`` and ``/v1/status``: who is in the cluster, who leads, is this node fit to serve."""

from __future__ import annotations

from caserver import wire
from caserver.api import status
from caserver.api.query import Body, Call, NodeView, Reply, check_datacenter, fresh_state, known_leader
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
    return _json(node, call, _address(node, node.log.leadership.leader))


async def get_peers(node: NodeView, call: Call) -> Reply:
    """Raft addresses of all servers."""
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
    """All servers with their Raft addresses and who leads; held a while for a leader unless it may be stale."""
    check_datacenter(node, call.options)
    if call.options.consistent:
        await fresh_state(node, call)
    elif not call.options.stale:
        await known_leader(node)
    peers = {name: _address(node, name) for name in node.peers}
    return _json(node, call, wire.encode_raft_configuration(peers, node.log.leadership.leader))


async def get_keyring(node: NodeView, call: Call) -> Reply:
    """Which keys of the cluster secret every node holds and stores, and which may be taken off the lists."""
    check_datacenter(node, call.options)
    state = await fresh_state(node, call)
    return _json(node, call, wire.encode_keyring(keyring_status(state, node.log.leadership)))
