"""THE table of the HTTP interface: every path with its methods, handlers and limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from caserver.acl import (
    AGENT_READ,
    AGENT_WRITE,
    MANAGEMENT,
    NODE_READ,
    OPERATOR_READ,
    OPERATOR_WRITE,
    SERVICE_WRITE,
    Permission,
)
from caserver.api import acl, agent, connect_ca, nodes, openapi, operator, snapshot
from caserver.api.query import Call, NodeView, Reply
from caserver.archive import ARCHIVE_MAX

KIB = 1024
BODY_MAX = 512 * KIB
CONFIGURATION_MAX = 64 * KIB

Handler = Callable[[NodeView, Call], Awaitable[Reply]]
Admission = Callable[[NodeView, Call], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Route:
    """One path; with ``subtree`` everything below it too, the rest of the path being the handler's to read.

    ``permission`` is what a caller needs while ACLs are on, None: nothing; of what is ``filtered`` by it the parts that it
    does not cover are left out, and nobody is refused but for a token that is none. The server asks this node's gate for it before
    a GET and before whatever is about this agent or node; other changes are decided by the leader, by
    ``acl.permission_of``, and what depends on a name in the request (service permissions) by whoever has read it: the
    leaf cache, the issuance, the handler.
    """

    path: str
    handlers: Mapping[str, Handler]  # method -> handler, in the order of the Allow header
    summary: str
    permission: Permission | None
    subtree: bool = False
    body_max: int = BODY_MAX
    secret: bool = (
        False  # carries keys or changes things: never over plain HTTP that leaves the machine, unless allowed
    )
    metadata: bool = False  # errors of the handler carry the X-Consul headers too
    filtered: bool = False
    admission: Admission | None = None  # of an upload: asked before its body, which goes to a file, is read

    @property
    def allow(self) -> str:
        """Value of the Allow header."""
        return ",".join(("OPTIONS", *self.handlers))


ROUTES: tuple[Route, ...] = (
    Route(
        "/v1/connect/ca/roots",
        {"GET": connect_ca.get_roots},
        "Trust bundle with every root and intermediate in force",
        None,
        metadata=True,
    ),
    Route(
        "/v1/connect/ca/configuration",
        {"GET": connect_ca.get_configuration, "PUT": connect_ca.put_configuration},
        "CA configuration in force; replacing it may rotate the root",
        OPERATOR_WRITE,
        body_max=CONFIGURATION_MAX,
        secret=True,
    ),
    Route(
        "/v1/connect/ca/sign",
        {"PUT": connect_ca.put_sign},
        "Sign certificate signing requests of services",
        SERVICE_WRITE,
        secret=True,
    ),
    Route(
        "/v1/connect/ca/cleanup",
        {"GET": connect_ca.get_cleanups},
        "What is still owed at the backends of former CA providers",
        OPERATOR_READ,
    ),
    Route(
        "/v1/connect/ca/cleanup/forget",
        {"PUT": connect_ca.forget_cleanup},
        "Give up a clean-up that is owed",
        OPERATOR_WRITE,
        secret=True,
    ),
    Route("/v1/agent/connect/ca/roots", {"GET": agent.get_roots}, "Trust bundle as this node knows it", None),
    Route(
        "/v1/agent/connect/ca/leaf/",
        {"GET": agent.get_leaf},
        "Leaf certificate and key of a service",
        SERVICE_WRITE,
        subtree=True,
        secret=True,
    ),
    Route("/v1/status/leader", {"GET": operator.get_leader}, "Raft address of the leader", None),
    Route("/v1/status/peers", {"GET": operator.get_peers}, "Raft addresses of all servers", None),
    Route("/v1/status/live", {"GET": operator.get_live}, "Whether the process answers", None),
    Route("/v1/status/ready", {"GET": operator.get_ready}, "Whether this node can serve, and what is amiss", None),
    Route(
        "/v1/operator/raft/configuration",
        {"GET": operator.get_raft_configuration},
        "Servers of the Raft cluster",
        OPERATOR_READ,
    ),
    Route(
        "/v1/operator/raft/peer",
        {"DELETE": operator.remove_peer},
        "Refused: the list of servers changes only while all are stopped",
        None,  # whoever asks is told the same
    ),
    Route(
        "/v1/operator/keyring",
        {"GET": operator.get_keyring},
        "Cluster secrets by key id: who holds which, which may go",
        OPERATOR_READ,
    ),
    Route(
        "/v1/operator/raft/transfer-leader",
        {"PUT": operator.transfer_leader, "POST": operator.transfer_leader},
        "Let another server lead",
        OPERATOR_WRITE,
        secret=True,
    ),
    Route(
        "/v1/operator/autopilot/health", {"GET": operator.get_autopilot_health}, "How the servers are", OPERATOR_READ
    ),
    Route(
        "/v1/operator/autopilot/configuration",
        {"GET": operator.get_autopilot_configuration},
        "What the health of servers is judged by",
        OPERATOR_READ,
    ),
    Route(
        "/v1/agent/connect/authorize",
        {"POST": agent.authorize},
        "Whether the client of a certificate may connect to a service",
        SERVICE_WRITE,
    ),
    Route("/v1/agent/self", {"GET": agent.get_self}, "What this node is, and how it is set up", AGENT_READ),
    Route(
        "/v1/agent/members",
        {"GET": nodes.get_members},
        "The servers, and which of them are alive",
        NODE_READ,
        filtered=True,
    ),
    Route(
        "/v1/catalog/nodes",
        {"GET": nodes.get_nodes},
        "The servers as nodes of the catalog",
        NODE_READ,
        metadata=True,
        filtered=True,
    ),
    Route(
        "/v1/health/node/",
        {"GET": nodes.get_checks},
        "The check of one server",
        NODE_READ,
        subtree=True,
        metadata=True,
        filtered=True,
    ),
    Route(
        "/v1/agent/reload",
        {"PUT": agent.reload},
        "Read this node's settings and TLS files again",
        AGENT_WRITE,
        secret=True,
    ),
    Route(
        "/v1/snapshot",
        {"GET": snapshot.get_snapshot, "PUT": snapshot.put_snapshot},
        "Save the whole state as a file, restore it",
        MANAGEMENT,
        body_max=ARCHIVE_MAX,
        secret=True,
        admission=snapshot.admit_snapshot,
    ),
    Route(
        "/v1/agent/metrics", {"GET": agent.get_metrics}, "Metrics of this node, as JSON or for Prometheus", AGENT_READ
    ),
    Route("/openapi.json", {"GET": openapi.serving(lambda: ROUTES)}, "This interface as an OpenAPI 3.1 document", None),
    Route("/v1/acl/bootstrap", {"PUT": acl.bootstrap}, "Make the first management token", None, secret=True),
    Route("/v1/acl/tokens", {"GET": acl.list_tokens}, "Tokens, without their secrets", MANAGEMENT, secret=True),
    Route("/v1/acl/token", {"PUT": acl.create_token}, "Make a token", MANAGEMENT, secret=True),
    Route("/v1/acl/token/self", {"GET": acl.get_own_token}, "The token that the caller shows", None, secret=True),
    Route(
        "/v1/acl/token/",
        {"GET": acl.get_token, "PUT": acl.put_token, "DELETE": acl.delete_token},
        "One token by its accessor id; PUT .../clone copies it",
        MANAGEMENT,
        subtree=True,
        secret=True,
    ),
    Route("/v1/acl/policies", {"GET": acl.list_policies}, "Policies, without their rules", MANAGEMENT, secret=True),
    Route("/v1/acl/policy", {"PUT": acl.create_policy}, "Make a policy", MANAGEMENT, secret=True),
    Route(
        "/v1/acl/policy/name/",
        {"GET": acl.get_policy_by_name},
        "One policy by its name",
        MANAGEMENT,
        subtree=True,
        secret=True,
    ),
    Route(
        "/v1/acl/policy/",
        {"GET": acl.get_policy, "PUT": acl.put_policy, "DELETE": acl.delete_policy},
        "One policy by its id",
        MANAGEMENT,
        subtree=True,
        secret=True,
    ),
)

EXACT: Mapping[str, Route] = {route.path: route for route in ROUTES if not route.subtree}
# The longest path that fits decides.
SUBTREES: tuple[Route, ...] = tuple(
    sorted((route for route in ROUTES if route.subtree), key=lambda route: -len(route.path))
)
