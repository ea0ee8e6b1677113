"""Handlers of ``/v1/agent``: the trust bundle and a service's leaf, as an agent serves them from its cache; this node itself."""

from __future__ import annotations

from caserver import nodes_wire, wire
from caserver.acl import SERVICE_WRITE
from caserver.api.connect_ca import check_enabled, roots_body, roots_key
from caserver.api.query import (
    CONTACT_MAX,
    Body,
    Call,
    NodeView,
    Reply,
    block,
    check_datacenter,
    check_namespace,
    initialized,
    metadata,
    patience,
    site,
)
from caserver.authority.operations import servers
from caserver.errors import InvalidCSR, InvalidQuery, InvalidRequest
from caserver.leaf_cache import CachedLeaf
from caserver.nodes_wire import encode_self
from caserver.pki.spiffe import ServiceID, is_other_identity, parse_service_uri
from caserver.settings_wire import encode_settings
from caserver.state.lifecycle import roots_index
from caserver.telemetry.metrics import prometheus

_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


async def get_roots(node: NodeView, call: Call) -> Reply:
    """The trust bundle out of this node's state; ``Age`` is how long ago the leader was heard."""
    check_enabled(node)
    check_datacenter(node, call.options)
    state = node.log.state if node.log.state.active_root is not None else await initialized(node, call)
    waited = await block(node, call.options, roots_index)
    state = node.log.state if waited else state
    pretty = call.options.pretty or node.dev
    hit = not waited and roots_key(state, pretty=pretty) in node.bodies
    headers = metadata(node, state.roots_index) | _cache_headers(hit=hit, age=node.log.leadership.last_contact)
    return Reply(roots_body(node, state, pretty=pretty), headers)


async def get_metrics(node: NodeView, call: Call) -> Reply:
    """The metrics of this node: Consul's JSON, or Prometheus' text with ``?format=prometheus``."""
    wanted = call.options.flags.get("format", "")
    if wanted == "prometheus":
        text = prometheus(await node.telemetry.totals())
        return Reply(Body(text.encode()), content_type=_PROMETHEUS)
    if wanted not in {"", "json"}:
        raise InvalidQuery(f'Invalid format "{wanted[:64]}"; use format=prometheus, or leave it out for JSON')
    ended, seconds, readings = await node.telemetry.interval()
    return Reply(Body(wire.render(wire.encode_metrics(readings, ended=ended, seconds=seconds), pretty=True)))


async def get_self(node: NodeView, call: Call) -> Reply:
    """This agent's description of itself: what it is, how it is set up, and how it is."""
    status = await node.raft.status()
    found = servers(status, now=node.clock.now().timestamp())
    settings = encode_settings(node.settings(), contact_max=status.contact_max)
    document = encode_self(settings, status, found, site(node))
    return Reply(Body(wire.render(document, pretty=call.options.pretty or node.dev)))


async def authorize(node: NodeView, call: Call) -> Reply:
    """Whether the client of a certificate may connect to a service; there are no intentions, so the default decides."""
    check_namespace(call.options)
    request = nodes_wire.decode_authorize(call.body.decode("utf-8", "replace"))
    client = _client(request.client_uri)
    check_enabled(node)
    target = SERVICE_WRITE.of(request.target)
    await node.gate.require(call.caller(node), target, operation="POST /v1/agent/connect/authorize")
    state = node.log.state if node.log.state.cluster_id else await initialized(node, call)
    authorized, reason = _default(node)
    if client.trust_domain != state.trust_domain:
        authorized, reason = False, f"Identity from an external trust domain: {client.trust_domain}"
    document = nodes_wire.encode_authorization(authorized=authorized, reason=reason)
    return Reply(Body(wire.render(document, pretty=call.options.pretty or node.dev)), _cache_headers(hit=False, age=0))


def _client(uri: str) -> ServiceID:
    try:
        return parse_service_uri(uri)
    except InvalidCSR as exc:
        kind = "Service" if is_other_identity(uri) else "Connect"
        raise InvalidRequest(f"Bad request: ClientCertURI not a valid {kind} identifier\n{exc.detail}") from exc


def _default(node: NodeView) -> tuple[bool, str]:
    """What holds where no intention speaks, and why."""
    settings = node.settings()
    wanted = settings.connect.authorize_default
    if wanted is None and settings.acl.enabled:
        return settings.acl.default_allow, "Default behavior configured by ACLs"
    if wanted is None:
        return True, "ACLs disabled, access is allowed by default"
    return wanted == "allow", "Default behavior configured by connect { authorize_default }"


async def reload(node: NodeView, _call: Call) -> Reply:
    """Read the settings and TLS files of this node again; an empty answer once they are in force."""
    await node.reload()
    return Reply()


async def get_leaf(node: NodeView, call: Call) -> Reply:
    """The leaf of the service named by the rest of the path, with its private key."""
    check_namespace(call.options)
    check_enabled(node)
    check_datacenter(node, call.options)
    options, caller = call.options, call.caller(node)
    if options.index:
        with node.blocked.slot():
            cached = await node.leaf_cache.leaf(
                caller, call.tail, after=options.index, wait=patience(options), fresh=options.fresh
            )
    else:
        cached = await node.leaf_cache.leaf(caller, call.tail, fresh=options.fresh)
    headers = _cache_headers(hit=cached.hit, age=cached.age) | {"X-Consul-Index": str(cached.leaf.index)}
    return Reply(_leaf_body(cached, pretty=options.pretty or node.dev), headers)


def _leaf_body(cached: CachedLeaf, *, pretty: bool) -> Body:
    body = cached.memo.get(pretty)
    if not isinstance(body, Body):
        body = Body(wire.render(wire.encode_leaf(cached.leaf, cached.key_pem), pretty=pretty))
        cached.memo[pretty] = body
    return body


def _cache_headers(*, hit: bool, age: float) -> dict[str, str]:
    return {"X-Cache": "HIT", "Age": str(int(min(age, CONTACT_MAX)))} if hit else {"X-Cache": "MISS"}
