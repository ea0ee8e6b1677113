"""The leader's decisions on tokens and policies. Texts are Consul's; what a caller got wrong is a 4xx here.

Every write is one command that carries the request's id: a retry, and a retry after a lost answer, finds its first
effect. What changed between looking and applying is refused by apply and looked at again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, assert_never

import structlog

from caserver.acl import MANAGEMENT_RULES, parse_rules
from caserver.acl_requests import (
    ACLAnswer,
    ACLRequest,
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
from caserver.acl_wire import PolicyDocument, TokenDocument, decode_policy, decode_token
from caserver.authority.gate import UNKNOWN_TOKEN, TokenHasher
from caserver.authority.ports import Log, verdict
from caserver.config.acl_settings import ACLSettings
from caserver.environment import Clock, Entropy, Workers
from caserver.errors import (
    ACLDisabled,
    CommitFailed,
    CommitUnknown,
    Conflict,
    InvalidRequest,
    NotFound,
    NotInitialized,
    PermissionDenied,
)
from caserver.fields import Secret, format_go_duration
from caserver.raft.ports import NotCommitted, OutcomeUnknown
from caserver.requests import Caller
from caserver.state.acl import (
    ANONYMOUS_ID,
    MANAGEMENT_DESCRIPTION,
    MANAGEMENT_ID,
    MANAGEMENT_NAME,
    RESERVED_PREFIX,
    ACLState,
    Grant,
    Policy,
    ServiceIdentity,
    Token,
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
from caserver.state.commands import Applied, Reason, Refused
from caserver.state.model import CAState, RequestRecord

ROUNDS = 3  # decisions on one request while others change what it is about
EXPIRES_MIN, EXPIRES_MAX = 60, 24 * 3600  # seconds (Consul's defaults)
BOOTSTRAP_DESCRIPTION = "Bootstrap Token (Global Management)"
INITIAL_DESCRIPTION = "Initial Management Token"
DESCRIPTION_MAX = 1024
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_POLICY_NAME = re.compile(r"[A-Za-z0-9\-_]{1,128}")
_SERVICE_NAME = re.compile(r"[a-z0-9]([a-z0-9\-_]{0,254}[a-z0-9])?")

_log = structlog.get_logger(__name__)


class ResetFile(Protocol):
    """What an operator puts into the data directory of the leader to make a management token once more."""

    def read(self) -> int:
        """The index written in it; 0 if there is none."""
        ...

    def remove(self) -> None:
        """Take it away: it counts once."""
        ...


@dataclass(frozen=True, slots=True)
class _Nothing:
    """A decision that nothing is to be done."""

    answer: ACLAnswer


_Decide = Callable[[CAState], ACLCommand | _Nothing]


class Tokens:
    """Makes, changes and forgets tokens and policies, while this node leads."""

    def __init__(
        self,
        log: Log,
        *,
        settings: ACLSettings,
        hasher: TokenHasher,
        reset: ResetFile,
        clock: Clock,
        entropy: Entropy,
        workers: Workers,
    ) -> None:
        self._log = log
        self._settings = settings
        self._hasher = hasher
        self._reset = reset
        self._clock = clock
        self._entropy = entropy
        self._workers = workers  # rules may take as long to read as a heartbeat

    async def initialize(self) -> None:
        """Make what every cluster with ACLs has, and the management token of this node's file, unless they are there."""
        if not self._settings.enabled:
            return
        grants = await self._workers.run(parse_rules, MANAGEMENT_RULES)
        management = Policy(
            id=MANAGEMENT_ID,
            name=MANAGEMENT_NAME,
            description=MANAGEMENT_DESCRIPTION,
            rules=MANAGEMENT_RULES,
            grants=grants,
            datacenters=(),
        )
        command = ACLInitialize(at=self._now(), management=management, initial=self._initial(self._log.state))
        outcome = verdict(await self._log.propose(command))
        match outcome:
            case Applied():
                _log.info("ACLs are initialized", tokens=len(self._log.state.acl.tokens))
            case Refused(reason=Reason.DUPLICATE_REQUEST):
                pass
            case Refused() as refused:
                raise Conflict(f"ACLs were not initialized: {refused.reason} {refused.detail}".rstrip())
            case NotCommitted(reason=why):
                raise CommitFailed(f"ACLs were not initialized: {why}")
            case OutcomeUnknown(reason=why):
                raise CommitUnknown(f"ACLs may not have been initialized: {why}")
            case _:
                assert_never(outcome)

    def _initial(self, state: CAState) -> Token | None:
        secret = self._settings.initial_management
        if secret is None:
            return None
        return self._management_token(state, new_id(self._entropy.bytes(16)), secret, description=INITIAL_DESCRIPTION)

    async def execute(self, caller: Caller, request: ACLRequest) -> ACLAnswer:
        """Do one operation; the gate has let the caller in."""
        if not self._settings.enabled:
            raise ACLDisabled
        if self._log.state.sealed_hmac_key is None:
            raise NotInitialized("the cluster is not bootstrapped yet, so it keeps no tokens; is Connect enabled?")
        request_id = caller.request_id or self._entropy.bytes(16).hex()
        answer = await self._commit(request_id, await self._decision(caller, request, request_id))
        _log.info("ACL write", operation=type(request).__name__, source=caller.source, subject=_subject(answer))
        return answer

    async def _decision(self, caller: Caller, request: ACLRequest, request_id: str) -> _Decide:
        match request:
            case BootstrapACL():
                return lambda state: self._bootstrap(state, request, request_id)
            case PutToken():
                return lambda state: self._put_token(state, request, request_id)
            case CloneToken():
                return lambda state: self._clone(state, request, request_id)
            case RemoveToken(accessor_id=accessor_id):
                return lambda state: self._remove_token(state, accessor_id, caller, request_id)
            case PutPolicy():
                document = decode_policy(request.body)
                _check_policy(document)
                grants = await self._workers.run(parse_rules, document.rules)
                return lambda state: self._put_policy(state, request, document, grants, request_id)
            case RemovePolicy(policy_id=policy_id):
                return lambda state: self._remove_policy(state, policy_id, request_id)
            case _:
                assert_never(request)

    async def _commit(self, request_id: str, decide: _Decide) -> ACLAnswer:
        """Decide and propose, until it is applied or refused for good."""
        for _ in range(ROUNDS):
            state = self._log.state
            if (record := state.requests.get(request_id)) is not None:
                return _answer_of(state, record)
            decision = decide(state)
            if isinstance(decision, _Nothing):
                await self._log.barrier()  # no commit proves it: who ceased to lead may not know what there is
                decision = decide(self._log.state)
            if isinstance(decision, _Nothing):
                return decision.answer
            outcome = verdict(await self._log.propose(decision))
            match outcome:
                case Applied() | Refused(reason=Reason.DUPLICATE_REQUEST):
                    return self._done(request_id)
                case Refused() as refused:
                    _log.debug("an ACL write is decided anew", reason=refused.reason, detail=refused.detail)
                case NotCommitted(reason=why):
                    raise CommitFailed(why)
                case OutcomeUnknown(reason=why):
                    await self._log.barrier()
                    if request_id not in self._log.state.requests:
                        raise CommitUnknown(why)
                    return self._done(request_id)
                case _:
                    assert_never(outcome)
        raise Conflict("what the request is about was changed again and again by others; read it and try again")

    def _done(self, request_id: str) -> ACLAnswer:
        state = self._log.state
        return _answer_of(state, state.requests[request_id])

    # -- tokens

    def _bootstrap(self, state: CAState, request: BootstrapACL, request_id: str) -> ACLCommand:
        lost = state.acl.bootstrap_index
        if lost:
            given = self._reset.read()
            if not given:
                raise PermissionDenied(f"Permission denied: ACL bootstrap no longer allowed (reset index: {lost})")
            if given != lost:
                raise InvalidRequest(f"Invalid bootstrap reset index (specified {given}, reset index: {lost})")
            # Before anything else: a file that stayed would allow the same again after a snapshot is restored.
            self._reset.remove()
        secret = Secret(request.secret)
        self._check_new_id(state, "AccessorID", request.accessor_id)
        self._check_new_secret(state, secret)
        token = self._management_token(state, request.accessor_id, secret, description=BOOTSTRAP_DESCRIPTION)
        return ACLBootstrap(request_id, self._now(), token, lost)

    def _management_token(self, state: CAState, accessor_id: str, secret: Secret, *, description: str) -> Token:
        return Token(
            accessor_id=accessor_id,
            secret_hash=self._hasher.hash(state, secret),
            description=description,
            policies=(MANAGEMENT_ID,),
            service_identities=(),
            local=False,
            created_at=self._now(),
            expires_at=None,
        )

    def _put_token(self, state: CAState, request: PutToken, request_id: str) -> ACLCommand:
        document = decode_token(request.body)
        known = self._live(state, request.accessor_id)
        if request.create:
            secret = Secret(request.secret)
            self._check_new_id(state, "AccessorID", request.accessor_id)
            self._check_new_secret(state, secret)
            token = self._new_token(state, document, request.accessor_id, secret)
            return SetToken(request_id, self._now(), token, 0)
        if not _UUID.fullmatch(request.accessor_id):
            raise InvalidRequest("AccessorID is not a valid UUID")
        if known is None:
            raise NotFound(f'Cannot find token "{request.accessor_id}"')
        return SetToken(request_id, self._now(), self._changed_token(state, document, known), known.modify_index)

    def _new_token(self, state: CAState, document: TokenDocument, accessor_id: str, secret: Secret) -> Token:
        now = self._now()
        token = Token(
            accessor_id=accessor_id,
            secret_hash=self._hasher.hash(state, secret),
            description=document.description,
            policies=(),
            service_identities=(),
            local=document.local,
            created_at=now,
            expires_at=_expiry(document, now),
        )
        return _standing(state.acl, token, document)

    def _changed_token(self, state: CAState, document: TokenDocument, known: Token) -> Token:
        accessor_id = known.accessor_id
        if document.secret is not None and self._hasher.hash(state, document.secret) != known.secret_hash:
            raise InvalidRequest("Changing a tokens SecretID is not permitted")
        if document.local != known.local:
            raise InvalidRequest(f"cannot toggle local mode of {accessor_id}")
        if document.lifetime or document.expires_at not in {None, known.expires_at}:
            raise InvalidRequest(f"Cannot change expiration time of {accessor_id}")
        return _standing(state.acl, replace(known, description=document.description), document)

    def _clone(self, state: CAState, request: CloneToken, request_id: str) -> ACLCommand:
        source = self._live(state, request.source_id)
        if source is None:
            raise PermissionDenied(UNKNOWN_TOKEN)
        secret = Secret(request.secret)
        self._check_new_id(state, "AccessorID", request.accessor_id)
        self._check_new_secret(state, secret)
        if len(request.description) > DESCRIPTION_MAX:
            raise _long_description()
        token = replace(
            source,
            accessor_id=request.accessor_id,
            secret_hash=self._hasher.hash(state, secret),
            description=request.description or source.description,
            created_at=self._now(),
        )
        return SetToken(request_id, self._now(), token, 0)

    def _remove_token(self, state: CAState, accessor_id: str, caller: Caller, request_id: str) -> ACLCommand | _Nothing:
        if not _UUID.fullmatch(accessor_id):
            raise InvalidRequest("Accessor ID is missing or an invalid UUID")
        if accessor_id == ANONYMOUS_ID:
            raise InvalidRequest("Delete operation not permitted on the anonymous token")
        token = state.acl.tokens.get(accessor_id)
        if token is None:
            return _Nothing(Removed(state.index))
        if caller.token is not None and self._hasher.hash(state, caller.token) == token.secret_hash:
            raise InvalidRequest("Deletion of the request's authorization token is not permitted")
        return DeleteToken(request_id, self._now(), accessor_id)

    def _live(self, state: CAState, accessor_id: str) -> Token | None:
        token = state.acl.tokens.get(accessor_id)
        return None if token is None or token.is_expired(self._now()) else token

    def _check_new_id(self, state: CAState, name: str, given: str) -> None:
        if not _UUID.fullmatch(given):
            raise InvalidRequest(f"Invalid Token: {name} is not a valid UUID")
        in_use = given in state.acl.tokens or state.acl.token_of(self._hasher.hash(state, Secret(given))) is not None
        if in_use:
            raise InvalidRequest(f"Invalid Token: {name} is already in use")
        if given.startswith(RESERVED_PREFIX):
            raise InvalidRequest(f'Invalid Token: UUIDs with the prefix "{RESERVED_PREFIX}" are reserved')

    def _check_new_secret(self, state: CAState, secret: Secret) -> None:
        self._check_new_id(state, "SecretID", secret.reveal())

    # -- policies

    def _put_policy(
        self,
        state: CAState,
        request: PutPolicy,
        document: PolicyDocument,
        grants: tuple[Grant, ...],
        request_id: str,
    ) -> ACLCommand:
        known = state.acl.policies.get(request.policy_id)
        namesake = state.acl.policy_named(document.name)
        if request.create:
            if namesake is not None:
                raise InvalidRequest(f'Invalid Policy: A Policy with Name "{document.name}" already exists')
        elif not _UUID.fullmatch(request.policy_id):
            raise InvalidRequest("Policy ID invalid UUID")
        elif known is None:
            raise NotFound(f"cannot find policy {request.policy_id}")
        elif namesake is not None and namesake.id != known.id:
            raise InvalidRequest(f'Invalid Policy: A policy with name "{document.name}" already exists')
        elif known.id == MANAGEMENT_ID:
            _check_builtin(document, known)
        policy = Policy(
            id=request.policy_id,
            name=document.name,
            description=document.description,
            rules=document.rules,
            grants=grants,
            datacenters=document.datacenters,
        )
        return SetPolicy(request_id, self._now(), policy, 0 if known is None else known.modify_index)

    def _remove_policy(self, state: CAState, policy_id: str, request_id: str) -> ACLCommand | _Nothing:
        if policy_id == MANAGEMENT_ID:
            raise InvalidRequest("Delete operation not permitted on the builtin global-management policy")
        if policy_id not in state.acl.policies:
            return _Nothing(Removed(state.index))
        return DeletePolicy(request_id, self._now(), policy_id)

    def _now(self) -> int:
        return int(self._clock.now().timestamp())


def _standing(acl: ACLState, token: Token, document: TokenDocument) -> Token:
    """``token`` with the policies and identities that the caller wrote, each once."""
    if len(document.description) > DESCRIPTION_MAX:
        raise _long_description()
    policies = dict.fromkeys(_policy_id(acl, *link) for link in document.policies)
    identities = dict.fromkeys(document.service_identities)
    for each in identities:
        _check_identity(each, local=document.local)
    if document.fault:
        raise InvalidRequest(document.fault)
    return replace(token, policies=tuple(policies), service_identities=tuple(identities))


def _policy_id(acl: ACLState, policy_id: str, name: str) -> str:
    if policy_id:
        if policy_id not in acl.policies:
            raise InvalidRequest(f'No such ACL policy with ID "{policy_id}"')
        return policy_id
    policy = acl.policy_named(name)
    if policy is None:
        raise InvalidRequest(f'No such ACL policy with name "{name}"')
    return policy.id


def _check_identity(identity: ServiceIdentity, *, local: bool) -> None:
    name = identity.service
    if not name:
        raise InvalidRequest("Service identity is missing the service name field on this token")
    if local and identity.datacenters:
        raise InvalidRequest(f'Service identity "{name}" cannot specify a list of datacenters on a local token')
    if not _SERVICE_NAME.fullmatch(name):
        raise InvalidRequest(
            f"Service identity \"{name}\" has an invalid name. Only alphanumeric characters, '-' and '_' are allowed"
        )


def _expiry(document: TokenDocument, now: int) -> int | None:
    if document.lifetime < 0:
        raise InvalidRequest(f"Token Expiration TTL '{format_go_duration(document.lifetime)}' should be > 0")
    if document.lifetime and document.expires_at is not None:
        raise InvalidRequest("Token Expiration TTL and Expiration Time cannot both be set")
    if document.lifetime:
        expires_at = now + int(document.lifetime)
    elif document.expires_at is None:
        return None
    else:
        expires_at = document.expires_at
    if expires_at < now:
        raise InvalidRequest("ExpirationTime cannot be before CreateTime")
    given, least, most = (format_go_duration(float(each)) for each in (expires_at - now, EXPIRES_MIN, EXPIRES_MAX))
    if expires_at - now > EXPIRES_MAX:
        raise InvalidRequest(f"ExpirationTime cannot be more than {most} in the future (was {given})")
    if expires_at - now < EXPIRES_MIN:
        raise InvalidRequest(f"ExpirationTime cannot be less than {least} in the future (was {given})")
    return expires_at


def _check_policy(document: PolicyDocument) -> None:
    if not document.name:
        raise InvalidRequest("Invalid Policy: no Name is set")
    if not _POLICY_NAME.fullmatch(document.name):
        raise InvalidRequest("Invalid Policy: invalid Name. Only alphanumeric characters, '-' and '_' are allowed")
    if len(document.description) > DESCRIPTION_MAX:
        raise _long_description()


def _check_builtin(document: PolicyDocument, known: Policy) -> None:
    if document.datacenters:
        raise InvalidRequest("Changing the Datacenters of the builtin global-management policy is not permitted")
    if document.rules != known.rules:
        raise InvalidRequest("Changing the Rules for the builtin global-management policy is not permitted")


def _long_description() -> InvalidRequest:
    return InvalidRequest(f"Description: longer than {DESCRIPTION_MAX} characters; shorten it")


def _answer_of(state: CAState, record: RequestRecord) -> ACLAnswer:
    """What a request that was applied is answered: what it was about as it is now."""
    token, policy = state.acl.tokens.get(record.result), state.acl.policies.get(record.result)
    if token is not None:
        return TokenWritten(token)
    return Removed(record.index) if policy is None else PolicyWritten(policy)


def _subject(answer: ACLAnswer) -> str:
    match answer:
        case TokenWritten(token=token):
            return token.accessor_id
        case PolicyWritten(policy=policy):
            return policy.name
        case Removed():
            return ""
        case _:
            assert_never(answer)
