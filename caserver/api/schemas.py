"""JSON Schemas (2020-12) of the bodies that the HTTP interface takes and answers; ``wire`` and the handlers make the bodies.

Answers are described exactly (every name required, no other), so that a test against the schemas notices a body that
changed; requests only as far as a client has to know before it is told.
"""

from __future__ import annotations

from collections.abc import Mapping

Schema = Mapping[str, object]

UINT64_MAX = 2**64 - 1
DURATION = r"^([-+]?(([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h))+|[-+]?0)$"

TEXT: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": UINT64_MAX}
INSTANT: Schema = {"type": "string", "format": "date-time"}
PEM: Schema = {"type": "string", "description": "PEM"}


def ref(name: str) -> Schema:
    """A schema of ``SCHEMAS`` by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def record(**properties: Schema) -> Schema:
    """An object with exactly these names."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def array(items: Schema, **limits: int) -> Schema:
    """A list; ``limits`` are ``minItems`` and ``maxItems``."""
    return {"type": "array", "items": items, **limits}


def nullable(schema: Schema) -> Schema:
    """The schema, or null."""
    return {"oneOf": [schema, {"type": "null"}]}


_TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
_MEMBER = record(
    Name=TEXT,
    Addr=TEXT,
    Port=COUNT,
    Tags=_TEXTS,
    Status=COUNT,
    ProtocolMin=COUNT,
    ProtocolMax=COUNT,
    ProtocolCur=COUNT,
    DelegateMin=COUNT,
    DelegateMax=COUNT,
    DelegateCur=COUNT,
)
_LIFETIME: Schema = {
    "oneOf": [
        {"type": "string", "pattern": DURATION, "examples": ["72h"]},
        {"type": "integer", "minimum": 0, "description": "nanoseconds"},
    ]
}
_LEAF = {
    "Service": TEXT,
    "ServiceURI": TEXT,
    "ValidAfter": INSTANT,
    "ValidBefore": INSTANT,
    "CreateIndex": COUNT,
    "ModifyIndex": COUNT,
}
_READING = {"Name": TEXT, "Labels": {"type": "object", "additionalProperties": TEXT}}

SCHEMAS: Mapping[str, Schema] = {
    "Root": record(
        ID=TEXT,
        Name=TEXT,
        SerialNumber=COUNT,
        SigningKeyID=TEXT,
        ExternalTrustDomain=TEXT,
        NotBefore=INSTANT,
        NotAfter=INSTANT,
        RootCert=PEM,
        IntermediateCerts=nullable(array(PEM)),
        Active=BOOLEAN,
        PrivateKeyType=TEXT,
        PrivateKeyBits=COUNT,
        CreateIndex=COUNT,
        ModifyIndex=COUNT,
    ),
    "Roots": record(ActiveRootID=TEXT, TrustDomain=TEXT, Roots=array(ref("Root"))),
    "Configuration": record(
        Provider=TEXT,
        Config={"type": "object", "description": "Keys and values as they were given; secrets read <redacted>."},
        State={"type": ["object", "null"]},
        ForceWithoutCrossSigning=BOOLEAN,
        CreateIndex=COUNT,
        ModifyIndex=COUNT,
    ),
    "ConfigurationChange": {
        "type": "object",
        "description": "Replaces the whole configuration. Names of any case and snake_case are understood.",
        "properties": {
            "Provider": {"enum": ["consul"]},
            "Config": {"oneOf": [ref("ProviderConfig"), {"type": "null"}]},
            "State": {"type": ["object", "null"]},
            "ForceWithoutCrossSigning": {"type": ["boolean", "null"]},
            "CreateIndex": COUNT,
            "ModifyIndex": {**COUNT, "description": "Above zero: the index that the configuration must still have."},
        },
        "required": ["Provider"],
        "additionalProperties": False,
    },
    "ProviderConfig": {
        "type": "object",
        "properties": {
            "LeafCertTTL": _LIFETIME,
            "IntermediateCertTTL": _LIFETIME,
            "RootCertTTL": _LIFETIME,
            "RotationPeriod": _LIFETIME,
            "CSRMaxPerSecond": {"type": "number", "minimum": 0},
            "CSRMaxConcurrent": COUNT,
            "PrivateKeyType": {"enum": ["ec", "rsa"]},
            "PrivateKeyBits": {"enum": [224, 256, 384, 521, 2048, 4096]},
            "PrivateKey": PEM,
            "RootCert": PEM,
        },
        "additionalProperties": False,
    },
    "CSR": record(CSR=PEM),
    "CSRs": record(CSRs=array(PEM, minItems=1, maxItems=100)),
    "Leaf": record(SerialNumber=TEXT, CertPEM=PEM, PrivateKeyPEM=PEM, **_LEAF),
    "SignedLeaf": record(SerialNumber=TEXT, CertPEM=PEM, **_LEAF),
    "NotSigned": record(Error=TEXT, Status=COUNT),
    "SignedLeaves": array({"oneOf": [ref("SignedLeaf"), ref("NotSigned")]}, minItems=1),
    "Cleanups": record(
        Cleanups=array(
            record(
                ID=TEXT,
                Provider=TEXT,
                Address=TEXT,
                Namespace=TEXT,
                Path=TEXT,
                Left=array(TEXT),
                NotBefore=INSTANT,
                Reason=TEXT,
            )
        )
    ),
    "Forgotten": record(Success=BOOLEAN),
    "Live": record(Live=BOOLEAN),
    "Readiness": record(Ready=BOOLEAN, Degraded=array(record(Code=TEXT, Reason=TEXT))),
    "RaftServer": record(ID=TEXT, Node=TEXT, Address=TEXT, Leader=BOOLEAN, ProtocolVersion=TEXT, Voter=BOOLEAN),
    "RaftConfiguration": record(Servers=array(ref("RaftServer")), Index=COUNT),
    "Transfer": record(Success=BOOLEAN),
    "ServerHealth": record(
        ID=TEXT,
        Name=TEXT,
        Address=TEXT,
        SerfStatus=TEXT,
        Version=TEXT,
        Leader=BOOLEAN,
        LastContact=TEXT,
        LastTerm=COUNT,
        LastIndex=COUNT,
        Healthy=BOOLEAN,
        Voter=BOOLEAN,
        StableSince=INSTANT,
    ),
    "Health": record(Healthy=BOOLEAN, FailureTolerance=COUNT, Servers=array(ref("ServerHealth"))),
    "Member": _MEMBER,
    "Members": array(ref("Member")),
    "Nodes": array(
        record(
            ID=TEXT,
            Node=TEXT,
            Address=TEXT,
            Datacenter=TEXT,
            TaggedAddresses=_TEXTS,
            Meta=_TEXTS,
            CreateIndex=COUNT,
            ModifyIndex=COUNT,
        )
    ),
    "Checks": array(
        record(
            Node=TEXT,
            CheckID=TEXT,
            Name=TEXT,
            Status={"enum": ["passing", "critical"]},
            Notes=TEXT,
            Output=TEXT,
            ServiceID=TEXT,
            ServiceName=TEXT,
            ServiceTags=array(TEXT),
            Type=TEXT,
            Definition=record(),
            CreateIndex=COUNT,
            ModifyIndex=COUNT,
        )
    ),
    "Self": record(
        Config=record(Datacenter=TEXT, NodeName=TEXT, NodeID=TEXT, Revision=TEXT, Server=BOOLEAN, Version=TEXT),
        DebugConfig={"type": "object", "description": "The settings of the node under Consul's names."},
        Coord={"type": "null"},
        Member=ref("Member"),
        Stats={"type": "object", "additionalProperties": _TEXTS},
        Meta=_TEXTS,
    ),
    "AuthorizeRequest": {
        "type": "object",
        "properties": {"Target": TEXT, "ClientCertURI": TEXT, "ClientCertSerial": TEXT},
        "required": ["Target", "ClientCertURI"],
        "additionalProperties": False,
    },
    "Authorization": record(Authorized=BOOLEAN, Reason=TEXT),
    "Autopilot": record(
        CleanupDeadServers=BOOLEAN,
        LastContactThreshold=TEXT,
        MaxTrailingLogs=COUNT,
        MinQuorum=COUNT,
        ServerStabilizationTime=TEXT,
        RedundancyZoneTag=TEXT,
        DisableUpgradeMigration=BOOLEAN,
        UpgradeVersionTag=TEXT,
        CreateIndex=COUNT,
        ModifyIndex=COUNT,
    ),
    "Keyring": record(
        Nodes=array(record(Node=TEXT, Announced=BOOLEAN, Keys=array(TEXT), Stored=array(TEXT))),
        Keys=array(record(ID=TEXT, Seals=array(TEXT), Removable=BOOLEAN, NeededBecause=array(TEXT))),
    ),
    "Sample": record(
        Count=COUNT, Rate=NUMBER, Sum=NUMBER, Min=NUMBER, Max=NUMBER, Mean=NUMBER, Stddev=NUMBER, **_READING
    ),
    "Metrics": record(
        Timestamp=TEXT,
        Gauges=array(record(Value=NUMBER, **_READING)),
        Points=array({}),
        Counters=array(ref("Sample")),
        Samples=array(ref("Sample")),
    ),
    "OpenAPI": {"type": "object", "required": ["openapi", "info", "paths"]},
}
