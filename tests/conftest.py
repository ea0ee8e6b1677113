"""What every test shares: a failing cluster test shows the nodes' logs by itself, see testkit/cluster.py."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.testkit.openbao import Server
    from tests.testkit.vault import VaultLab

# One shared machine with two cores: time is no measure of a property test, and the examples must be the same everywhere.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("steady")


def pytest_collection_finish() -> None:
    """What was imported and collected lives to the end: full garbage collections need not look at it again and again."""
    gc.freeze()


@pytest.fixture(scope="session")
def openbao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server in memory that tests share; each uses paths of its own and leaves the others' alone."""
    from tests.testkit.openbao import in_memory

    with in_memory(tmp_path_factory.mktemp("openbao")) as server:
        yield server


@pytest.fixture
def vault(openbao: Server) -> Iterator[VaultLab]:
    """Providers on the shared server."""
    from tests.testkit.vault import VaultLab

    lab = VaultLab(openbao)
    yield lab
    lab.close()
