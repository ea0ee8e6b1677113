import math
import statistics

import pytest

from caserver.telemetry import metrics
from caserver.telemetry.metrics import METRICS, Kind, Reading, Summary, Totals, prometheus, readings_of


def test_names_are_unique_and_of_the_two_families() -> None:
    names = [each.name for each in METRICS]

    assert len(set(names)) == len(names) == len({each.prometheus_name for each in METRICS})
    assert all(name.startswith(("consul.", "caserver.")) for name in names)
    assert metrics.ROOT_EXPIRY.prometheus_name == "consul_mesh_active_root_ca_expiry"


def test_a_summary_adds_up() -> None:
    summary = Summary()
    for value in (3.0, 1.0, 2.0):
        summary.add(value)

    totals = summary.read()

    assert (totals.count, totals.total, totals.low, totals.high, totals.mean) == (3, 6.0, 1.0, 3.0, 2.0)
    assert totals.deviation == pytest.approx(statistics.stdev([3.0, 1.0, 2.0]))


def test_an_interval_has_its_own_extremes() -> None:
    summary = Summary()
    summary.add(9.0)
    first = summary.read(restart=True)
    summary.add(2.0)

    second = summary.read(restart=True).since(first)

    assert (second.count, second.total, second.low, second.high) == (1, 2.0, 2.0, 2.0)
    assert summary.read() == Totals(2, 11.0, 85.0, 0.0, 0.0)
    assert math.isfinite(Summary().read().low)


def test_prometheus_text() -> None:
    readings = [
        Reading(metrics.FSYNC_TIME, Totals(2, 1.5, 1.25, 0.5, 1.0)),
        Reading(metrics.ROOT_EXPIRY, 86400.0),
        *readings_of(metrics.CSR_REFUSED, {"InvalidCSR": 2, 'odd"\n\\': 1}),
        Reading(metrics.LEADER_CONTACT, 12.5),
    ]

    lines = prometheus(readings).splitlines()

    assert lines[:3] == [
        "# HELP consul_mesh_active_root_ca_expiry seconds until the active root expires",
        "# TYPE consul_mesh_active_root_ca_expiry gauge",
        "consul_mesh_active_root_ca_expiry 86400",
    ]
    assert 'caserver_csr_refused{reason="InvalidCSR"} 2' in lines
    assert 'caserver_csr_refused{reason="odd\\"\\n\\\\"} 1' in lines
    assert lines.count("# TYPE caserver_csr_refused counter") == 1
    assert {"caserver_raft_fsync_sum 1.5", "caserver_raft_fsync_count 2", "caserver_raft_leader_contact 12.5"} <= set(
        lines
    )


def test_every_kind_has_a_prometheus_type() -> None:
    assert {each.value for each in Kind} == {"gauge", "counter", "summary"}
