"""What the README and the examples say is what the program does."""

from __future__ import annotations

from pathlib import Path

import pytest

from caserver.api.routes import ROUTES, Route
from caserver.cli import VERBS
from caserver.config.agent_config import KEYS, AgentConfig
from caserver.telemetry.metrics import METRICS, Metric

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SECRET = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_every_route_is_in_the_readme(route: Route) -> None:
    assert route.path in README


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
