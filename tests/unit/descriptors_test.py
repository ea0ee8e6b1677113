import resource

import pytest

from caserver.descriptors import Shares, raise_limit


def test_the_process_takes_all_that_it_may_have() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 700), hard))
    try:
        limit = raise_limit()
        raised = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert raised == hard
    assert limit == (1 << 20 if hard == resource.RLIM_INFINITY else hard)


@pytest.mark.parametrize("limit", [256, 1024, 20_000, 1 << 20])
@pytest.mark.parametrize("listeners", [0, 1, 2])
@pytest.mark.parametrize("peers", [0, 2, 4])
def test_a_quarter_is_left_for_the_log_and_its_files(limit: int, listeners: int, peers: int) -> None:
    shares = Shares.of(limit, listeners=listeners, peers=peers)

    assert listeners * shares.per_listener + 2 * peers * shares.per_peer <= limit * 3 // 4
    assert shares.per_listener >= 64
    assert shares.per_peer >= 8
