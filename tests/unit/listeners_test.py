from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from caserver.config.agent_config import AgentConfig
from caserver.errors import Misdirected
from caserver.listeners import front
from caserver.unix_socket import UnixSocket
from tests.testkit.web_certs import WebCA

BROWSER = {"Sec-Fetch-Site": "none"}


def config(**flags: object) -> AgentConfig:
    given = {key.replace("__", "."): value for key, value in flags.items()}
    return AgentConfig.load([], flags={"dev": True, **given}, environ={}, hostname="n1")


def test_every_address_has_a_listener_of_each_protocol(tmp_path: Path) -> None:
    pair = WebCA(tmp_path).issue("a")
    made = front(
        config(
            client_addr=f"127.0.0.1 0.0.0.0 unix://{tmp_path}/s",
            addresses__https="::1",
            cert_file=str(pair.cert),
            key_file=str(pair.key),
        )
    )

    assert [(each.address, each.tls is not None, each.exposed) for each in made.listeners] == [
        (("127.0.0.1", 8500), False, False),
        (("0.0.0.0", 8500), False, True),  # noqa: S104 - what the test is about
        (UnixSocket(tmp_path / "s"), False, False),
        (("::1", 8501), True, False),
    ]


def test_a_port_that_is_off_leaves_the_sockets() -> None:
    made = front(config(client_addr="127.0.0.1 unix:///run/s", ports__http=-1))

    assert [each.address for each in made.listeners] == [UnixSocket(Path("/run/s"))]


def test_a_browser_may_use_the_names_of_the_certificate(tmp_path: Path) -> None:
    pair = WebCA(tmp_path).issue("a", hosts=("ca.example", "10.1.1.1"))
    hosts = front(config(cert_file=str(pair.cert), key_file=str(pair.key))).hosts

    for name in ("ca.example", "n1:8500", "localhost"):
        hosts.check("GET", {"Host": name, **BROWSER})
    with pytest.raises(Misdirected):
        hosts.check("GET", {"Host": "other.example", **BROWSER})


def test_a_browser_may_use_the_name_that_a_single_server_advertises() -> None:
    front(config(advertise_addr="ca.internal")).hosts.check("GET", {"Host": "ca.internal:8500", **BROWSER})


@pytest.mark.parametrize(
    ("year", "said"),
    [(2019, "is not valid before 2020-01-01"), (2026, None), (2095, "expires at 2100-01-01"), (2101, "expired at")],
)
def test_a_certificate_is_said_to_age_in_its_last_tenth(tmp_path: Path, year: int, said: str | None) -> None:
    pair = WebCA(tmp_path).issue("a")
    made = front(config(cert_file=str(pair.cert), key_file=str(pair.key)))

    reason = made.ageing(datetime(year, 6, 1, tzinfo=UTC))

    assert (reason is None) == (said is None)
    assert said is None or said in str(reason)


def test_without_https_nothing_ages() -> None:
    assert front(config()).ageing(datetime(2199, 1, 1, tzinfo=UTC)) is None
