#!/usr/bin/env python3
"""Starts a node and sends it requests made up from its own OpenAPI document, valid ones and broken ones, and these with bytes changed.

Ends with 1 if any answer was a 5xx or other than the document says. The same seed sends the same requests.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from caserver.api.routes import ROUTES  # noqa: E402 - after the path
from tests.testkit.cluster import Cluster  # noqa: E402
from tests.testkit.fuzz import Summary, fuzz, told  # noqa: E402

ROUND = 40  # requests to each operation before the next one gets its turn again
TWISTS = 9  # of each request, with bytes changed
FAULTS_SHOWN = 20


def main() -> int:
    """Fuzz, tell, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    operations = sum(len(route.handlers) for route in ROUTES)
    summary = Summary()
    with tempfile.TemporaryDirectory() as directory, Cluster(Path(directory), ("n1",), dev=True) as cluster:
        cluster.start_ready()
        number = options.seed
        while summary.requests < options.requests and not summary.faults:
            left = -(-(options.requests - summary.requests) // (operations * (TWISTS + 1)))
            found = fuzz(cluster.nodes[0].url, examples=min(ROUND, left), number=number, twists=TWISTS)
            summary.answers += found.answers
            summary.faults += found.faults
            summary.unanswered += found.unanswered
            number += 1
            print(
                f"{summary.requests} requests, {summary.unanswered} unfinished ones, {len(summary.faults)} faults",
                flush=True,
            )
        alive = cluster.nodes[0].running
    print(told(summary))
    print(*summary.faults[:FAULTS_SHOWN], sep="\n")
    return 0 if alive and not summary.faults else 1


if __name__ == "__main__":
    sys.exit(main())
