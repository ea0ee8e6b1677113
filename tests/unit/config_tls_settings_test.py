from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from caserver.config.agent_config import AgentConfig
from caserver.config.tls_settings import TLSFiles
from caserver.errors import InvalidConfig
from tests.unit.config_agent_config_test import SINGLE, faults, load


def pair(directory: Path) -> dict[str, object]:
    """The keys of two files that are there."""
    for name in ("c.pem", "k.pem"):
        (directory / name).touch()
    return {"cert_file": str(directory / "c.pem"), "key_file": str(directory / "k.pem")}


def test_tls_files_turn_https_on(tmp_path: Path) -> None:
    for name in ("c.pem", "k.pem"):
        (tmp_path / name).touch()
    files = {"cert_file": str(tmp_path / "c.pem"), "key_file": str(tmp_path / "k.pem")}

    config = load({**SINGLE, **files}, at=tmp_path)

    assert config.tls is not None
    assert config.tls.cert_file == tmp_path / "c.pem"
    assert config.tls.min_version == "tls12"
    assert config.ports.https == 8501


def test_the_floor_of_tls_is_set_in_consuls_spelling(tmp_path: Path) -> None:
    for name in ("c.pem", "k.pem"):
        (tmp_path / name).touch()
    files = {"cert_file": str(tmp_path / "c.pem"), "key_file": str(tmp_path / "k.pem")}

    config = load({**SINGLE, **files, "tls_min_version": "tls13"}, at=tmp_path)

    assert config.tls is not None
    assert config.tls.min_version == "tls13"
    assert not [line for line in config.warnings if "tls_min_version" in line]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"tls_min_version": "tls10"}, "tls_min_version: tls10 is not offered: it is broken; use tls12 or tls13"),
        ({"tls_min_version": "tls11"}, "tls_min_version: tls11 is not offered: it is broken; use tls12 or tls13"),
        ({"tls_min_version": "1.2"}, 'tls_min_version: "1.2" is no version of TLS; use tls12 or tls13'),
        (
            {"tls_cipher_suites": "TLS_RSA_WITH_AES_128_CBC_SHA"},
            "tls_cipher_suites: none of them is offered (TLS_RSA_WITH_AES_128_CBC_SHA)",
        ),
    ],
)
def test_a_hardening_of_tls_that_would_not_happen_is_refused(
    tmp_path: Path, given: Mapping[str, object], fault: str
) -> None:
    found = faults({**SINGLE, **given}, at=tmp_path)

    assert len(found) == 1
    assert found[0].startswith(f"0.json: {fault}")


def test_files_that_no_listener_can_serve_with_are_faults(tmp_path: Path) -> None:
    def judge(files: TLSFiles) -> None:
        raise InvalidConfig(f"key_file: {files.key_file} is wrong; mend it\nca_file: too")

    path = tmp_path / "n.json"
    path.write_text(json.dumps({**SINGLE, "cert_file": str(path), "key_file": str(path)}))
    with pytest.raises(InvalidConfig) as caught:
        AgentConfig.load([str(path)], flags={}, environ={}, hostname="h", judge_tls=judge)

    assert caught.value.detail == f"{path}: key_file: {path} is wrong; mend it\nca_file: too"


@pytest.mark.parametrize("key", ["verify_incoming", "verify_incoming_https"])
def test_either_key_requires_client_certificates(tmp_path: Path, key: str) -> None:
    config = load({**SINGLE, **pair(tmp_path), "ca_path": str(tmp_path), key: True}, at=tmp_path)

    assert config.tls is not None
    assert (config.tls.verify_incoming, config.tls.ca_path, config.tls.ca_file) == (True, tmp_path, None)


def test_client_certificates_between_servers_are_not_those_of_https(tmp_path: Path) -> None:
    config = load({**SINGLE, **pair(tmp_path), "verify_incoming_rpc": True, "verify_outgoing": True}, at=tmp_path)

    assert config.tls is not None
    assert not config.tls.verify_incoming
    assert config.warnings[-1].endswith("ignored: verify_incoming_rpc, verify_outgoing")


def test_safe_suites_are_taken_and_the_others_named(tmp_path: Path) -> None:
    suites = "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, TLS_RSA_WITH_AES_128_CBC_SHA,TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305"

    config = load({**SINGLE, **pair(tmp_path), "tls_cipher_suites": suites}, at=tmp_path)

    assert config.tls is not None
    assert config.tls.cipher_suites == ("ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-RSA-CHACHA20-POLY1305")
    assert "tls_cipher_suites: not offered here: TLS_RSA_WITH_AES_128_CBC_SHA" in config.warnings


def test_a_ca_path_that_is_no_directory_is_a_fault(tmp_path: Path) -> None:
    given = {**SINGLE, **pair(tmp_path), "ca_path": str(tmp_path / "c.pem")}

    assert faults(given, at=tmp_path) == [
        f"0.json: ca_path: {tmp_path}/c.pem is not a directory; check the path and its permissions"
    ]


def test_the_newer_block_of_consul_lies_over_the_older_keys(tmp_path: Path) -> None:
    older = pair(tmp_path)
    (tmp_path / "other.pem").touch()
    defaults = {"ca_file": older["cert_file"], "verify_incoming": True, "verify_outgoing": True, **older}
    https = {
        "verify_incoming": False,
        "tls_min_version": "TLSv1_3",
        "ca_file": str(tmp_path / "other.pem"),
        "tls_cipher_suites": ["TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384"],
    }

    over = load({**SINGLE, "tls": {"defaults": defaults, "https": https}}, at=tmp_path)
    alone = load({**SINGLE, **older, "tls": {"defaults": {"verify_incoming": False}, "internal_rpc": {}}}, at=tmp_path)

    assert over.tls == TLSFiles(
        tmp_path / "c.pem",
        tmp_path / "k.pem",
        tmp_path / "other.pem",
        verify_incoming=False,
        min_version="tls13",
        cipher_suites=("ECDHE-RSA-AES256-GCM-SHA384",),
    )
    assert alone.tls is not None
    assert alone.tls.cert_file == tmp_path / "c.pem"


@pytest.mark.parametrize(
    ("tls", "fault"),
    [
        ({"https": {"cert_fil": "x"}}, '0.json: tls.https.cert_fil: unknown key; did you mean "cert_file"?'),
        ({"htps": {}}, '0.json: tls.htps: unknown key; did you mean "https"?'),
        ({"https": {"tls_min_version": "TLSv1_1"}}, "0.json: tls.https.tls_min_version: TLSv1_1 is not offered"),
        ({"defaults": {"ca_file": "/nope"}}, "0.json: tls.defaults.ca_file: /nope is not a file"),
        (
            {"defaults": {"verify_incoming": True}},
            "0.json: tls.defaults.verify_incoming: needs cert_file, key_file and",
        ),
    ],
)
def test_a_fault_in_the_newer_block_is_named_with_its_place(tmp_path: Path, tls: dict[str, object], fault: str) -> None:
    found = faults({**SINGLE, "tls": tls}, at=tmp_path)

    assert len(found) == 1
    assert found[0].startswith(fault)
