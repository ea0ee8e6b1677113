"""Applying the commands of ``state.acl_commands``: pure, deterministic and total, like all of ``state.apply``."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from caserver.state.acl import (
    ANONYMOUS_DESCRIPTION,
    ANONYMOUS_ID,
    MANAGEMENT_ID,
    ACLState,
    Policy,
    Token,
    earliest_expiry,
)
from caserver.state.acl_commands import (
    ACLBootstrap,
    ACLCommand,
    ACLInitialize,
    DeletePolicy,
    DeleteToken,
    SetPolicy,
    SetToken,
)
from caserver.state.commands import Applied, Reason, Refused, Result
from caserver.state.ledger import without
from caserver.state.model import CAState, Index, RequestRecord
from caserver.state.repeats import next_index, refuse_duplicate, with_request

Step = tuple[CAState, Result]


def apply_acl(state: CAState, command: ACLCommand) -> Step:
    """The state after ``command`` and its result; the same state if it is refused."""
    if isinstance(command, ACLInitialize):
        return _initialize(state, command)
    refusal = refuse_duplicate(state, command.request_id) or _refusal(state, command)
    if refusal is not None:
        return state, refusal
    index = next_index(state)
    acl, subject = _changed(state.acl, command, index)
    record = RequestRecord(command.at, index, subject)
    requests = with_request(state, command.request_id, record)
    return replace(state, index=index, acl=replace(acl, index=index), requests=requests), Applied(index)


def without_expired(acl: ACLState, now: int) -> ACLState:
    """``acl`` without the tokens that have expired."""
    if acl.next_expiry is None or acl.next_expiry > now:
        return acl
    for token in [each for each in acl.tokens.values() if each.is_expired(now)]:
        acl = _without_token(acl, token)
    return replace(acl, next_expiry=earliest_expiry(acl.tokens.values()))


def _initialize(state: CAState, command: ACLInitialize) -> Step:
    if state.sealed_hmac_key is None:
        return state, Refused(Reason.NOT_BOOTSTRAPPED)
    index = next_index(state)
    acl = _with_management(state.acl, command.management, index)
    if ANONYMOUS_ID not in acl.tokens:
        acl = _with_token(acl, _anonymous(command.at), index)
    initial = command.initial
    if initial is not None and acl.token_of(initial.secret_hash) is None:
        refusal = _refuse_new_token(acl, initial)
        if refusal is not None:
            return state, refusal
        acl = _with_token(acl, initial, index)
        acl = replace(acl, bootstrap_index=acl.bootstrap_index or index)
    if acl is state.acl:
        return state, Refused(Reason.DUPLICATE_REQUEST, "everything is there already")
    return replace(state, index=index, acl=replace(acl, index=index)), Applied(index)


def _with_management(acl: ACLState, policy: Policy, index: Index) -> ACLState:
    known = acl.policies.get(MANAGEMENT_ID)
    if known is not None and (known.rules, known.grants) == (policy.rules, policy.grants):
        return acl
    if known is not None:  # its name and description are the operator's to change
        policy = replace(known, rules=policy.rules, grants=policy.grants)
    return _with_policy(acl, replace(policy, id=MANAGEMENT_ID), index)


def _anonymous(at: int) -> Token:
    return Token(ANONYMOUS_ID, b"", ANONYMOUS_DESCRIPTION, (), (), local=False, created_at=at, expires_at=None)


# Refusals -------------------------------------------------------------------------------------------------------------


def _refusal(
    state: CAState, command: ACLBootstrap | SetToken | DeleteToken | SetPolicy | DeletePolicy
) -> Refused | None:
    acl = state.acl
    match command:
        case ACLBootstrap():
            if acl.bootstrap_index != command.reset_index:
                return Refused(Reason.STALE_INDEX, f"bootstrapped at {acl.bootstrap_index}")
            return _refuse_new_token(acl, command.token)
        case SetToken():
            return _refuse_token(acl, command)
        case DeleteToken(accessor_id=accessor_id):
            if accessor_id == ANONYMOUS_ID or accessor_id not in acl.tokens:
                return Refused(Reason.NO_SUCH_TOKEN, accessor_id)
        case SetPolicy():
            return _refuse_policy(acl, command)
        case DeletePolicy(policy_id=policy_id):
            if policy_id == MANAGEMENT_ID or policy_id not in acl.policies:
                return Refused(Reason.NO_SUCH_POLICY, policy_id)
        case _:
            assert_never(command)
    return None


def _refuse_token(acl: ACLState, command: SetToken) -> Refused | None:
    token, known = command.token, acl.tokens.get(command.token.accessor_id)
    if (0 if known is None else known.modify_index) != command.expect:
        return Refused(Reason.STALE_INDEX, f"token {token.accessor_id} changed")
    if known is None:
        return _refuse_new_token(acl, token)
    if _lasting(known) != _lasting(token):
        return Refused(Reason.INVALID, "the secret, the age, the reach and the expiry of a token never change")
    return _refuse_links(acl, token)


def _lasting(token: Token) -> tuple[object, ...]:
    """What a token keeps as long as it lives."""
    return token.secret_hash, token.created_at, token.local, token.expires_at


def _refuse_new_token(acl: ACLState, token: Token) -> Refused | None:
    if not (token.accessor_id and token.secret_hash):
        return Refused(Reason.INVALID, "the token lacks its id or its secret")
    if token.accessor_id in acl.tokens or token.secret_hash in acl.by_hash:
        return Refused(Reason.STALE_INDEX, "there is a token of that id or secret")
    return _refuse_links(acl, token)


def _refuse_links(acl: ACLState, token: Token) -> Refused | None:
    missing = next((each for each in token.policies if each not in acl.policies), None)
    return None if missing is None else Refused(Reason.NO_SUCH_POLICY, missing)


def _refuse_policy(acl: ACLState, command: SetPolicy) -> Refused | None:
    policy, known = command.policy, acl.policies.get(command.policy.id)
    if (0 if known is None else known.modify_index) != command.expect:
        return Refused(Reason.STALE_INDEX, f"policy {policy.id} changed")
    if not (policy.id and policy.name):
        return Refused(Reason.INVALID, "the policy lacks its id or its name")
    namesake = acl.policy_named(policy.name)
    if namesake is not None and namesake.id != policy.id:
        return Refused(Reason.STALE_INDEX, f"there is a policy of the name {policy.name}")
    if policy.id == MANAGEMENT_ID and (known is None or known.grants != policy.grants):
        return Refused(Reason.INVALID, "the builtin policy grants what it grants")
    return None


# Parts of the next state ----------------------------------------------------------------------------------------------


def _changed(
    acl: ACLState, command: ACLBootstrap | SetToken | DeleteToken | SetPolicy | DeletePolicy, index: Index
) -> tuple[ACLState, str]:
    """The tokens and policies after a command that nothing stands against, and the id of what it was about."""
    match command:
        case ACLBootstrap(token=token):
            return replace(_with_token(acl, token, index), bootstrap_index=index), token.accessor_id
        case SetToken(token=token):
            return _with_token(acl, token, index), token.accessor_id
        case DeleteToken(accessor_id=accessor_id):
            gone = _without_token(acl, acl.tokens[accessor_id])
            return replace(gone, next_expiry=earliest_expiry(gone.tokens.values())), accessor_id
        case SetPolicy(policy=policy):
            return _with_policy(acl, policy, index), policy.id
        case DeletePolicy(policy_id=policy_id):
            return _without_policy(acl, policy_id, index), policy_id
        case _:
            assert_never(command)


def _with_token(acl: ACLState, token: Token, index: Index) -> ACLState:
    known = acl.tokens.get(token.accessor_id)
    token = replace(token, create_index=index if known is None else known.create_index, modify_index=index)
    expiries = [each for each in (acl.next_expiry, token.expires_at) if each is not None]
    return replace(
        acl,
        tokens=acl.tokens.set(token.accessor_id, token),
        by_hash=acl.by_hash.set(token.secret_hash, token.accessor_id) if token.secret_hash else acl.by_hash,
        next_expiry=min(expiries, default=None),
    )


def _without_token(acl: ACLState, token: Token) -> ACLState:
    return replace(
        acl,
        tokens=without(acl.tokens, [token.accessor_id]),
        by_hash=without(acl.by_hash, [token.secret_hash] if token.secret_hash else []),
    )


def _with_policy(acl: ACLState, policy: Policy, index: Index) -> ACLState:
    known = acl.policies.get(policy.id)
    policy = replace(policy, create_index=index if known is None else known.create_index, modify_index=index)
    return replace(acl, policies=acl.policies.set(policy.id, policy))


def _without_policy(acl: ACLState, policy_id: str, index: Index) -> ACLState:
    tokens = acl.tokens
    for token in [each for each in acl.tokens.values() if policy_id in each.policies]:
        kept = tuple(each for each in token.policies if each != policy_id)
        tokens = tokens.set(token.accessor_id, replace(token, policies=kept, modify_index=index))
    return replace(acl, tokens=tokens, policies=without(acl.policies, [policy_id]))
