"""What the routes of ``/v1/acl`` take and answer: the part of ``/openapi.json`` on tokens and policies."""

from __future__ import annotations

from collections.abc import Mapping

from caserver.api import status
from caserver.api.reference import (
    CONSISTENT,
    DATACENTER,
    INDEX,
    JSON_TYPE,
    MAX_STALE,
    NAMESPACE,
    PRETTY,
    STALE,
    WAIT,
    Operation,
    Parameter,
)
from caserver.api.schemas import BOOLEAN, COUNT, DURATION, INSTANT, TEXT, Schema, array, nullable, record, ref

_ID: Schema = {"type": "string", "format": "uuid"}
_HASH: Schema = {"type": "string", "contentEncoding": "base64"}
_OPTIONAL = ("Policies", "ServiceIdentities", "ExpirationTime")
_LINK = record(ID=_ID, Name=TEXT)
_IDENTITY: Schema = {
    "type": "object",
    "properties": {"ServiceName": TEXT, "Datacenters": array(TEXT)},
    "required": ["ServiceName"],
    "additionalProperties": False,
}
_INDEXES: dict[str, Schema] = {"Hash": _HASH, "CreateIndex": COUNT, "ModifyIndex": COUNT}
_STANDING: dict[str, Schema] = {
    "Policies": array(_LINK),
    "ServiceIdentities": array(_IDENTITY),
    "Local": BOOLEAN,
    "ExpirationTime": INSTANT,
    "CreateTime": INSTANT,
    **_INDEXES,
}
_POLICY: dict[str, Schema] = {"ID": _ID, "Name": TEXT, "Description": TEXT, "Rules": TEXT, "Datacenters": array(TEXT)}


def _with_optional(optional: tuple[str, ...], **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


ACL_SCHEMAS: Mapping[str, Schema] = {
    "Token": _with_optional(_OPTIONAL, AccessorID=_ID, SecretID=TEXT, Description=TEXT, **_STANDING),
    "BootstrapToken": _with_optional(_OPTIONAL, ID=_ID, AccessorID=_ID, SecretID=TEXT, Description=TEXT, **_STANDING),
    "TokenStub": _with_optional(_OPTIONAL, AccessorID=_ID, Description=TEXT, **_STANDING),
    "TokenChange": _with_optional(
        (*_STANDING, "AccessorID", "SecretID", "Description", "ExpirationTTL"),
        AccessorID=_ID,
        SecretID=_ID,
        Description={"type": "string", "maxLength": 1024},
        Policies=array({"type": "object", "properties": {"ID": _ID, "Name": TEXT}, "additionalProperties": False}),
        ServiceIdentities=array(_IDENTITY),
        Local=BOOLEAN,
        ExpirationTime=INSTANT,
        ExpirationTTL={"type": "string", "pattern": DURATION, "examples": ["1h"]},
    ),
    "Policy": _with_optional(("Datacenters",), **_POLICY, **_INDEXES),
    "PolicyStub": record(ID=_ID, Name=TEXT, Description=TEXT, Datacenters=nullable(array(TEXT)), **_INDEXES),
    "PolicyChange": _with_optional(("ID", "Description", "Rules", "Datacenters"), **_POLICY),
}

_FAILURES = {status.UNAUTHORIZED: "ACLs are disabled on this node."}
_WRITE_FAILURES = _FAILURES | {
    status.NOT_FOUND: "There is no such token or policy.",
    status.CONFLICT: "It was changed again and again by others.",
}
_READ = (PRETTY, DATACENTER, NAMESPACE, STALE, CONSISTENT, MAX_STALE, INDEX, WAIT)
_METADATA = ("X-Consul-Index", "X-Consul-Knownleader", "X-Consul-Lastcontact")
_TOKEN = Parameter("accessor_id", "path", "Accessor id of the token; PUT: and /clone to copy it.", _ID)
_POLICY_ID = Parameter("id", "path", "Id of the policy.", _ID)


def _read(schema: Schema, *more: Parameter, variable: Parameter | None = None) -> Operation:
    return Operation({JSON_TYPE: schema}, (*_READ, *more), variable, headers=_METADATA, failures=_FAILURES)


def _write(answer: str, change: str, summary: str = "", variable: Parameter | None = None) -> Operation:
    return Operation(
        {JSON_TYPE: ref(answer)},
        (PRETTY, DATACENTER, NAMESPACE),
        variable,
        takes={JSON_TYPE: ref(change)},
        failures=_WRITE_FAILURES,
        summary=summary,
    )


def _delete(summary: str, variable: Parameter) -> Operation:
    return Operation(
        {JSON_TYPE: BOOLEAN}, (PRETTY, DATACENTER, NAMESPACE), variable, failures=_WRITE_FAILURES, summary=summary
    )


ACL_OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("/v1/acl/bootstrap", "PUT"): Operation(
        {JSON_TYPE: ref("BootstrapToken")}, (PRETTY, DATACENTER, NAMESPACE), failures=_WRITE_FAILURES
    ),
    ("/v1/acl/tokens", "GET"): _read(
        array(ref("TokenStub")),
        Parameter("policy", "query", "Id of a policy: only tokens that have it."),
        Parameter("role", "query", "Consul's; no token has any."),
        Parameter("authmethod", "query", "Consul's; no token has any."),
    ),
    ("/v1/acl/token", "PUT"): _write("Token", "TokenChange"),
    ("/v1/acl/token/self", "GET"): Operation(
        {JSON_TYPE: ref("Token")},
        (PRETTY, DATACENTER, NAMESPACE, STALE, CONSISTENT, MAX_STALE),
        headers=_METADATA,
        failures=_FAILURES,
    ),
    ("/v1/acl/token/", "GET"): _read(ref("Token"), variable=_TOKEN),
    ("/v1/acl/token/", "PUT"): _write("Token", "TokenChange", "Change what a token stands for, or copy it", _TOKEN),
    ("/v1/acl/token/", "DELETE"): _delete("Forget a token", _TOKEN),
    ("/v1/acl/policies", "GET"): _read(array(ref("PolicyStub"))),
    ("/v1/acl/policy", "PUT"): _write("Policy", "PolicyChange"),
    ("/v1/acl/policy/name/", "GET"): _read(
        ref("Policy"), variable=Parameter("name", "path", "Name of the policy.", {"type": "string", "minLength": 1})
    ),
    ("/v1/acl/policy/", "GET"): _read(ref("Policy"), variable=_POLICY_ID),
    ("/v1/acl/policy/", "PUT"): _write("Policy", "PolicyChange", "Change a policy", _POLICY_ID),
    ("/v1/acl/policy/", "DELETE"): _delete("Forget a policy", _POLICY_ID),
}
