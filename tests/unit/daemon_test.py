import gc
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from caserver.daemon import calm_collector


@dataclass
class Cycle:
    other: object = None


@pytest.fixture
def collector() -> Iterator[None]:
    """The collector as it was before."""
    thresholds, callbacks = gc.get_threshold(), list(gc.callbacks)
    yield
    gc.set_threshold(*thresholds)
    gc.callbacks[:] = callbacks
    gc.unfreeze()


def test_what_survives_a_full_collection_is_not_looked_at_again(collector: None) -> None:
    calm_collector()
    calm_collector()
    before = gc.get_freeze_count()

    kept = [Cycle() for _ in range(1000)]
    gc.collect()

    assert before > 10_000
    assert gc.get_freeze_count() >= before + len(kept)
    assert len(gc.get_objects()) < 1000


def test_new_cycles_are_still_collected(collector: None) -> None:
    calm_collector()
    cycle = Cycle()
    cycle.other = cycle
    del cycle

    assert gc.collect() >= 1
