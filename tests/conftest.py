"""What every test shares: a failing cluster test shows the nodes' logs by itself, see testkit/cluster.py."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# One shared machine with two cores: time is no measure of a property test, and the examples must be the same everywhere.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("steady")
