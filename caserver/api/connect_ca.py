"""Handlers of ``/v1/connect/ca``: the trust bundle, the configuration, signing of CSRs."""

from __future__ import annotations

import re

from caserver import gojson, wire
from caserver.api import status
from caserver.api.query import (
    Body,
    Call,
    NodeView,
    Reply,
    block,
    check_datacenter,
    fresh_state,
    initialized,
    metadata,
)
from caserver.cleanup_requests import CleanupsRead, ForgetCleanup, ReadCleanups
from caserver.environment import within
from caserver.errors import ConnectDisabled, InvalidQuery, InvalidRequest, NotInitialized, from_kind
from caserver.raft.ports import Leadership
from caserver.requests import ChangeConfiguration, Failure, IssuedLeaf, LeavesSigned, SignLeaves
from caserver.state.lifecycle import roots_index
from caserver.state.model import CAState, Configuration

PEM_TYPE = "application/pem-certificate-chain"  # RFC 8555 9.1
_TRUE = {"", "1", "t", "true"}
_FALSE = {"0", "f", "false"}
_CAS = re.compile(r"[0-9]{1,19}")
_HELD_FOR_CONFIGURATION = 7.0  # seconds


def check_enabled(node: NodeView) -> None:
    """ConnectDisabled if this node runs without Connect."""
    if not node.connect_enabled:
        raise ConnectDisabled


def flag(call: Call, name: str) -> bool:
    """A boolean parameter: absent is false, present without a value is true; InvalidQuery for anything else."""
    value = call.options.flags.get(name)
    if value is None or value.lower() in _FALSE:
        return False
    if value.lower() in _TRUE:
        return True
    raise InvalidQuery(f'Invalid {name} value "{value}"; use {name}=true or {name}=false')


def roots_key(state: CAState, *, pretty: bool) -> tuple[object, ...]:
    """What determines the bytes of the roots document."""
    return (state.cluster_id, state.roots_index, pretty, *(root.id for root in state.roots))


def roots_body(node: NodeView, state: CAState, *, pretty: bool) -> Body:
    """The roots document; rendered once per change of the bundle, not per request."""
    key = roots_key(state, pretty=pretty)
    return node.bodies.get(key, lambda: wire.render(wire.encode_roots(state), pretty=pretty))


async def get_roots(node: NodeView, call: Call) -> Reply:
    """The trust bundle, as JSON or with ``?pem=true`` as one PEM file."""
    check_enabled(node)
    check_datacenter(node, call.options)
    as_pem = flag(call, "pem")
    state = await initialized(node, call)
    if await block(node, call.options, roots_index, jitter=True):
        state = node.log.state
    headers = metadata(node, state.roots_index, stale=call.options.stale)
    if as_pem:
        return Reply(Body(wire.pem_bundle(state)), headers, content_type=PEM_TYPE)
    return Reply(roots_body(node, state, pretty=call.options.pretty or node.dev), headers)


def configuration_of(state: CAState, _leadership: Leadership) -> Configuration | None:
    """Selector: the configuration in force."""
    return state.configuration


async def get_configuration(node: NodeView, call: Call) -> Reply:
    """The configuration in force, secrets as ``<redacted>``."""
    check_enabled(node)
    check_datacenter(node, call.options)
    state = await fresh_state(node, call)
    configuration = state.configuration
    if configuration is None:
        try:
            configuration = await within(node.clock, _HELD_FOR_CONFIGURATION, node.log.changed(configuration_of, None))
        except TimeoutError:
            configuration = None
    if configuration is None:
        raise NotInitialized("the CA is not configured yet; see /v1/status/ready for the reason")
    document = wire.encode_configuration(configuration)
    return Reply(Body(wire.render(document, pretty=call.options.pretty or node.dev)))


async def put_configuration(node: NodeView, call: Call) -> Reply:
    """Replace the configuration; ``?cas=`` is the ModifyIndex it must have, ``?force=true`` overrides the proof of a rotation."""
    body = call.body.decode("utf-8", "replace")
    try:
        gojson.decode(body)
    except ValueError as exc:
        raise InvalidRequest(f"Bad request: Request decode failed: {exc}") from exc
    check_enabled(node)
    check_datacenter(node, call.options)
    request = ChangeConfiguration(body=body, cas=_cas(call), force=flag(call, "force"))
    await node.leader.execute(call.caller(node), request)
    return Reply()


def _cas(call: Call) -> int | None:
    given = call.options.flags.get("cas", "")
    if not given:
        return None
    if _CAS.fullmatch(given) is None:
        raise InvalidQuery(f'Invalid cas value "{given}"; use the ModifyIndex of the configuration that was read')
    return int(given)


async def put_sign(node: NodeView, call: Call) -> Reply:
    """Sign the caller's CSR, or each of a list on its own merits; the caller holds the keys."""
    try:
        body = wire.decode_sign(call.body.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise InvalidRequest("Bad request: Request decode failed: the body is not UTF-8; send PEM or JSON") from exc
    check_enabled(node)
    check_datacenter(node, call.options)
    answer = await node.leader.execute(call.caller(node), SignLeaves(csrs=body.csrs))
    if not isinstance(answer, LeavesSigned) or len(answer.results) != len(body.csrs):
        raise TypeError(f"signing {len(body.csrs)} CSRs was answered by {type(answer).__name__}")
    signed = [_result(each) for each in answer.results] if body.listed else wire.encode_leaf(_leaf(answer.results[0]))
    return Reply(Body(wire.render(signed, pretty=call.options.pretty or node.dev)))


async def get_cleanups(node: NodeView, call: Call) -> Reply:
    """What is still owed at the backends of former CA providers, as the leader knows it."""
    check_enabled(node)
    check_datacenter(node, call.options)
    answer = await node.leader.execute(call.caller(node), ReadCleanups())
    if not isinstance(answer, CleanupsRead):
        raise TypeError(f"reading the clean-ups was answered by {type(answer).__name__}")
    return Reply(Body(wire.render(wire.encode_cleanups(answer), pretty=call.options.pretty or node.dev)))


async def forget_cleanup(node: NodeView, call: Call) -> Reply:
    """Give up the clean-up that ``?id=`` names; what it would have removed stays at its backend."""
    check_enabled(node)
    check_datacenter(node, call.options)
    cleanup_id = call.options.flags.get("id", "")
    if not cleanup_id:
        raise InvalidRequest("Must specify with ?id= which clean-up to forget; GET /v1/connect/ca/cleanup lists them")
    await node.leader.execute(call.caller(node), ForgetCleanup(cleanup_id=cleanup_id))
    return Reply(Body(wire.render(wire.encode_forgotten(), pretty=call.options.pretty or node.dev)))


def _leaf(result: IssuedLeaf | Failure) -> IssuedLeaf:
    if isinstance(result, Failure):
        raise from_kind(result.kind, result.detail)
    return result


def _result(result: IssuedLeaf | Failure) -> wire.Document:
    if isinstance(result, Failure):
        error = from_kind(result.kind, result.detail)
        return wire.encode_failure(status.text_of(error), status.status_of(error))
    return wire.encode_leaf(result)
