"""Handlers of what Consul's clients ask about servers: members, the catalog's nodes and the checks of a node.

Only servers are known here, since this is no service discovery; clients ask for them when they start.
"""

from __future__ import annotations

from contextlib import suppress

from caserver import nodes_wire, wire
from caserver.acl import NODE_READ
from caserver.api.query import Body, Call, NodeView, Reply, check_datacenter, fresh_state, metadata, patience, site
from caserver.authority.operations import servers
from caserver.environment import within
from caserver.errors import InvalidQuery, InvalidRequest
from caserver.requests import ServersRead

LOOK_AGAIN = 1.0  # seconds between two looks of a query that waits for a server to come or go
_ALL_SEGMENTS = "_all"


async def get_members(node: NodeView, call: Call) -> Reply:
    """The servers as this node sees them, alive or failed."""
    segment = call.options.flags.get("segment", "")
    if segment not in {"", _ALL_SEGMENTS}:
        raise InvalidQuery("Network segments are not supported in this version of Consul")
    found = await _readable(node, call, await _seen(node))
    wan = call.options.flags.get("wan", "") != ""
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
    check_datacenter(node, call.options)
    _refuse_filter(call)
    if not call.tail:
        raise InvalidRequest("Missing node name")
    found, index, headers = await _watched(node, call)
    server = next((each for each in found.servers if each.name.lower() == call.tail.lower()), None)
    return _json(node, call, [] if server is None else nodes_wire.encode_checks(server, index=index), headers)


def _json(node: NodeView, call: Call, document: object, headers: dict[str, str] | None = None) -> Reply:
    return Reply(Body(wire.render(document, pretty=call.options.pretty or node.dev)), headers or {})


def _refuse_filter(call: Call) -> None:
    if call.options.flags.get("filter"):
        raise InvalidQuery(
            "Failed to create boolean expression evaluator: filters are not supported here; leave it out"
        )


async def _readable(node: NodeView, call: Call, found: ServersRead) -> ServersRead:
    """Those of the servers that the caller may read of."""
    caller = call.caller(node)
    refusals = [await node.gate.refusal(caller, NODE_READ.of(each.name)) for each in found.servers]
    return ServersRead(tuple(each for each, refusal in zip(found.servers, refusals, strict=True) if refusal is None))


async def _seen(node: NodeView) -> ServersRead:
    """The servers as this node sees them."""
    return servers(await node.raft.status(), now=node.clock.now().timestamp())


async def _watched(node: NodeView, call: Call) -> tuple[ServersRead, int, dict[str, str]]:
    """The servers, their index and the X-Consul headers, once the index has passed the caller's or its patience ended."""
    options = call.options
    await fresh_state(node, call)  # as of any read: not without a leader, unless it may be stale
    found = await _look(node)
    if options.index and node.roster.index <= options.index:
        with node.blocked.slot(), suppress(TimeoutError):
            await within(node.clock, patience(options), _passed(node, options.index))
        found = await _look(node)
    return await _readable(node, call, found), node.roster.index, metadata(node, node.roster.index, stale=options.stale)


async def _look(node: NodeView) -> ServersRead:
    found = await _seen(node)
    node.roster.look(tuple((each.name, each.connected) for each in found.servers), node.log.state.index)
    return found


async def _passed(node: NodeView, index: int) -> None:
    while node.roster.index <= index:
        await node.clock.sleep(LOOK_AGAIN)
        await _look(node)
