"""``/openapi.json``: the table of routes as an OpenAPI 3.1 document, with what ``reference`` says of each of them."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Protocol

from caserver import wire
from caserver.acl import Permission
from caserver.api.acl_reference import ACL_OPERATIONS, ACL_SCHEMAS
from caserver.api.query import Call, NodeView, Reply
from caserver.api.reference import ERRORS, OPERATIONS, TEXT_TYPE, WRITE_ERRORS, Operation, Parameter
from caserver.api.schemas import SCHEMAS, TEXT
from caserver.environment import release

_JSON = "application/json"
_SECURITY = {
    "token": {"type": "apiKey", "in": "header", "name": "X-Consul-Token"},
    "bearer": {"type": "http", "scheme": "bearer"},
    "parameter": {"type": "apiKey", "in": "query", "name": "token", "description": "Deprecated: it ends up in logs."},
}
REFERENCE = {**OPERATIONS, **ACL_OPERATIONS}  # what every route takes and answers
_METADATA = {
    "X-Consul-Index": {
        "description": "Index of what was answered, for a blocking query.",
        "schema": {"type": "integer"},
    },
    "X-Consul-Knownleader": {"description": "Whether this node knows a leader.", "schema": {"type": "boolean"}},
    "X-Consul-Lastcontact": {
        "description": "Milliseconds since the leader was heard, for an answer that may be stale.",
        "schema": {"type": "integer"},
    },
    "X-Cache": {"description": "Whether this node held the answer.", "schema": {"enum": ["HIT", "MISS"]}},
    "Age": {"description": "For how many seconds, on a HIT.", "schema": {"type": "integer"}},
}


class Documented(Protocol):
    """What the document takes from a route."""

    @property
    def path(self) -> str:
        """The path, or what all of its paths begin with."""

    @property
    def handlers(self) -> Mapping[str, object]:
        """By method."""

    @property
    def summary(self) -> str:
        """One line."""

    @property
    def permission(self) -> Permission | None:
        """What a caller needs while ACLs are on."""

    @property
    def filtered(self) -> bool:
        """Whether what it does not cover is left out, instead of a refusal."""


def serving(routes: Callable[[], Iterable[Documented]]) -> Callable[[NodeView, Call], Awaitable[Reply]]:
    """The handler that answers with the document of ``routes``, rendered once."""

    async def get_openapi(node: NodeView, call: Call) -> Reply:
        pretty = call.options.pretty or node.dev
        return Reply(node.bodies.get(("openapi", pretty), lambda: wire.render(document(routes()), pretty=pretty)))

    return get_openapi


def document(routes: Iterable[Documented]) -> dict[str, object]:
    """The OpenAPI document."""
    paths: dict[str, object] = {}
    for route in routes:
        operations = {method: REFERENCE[route.path, method] for method in route.handlers}
        variable = next(iter(operations.values())).variable
        path = route.path if variable is None else f"{route.path}{{{variable.name}}}"
        paths[path] = {
            method.lower(): _operation(route, path, method, operation) for method, operation in operations.items()
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "caserver",
            "version": release(),
            "description": "Connect certificate management: roots, configuration, leaves. Errors are plain text.",
        },
        "servers": [{"url": "/"}],
        "security": [{}, *({name: []} for name in _SECURITY)],
        "paths": paths,
        "components": {"schemas": {**SCHEMAS, **ACL_SCHEMAS}, "securitySchemes": _SECURITY, "headers": _METADATA},
    }


def _operation(route: Documented, path: str, method: str, operation: Operation) -> dict[str, object]:
    parameters = [*((operation.variable,) if operation.variable else ()), *operation.parameters]
    found: dict[str, object] = {
        "operationId": re.sub(r"[^a-z0-9]+", "_", f"{method} {path}".lower()).strip("_"),
        "summary": operation.summary or route.summary,
        "description": _needs(route),
        "parameters": [_parameter(each) for each in parameters],
        "responses": _responses(method, operation),
    }
    if operation.takes:
        found["requestBody"] = {
            "required": True,
            "content": {media: {"schema": schema} for media, schema in operation.takes.items()},
        }
    return found


def _needs(route: Documented) -> str:
    if route.permission is None:
        return "Needs nothing."
    return f"{'Shows what is covered by' if route.filtered else 'Needs'} {route.permission}, if ACLs are on."


def _parameter(parameter: Parameter) -> dict[str, object]:
    found: dict[str, object] = {
        "name": parameter.name,
        "in": parameter.where,
        "required": parameter.where == "path",
        "description": parameter.meaning,
        "schema": parameter.schema,
    }
    return found | ({"allowEmptyValue": True} if parameter.where == "query" else {})


def _responses(method: str, operation: Operation) -> dict[str, object]:
    answer: dict[str, object] = {"description": "Done."}
    if operation.answers:
        answer["content"] = {media: {"schema": schema} for media, schema in operation.answers.items()}
    if operation.headers:
        answer["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in operation.headers}
    failures = {**ERRORS, **(WRITE_ERRORS if method != "GET" else {}), **operation.failures}
    responses: dict[str, object] = {"200": answer}
    for status, meaning in sorted(failures.items()):
        content = {TEXT_TYPE: {"schema": TEXT}}
        if status in operation.same_body:
            content = {_JSON: {"schema": operation.answers[_JSON]}, **content}
        responses[str(status)] = {"description": meaning, "content": content}
    return responses
