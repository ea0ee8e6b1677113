"""Consul's JSON of tokens and policies, in both directions; a secret is shown only by who hands it in here."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from caserver import gojson
from caserver.errors import InvalidRequest
from caserver.fields import Secret, go_duration
from caserver.state.acl import ACLState, Policy, ServiceIdentity, Token
from caserver.wire import Document, instant

HIDDEN = "<hidden>"  # what Consul shows for a secret that it does not show
_NANOSECOND = 1e-9  # seconds
_DATETIME_MAX = 253402300799  # the last second of the year 9999

# Member -> Go's name of its type. What only Consul's server writes is taken and passed over.
_TOKEN_MEMBERS = {
    "AccessorID": "string",
    "SecretID": "string",
    "Description": "string",
    "Policies": "[]structs.ACLTokenPolicyLink",
    "Roles": "[]structs.ACLTokenRoleLink",
    "ServiceIdentities": "[]*structs.ACLServiceIdentity",
    "NodeIdentities": "[]*structs.ACLNodeIdentity",
    "Rules": "string",
    "Type": "string",
    "Local": "bool",
    "AuthMethod": "string",
    "ExpirationTime": "time.Time",
    "ExpirationTTL": "time.Duration",
    "CreateTime": "time.Time",
    "Hash": "[]uint8",
    "CreateIndex": "uint64",
    "ModifyIndex": "uint64",
    "Legacy": "bool",
}
_POLICY_MEMBERS = {
    "ID": "string",
    "Name": "string",
    "Description": "string",
    "Rules": "string",
    "Datacenters": "[]string",
    "Hash": "[]uint8",
    "CreateIndex": "uint64",
    "ModifyIndex": "uint64",
}
_KINDS: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "bool": bool,
    "uint64": int,
    "time.Time": str,
    "time.Duration": (str, int, float),
    "[]uint8": str,
}


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """What a caller wrote about a token."""

    accessor_id: str = ""
    secret: Secret | None = None
    description: str = ""
    policies: tuple[tuple[str, str], ...] = ()  # (id, name), one of them given
    service_identities: tuple[ServiceIdentity, ...] = ()
    local: bool = False
    expires_at: int | None = None
    lifetime: float = 0.0  # seconds; 0 = not given
    fault: str = ""  # what it asks for that there is not


@dataclass(frozen=True, slots=True)
class PolicyDocument:
    """What a caller wrote about a policy."""

    id: str = ""
    name: str = ""
    description: str = ""
    rules: str = ""
    datacenters: tuple[str, ...] = field(default=())


def decode_token(body: str) -> TokenDocument:
    """Read a token; InvalidRequest in Go's words."""
    given = _members(body, "Token", "ACLToken", _TOKEN_MEMBERS)
    secret = given.get("SecretID") or ""
    return TokenDocument(
        accessor_id=(given.get("AccessorID") or "").lower(),
        secret=Secret(secret) if secret not in {"", HIDDEN} else None,
        description=given.get("Description") or "",
        policies=tuple(_link(each) for each in _objects(given, "Policies", {"ID", "Name"})),
        service_identities=tuple(
            _identity(each) for each in _objects(given, "ServiceIdentities", {"ServiceName", "Datacenters"})
        ),
        local=bool(given.get("Local")),
        expires_at=_instant(given.get("ExpirationTime")),
        lifetime=_lifetime(given.get("ExpirationTTL")),
        fault=_unsupported(given),
    )


def decode_policy(body: str) -> PolicyDocument:
    """Read a policy; InvalidRequest in Go's words."""
    given = _members(body, "Policy", "ACLPolicy", _POLICY_MEMBERS)
    return PolicyDocument(
        id=(given.get("ID") or "").lower(),
        name=given.get("Name") or "",
        description=given.get("Description") or "",
        rules=given.get("Rules") or "",
        datacenters=_texts("Policy", "Datacenters", given.get("Datacenters")),
    )


def encode_token(token: Token, acl: ACLState, *, secret: Secret | None = None) -> Document:
    """Body of the token endpoints."""
    return {
        "AccessorID": token.accessor_id,
        "SecretID": HIDDEN if secret is None else secret.reveal(),
        "Description": token.description,
    } | _standing(token, acl)


def encode_bootstrap(token: Token, acl: ACLState, *, secret: Secret) -> Document:
    """Body of the bootstrap endpoint: the secret once more under the name that it had in older versions of Consul."""
    return {"ID": secret.reveal()} | encode_token(token, acl, secret=secret)


def encode_token_stub(token: Token, acl: ACLState) -> Document:
    """One entry of the list of tokens."""
    return {"AccessorID": token.accessor_id, "Description": token.description} | _standing(token, acl)


def encode_policy(policy: Policy) -> Document:
    """Body of the policy endpoints."""
    document: Document = {
        "ID": policy.id,
        "Name": policy.name,
        "Description": policy.description,
        "Rules": policy.rules,
    }
    if policy.datacenters:
        document["Datacenters"] = list(policy.datacenters)
    return document | _ending(policy)


def encode_policy_stub(policy: Policy) -> Document:
    """One entry of the list of policies."""
    return {
        "ID": policy.id,
        "Name": policy.name,
        "Description": policy.description,
        "Datacenters": list(policy.datacenters) or None,
    } | _ending(policy)


def _standing(token: Token, acl: ACLState) -> Document:
    document: Document = {}
    links = [acl.policies[each] for each in token.policies if each in acl.policies]
    if links:
        document["Policies"] = [{"ID": each.id, "Name": each.name} for each in links]
    if token.service_identities:
        document["ServiceIdentities"] = [_encode_identity(each) for each in token.service_identities]
    document["Local"] = token.local
    if token.expires_at is not None:
        document["ExpirationTime"] = instant(token.expires_at)
    document["CreateTime"] = instant(token.created_at)
    return document | _ending(token)


def _encode_identity(identity: ServiceIdentity) -> Document:
    document: Document = {"ServiceName": identity.service}
    return document | ({"Datacenters": list(identity.datacenters)} if identity.datacenters else {})


def _ending(kept: Token | Policy) -> Document:
    return {
        "Hash": base64.b64encode(kept.hash).decode(),
        "CreateIndex": kept.create_index,
        "ModifyIndex": kept.modify_index,
    }


# Reading --------------------------------------------------------------------------------------------------------------


def _members(body: str, what: str, go_type: str, known: Mapping[str, str]) -> dict[str, Any]:
    try:
        document = gojson.decode(body)
    except ValueError as exc:
        raise _failed(what, str(exc)) from exc
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise _failed(
            what, f"json: cannot unmarshal {gojson.type_name(document)} into Go value of type structs.{go_type}"
        )
    by_fold = {name.lower(): name for name in known}
    found: dict[str, Any] = {}
    for key, value in document.items():
        name = by_fold.get(key.lower())
        if name is None:
            raise _failed(what, f'json: unknown field "{key}"')
        if name in found:
            raise _failed(what, f'key "{name}" is given twice in one object')
        found[name] = _checked(what, f"{go_type}.{name}", known[name], value)
    return found


def _checked(what: str, where: str, go_type: str, value: object) -> object:
    kind = list if go_type.startswith("[]") and go_type not in _KINDS else _KINDS[go_type]
    if value is None or (isinstance(value, kind) and (go_type == "bool" or not isinstance(value, bool))):
        return value
    raise _failed(
        what, f"json: cannot unmarshal {gojson.type_name(value)} into Go struct field {where} of type {go_type}"
    )


def _failed(what: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"Bad request: {what} decoding failed: {problem}")


def _objects(given: Mapping[str, Any], name: str, known: set[str]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for each in given.get(name) or []:
        if not isinstance(each, dict):
            raise _failed("Token", f"json: cannot unmarshal {gojson.type_name(each)} into {name}")
        by_fold = {key.lower(): value for key, value in each.items()}
        foreign = sorted(by_fold.keys() - {one.lower() for one in known})
        if foreign:
            raise _failed("Token", f'json: unknown field "{foreign[0]}" in {name}')
        found.append({one: by_fold.get(one.lower()) for one in known})
    return found


def _text(name: str, value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _failed("Token", f"json: cannot unmarshal {gojson.type_name(value)} into {name} of type string")
    return value


def _link(link: Mapping[str, Any]) -> tuple[str, str]:
    return _text("Policies.ID", link["ID"]).lower(), _text("Policies.Name", link["Name"])


def _identity(identity: Mapping[str, Any]) -> ServiceIdentity:
    service = _text("ServiceIdentities.ServiceName", identity["ServiceName"])
    return ServiceIdentity(service, _texts("Token", "ServiceIdentities.Datacenters", identity["Datacenters"]))


def _texts(what: str, name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise _failed(what, f"json: cannot unmarshal {gojson.type_name(value)} into {name} of type []string")
    return tuple(value)


def _instant(text: str | None) -> int | None:
    if not text:
        return None
    try:
        # Go prints up to nine digits of a second, Python reads six; whole seconds are kept.
        found = datetime.fromisoformat(re.sub(r"(\.[0-9]{6})[0-9]+", r"\1", text))
        seconds = None if found.tzinfo is None else int(found.timestamp())
    except (ValueError, OverflowError):
        seconds = None
    if seconds is None:
        raise _failed("Token", f'ExpirationTime: "{text[:64]}" is no RFC 3339 time')
    return seconds if seconds > 0 else None  # Go's zero time stands for none


def _lifetime(given: str | float | None) -> float:
    if not given:
        return 0.0
    try:
        seconds = go_duration(given) if isinstance(given, str) else given * _NANOSECOND
    except ValueError as exc:
        raise _failed("Token", str(exc)) from exc
    return min(seconds, float(_DATETIME_MAX))


def _unsupported(given: Mapping[str, Any]) -> str:
    """What is said to who asks for what there is not; the first in Consul's order."""
    if given.get("AuthMethod"):
        return "AuthMethod field is disallowed outside of Login"
    if given.get("Roles"):
        return "Roles are not kept here; give the token policies or service identities"
    if given.get("NodeIdentities"):
        return "Node identities are not kept here; give the token a policy with rules for the node"
    if given.get("Rules"):
        return "Rules cannot be specified for this token"
    if given.get("Type"):
        return "Type cannot be specified for this token"
    return ""
