"""A few hundred requests made up from the served OpenAPI document; ``scripts/fuzz`` sends as many as one likes."""

from __future__ import annotations

from pathlib import Path

from caserver.api.routes import ROUTES
from tests.testkit.cluster import Cluster
from tests.testkit.fuzz import fuzz, told

EXAMPLES = 15


def test_requests_made_up_from_the_document_are_answered_as_it_says(tmp_path: Path) -> None:
    with Cluster(tmp_path, ("n1",), dev=True).start_ready() as cluster:
        summary = fuzz(cluster.nodes[0].url, examples=EXAMPLES)

    assert not summary.faults, "\n".join([*summary.faults[:20], told(summary)])
    assert {(method, path.partition("{")[0]) for method, path, _ in summary.answers} == {
        (method, route.path) for route in ROUTES for method in route.handlers
    }
