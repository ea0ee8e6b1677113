"""What the README and the examples say is what the program does."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from caserver.api import status
from caserver.api.openapi import REFERENCE, document
from caserver.api.routes import ROUTES, Route
from caserver.cli import VERBS
from caserver.config.agent_config import KEYS, AgentConfig
from caserver.telemetry.metrics import METRICS, Metric

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def _told(path: str) -> set[str]:
    return {method for known, method in REFERENCE if known == path}


OPENAPI: Any = json.loads(json.dumps(document([each for each in ROUTES if set(each.handlers) <= _told(each.path)])))
OPERATIONS = [
    (f"{method.upper()} {path}", operation)
    for path, methods in OPENAPI["paths"].items()
    for method, operation in methods.items()
]
SECRET = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_every_route_is_in_the_readme(route: Route) -> None:
    assert route.path in README


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_what_a_route_needs_is_in_the_readme(route: Route) -> None:
    assert route.permission is None or f"| `{route.permission}`" in README


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_is_in_the_readme(metric: Metric) -> None:
    assert f"`{metric.name}`" in README


@pytest.mark.parametrize("key", sorted({word for key in (*KEYS.scalars, *KEYS.open_tables) for word in key.split(".")}))
def test_every_agent_key_is_in_the_readme(key: str) -> None:
    assert f"`{key}" in README


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_in_the_readme(verb: str) -> None:
    group, _, last = verb.rpartition(" ")
    lines = [line for line in README.splitlines() if line.startswith(f"caserver {group}".strip())]

    assert any(last in line.split() for line in lines)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").iterdir()), ids=lambda file: file.name)
def test_every_example_loads(file: Path) -> None:
    config = AgentConfig.load([str(file)], flags={}, environ={"CASERVER_CLUSTER_SECRET": SECRET}, hostname="localhost")

    assert config.connect.enabled


def parameters_read() -> set[str]:
    """Names of query parameters that the source asks for."""
    found = set()
    for path in (ROOT / "caserver" / "api").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name("flags") | ast.Attribute(attr="flags"), attr="get" | "pop"),
                    args=[ast.Constant(str(name)), *_],
                ):
                    found.add(name)
                case ast.Call(func=ast.Name("flag"), args=[_, ast.Constant(str(name)), *_]):
                    found.add(name)
                case ast.Compare(left=ast.Constant(str(name)), ops=[ast.In()], comparators=[ast.Name("flags")]):
                    found.add(name)
    return found


def test_the_reference_knows_every_route_and_method_and_no_other() -> None:
    told, served = set(REFERENCE), {(route.path, method) for route in ROUTES for method in route.handlers}

    assert served - told == set(), "say in api/reference.py or api/acl_reference.py what these take and answer"
    assert told - served == set()


def test_every_route_and_method_is_in_the_openapi_document() -> None:
    expected = {f"{method} {route.path}" for route in ROUTES for method in route.handlers}

    assert {name.partition("{")[0] for name, _ in OPERATIONS} == expected
    assert len(OPERATIONS) == len({operation["operationId"] for _, operation in OPERATIONS})


def test_every_query_parameter_is_in_the_openapi_document() -> None:
    told = {each["name"] for _, operation in OPERATIONS for each in operation["parameters"] if each["in"] == "query"}
    told |= {each["name"] for each in OPENAPI["components"]["securitySchemes"].values() if each.get("in") == "query"}

    assert parameters_read() <= told
    assert {
        "index",
        "wait",
        "stale",
        "consistent",
        "max_stale",
        "dc",
        "ns",
        "pretty",
        "token",
        "cas",
    } <= parameters_read()


@pytest.mark.parametrize(("name", "operation"), OPERATIONS, ids=[name for name, _ in OPERATIONS])
def test_an_operation_tells_all_that_it_may_answer(name: str, operation: dict[str, Any]) -> None:
    usual = {status.OK, status.BAD_REQUEST, status.FORBIDDEN, status.MISDIRECTED, status.BUG, status.NOT_READY}
    if not name.startswith("GET "):
        usual |= {status.SLOW_REQUEST, status.TOO_LARGE}

    assert {str(each) for each in usual} <= set(operation["responses"])
    assert operation["summary"]


def test_every_status_of_an_error_is_told_somewhere() -> None:
    told = {int(each) for _, operation in OPERATIONS for each in operation["responses"]}

    assert set(status.EVERY) <= told | {status.NOT_FOUND}
