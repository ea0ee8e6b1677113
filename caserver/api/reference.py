"""What every route takes and answers beyond its name: parameters, bodies, headers, statuses; the source of ``/openapi.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from caserver.api import status
from caserver.api.connect_ca import PEM_TYPE
from caserver.api.schemas import COUNT, DURATION, TEXT, Schema, ref

JSON_TYPE = "application/json"
TEXT_TYPE = "text/plain"
GZIP_TYPE, FILE_TYPE = "application/x-gzip", "application/octet-stream"
FILE: Schema = {"type": "string", "format": "binary"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter: ``where`` is query, header or path."""

    name: str
    where: str
    meaning: str
    schema: Schema = field(default_factory=lambda: TEXT)


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one route."""

    answers: Mapping[str, Schema] = field(default_factory=dict)  # media type -> schema; none: an empty body
    parameters: tuple[Parameter, ...] = ()
    variable: Parameter | None = None  # what follows the path of a subtree
    takes: Mapping[str, Schema] = field(default_factory=dict)  # media type -> schema of the request's body
    headers: tuple[str, ...] = ()
    failures: Mapping[int, str] = field(default_factory=dict)  # beside those of every operation
    same_body: tuple[int, ...] = ()  # failures that have the body of a success
    summary: str = ""  # where it differs from the route's


# What any request may be answered with, and any that carries a body.
ERRORS: Mapping[int, str] = {
    status.BAD_REQUEST: "The request is wrong; the first line says what is, further lines what else and what to do.",
    status.FORBIDDEN: "Not allowed: by the token, for a page of another origin, or over plain HTTP that leaves the machine.",
    status.MISDIRECTED: "A browser called this node by a name that is not its own.",
    status.BUG: "No cluster leader, Connect is disabled, or an error of this node.",
    status.NOT_READY: "Not now: no room for another blocking query, this node lags, or the outcome is unknown.",
}
WRITE_ERRORS: Mapping[int, str] = {
    status.SLOW_REQUEST: "The body did not arrive in time.",
    status.TOO_LARGE: "The body is too large.",
}

_FLAG: Schema = {"type": "string", "enum": ["", "true", "false", "1", "0", "t", "f"]}
_PRESENT: Schema = {"type": "string", "enum": ["", "true"]}
_DURATION: Schema = {"type": "string", "pattern": DURATION, "examples": ["30s"]}
PRETTY = Parameter("pretty", "query", "Indents the answer.", _PRESENT)
DATACENTER = Parameter("dc", "query", "The datacenter to ask; there is only this one.")
STALE = Parameter("stale", "query", "This node's own state will do.", _PRESENT)
CONSISTENT = Parameter("consistent", "query", "A majority confirms that the answer is the latest.", _PRESENT)
MAX_STALE = Parameter("max_stale", "query", "As stale, while the leader was heard within this time.", _DURATION)
INDEX = Parameter("index", "query", "Waits until the index of the answer is greater.", COUNT)
WAIT = Parameter("wait", "query", "For how long, 5m unless told, 10m at most.", _DURATION)
CACHE_CONTROL = Parameter(
    "Cache-Control",
    "header",
    "max-age=0 or must-revalidate: not a leaf of a root that was replaced.",
    {"type": "string", "enum": ["max-age=0", "max-age=60", "must-revalidate", "no-cache", "stale-if-error=30"]},
)
CACHED = Parameter("cached", "query", "Consul's; answers of this kind always come from this node's cache.", _PRESENT)
NAMESPACE = Parameter("ns", "query", "Consul Enterprise's; refused.", {"type": "string", "maxLength": 0})
FILTER = Parameter("filter", "query", "Consul's; refused.", {"type": "string", "maxLength": 0})
_CONSISTENCY = (STALE, CONSISTENT, MAX_STALE)
_READ = (PRETTY, DATACENTER, *_CONSISTENCY)
_BLOCKING = (INDEX, WAIT)
_METADATA = ("X-Consul-Index", "X-Consul-Knownleader", "X-Consul-Lastcontact")
_CACHE = ("X-Cache", "Age")
_UNAVAILABLE = {
    status.RATE_LIMITED: "More CSRs than the configuration allows; try again after Retry-After seconds.",
    status.NOT_READY: "Nobody can sign just now; where that is the provider's backend, try again after Retry-After seconds.",
}
_CONFLICT = {status.CONFLICT: "Decided on an index that is no longer current; nothing was changed."}


def _json(name: str) -> Mapping[str, Schema]:
    return {JSON_TYPE: ref(name)}


_TRANSFER = Operation(
    _json("Transfer"),
    (PRETTY, DATACENTER, Parameter("id", "query", "Name of the server that shall lead.")),
    failures={status.CONFLICT: "Leadership changed meanwhile."},
)

OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("/v1/connect/ca/roots", "GET"): Operation(
        {**_json("Roots"), PEM_TYPE: TEXT},
        (*_READ, *_BLOCKING, Parameter("pem", "query", "Answers with one PEM file.", _FLAG)),
        headers=_METADATA,
    ),
    ("/v1/connect/ca/configuration", "GET"): Operation(_json("Configuration"), _READ),
    ("/v1/connect/ca/configuration", "PUT"): Operation(
        parameters=(
            DATACENTER,
            Parameter("cas", "query", "ModifyIndex that the configuration must still have.", COUNT),
            Parameter("force", "query", "Rotates although the proof of the new chain failed.", _FLAG),
        ),
        takes=_json("ConfigurationChange"),
        failures=_CONFLICT | {status.REFUSED_BEHIND: "The backend of the provider refused."},
        summary="Replace the CA configuration, which may rotate the root",
    ),
    ("/v1/connect/ca/sign", "PUT"): Operation(
        {JSON_TYPE: {"oneOf": [ref("SignedLeaf"), ref("SignedLeaves")]}},
        (PRETTY, DATACENTER),
        takes={PEM_TYPE: TEXT, JSON_TYPE: {"oneOf": [ref("CSR"), ref("CSRs")]}},
        failures=_UNAVAILABLE | {status.REFUSED_BEHIND: "The backend of the provider refused."},
    ),
    ("/v1/connect/ca/cleanup", "GET"): Operation(_json("Cleanups"), (PRETTY, DATACENTER)),
    ("/v1/connect/ca/cleanup/forget", "PUT"): Operation(
        _json("Forgotten"),
        (PRETTY, DATACENTER, Parameter("id", "query", "ID of the clean-up, as the list shows it.")),
        failures={status.NOT_FOUND: "No such clean-up is owed."},
    ),
    ("/v1/agent/connect/ca/roots", "GET"): Operation(
        _json("Roots"), (*_READ, *_BLOCKING, CACHED, CACHE_CONTROL), headers=(*_METADATA, *_CACHE)
    ),
    ("/v1/agent/connect/ca/leaf/", "GET"): Operation(
        _json("Leaf"),
        (PRETTY, DATACENTER, *_BLOCKING, CACHED, NAMESPACE, CACHE_CONTROL),
        Parameter("service", "path", "Name of the service, percent-encoded.", {"type": "string", "minLength": 1}),
        headers=("X-Consul-Index", *_CACHE),
        failures=_UNAVAILABLE | {status.REFUSED_BEHIND: "The backend of the provider refused."},
    ),
    ("/v1/status/leader", "GET"): Operation({JSON_TYPE: TEXT}, (DATACENTER, PRETTY)),
    ("/v1/status/peers", "GET"): Operation({JSON_TYPE: {"type": "array", "items": TEXT}}, (DATACENTER, PRETTY)),
    ("/v1/status/live", "GET"): Operation(_json("Live"), (PRETTY,)),
    ("/v1/status/ready", "GET"): Operation(
        _json("Readiness"),
        (PRETTY,),
        failures={status.NOT_READY: "It cannot serve; the body says why."},
        same_body=(status.NOT_READY,),
    ),
    ("/v1/operator/raft/configuration", "GET"): Operation(_json("RaftConfiguration"), _READ),
    ("/v1/operator/raft/transfer-leader", "PUT"): _TRANSFER,
    ("/v1/operator/raft/transfer-leader", "POST"): _TRANSFER,
    ("/v1/operator/raft/peer", "DELETE"): Operation(
        parameters=(
            DATACENTER,
            Parameter("id", "query", "Id of the server."),
            Parameter("address", "query", "Raft address of the server."),
        )
    ),
    ("/v1/operator/keyring", "GET"): Operation(_json("Keyring"), _READ),
    ("/v1/snapshot", "GET"): Operation({GZIP_TYPE: FILE}, (DATACENTER, *_CONSISTENCY), headers=_METADATA),
    ("/v1/snapshot", "PUT"): Operation(
        parameters=(DATACENTER,),
        takes={FILE_TYPE: FILE},
        failures={status.CONFLICT: "Another restore is in progress; nothing was changed."},
        summary="Let a saved snapshot take the place of the whole state",
    ),
    ("/v1/operator/autopilot/health", "GET"): Operation(
        _json("Health"),
        _READ,
        failures={status.UNHEALTHY: "A server is not well; the body says which."},
        same_body=(status.UNHEALTHY,),
    ),
    ("/v1/operator/autopilot/configuration", "GET"): Operation(_json("Autopilot"), (PRETTY, DATACENTER)),
    ("/v1/agent/connect/authorize", "POST"): Operation(
        _json("Authorization"), (PRETTY, NAMESPACE), takes=_json("AuthorizeRequest"), headers=("X-Cache",)
    ),
    ("/v1/agent/self", "GET"): Operation(_json("Self"), (PRETTY,)),
    ("/v1/agent/members", "GET"): Operation(
        _json("Members"),
        (
            PRETTY,
            Parameter("wan", "query", "Names carry the datacenter.", _PRESENT),
            Parameter("segment", "query", "Consul Enterprise's.", {"type": "string", "enum": ["", "_all"]}),
        ),
    ),
    ("/v1/catalog/nodes", "GET"): Operation(
        _json("Nodes"),
        (*_READ, *_BLOCKING, FILTER, Parameter("node-meta", "query", "Only nodes with this key:value.")),
        headers=_METADATA,
    ),
    ("/v1/health/node/", "GET"): Operation(
        _json("Checks"),
        (*_READ, *_BLOCKING, FILTER, NAMESPACE),
        Parameter("node", "path", "Name of the server.", {"type": "string", "minLength": 1}),
        headers=_METADATA,
    ),
    ("/v1/agent/reload", "PUT"): Operation(),
    ("/v1/agent/metrics", "GET"): Operation(
        {**_json("Metrics"), TEXT_TYPE: TEXT},
        (Parameter("format", "query", "prometheus: as text.", {"type": "string", "enum": ["", "json", "prometheus"]}),),
    ),
    ("/openapi.json", "GET"): Operation(_json("OpenAPI"), (PRETTY,)),
}
