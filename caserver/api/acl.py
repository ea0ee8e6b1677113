"""Handlers of ``/v1/acl``: tokens, policies, and the first management token. The leader decides every write."""

from __future__ import annotations

from caserver import wire
from caserver.acl_requests import (
    BootstrapACL,
    CloneToken,
    PolicyWritten,
    PutPolicy,
    PutToken,
    Removed,
    RemovePolicy,
    RemoveToken,
    TokenWritten,
    new_id,
)
from caserver.acl_wire import (
    decode_policy,
    decode_token,
    encode_bootstrap,
    encode_policy,
    encode_policy_stub,
    encode_token,
    encode_token_stub,
)
from caserver.api.query import (
    Body,
    Call,
    NodeView,
    Reply,
    block,
    check_datacenter,
    check_namespace,
    fresh_state,
    metadata,
    reached,
)
from caserver.authority.gate import UNKNOWN_TOKEN
from caserver.errors import ACLDisabled, InvalidRequest, PermissionDenied
from caserver.fields import Secret
from caserver.raft.ports import Leadership
from caserver.requests import Request
from caserver.state.acl import ACLState, Policy, Token
from caserver.state.model import CAState

_CLONE = "/clone"


def acl_index(state: CAState, _leadership: Leadership) -> int:
    """Selector: the index that a blocking query on tokens and policies waits for."""
    return state.acl.index


def _check(node: NodeView, call: Call) -> None:
    """What holds whatever was asked for, and is said first."""
    if not node.settings().acl.enabled:
        raise ACLDisabled
    check_namespace(call.options)
    check_datacenter(node, call.options)


async def _read(node: NodeView, call: Call) -> ACLState:
    """Tokens and policies as fresh as was asked for, once they changed if the caller waits for that."""
    state = await fresh_state(node, call)
    if await block(node, call.options, acl_index):
        state = node.log.state
    return state.acl


def _json(node: NodeView, call: Call, document: object, acl: ACLState | None = None) -> Reply:
    headers = {} if acl is None else metadata(node, acl.index, stale=call.options.stale)
    return Reply(Body(wire.render(document, pretty=call.options.pretty or node.dev)), headers)


def _text(call: Call) -> str:
    return call.body.decode("utf-8", "replace")


def _secret_from(node: NodeView) -> Secret:
    return Secret(new_id(node.entropy.bytes(16)))


async def bootstrap(node: NodeView, call: Call) -> Reply:
    """Make the first management token; its secret is shown here and nowhere else."""
    _check(node, call)
    secret = _secret_from(node)
    request = BootstrapACL(accessor_id=new_id(node.entropy.bytes(16)), secret=secret.reveal())
    token, acl = await _written_token(node, call, request)
    return _json(node, call, encode_bootstrap(token, acl, secret=secret))


async def list_tokens(node: NodeView, call: Call) -> Reply:
    """Every token that counts, without secrets; ``?policy=`` only those that have that policy."""
    _check(node, call)
    acl = await _read(node, call)
    flags, now = call.options.flags, node.clock.now().timestamp()
    wanted = flags.get("policy", "").lower()
    foreign = flags.get("role") or flags.get("authmethod")  # no token has any
    found = [
        token
        for _, token in sorted(acl.tokens.items())
        if not (foreign or token.is_expired(now)) and (not wanted or wanted in token.policies)
    ]
    return _json(node, call, [encode_token_stub(token, acl) for token in found], acl)


async def create_token(node: NodeView, call: Call) -> Reply:
    """Make a token; its secret is shown here and nowhere else."""
    _check(node, call)
    document = decode_token(_text(call))
    secret = document.secret or _secret_from(node)
    request = PutToken(
        accessor_id=document.accessor_id or new_id(node.entropy.bytes(16)),
        secret=secret.reveal(),
        create=True,
        body=_text(call),
    )
    token, acl = await _written_token(node, call, request)
    return _json(node, call, encode_token(token, acl, secret=secret))


async def get_own_token(node: NodeView, call: Call) -> Reply:
    """The token that the caller shows."""
    _check(node, call)
    state = await fresh_state(node, call)
    token = None if call.options.token is None else node.gate.token(call.caller(node))
    if token is None:
        raise PermissionDenied(UNKNOWN_TOKEN)
    return _json(node, call, encode_token(token, state.acl), state.acl)


async def get_token(node: NodeView, call: Call) -> Reply:
    """One token by its accessor id, without its secret."""
    _check(node, call)
    accessor_id = _id(call.tail, "token ID")
    acl = await _read(node, call)
    token = acl.tokens.get(accessor_id)
    if token is None or token.is_expired(node.clock.now().timestamp()):
        raise PermissionDenied(UNKNOWN_TOKEN)
    return _json(node, call, encode_token(token, acl), acl)


async def put_token(node: NodeView, call: Call) -> Reply:
    """Change what a token stands for, or make one that stands for the same (``.../clone``)."""
    _check(node, call)
    if call.tail.endswith(_CLONE):
        return await _clone_token(node, call)
    document = decode_token(_text(call))
    accessor_id = call.tail.lower()
    if document.accessor_id not in {"", accessor_id}:
        raise InvalidRequest("Bad request: Token Accessor ID in URL and payload do not match")
    request = PutToken(accessor_id=accessor_id, secret="", create=False, body=_text(call))
    token, acl = await _written_token(node, call, request)
    return _json(node, call, encode_token(token, acl))


async def _clone_token(node: NodeView, call: Call) -> Reply:
    description = decode_token(_text(call)).description if call.body.strip() else ""  # Consul takes no body, too
    secret = _secret_from(node)
    request = CloneToken(
        source_id=call.tail.removesuffix(_CLONE).lower(),
        accessor_id=new_id(node.entropy.bytes(16)),
        secret=secret.reveal(),
        description=description,
    )
    token, acl = await _written_token(node, call, request)
    return _json(node, call, encode_token(token, acl, secret=secret))


async def delete_token(node: NodeView, call: Call) -> Reply:
    """Forget a token."""
    _check(node, call)
    accessor_id = _id(call.tail, "token ID")
    await _removed(node, call, RemoveToken(accessor_id))
    return _json(node, call, document=True)


async def list_policies(node: NodeView, call: Call) -> Reply:
    """Every policy, without its rules."""
    _check(node, call)
    acl = await _read(node, call)
    return _json(node, call, [encode_policy_stub(each) for _, each in sorted(acl.policies.items())], acl)


async def create_policy(node: NodeView, call: Call) -> Reply:
    """Make a policy."""
    _check(node, call)
    if decode_policy(_text(call)).id:
        raise InvalidRequest("Bad request: Cannot specify the ID when creating a new policy")
    request = PutPolicy(policy_id=new_id(node.entropy.bytes(16)), create=True, body=_text(call))
    return _json(node, call, encode_policy(await _written_policy(node, call, request)))


async def get_policy(node: NodeView, call: Call) -> Reply:
    """One policy by its id."""
    _check(node, call)
    policy_id = _id(call.tail, "policy ID")
    acl = await _read(node, call)
    return _policy(node, call, acl, acl.policies.get(policy_id))


async def get_policy_by_name(node: NodeView, call: Call) -> Reply:
    """One policy by its name."""
    _check(node, call)
    name = _id(call.tail, "policy Name", fold=False)
    acl = await _read(node, call)
    return _policy(node, call, acl, acl.policy_named(name))


def _policy(node: NodeView, call: Call, acl: ACLState, policy: Policy | None) -> Reply:
    if policy is None:
        raise PermissionDenied(UNKNOWN_TOKEN)  # Consul's words for a policy, too
    return _json(node, call, encode_policy(policy), acl)


async def put_policy(node: NodeView, call: Call) -> Reply:
    """Change a policy."""
    _check(node, call)
    policy_id = call.tail.lower()
    if decode_policy(_text(call)).id not in {"", policy_id}:
        raise InvalidRequest("Bad request: Policy ID in URL and payload do not match")
    request = PutPolicy(policy_id=policy_id, create=False, body=_text(call))
    return _json(node, call, encode_policy(await _written_policy(node, call, request)))


async def delete_policy(node: NodeView, call: Call) -> Reply:
    """Forget a policy; tokens lose it."""
    _check(node, call)
    policy_id = _id(call.tail, "policy ID")
    await _removed(node, call, RemovePolicy(policy_id))
    return _json(node, call, document=True)


def _id(tail: str, what: str, *, fold: bool = True) -> str:
    if not tail:
        raise InvalidRequest(f"Bad request: Missing {what}")
    return tail.lower() if fold else tail


async def _written_token(node: NodeView, call: Call, request: Request) -> tuple[Token, ACLState]:
    answer = await node.leader.execute(call.caller(node), request)
    if not isinstance(answer, TokenWritten):
        raise TypeError(f"{type(request).__name__} was answered by {type(answer).__name__}")
    await reached(node, answer.token.modify_index)
    return answer.token, node.log.state.acl


async def _written_policy(node: NodeView, call: Call, request: PutPolicy) -> Policy:
    answer = await node.leader.execute(call.caller(node), request)
    if not isinstance(answer, PolicyWritten):
        raise TypeError(f"writing a policy was answered by {type(answer).__name__}")
    await reached(node, answer.policy.modify_index)
    return answer.policy


async def _removed(node: NodeView, call: Call, request: RemoveToken | RemovePolicy) -> None:
    """What was removed counts no more on this node, at least, when the caller is told."""
    answer = await node.leader.execute(call.caller(node), request)
    if not isinstance(answer, Removed):
        raise TypeError(f"{type(request).__name__} was answered by {type(answer).__name__}")
    await reached(node, answer.index)
