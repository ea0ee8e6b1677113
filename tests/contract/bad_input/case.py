"""One request that must be refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

SIGN = "/v1/connect/ca/sign"
CONFIGURATION = "/v1/connect/ca/configuration"
LEAF = "/v1/agent/connect/ca/leaf/"


@dataclass(frozen=True)
class Case:
    """``raw`` is what goes over the wire instead of a request made of the other parts."""

    name: str
    method: str = "GET"
    path: str = "/"
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    bare: bool = False  # refused before it is a request at all: a status and no words, as Go's server does


def put(name: str, path: str, body: object) -> Case:
    """A PUT of text, bytes, or anything else as JSON."""
    if isinstance(body, bytes):
        return Case(name, "PUT", path, body)
    text = body if isinstance(body, str) else json.dumps(body)
    return Case(name, "PUT", path, text.encode("utf-8", "surrogatepass"))
