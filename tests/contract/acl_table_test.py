"""Who may call what: every route with every kind of token, and what each is answered.

The table below says what a route needs; a route without a line fails here. What is checked is the answer: a refusal is a
403 with Consul's text, or an answer from which everything is left out, and whatever else comes is not a refusal.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from caserver.acl import Permission
from caserver.api.routes import ROUTES, Route
from caserver.state.acl import ANONYMOUS_ID
from tests.contract.world import CLUSTER_ID, World
from tests.testkit.acl_world import MASTER, UNKNOWN, at, guarded, made_token, put, secret_of
from tests.testkit.nodes import csr_for

TRUST_DOMAIN = f"{CLUSTER_ID}.consul"
NOBODY = "00000000-9999-9999-9999-999999999999"  # an id that nothing has


@dataclass(frozen=True)
class Line:
    """What a route needs, and how to call it so that nothing but the permission decides."""

    needs: str  # "" = nothing
    path: str = ""  # if not the route's own
    body: object = None


LINES: dict[tuple[str, str], Line] = {
    ("GET", "/v1/connect/ca/roots"): Line(""),
    ("GET", "/v1/connect/ca/configuration"): Line("operator:write"),
    ("PUT", "/v1/connect/ca/configuration"): Line(
        "operator:write", body={"Provider": "consul", "Config": {"LeafCertTTL": "40h"}}
    ),
    ("PUT", "/v1/connect/ca/sign"): Line(
        "service:write on web", body={"CSR": csr_for("web", trust_domain=TRUST_DOMAIN)}
    ),
    ("GET", "/v1/connect/ca/cleanup"): Line("operator:read"),
    ("PUT", "/v1/connect/ca/cleanup/forget"): Line("operator:write", "/v1/connect/ca/cleanup/forget?id=1"),
    ("GET", "/v1/agent/connect/ca/roots"): Line(""),
    ("GET", "/v1/agent/connect/ca/leaf/"): Line("service:write on web", "/v1/agent/connect/ca/leaf/web"),
    ("POST", "/v1/agent/connect/authorize"): Line(
        "service:write on web",
        body={"Target": "web", "ClientCertURI": f"spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/db"},
    ),
    ("GET", "/v1/agent/self"): Line("agent:read"),
    ("GET", "/v1/agent/members"): Line("node:read"),
    ("GET", "/v1/catalog/nodes"): Line("node:read"),
    ("GET", "/v1/health/node/"): Line("node:read", "/v1/health/node/n1"),
    ("GET", "/v1/snapshot"): Line("acl:write"),
    ("PUT", "/v1/snapshot"): Line("acl:write"),
    ("GET", "/v1/agent/metrics"): Line("agent:read"),
    ("PUT", "/v1/agent/reload"): Line("agent:write"),
    ("GET", "/openapi.json"): Line(""),
    ("GET", "/v1/status/leader"): Line(""),
    ("GET", "/v1/status/peers"): Line(""),
    ("GET", "/v1/status/live"): Line(""),
    ("GET", "/v1/status/ready"): Line(""),
    ("GET", "/v1/operator/raft/configuration"): Line("operator:read"),
    ("GET", "/v1/operator/keyring"): Line("operator:read"),
    ("DELETE", "/v1/operator/raft/peer"): Line(""),
    ("PUT", "/v1/operator/raft/transfer-leader"): Line("operator:write"),
    ("POST", "/v1/operator/raft/transfer-leader"): Line("operator:write"),
    ("GET", "/v1/operator/autopilot/health"): Line("operator:read"),
    ("GET", "/v1/operator/autopilot/configuration"): Line("operator:read"),
    # Everybody may ask for the first management token: it is refused once there is one, and 403 says so in other words.
    ("PUT", "/v1/acl/bootstrap"): Line(""),
    ("GET", "/v1/acl/tokens"): Line("acl:write"),
    ("PUT", "/v1/acl/token"): Line("acl:write", body={"Description": "x"}),
    ("GET", "/v1/acl/token/self"): Line("own token"),
    ("GET", "/v1/acl/token/"): Line("acl:write", f"/v1/acl/token/{ANONYMOUS_ID}"),
    ("PUT", "/v1/acl/token/"): Line("acl:write", f"/v1/acl/token/{ANONYMOUS_ID}", {"Description": "x"}),
    ("DELETE", "/v1/acl/token/"): Line("acl:write", f"/v1/acl/token/{NOBODY}"),
    ("GET", "/v1/acl/policies"): Line("acl:write"),
    ("PUT", "/v1/acl/policy"): Line("acl:write", body={"Name": "in-table"}),
    ("GET", "/v1/acl/policy/name/"): Line("acl:write", "/v1/acl/policy/name/global-management"),
    ("GET", "/v1/acl/policy/"): Line("acl:write", "/v1/acl/policy/00000000-0000-0000-0000-000000000001"),
    ("PUT", "/v1/acl/policy/"): Line("acl:write", f"/v1/acl/policy/{NOBODY}", {"Name": "x"}),
    ("DELETE", "/v1/acl/policy/"): Line("acl:write", f"/v1/acl/policy/{NOBODY}"),
}
CALLS = [(method, route) for route in ROUTES for method in route.handlers]

# Kind of token -> what it covers of what the lines need.
GRANTED: dict[str, set[str]] = {
    "none": set(),
    "unknown": set(),
    "management": {
        "operator:read",
        "operator:write",
        "agent:read",
        "agent:write",
        "node:read",
        "acl:write",
        "own token",
    }
    | {"service:write on web", "service:write on db"},
    "operator read": {"operator:read", "own token"},
    "operator write": {"operator:read", "operator:write", "own token"},
    "operator deny": {"own token"},
    "service write exact": {"service:write on web", "own token"},
    "service write prefix": {"service:write on web", "own token"},
    "service write other": {"own token"},
    "service read": {"own token"},
    "service deny over prefix": {"own token"},
    "agent read": {"agent:read", "own token"},
    "agent write": {"agent:read", "agent:write", "own token"},
    "node read": {"node:read", "own token"},
    "acl read": {"own token"},
    "expired": set(),
    "deleted": set(),
}
RULES = {
    "operator read": 'operator = "read"',
    "operator write": 'operator = "write"',
    "operator deny": 'operator = "deny"',
    "service write exact": 'service "web" { policy = "write" }',
    "service write prefix": 'service_prefix "we" { policy = "write" }',
    "service write other": 'service "web2" { policy = "write" } service_prefix "webb" { policy = "write" }',
    "service read": 'service_prefix "" { policy = "read" }',
    "service deny over prefix": 'service "web" { policy = "deny" } service_prefix "" { policy = "write" }',
    "agent read": 'agent "n1" { policy = "read" }',
    "agent write": 'agent_prefix "n" { policy = "write" }',
    "node read": 'node_prefix "" { policy = "read" }',
    "acl read": 'acl = "read"',
}


@dataclass
class Guarded:
    """A node, and a token of every kind."""

    world: World
    tokens: dict[str, str]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node() -> AsyncIterator[Guarded]:
    async with guarded() as world:
        tokens = {kind: await secret_of(world, rules) for kind, rules in RULES.items()}
        operator = [{"Name": "for-all"}]
        rules = 'operator = "write" service_prefix "" { policy = "write" } acl = "write" agent_prefix "" { policy = "write" }'
        await put(world, "/v1/acl/policy", {"Name": "for-all", "Rules": rules})
        expired = await made_token(world, Policies=operator, ExpirationTTL="5m")
        deleted = await made_token(world, Policies=operator)
        await world.fetch("DELETE", f"/v1/acl/token/{deleted['AccessorID']}", {"X-Consul-Token": MASTER})
        await world.clock.advance(at(expired["ExpirationTime"]) - world.clock.now().timestamp())
        tokens |= {"none": "", "unknown": UNKNOWN, "management": MASTER}
        tokens |= {"expired": expired["SecretID"], "deleted": deleted["SecretID"]}
        assert set(tokens) == set(GRANTED)
        yield Guarded(world, tokens)


def permission_text(permission: Permission | None) -> str:
    return "" if permission is None else f"{permission.resource}:{permission.access}"


@pytest.mark.parametrize(("method", "route"), CALLS, ids=lambda each: getattr(each, "path", each))
def test_every_route_has_a_line_that_agrees_with_its_permission(method: str, route: Route):
    line = LINES[method, route.path]

    if route.path != "/v1/acl/token/self":
        assert line.needs.partition(" on ")[0] == permission_text(route.permission)


def test_no_line_is_left_over():
    assert set(LINES) == {(method, route.path) for method, route in CALLS}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("kind", GRANTED)
@pytest.mark.parametrize(("method", "route"), CALLS, ids=lambda each: getattr(each, "path", each))
async def test_a_call_is_refused_exactly_if_its_token_does_not_cover_it(
    node: Guarded, method: str, route: Route, kind: str
):
    line = LINES[method, route.path]
    unknown = kind in {"unknown", "expired", "deleted"}
    token = node.tokens[kind]
    headers = {"X-Consul-Token": token} if token else {}
    body = b"" if line.body is None else json.dumps(_own(line.body, kind)).encode()

    answer = await node.world.fetch(method, line.path or route.path, headers, body)

    if not line.needs or line.needs in GRANTED[kind]:
        assert answer.body not in {b"Permission denied", b"ACL not found", b"[]"}, answer.status
    elif route.filtered and not unknown:
        assert (answer.status, answer.text.strip()) == (200, "[]")
    else:
        assert answer.status == 403
        nobody = unknown or (kind == "none" and line.needs == "own token")
        assert answer.text == ("ACL not found" if nobody else "Permission denied")


def _own(body: Any, kind: str) -> Any:
    """Names that must differ from call to call."""
    return body | {"Name": f"in-table-{kind.replace(' ', '-')}"} if body == {"Name": "in-table"} else body
