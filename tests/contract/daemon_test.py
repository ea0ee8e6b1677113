import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

import pytest
import structlog

from caserver import daemon
from caserver.config.agent_config import AgentConfig
from caserver.daemon import COLLECTOR_THRESHOLDS, calm_collector


@dataclass
class Cycle:
    other: object = None


@pytest.fixture
def collector() -> Iterator[None]:
    """The collector as it was before."""
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def test_what_is_there_at_the_start_is_not_looked_at_again(collector: None) -> None:
    kept = [Cycle() for _ in range(1000)]
    calm_collector()

    assert gc.get_freeze_count() > 10_000
    assert len(gc.get_objects()) < len(kept)
    assert gc.get_threshold() == COLLECTOR_THRESHOLDS


def test_new_cycles_are_still_collected(collector: None) -> None:
    calm_collector()
    cycle = Cycle()
    cycle.other = cycle
    del cycle

    assert gc.collect() >= 1


@pytest.fixture
def logging() -> Iterator[None]:
    """Logging as it was before."""
    root = getLogger()
    before = (root.handlers[:], root.level)
    yield
    structlog.reset_defaults()
    root.handlers, root.level = before


def test_files_that_nobody_can_serve_with_stop_the_agent_before_its_log_begins(
    tmp_path: Path, logging: None, capfd: pytest.CaptureFixture[str]
) -> None:
    path, data = tmp_path / "n.json", tmp_path / "data"
    path.write_text(json.dumps({"data_dir": str(data), "cert_file": str(path), "key_file": str(path)}))
    config = AgentConfig.load([str(path)], flags={}, environ={}, hostname="n1")

    assert daemon.run(config) == daemon.EXIT_FAILED

    assert not data.exists()
    assert f"cert_file: no certificate can be read from {path}" in "".join(capfd.readouterr())
