"""Who calls, and may they: the one decision on every request, made on this node's copy of tokens and policies.

The leader asks it before it does anything (its copy holds everything that was committed); what a node answers itself goes
through ``node_gate``, which knows how old its copy may be. A refusal is written down with the accessor id of the token,
never with its secret.
"""

from __future__ import annotations

import hmac
from typing import Protocol

import structlog

from caserver.acl import Permission, Resource, Rules, authorize, could_authorize
from caserver.authority.custody import HMAC_KEY_PURPOSE
from caserver.authority.ports import Log
from caserver.config.acl_settings import ACLSettings
from caserver.environment import Clock
from caserver.errors import Corrupt, PermissionDenied, Unavailable
from caserver.fields import Secret
from caserver.internode.keyring import Keyring, Sealed
from caserver.requests import Caller
from caserver.state.acl import ANONYMOUS_ID, READ, WRITE, ACLState, Grant, Token
from caserver.state.model import CAState

DENIED = "Permission denied"  # Consul's words, which its clients look for
UNKNOWN_TOKEN = "ACL not found"  # noqa: S105 - likewise

_log = structlog.get_logger(__name__)


class Gate(Protocol):
    """Decides what a caller may do."""

    def refusal(self, caller: Caller, permission: Permission | None) -> PermissionDenied | None:
        """Why the caller may not, None if it may. Without a name, a service permission is covered if one for any name is."""
        ...

    def accessor(self, caller: Caller) -> str:
        """The accessor id of the caller's token as far as it is known, whether it still counts or not."""
        ...

    def token(self, caller: Caller) -> Token | None:
        """The caller's token, the anonymous one if it shows none; None for one that is not known or has expired."""
        ...


class OpenGate:
    """The gate of a node without ACLs: everybody may do everything."""

    def refusal(self, caller: Caller, permission: Permission | None) -> PermissionDenied | None:
        """Nothing is refused."""
        return None

    def accessor(self, caller: Caller) -> str:
        """Nobody is known."""
        return ""

    def token(self, caller: Caller) -> Token | None:
        """There are none."""
        return None


OPEN = OpenGate()


class TokenHasher:
    """Turns secrets into what the state keeps of them."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self._opened: tuple[Sealed, bytes] | None = None

    def hash(self, state: CAState, secret: Secret) -> bytes:
        """HMAC-SHA-256 of a secret under the cluster's key; empty while the cluster has none, Unavailable if it is closed."""
        sealed = state.sealed_hmac_key
        if sealed is None:
            return b""
        if self._opened is None or self._opened[0] != sealed:
            try:
                self._opened = (sealed, self._keyring.open(sealed, purpose=HMAC_KEY_PURPOSE))
            except Corrupt as exc:
                raise Unavailable(f"no token can be checked on this node: {exc}") from exc
        return hmac.digest(self._opened[1], secret.reveal().encode("utf-8", "surrogatepass"), "sha256")


class TokenGate:
    """The gate of a node with ACLs."""

    def __init__(self, log: Log, *, settings: ACLSettings, hasher: TokenHasher, clock: Clock, datacenter: str) -> None:
        self._log = log
        self._settings = settings
        self._hasher = hasher
        self._clock = clock
        self._datacenter = datacenter
        self._of: ACLState | None = None  # what the rules were made from
        self._rules: dict[str, Rules] = {}  # by accessor id

    def refusal(self, caller: Caller, permission: Permission | None) -> PermissionDenied | None:
        """Why the caller may not, None if it may."""
        if permission is None:
            return None
        acl = self._log.state.acl
        token = self.token(caller)
        if token is None and caller.token is not None:
            return PermissionDenied(UNKNOWN_TOKEN)
        unnamed = permission.resource is Resource.SERVICE and not permission.name
        covered = (could_authorize if unnamed else authorize)(
            self._rules_of(acl, token), permission, default_allow=self._settings.default_allow
        )
        return None if covered else PermissionDenied(DENIED)

    def accessor(self, caller: Caller) -> str:
        """The accessor id of the caller's token as far as it is known, whether it still counts or not."""
        token = self._token(caller)
        return "unknown" if token is None else token.accessor_id

    def token(self, caller: Caller) -> Token | None:
        """The caller's token, the anonymous one if it shows none; None for one that is not known or has expired."""
        token = self._token(caller)
        return None if token is None or token.is_expired(self._clock.now().timestamp()) else token

    def _token(self, caller: Caller) -> Token | None:
        state = self._log.state
        if caller.token is None:
            return state.acl.tokens.get(ANONYMOUS_ID)
        return state.acl.token_of(self._hasher.hash(state, caller.token))

    def _rules_of(self, acl: ACLState, token: Token | None) -> Rules:
        if token is None:
            return Rules()
        if self._of is not acl:
            self._of, self._rules = acl, {}
        rules = self._rules.get(token.accessor_id)
        if rules is None:
            rules = self._rules[token.accessor_id] = Rules.of(_grants(acl, token, self._datacenter))
        return rules


def _grants(acl: ACLState, token: Token, datacenter: str) -> list[Grant]:
    found: list[Grant] = []
    for policy_id in token.policies:
        policy = acl.policies.get(policy_id)
        if policy is not None and (not policy.datacenters or datacenter in policy.datacenters):
            found += policy.grants
    for identity in token.service_identities:
        if not identity.datacenters or datacenter in identity.datacenters:
            found += [Grant("service", WRITE, name) for name in (identity.service, f"{identity.service}-sidecar-proxy")]
            found += [Grant(resource, READ, prefix=True) for resource in ("service", "node")]
    return found


def hazard(settings: ACLSettings, state: CAState) -> str | None:
    """What is wrong if a node asks for no tokens in a cluster that keeps some; None if nothing is."""
    if settings.enabled or not state.acl.tokens:
        return None
    return (
        "this server asks for no tokens, though the cluster keeps some: whoever reaches it may do everything; "
        "set acl { enabled = true } as on the others"
    )


def admit(gate: Gate, caller: Caller, permission: Permission | None, *, operation: str) -> None:
    """PermissionDenied, written down, unless the caller may."""
    refusal = gate.refusal(caller, permission)
    if refusal is not None:
        raise recorded(gate, refusal, caller, permission, operation=operation)


def recorded(
    gate: Gate, refusal: PermissionDenied, caller: Caller, permission: Permission | None, *, operation: str
) -> PermissionDenied:
    """``refusal``, once it is written down who was refused what."""
    _log.warning(
        "access denied",
        accessor=gate.accessor(caller),
        source=caller.source,
        operation=operation,
        needs=str(permission),
        reason=refusal.detail,
    )
    return refusal
