import gc
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

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
