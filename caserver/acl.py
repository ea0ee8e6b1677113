"""Access control: what a request needs, what rules grant, and whether the one covers the other. Pure.

The rules are Consul's, in HCL or JSON, and so is their precedence: a rule for the exact name before the one for the
longest prefix, deny before write before list before read where several policies speak of the same name, and the default
policy where none does. Management (``acl``) is never given by default. Resources that only Consul has are accepted and
mean nothing here; a name that is neither is refused, because a misspelt rule would protect nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import assert_never

from caserver.acl_requests import (
    BootstrapACL,
    CloneToken,
    PutPolicy,
    PutToken,
    RemovePolicy,
    RemoveToken,
)
from caserver.cleanup_requests import ForgetCleanup, ReadCleanups
from caserver.config.document import Document, parse_hcl, parse_json
from caserver.errors import InvalidRequest
from caserver.fields import nearest
from caserver.requests import (
    AbortRestore,
    AdmitRestore,
    ChangeConfiguration,
    CommitRestore,
    ReadIndex,
    ReadServers,
    Request,
    SignLeaves,
    StageRestore,
    TransferLeadership,
)
from caserver.state.acl import DENY, LIST, READ, WRITE, Grant

RULES_MAX = 64 * 1024  # characters of one policy's rules
_RANK = {READ: 1, LIST: 2, WRITE: 3}
_PRECEDENCE = (READ, LIST, WRITE, DENY)  # later ones win
_ACCESS = (READ, WRITE, DENY)
_UNNAMED = frozenset({"acl", "operator", "keyring", "mesh", "peering"})
_NAMED = frozenset({"agent", "event", "identity", "key", "node", "query", "service", "session"})
_PREFIX = "_prefix"
_KNOWN = _UNNAMED | _NAMED | {name + _PREFIX for name in _NAMED}
_MEANT = frozenset({"acl", "operator", "agent", "node", "service"})
_IN_RULES = {"policy", "intentions", "sentinel"}


MANAGEMENT_RULES = """
acl = "write"
agent_prefix "" {
	policy = "write"
}
event_prefix "" {
	policy = "write"
}
key_prefix "" {
	policy = "write"
}
keyring = "write"
node_prefix "" {
	policy = "write"
}
operator = "write"
query_prefix "" {
	policy = "write"
}
service_prefix "" {
	policy = "write"
	intentions = "write"
}
session_prefix "" {
	policy = "write"
}"""  # Consul's, to the letter


class Resource(StrEnum):
    """What access is given to."""

    ACL = "acl"
    OPERATOR = "operator"
    AGENT = "agent"
    NODE = "node"
    SERVICE = "service"


@dataclass(frozen=True, slots=True)
class Permission:
    """What a caller needs: ``read`` or ``write`` to a resource; ``name`` is whose, empty where it has none or is not known yet."""

    resource: Resource
    access: str
    name: str = ""

    def of(self, name: str) -> Permission:
        """The same of one name."""
        return replace(self, name=name)

    def __str__(self) -> str:
        return f"{self.resource}:{self.access}" + (f" on {self.name}" if self.name else "")


MANAGEMENT = Permission(Resource.ACL, WRITE)
OPERATOR_READ = Permission(Resource.OPERATOR, READ)
OPERATOR_WRITE = Permission(Resource.OPERATOR, WRITE)
AGENT_READ = Permission(Resource.AGENT, READ)  # of the agent that is asked
AGENT_WRITE = Permission(Resource.AGENT, WRITE)
NODE_READ = Permission(Resource.NODE, READ)  # of the node that is asked
SERVICE_WRITE = Permission(Resource.SERVICE, WRITE)  # on the exact service, which who reads the request fills in


def permission_of(request: Request) -> Permission | None:
    """What the caller of an operation of the leader needs; None: nothing. A signature needs it on the service of each CSR."""
    match request:
        case SignLeaves():
            return SERVICE_WRITE
        case ChangeConfiguration() | TransferLeadership() | ForgetCleanup():
            return OPERATOR_WRITE
        case ReadServers() | ReadCleanups():
            return OPERATOR_READ
        case AdmitRestore() | StageRestore() | CommitRestore() | AbortRestore():
            return MANAGEMENT
        case PutToken() | CloneToken() | RemoveToken() | PutPolicy() | RemovePolicy():
            return MANAGEMENT
        case ReadIndex() | BootstrapACL():
            return None
        case _:
            assert_never(request)


@dataclass(frozen=True, slots=True)
class Rules:
    """What some policies grant together, ready to be asked."""

    exact: Mapping[tuple[str, str], str] = field(default_factory=dict)  # (resource, name) -> access
    prefixes: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @classmethod
    def of(cls, grants: Iterable[Grant]) -> Rules:
        """Merge the grants of all policies of a token."""
        exact: dict[tuple[str, str], str] = {}
        prefixes: dict[tuple[str, str], str] = {}
        for grant in grants:
            target = prefixes if grant.prefix else exact
            key = (grant.resource, grant.name)
            target[key] = max(target.get(key, READ), grant.access, key=_PRECEDENCE.index)
        return cls(exact, prefixes)

    def says(self, resource: str, name: str) -> str | None:
        """The access that the most specific rule gives; None if no rule speaks of it."""
        found = self.exact.get((resource, name))
        if found is not None:
            return found
        for length in range(len(name), -1, -1):
            found = self.prefixes.get((resource, name[:length]))
            if found is not None:
                return found
        return None


def authorize(rules: Rules, permission: Permission, *, default_allow: bool) -> bool:
    """Whether ``rules`` cover ``permission``; ``default_allow`` decides what they do not speak of, but never management."""
    access = rules.says(permission.resource, permission.name)
    if access is None:
        return default_allow and permission.resource is not Resource.ACL
    return covers(access, permission.access)


def could_authorize(rules: Rules, permission: Permission, *, default_allow: bool) -> bool:
    """Whether there is any name for which ``rules`` cover ``permission``: who fails this need not be read further."""
    if default_allow:
        return True
    given = [*rules.exact.items(), *rules.prefixes.items()]
    return any(resource == permission.resource and covers(access, permission.access) for (resource, _), access in given)


def covers(access: str, needed: str) -> bool:
    """Whether a rule's access includes what is needed."""
    return access != DENY and _RANK[access] >= _RANK[needed]


# Reading rules --------------------------------------------------------------------------------------------------------


def parse_rules(text: str) -> tuple[Grant, ...]:
    """What rules in HCL or JSON grant, sorted; InvalidRequest in Consul's words."""
    if not text.strip():
        return ()
    if len(text) > RULES_MAX:
        raise InvalidRequest(f"Failed to parse ACL rules: they have more than {RULES_MAX} characters; split the policy")
    document = parse_json("rules", text) if text.lstrip().startswith("{") else parse_hcl("rules", text)
    if document.faults:
        raise InvalidRequest("Failed to parse ACL rules: " + "\n".join(map(str, document.faults)))
    return tuple(sorted(_grants(document)))


def _grants(document: Document) -> list[Grant]:
    grants: list[Grant] = []
    for key, value in document.values.items():
        if key not in _KNOWN:
            near = nearest(key, _KNOWN)
            hint = f'did you mean "{near}"?' if near else "known are " + ", ".join(sorted(_KNOWN))
            raise InvalidRequest(f'Failed to parse ACL rules: "{key}" is no resource; {hint}')
        resource = key.removesuffix(_PREFIX)
        if resource in _UNNAMED:
            grant = Grant(resource, _unnamed_access(key, value))
            grants += [grant] if resource in _MEANT else []
            continue
        for name, access in _named(key, value):
            grants += [Grant(resource, access, name, prefix=key.endswith(_PREFIX))] if resource in _MEANT else []
    return grants


def _unnamed_access(key: str, value: object) -> str:
    if not isinstance(value, str) or value not in _ACCESS:
        raise InvalidRequest(f"Invalid {key} policy: {_quoted(value)}; use read, write or deny")
    return value


def _named(key: str, value: object) -> Iterable[tuple[str, str]]:
    """Name and access of each rule; JSON writes several as a list of objects, too."""
    for part in value if isinstance(value, list) else [value]:
        if not isinstance(part, Mapping):
            raise InvalidRequest(f'Failed to parse ACL rules: "{key}" expects names: {key} "web" {{ policy = "read" }}')
        for name, body in part.items():
            for rule in body if isinstance(body, list) else [body]:
                yield name, _access(key, name, rule)


def _access(key: str, name: str, rule: object) -> str:
    if not isinstance(rule, Mapping):
        raise InvalidRequest(f'Failed to parse ACL rules: {key} "{name}" expects {{ policy = "read" }}')
    if unknown := sorted(rule.keys() - _IN_RULES):
        raise InvalidRequest(
            f'Failed to parse ACL rules: {key} "{name}" has an unknown member "{unknown[0]}"; use policy'
        )
    access, intentions = rule.get("policy"), rule.get("intentions", READ)
    allowed = (*_ACCESS, LIST) if key.removesuffix(_PREFIX) == "key" else _ACCESS
    if not isinstance(access, str) or access not in allowed:
        raise InvalidRequest(f'Invalid {key} policy: {_quoted(access)} for "{name}"; use {", ".join(allowed)}')
    if intentions not in _ACCESS:
        raise InvalidRequest(f'Invalid {key} intentions policy: {_quoted(intentions)} for "{name}"')
    return access


def _quoted(value: object) -> str:
    return json.dumps(value) if isinstance(value, str | int | float | bool) or value is None else type(value).__name__
