from __future__ import annotations

from pathlib import Path

import pytest

from caserver.unix_socket import UnixSocket
from tests.unit.config_agent_config_test import CLUSTER, SINGLE, faults, load


@pytest.mark.parametrize(
    ("address", "http_config", "exposed"),
    [
        ("127.0.0.1", {}, False),
        ("localhost", {}, False),
        ("::1", {}, False),
        ("0.0.0.0", {}, True),  # noqa: S104 - what the test is about
        ("10.0.0.1", {"allowed_hosts": ["ca.example.com"]}, True),
        ("10.0.0.1", {"allow_insecure_http": True}, False),
    ],
)
def test_plain_http_beyond_the_machine_is_exposed_unless_it_is_meant(
    address: str, http_config: dict[str, object], exposed: bool, tmp_path: Path
) -> None:
    config = load({**CLUSTER, "client_addr": address, "http_config": http_config}, at=tmp_path)

    assert bool(config.exposed) is exposed
    assert any("plain HTTP" in warning for warning in config.warnings) is exposed


def test_several_addresses_are_separated_by_blanks(tmp_path: Path) -> None:
    config = load({**SINGLE, "client_addr": "127.0.0.1  10.0.0.1 [::1]"}, at=tmp_path)

    assert config.listen.http == ("127.0.0.1", "10.0.0.1", "::1")
    assert config.listen.https == config.listen.http
    assert config.exposed == ("10.0.0.1",)


def test_either_protocol_may_have_its_own_addresses(tmp_path: Path) -> None:
    given = {"client_addr": "127.0.0.1", "addresses": {"https": "::", "dns": "127.0.0.1"}}

    config = load({**SINGLE, **given}, at=tmp_path)

    assert (config.listen.http, config.listen.https) == (("127.0.0.1",), ("::",))
    assert not config.exposed
    assert config.warnings[-1].endswith("ignored: addresses.dns")


def test_a_unix_socket_has_the_mode_and_the_owner_it_is_given(tmp_path: Path) -> None:
    config = load(
        f"""
        data_dir = "/d"
        addresses {{ http = "unix://{tmp_path}/ca.sock" }}
        unix_sockets {{ mode = "0660" user = "root" group = "12" }}
        """,
        at=tmp_path,
    )

    assert config.listen.http == (UnixSocket(tmp_path / "ca.sock", 0o660, 0, 12),)
    assert config.listen.https == ("127.0.0.1",)
    assert not config.exposed


def test_a_socket_as_client_addr_is_that_of_http(tmp_path: Path) -> None:
    config = load({**SINGLE, "client_addr": "unix:///run/ca.sock 127.0.0.1"}, at=tmp_path)

    assert config.listen.http == (UnixSocket(Path("/run/ca.sock")), "127.0.0.1")
    assert config.listen.https == ("127.0.0.1",)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"unix_sockets": {"mode": "rw"}}, 'unix_sockets.mode: "rw" is no file mode; give three octal digits'),
        ({"unix_sockets": {"user": "nobody-at-all"}}, 'unix_sockets.user: "nobody-at-all" is no user of this machine'),
        ({"unix_sockets": {"group": "none-such"}}, 'unix_sockets.group: "none-such" is no group of this machine'),
        ({"client_addr": "unix://"}, 'client_addr: "unix://" is no path of a socket'),
        ({"addresses": {"http": f"unix:///{'x' * 107}"}}, 'addresses.http: "unix:///xxx'),
        (
            {"addresses": {"http": "unix:///run/s", "https": "unix:///run/s"}},
            "addresses.https: unix:///run/s serves http already; give each listener its own socket",
        ),
        ({"bind_addr": "127.0.0.1 ::1"}, 'bind_addr: "127.0.0.1 ::1" is not one address'),
        ({"bind_addr": "unix:///run/s"}, 'bind_addr: "unix:///run/s" is not one address'),
    ],
)
def test_what_cannot_be_listened_on_is_refused(tmp_path: Path, given: dict[str, object], fault: str) -> None:
    found = faults({**SINGLE, **given}, at=tmp_path)

    assert len(found) == 1
    assert found[0].startswith(f"0.json: {fault}")


def test_what_the_operator_closes_is_read(tmp_path: Path) -> None:
    config = load(
        """
        data_dir = "/d"
        http_config {
          block_endpoints       = ["/v1/agent/self"]
          allow_write_http_from = ["10.0.0.0/8", "::1/128"]
          response_headers      { "X-Site" = "a" }
        }
        """,
        at=tmp_path,
    )

    assert config.http.block_endpoints == ("/v1/agent/self",)
    assert [str(each) for each in config.http.write_from] == ["10.0.0.0/8", "::1/128"]
    assert config.http.response_headers == (("X-Site", "a"),)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"allow_write_http_from": ["10.0.0.0/40"]}, 'allow_write_http_from: "10.0.0.0/40" is no network'),
        ({"response_headers": {"a b": "x"}}, 'response_headers: "a b" is no header'),
        ({"response_headers": {"X": "a\r\nb"}}, 'response_headers: "X" is no header'),
        ({"response_headers": {"Content-Length": "1"}}, "response_headers: Content-Length is what the answer itself"),
    ],
)
def test_a_restriction_that_cannot_be_kept_is_refused(tmp_path: Path, given: dict[str, object], fault: str) -> None:
    (found,) = faults({**SINGLE, "http_config": given}, at=tmp_path)

    assert found.startswith(f"0.json: http_config.{fault}")
