import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from immutables import Map

from caserver import wire
from caserver.errors import InvalidRequest
from caserver.requests import IssuedLeaf, ServersRead, ServerStatus
from caserver.state.model import CARoot, CAState, Configuration, Effective, Index, RootID, StoredConfiguration
from caserver.telemetry import metrics
from caserver.telemetry.metrics import Reading, Totals

CLUSTER = "838f036d-2872-2c69-9558-34f8baacf38a"
ROOT = CARoot(
    id=RootID("b2:bb"),
    name="Consul CA Root Cert",
    pem="-----BEGIN CERTIFICATE-----\nROOT\n-----END CERTIFICATE-----\n",
    serial=(1 << 150) + 5,
    not_before=1795430811,
    not_after=2111050011,
    key_type="ec",
    key_bits=256,
    signing_key_id="2a:8e",
    provider="consul",
    intermediates=(),
    sealed_key=None,
    active=True,
    rotated_out_at=None,
    leaf_not_after_max=0,
    leaf_ttl_max=259200,
    live_by_hour=Map(),
    create_index=Index(9),
    modify_index=Index(12),
)
STATE = CAState(cluster_id=CLUSTER, index=Index(12), roots=(ROOT,), roots_index=Index(12))


def configuration(given: str) -> Configuration:
    stored = StoredConfiguration(provider="consul", given=given, secrets=(), effective=Effective())
    return Configuration(stored, create_index=Index(5), modify_index=Index(7))


def test_roots_have_consuls_names_in_consuls_order() -> None:
    expected = (
        '{"ActiveRootID":"b2:bb","TrustDomain":"838f036d-2872-2c69-9558-34f8baacf38a.consul","Roots":[{"ID":"b2:bb",'
        '"Name":"Consul CA Root Cert","SerialNumber":5,"SigningKeyID":"2a:8e",'
        '"ExternalTrustDomain":"838f036d-2872-2c69-9558-34f8baacf38a","NotBefore":"2026-11-23T10:46:51Z",'
        '"NotAfter":"2036-11-23T10:46:51Z","RootCert":"-----BEGIN CERTIFICATE-----\\nROOT\\n-----END CERTIFICATE-----\\n",'
        '"IntermediateCerts":null,"Active":true,"PrivateKeyType":"ec","PrivateKeyBits":256,"CreateIndex":9,"ModifyIndex":12}]}'
    )

    assert wire.render(wire.encode_roots(STATE)).decode() == expected


def test_intermediates_are_a_list() -> None:
    state = replace(STATE, roots=(replace(ROOT, intermediates=("CROSS",)),))

    assert wire.encode_roots(state)["Roots"][0]["IntermediateCerts"] == ["CROSS"]


def test_the_pem_bundle_begins_with_the_active_root_and_names_nothing_twice() -> None:
    old = replace(ROOT, id=RootID("aa:aa"), pem="OLD\n", active=False, intermediates=("CROSS\n",))
    active = replace(ROOT, pem="NEW", intermediates=("CROSS\n",))

    assert wire.pem_bundle(replace(STATE, roots=(old, active))) == b"NEW\nCROSS\nOLD\n"


def test_the_configuration_shows_keys_as_go_orders_them() -> None:
    document = wire.encode_configuration(
        configuration(
            '{"RotationPeriod":"2160h","LeafCertTTL":"72h","Nested":{"b":1,"a":2},"IntermediateCertTTL":"8760h"}'
        )
    )
    expected = (
        '{"Provider":"consul","Config":{"IntermediateCertTTL":"8760h","LeafCertTTL":"72h","Nested":{"a":2,"b":1},'
        '"RotationPeriod":"2160h"},"State":null,"ForceWithoutCrossSigning":false,"CreateIndex":5,"ModifyIndex":7}'
    )

    assert wire.render(document).decode() == expected


def test_whole_floats_are_shown_as_go_shows_them() -> None:
    document = wire.encode_configuration(configuration('{"LeafCertTTL":3600000000000.0,"CSRMaxPerSecond":0.5}'))

    assert wire.render(document["Config"]) == b'{"CSRMaxPerSecond":0.5,"LeafCertTTL":3600000000000}'


def test_strings_are_escaped_as_go_escapes_them() -> None:
    assert wire.render({"a": "<é&>\u2028"}).decode() == '{"a":"\\u003cé\\u0026\\u003e\\u2028"}'


def test_pretty_is_four_spaces_and_a_newline() -> None:
    assert wire.render({"a": [1]}, pretty=True) == b'{\n    "a": [\n        1\n    ]\n}\n'


@pytest.mark.parametrize(("serial", "text"), [(8, "08"), (0x0102, "01:02"), (1 << 127, "80" + ":00" * 15), (0, "00")])
def test_a_leafs_serial_has_two_digits_a_byte(serial: int, text: str) -> None:
    assert wire.serial_text(serial) == text


def test_a_leaf_has_consuls_names_and_no_key_unless_given() -> None:
    leaf = IssuedLeaf(8, "CERT", "web", "spiffe://x/web", 1795430811, 1795690011, "aa", "bb", 33)
    named = list(wire.encode_leaf(leaf, "KEY"))

    assert named == [
        "SerialNumber", "CertPEM", "PrivateKeyPEM", "Service", "ServiceURI", "ValidAfter", "ValidBefore", "CreateIndex",
        "ModifyIndex",
    ]  # fmt: skip
    assert "PrivateKeyPEM" not in wire.encode_leaf(leaf)
    assert wire.encode_leaf(leaf)["ValidAfter"] == "2026-11-23T10:46:51Z"


def server(name: str, **fields: Any) -> ServerStatus:
    well = ServerStatus(
        name=name,
        leader=False,
        voter=True,
        healthy=True,
        connected=True,
        last_contact=0.0,
        last_index=9,
        last_term=2,
        stable_since=1795430811,
    )
    return replace(well, **fields)


@pytest.mark.parametrize(
    ("unwell", "healthy", "tolerance"),
    [([], True, 1), ([{"healthy": False}], False, 0), ([{"voter": False}], False, 0)],
)
def test_health_says_how_many_servers_may_be_lost(unwell: list[dict[str, bool]], healthy: bool, tolerance: int) -> None:
    servers = (server("n1", leader=True, release="1.0"), server("n2"), server("n3", **(unwell[0] if unwell else {})))

    document = wire.encode_health(ServersRead(servers), {})

    assert (document["Healthy"], document["FailureTolerance"]) == (healthy, tolerance)
    assert [each["Version"] for each in document["Servers"]] == ["1.0", "", ""]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1.0, "never"), (0.0, "0s"), (0.01823282, "18.23282ms"), (0.0005, "500µs"), (0.25, "250ms"), (75.0, "1m15s")],
)
def test_contact_is_shown_as_go_shows_a_duration(seconds: float, text: str) -> None:
    document = wire.encode_health(ServersRead((server("n1", last_contact=seconds),)), {})

    assert document["Servers"][0]["LastContact"] == text


def test_metrics_have_consuls_shape() -> None:
    readings = [
        Reading(metrics.TERM, 3),
        Reading(metrics.HTTP_REQUESTS, 20, {"path": "/x", "method": "GET", "status": "200"}),
        Reading(metrics.FSYNC_TIME, Totals(4, 6.0, 14.0, 0.5, 3.0)),
    ]

    document = wire.encode_metrics(readings, ended=datetime(2026, 11, 23, 10, 54, 20, tzinfo=UTC), seconds=10.0)

    assert list(document) == ["Timestamp", "Gauges", "Points", "Counters", "Samples"]
    assert document["Timestamp"] == "2026-11-23 10:54:20 +0000 UTC"
    assert document["Gauges"] == [{"Name": "caserver.raft.term", "Value": 3, "Labels": {}}]
    assert [(each["Count"], each["Rate"], each["Sum"]) for each in document["Counters"]] == [(20, 2, 20)]
    (sample,) = document["Samples"]
    assert (sample["Count"], sample["Min"], sample["Max"], sample["Mean"]) == (4, 0.5, 3, 1.5)
    assert sample["Stddev"] == pytest.approx(1.2909944)


def test_the_raft_configuration_lists_every_server() -> None:
    servers = (server("n1"), server("n2", leader=True), server("n3", voter=False))

    document = wire.encode_raft_configuration(ServersRead(servers), {"n2": "10.0.0.2:8300", "n1": "10.0.0.1:8300"})

    assert [(each["Node"], each["Leader"], each["Voter"], each["Address"]) for each in document["Servers"]] == [
        ("n1", False, True, "10.0.0.1:8300"),
        ("n2", True, True, "10.0.0.2:8300"),
        ("n3", False, False, ""),
    ]
    assert list(document["Servers"][0]) == ["ID", "Node", "Address", "Leader", "ProtocolVersion", "Voter"]
    assert document["Index"] == 0


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("-----BEGIN X", wire.SignBody(("-----BEGIN X",), listed=False)),
        ('{"CSR": "a"}', wire.SignBody(("a",), listed=False)),
        (' {"CSRs": ["a", "b"]}', wire.SignBody(("a", "b"), listed=True)),
        (json.dumps({"CSRs": ["a"] * 100}), wire.SignBody(("a",) * 100, listed=True)),
    ],
)
def test_a_sign_body_may_be_pem_an_object_or_a_list(body: str, expected: wire.SignBody) -> None:
    assert wire.decode_sign(body) == expected


@pytest.mark.parametrize(
    "body",
    [
        "",
        " \n",
        "{",
        '{"CSR": 5}',
        '{"CSRs": []}',
        '{"CSRs": [5]}',
        '{"CSR":"a","CSRs":["b"]}',
        '{"CSR":"a","Foo":1}',
        "{}",
    ],
)
def test_a_sign_body_of_another_shape_is_refused(body: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^Bad request: Request decode failed: "):
        wire.decode_sign(body)


def test_more_than_a_hundred_csrs_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="at most 100"):
        wire.decode_sign(json.dumps({"CSRs": ["a"] * 101}))
