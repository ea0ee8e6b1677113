"""Handlers of what Consul's clients ask about servers: members, the catalog's nodes and the checks of a node.

Only servers are known here, since this is no service discovery; clients ask for them when they start. Who they are says the
configuration, who is alive say this node's links. A server that the caller may not read of is left out, as in Consul.
"""

from __future__ import annotations

from contextlib import suppress

from caserver import nodes_wire, wire
from caserver.acl import NODE_READ
from caserver.api.query import (
    Body,
    Call,
    NodeView,
    Reply,
    check_datacenter,
    check_namespace,
    fresh_state,
    metadata,
    patience,
    site,
)
from caserver.environment import within
from caserver.errors import InvalidQuery, InvalidRequest
from caserver.nodes_wire import Server
from caserver.raft.ports import Leadership
from caserver.state.model import CAState

_ALL_SEGMENTS = "_all"


def links(_state: CAState, leadership: Leadership) -> tuple[tuple[str, bool], ...]:
    """Selector: the other servers, and which of them this node is linked to."""
    return tuple(sorted(leadership.peers.items()))


async def get_members(node: NodeView, call: Call) -> Reply:
    """The servers as this node sees them, alive or failed."""
    segment, wan = call.options.flags.get("segment", ""), call.options.flags.get("wan", "") != ""
    if segment not in {"", _ALL_SEGMENTS}:
        fault = "Network segments are not supported in this version of Consul"
        raise InvalidQuery("Cannot provide a segment with wan=true" if wan else fault)
    found = await _readable(node, call)
    return _json(node, call, nodes_wire.encode_members(found, site(node), wan=wan))


async def get_nodes(node: NodeView, call: Call) -> Reply:
    """The servers as nodes of the catalog; waits with ``?index=`` until one comes or goes."""
    check_datacenter(node, call.options)
    _refuse_filter(call)
    found, index, headers = await _watched(node, call)
    nodes = nodes_wire.encode_nodes(found, site(node), index=index)
    wanted = call.options.flags.get("node-meta", "")
    key, _, value = wanted.partition(":")
    nodes = [each for each in nodes if not wanted or each["Meta"].get(key) == value]
    return _json(node, call, nodes, headers)


async def get_checks(node: NodeView, call: Call) -> Reply:
    """The check of one server, none for a node that is no server; waits with ``?index=`` until one comes or goes."""
    check_namespace(call.options)
    check_datacenter(node, call.options)
    _refuse_filter(call)
    if not call.tail:
        raise InvalidRequest("Missing node name")
    found, index, headers = await _watched(node, call)
    server = next((each for each in found if each.name.lower() == call.tail.lower()), None)
    return _json(node, call, [] if server is None else nodes_wire.encode_checks(server, index=index), headers)


def _json(node: NodeView, call: Call, document: object, headers: dict[str, str] | None = None) -> Reply:
    return Reply(Body(wire.render(document, pretty=call.options.pretty or node.dev)), headers or {})


def _refuse_filter(call: Call) -> None:
    if call.options.flags.get("filter"):
        raise InvalidQuery(
            "Failed to create boolean expression evaluator: filters are not supported here; leave it out"
        )


async def _readable(node: NodeView, call: Call) -> list[Server]:
    """Those of the servers that the caller may read of, by name."""
    names = sorted(node.peers)
    covered = await node.gate.covered(
        call.caller(node), [NODE_READ.of(name) for name in names], operation="reading of the servers"
    )
    linked = node.log.leadership.peers
    return [
        Server(name, connected=name == node.node_name or linked.get(name, False))
        for name, may in zip(names, covered, strict=True)
        if may
    ]


async def _watched(node: NodeView, call: Call) -> tuple[list[Server], int, dict[str, str]]:
    """The servers, their index and the X-Consul headers, once the index has passed the caller's or its patience ended."""
    options = call.options
    await _readable(node, call)  # not with a token that is none
    await fresh_state(node, call)  # as of any read: not without a leader, unless it may be stale
    if options.index and _look(node) <= options.index:
        with node.blocked.slot(), suppress(TimeoutError):
            await within(node.clock, patience(options), _passed(node, options.index))
    found = await _readable(node, call)
    index = _look(node)
    return found, index, metadata(node, index, stale=options.stale)


def _look(node: NodeView) -> int:
    """The index of what this node sees now."""
    return node.roster.look(links(node.log.state, node.log.leadership), node.log.state.index)


async def _passed(node: NodeView, index: int) -> None:
    seen = links(node.log.state, node.log.leadership)
    while node.roster.look(seen, node.log.state.index) <= index:
        seen = await node.log.changed(links, seen)
