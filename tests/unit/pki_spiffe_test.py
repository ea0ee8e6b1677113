"""Names of the mesh (contract sections 2 and 3)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caserver.errors import InvalidCSR, InvalidRequest
from caserver.pki.spiffe import (
    ServiceID,
    check_service_name,
    cluster_id_from,
    cluster_id_of_root,
    leaf_common_name,
    normalise_cluster_id,
    parse_service_uri,
    signing_uri,
)
from tests.testkit import mesh
from tests.testkit.keys import key_pem

TD = "838f036d-2872-2c69-9558-34f8baacf38a.consul"


def test_a_cluster_id_is_a_version_4_uuid():
    assert cluster_id_from(b"\xff" * 16) == "ffffffff-ffff-4fff-bfff-ffffffffffff"


def test_an_upper_case_cluster_id_is_lowered():
    assert normalise_cluster_id("838F036D-2872-2C69-9558-34F8BAACF38A") == "838f036d-2872-2c69-9558-34f8baacf38a"


@pytest.mark.parametrize(
    "text", ["", "838f036d", "838f036d-2872-2c69-9558-34f8baacf38a\n", "{838f036d28722c69955834f8baacf38a}"]
)
def test_what_is_no_uuid_is_refused_with_consuls_text(text: str):
    with pytest.raises(ValueError, match="cluster_id was supplied but was not a valid UUID"):
        normalise_cluster_id(text)


@pytest.mark.parametrize(
    ("service", "tail"),
    [
        ("web", "web"),
        ("Web", "Web"),
        ("a b", "a%20b"),
        ("é", "%C3%A9"),
        ("a.b_c~d", "a.b_c~d"),
        ("a+b:c@d", "a+b:c@d"),
        ("a%b", "a%25b"),
        ("x" * 300, "x" * 300),
    ],
)
def test_a_service_is_written_as_gos_url_writes_it_and_read_back(service: str, tail: str):
    identity = ServiceID(TD, "dc1", service)

    assert identity.uri == f"spiffe://{TD}/ns/default/dc/dc1/svc/{tail}"
    assert parse_service_uri(identity.uri) == identity


@settings(max_examples=60)
@given(st.text(min_size=1, max_size=40))
def test_every_name_that_is_accepted_survives_the_way_through_a_uri(service: str):
    try:
        check_service_name(service)
    except InvalidRequest:
        return
    identity = ServiceID(TD, "dc1", service)

    assert parse_service_uri(identity.uri) == identity


def test_a_uri_is_decoded_once_only():
    assert parse_service_uri(f"spiffe://{TD}/ns/default/dc/dc1/svc/a%2525b").service == "a%25b"


def test_scheme_and_trust_domain_compare_without_regard_to_case():
    assert parse_service_uri(f"SPIFFE://{TD.upper()}/ns/default/dc/dc1/svc/Web") == ServiceID(TD, "dc1", "Web")


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("", "SPIFFE ID must have 'spiffe' scheme"),
        (f"https://{TD}/ns/default/dc/dc1/svc/web", "SPIFFE ID must have 'spiffe' scheme"),
        (f"spiffe://{TD}", f"SPIFFE ID is not in the expected format: spiffe://{TD}"),
        (f"spiffe://{TD}/ns/default/dc/dc1/svc/", "SPIFFE ID is not in the expected format"),
        (
            f"spiffe://{TD}/ns/default/dc/dc1/svc/a/b",
            f"SPIFFE ID is not in the expected format: spiffe://{TD}/ns/default/dc/dc1/svc/a/b",
        ),
        (f"spiffe://{TD}/ns/default/dc/dc1/svc/a%2Fb", "SPIFFE ID is not in the expected format"),
        (f"spiffe://{TD}/ns/default/dc/dc1/svc/a%zz", "SPIFFE ID is not in the expected format"),
        (f"spiffe://{TD}/ns/default/dc/dc1/svc/%ff", "SPIFFE ID is not in the expected format"),
        (f"spiffe://{TD}/ns/default/dc/dc1/svc/web?x=1", "SPIFFE ID is not in the expected format"),
        (f"spiffe://{TD}/ns/default/dc/dc1/svc/web#x", "SPIFFE ID is not in the expected format"),
        (f"spiffe://user@{TD}/ns/default/dc/dc1/svc/web", "SPIFFE ID is not in the expected format"),
        (f"spiffe://{TD}:80/ns/default/dc/dc1/svc/web", "SPIFFE ID is not in the expected format"),
        (f"spiffe://{TD}/ns/default/dc/dc1/svc/web\n", "SPIFFE ID is not in the expected format"),
        (f"spiffe://{TD}/ns/default/dc/dc1/svc/w%00b", "holds a character that does not print"),
        (f"spiffe://{TD}/ns/default/dc/dc1/svc/w%E2%80%8Bb", "holds a character that does not print"),
        (f"spiffe://{TD}/ns/default/dc/dc1/svc/%2e%2e", "paths give another meaning"),
        (f"spiffe://{TD}/ns/default/dc/dc1/svc/" + "x" * 2048, "at most 2048"),
        (f"spiffe://{TD}/ns/default/dc/dc1/svc/" + "x" * 1100, "longer than 1024"),
        (f"spiffe://{TD}/ns/default/dc/dc1/svc/é", "SPIFFE ID is not in the expected format"),
    ],
)
def test_what_names_no_service_is_refused(uri: str, text: str):
    with pytest.raises(InvalidCSR) as refused:
        parse_service_uri(uri)

    assert text in refused.value.detail
    assert "\n" not in refused.value.detail


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("", "URI must be either service or agent"),
        ("a/b", f"SPIFFE ID is not in the expected format: spiffe://{TD}/ns/default/dc/dc1/svc/a/b"),
        ("web/", f"SPIFFE ID is not in the expected format: spiffe://{TD}/ns/default/dc/dc1/svc/web/"),
        ("a\0b", "holds a character that does not print"),
        ("\x85", "holds a character that does not print"),
        ("pay\u202epal", "holds a character that does not print"),
        ("web\xa0", "holds a character that does not print"),
        ("\udcff", "is not UTF-8"),
        ("..", "paths give another meaning"),
        ("x" * 1025, "longer than 1024"),
    ],
)
def test_a_name_that_fits_no_spiffe_id_is_refused(name: str, text: str):
    with pytest.raises(InvalidRequest) as refused:
        check_service_name(name, trust_domain=TD, datacenter="dc1")

    assert text in refused.value.detail


@pytest.mark.parametrize(
    ("service", "common_name"),
    [
        ("web", "web.svc.default.838f036d.consul"),
        ("a_b", "ab.svc.default.838f036d.consul"),
        ("a b", "ab.svc.default.838f036d.consul"),
        ("Web", "web.svc.default.838f036d.consul"),
        ("é", ".svc.default.838f036d.consul"),
        ("x" * 300, "x" * 36 + ".svc.default.838f036d.consul"),
    ],
)
def test_common_names_are_those_that_were_recorded(service: str, common_name: str):
    assert leaf_common_name(service, TD) == common_name


def test_the_cluster_id_is_read_from_a_roots_uri():
    assert cluster_id_of_root(mesh.root("ec-256")) == mesh.TRUST_DOMAIN.removesuffix(".consul")


@pytest.mark.parametrize("pem", ["", "garbage", mesh.leaf(mesh.root("ec-256"), "ec-256"), key_pem("ec-256")])
def test_what_names_no_cluster_gives_no_cluster_id(pem: str):
    assert cluster_id_of_root(pem) is None


def test_a_root_carries_the_uri_of_its_trust_domain():
    assert signing_uri(TD) == f"spiffe://{TD}"
