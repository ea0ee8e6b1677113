from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from caserver.cli import main
from caserver.cli.agent import COMMANDS, load, load_to_run
from caserver.cli.flags import Parsed
from caserver.errors import InvalidConfig
from caserver.internode.keyring import decode_secret
from caserver.raft.data_dir import Marker
from tests.testkit.keys import key_pem
from tests.testkit.nodes import TRUST_DOMAIN, operator_root


def test_keygen_prints_a_new_cluster_secret_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    main(["keygen"], {})
    main(["keygen"], {})

    first, second = capsys.readouterr().out.splitlines()
    assert len(decode_secret(first)) == len(base64.b64decode(second)) == 32
    assert first != second


def test_validate_accepts_what_the_agent_would_start_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "n.json"
    path.write_text(json.dumps({"connect": {"enabled": True}}))

    code = main(["validate", f"-data-dir={tmp_path}", "-server", str(path)], {"CASERVER_NODE_NAME": "n1"})

    out, err = capsys.readouterr()
    assert (code, out) == (0, "Configuration is valid!\n")
    assert "Warning: keys of Consul without a meaning here, ignored: server\n" in err


def test_validate_reports_every_fault_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "n.hcl"
    path.write_text('log_level = "loud"\nconnect {\n ca_config { leaf_cert_ttl = "1s" }\n}\n')

    assert main(["validate", str(path)], {}) == 1

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Config validation failed:\n")
    assert f'    {path}:1: log_level: "loud" is no level' in err
    assert f"    {path}:3: connect.ca_config.leaf_cert_ttl: " in err
    assert "    data_dir: missing" in err


def test_validate_refuses_tls_files_that_cannot_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, other = tmp_path / "n.hcl", tmp_path / "hostname"
    other.write_text("host\n")
    path.write_text(f'data_dir = "/d"\ncert_file = "{other}"\nkey_file = "{other}"\n')

    assert main(["validate", str(path)], {}) == 1

    err = capsys.readouterr().err
    assert f"    {path}:2: cert_file: no certificate can be read from {other}; " in err
    assert f"    {path}:3: key_file: no private key can be read from {other}; " in err


CLUSTER_ID = TRUST_DOMAIN.removesuffix(".consul")
SOUND = operator_root("ec-256", start=datetime(2020, 1, 1, tzinfo=UTC), days=20_000)
EXPIRED = operator_root("ec-256", start=datetime(2010, 1, 1, tzinfo=UTC), days=10)
FOREIGN = operator_root("ec-256", trust_domain="example.com", start=datetime(2020, 1, 1, tzinfo=UTC), days=20_000)


def seeded(directory: Path, ca_config: Mapping[str, object]) -> str:
    path = directory / "n.json"
    path.write_text(json.dumps({"data_dir": "/d", "connect": {"enabled": True, "ca_config": ca_config}}))
    return str(path)


@pytest.mark.parametrize(
    ("ca_config", "fault"),
    [
        (
            {"private_key": "-----BEGIN EC PRIVATE KEY-----\nSECRETKEY\n-----END EC PRIVATE KEY-----\n"},
            "private_key: error parsing private key: ",
        ),
        (
            {"PrivateKey": key_pem("ec-384"), "root_cert": SOUND["RootCert"]},
            "PrivateKey: does not belong to RootCert; ",
        ),
        ({**SOUND, "RootCert": "x"}, "RootCert: no certificate can be read from it; "),
        ({**SOUND, "ClusterID": "11111111-2222-4333-8444-555555555555"}, "RootCert: its URI names are "),
        (EXPIRED, "RootCert: expired at 2010-01-11T00:00:00Z; "),
    ],
)
def test_validate_refuses_a_ca_that_could_not_be_founded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ca_config: Mapping[str, object], fault: str
) -> None:
    assert main(["validate", seeded(tmp_path, ca_config)], {}) == 1

    err = capsys.readouterr().err
    assert f"n.json: connect.ca_config.{fault}" in err
    assert "SECRETKEY" not in err


def test_validate_accepts_an_operators_root_and_its_key(tmp_path: Path) -> None:
    assert main(["validate", seeded(tmp_path, SOUND)], {}) == 0
    assert main(["validate", seeded(tmp_path, {**SOUND, "ClusterID": CLUSTER_ID})], {}) == 0
    assert main(["validate", seeded(tmp_path, {"private_key": key_pem("rsa-2048")})], {}) == 0


def test_the_root_that_seeded_a_cluster_long_ago_does_not_keep_its_nodes_from_starting(tmp_path: Path) -> None:
    parsed = Parsed(lists={"config-file": [seeded(tmp_path, EXPIRED)]})

    assert load(parsed, {}).connect.enabled
    with pytest.raises(InvalidConfig, match="expired"):
        load(parsed, {}, new=True)


def test_what_is_wrong_with_the_root_of_a_founded_cluster_is_a_warning(tmp_path: Path) -> None:
    path = seeded(tmp_path, {**SOUND, "PrivateKey": key_pem("ec-384")})
    document = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps({**document, "data_dir": str(tmp_path)}))
    parsed = Parsed(lists={"config-file": [path]})
    marker = Marker.of("n", ["n"])

    for of_no_cluster in (None, b"{", marker.encode()):
        if of_no_cluster is not None:
            (tmp_path / "node.json").write_bytes(of_no_cluster)
        with pytest.raises(InvalidConfig, match="does not belong to RootCert"):
            load_to_run(parsed, {})

    (tmp_path / "node.json").write_bytes(replace(marker, initialised=True, cluster_id=CLUSTER_ID).encode())
    warnings = load_to_run(parsed, {}).warnings
    assert any("ca_config.PrivateKey: does not belong to RootCert" in warning for warning in warnings)
    assert any(f"this node is of cluster {CLUSTER_ID}" in warning for warning in warnings)

    Path(path).write_text(json.dumps({**document, "data_dir": str(tmp_path), "log_level": "loud"}))
    with pytest.raises(InvalidConfig, match="log_level"):
        load_to_run(parsed, {})


def test_a_root_without_a_cluster_is_told_the_id_and_the_commands_that_make_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["validate", seeded(tmp_path, FOREIGN)], {})

    err = capsys.readouterr().err
    proposed = re.search(r'RootCert: names no cluster, and there is no ClusterID .*; set ClusterID = "([^"]+)"', err)
    assert proposed
    assert "    openssl req -x509 " in err
    assert f"subjectAltName=URI:spiffe://{proposed[1]}.consul" in err


def test_validate_needs_something_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate"], {}) == 1
    assert capsys.readouterr().err == "Must specify at least one config file or directory\n"


def test_a_flag_beats_the_environment_and_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "n.hcl"
    path.write_text('data_dir = "/d"\nlog_level = "also loud"')

    code = main(["validate", "-quiet", "-log-level=debug", str(path)], {"CASERVER_LOG_LEVEL": "loud"})

    assert (code, capsys.readouterr().out) == (0, "")


def test_consuls_ways_to_join_are_refused_with_the_blocks_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["agent", "-server", "-bootstrap-expect=3", "-retry-join=10.0.0.1", "-retry-join", "10.0.0.2"]

    assert main([*words, f"-data-dir={tmp_path}"], {}) == 1

    err = capsys.readouterr().err
    assert err.startswith("==> The configuration has faults:\n")
    assert 'address = "10.0.0.1"' in err
    assert 'address = "10.0.0.2"' in err


def test_an_agent_with_a_faulty_configuration_does_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["agent", f"-config-file={tmp_path / 'none.hcl'}"], {}) == 1
    assert "none.hcl: cannot be read (No such file or directory)" in capsys.readouterr().err


def test_validate_judges_an_external_provider(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text("s.x")
    path = tmp_path / "v.hcl"

    def validated(token: str, environ: Mapping[str, str]) -> str:
        path.write_text(
            f'data_dir = "/d"\nconnect {{\n enabled = true\n ca_provider = "vault"\n file_dir = "{tmp_path}"\n'
            f' ca_config {{\n  {token}\n  root_pki_path = "r"\n  intermediate_pki_path = "i"\n }}\n}}\n'
        )
        code = main(["validate", str(path)], environ)
        err = capsys.readouterr().err
        assert code == int("connect." in err)
        return err.partition("Warning: ")[0]

    home = {"VAULT_ADDR": "http://127.0.0.1:8200", "VAULT_TOKEN": "s.y"}
    assert validated('address = "https://v"\n  token_file = "token"', {}) == ""
    assert validated("", home) == ""
    assert f'v.hcl:7: connect.ca_config.token_file: there is no "tokne" below {tmp_path}' in validated(
        'token_file = "tokne"', home
    )
    assert "ca_config.Token: is missing" in validated('address = "https://elsewhere"', home)
    assert 'v.hcl:7: connect.ca_config.adress: unknown key; did you mean "Address"?' in validated('adress = "x"', home)


def test_a_piece_of_hcl_beats_files_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "n.hcl"
    path.write_text('data_dir = "/d"\nconnect {\n  enabled = true\n  ca_config { leaf_cert_ttl = "24h" }\n}\n')
    pieces = ["-hcl", 'log_level = "warn"', '-hcl=connect { ca_config { LeafCertTTL = "48h" } }']

    parsed = COMMANDS["agent"].parse([f"-config-file={path}", "-log-level=debug", *pieces])
    config = load(parsed, {})

    assert (config.log_level, config.connect.enabled) == ("warn", True)
    assert config.connect.ca_config == {"LeafCertTTL": "48h"}
    assert main(["validate", "-hcl", "data_dir = [", str(path)], {}) == 1
    assert "    -hcl:1:13: unexpected end of file" in capsys.readouterr().err


def test_files_of_any_name_are_read_in_the_format_that_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "agent.conf"
    path.write_text('data_dir = "/d"\n')

    for given in (path, tmp_path):
        assert load(COMMANDS["agent"].parse([f"-config-dir={given}", "-config-format=hcl"]), {}).data_dir == Path("/d")
    assert main(["validate", "-config-format=json", str(path)], {}) == 1
    assert main(["validate", "-config-format=yaml", str(path)], {}) == 1
    err = capsys.readouterr().err
    assert "invalid JSON" in err
    assert "-config-format must be either 'hcl' or 'json'" in err


def test_a_start_script_of_consul_is_understood() -> None:
    """The flags of ``consul agent`` 1.8, each with a value."""
    valued = """advertise=10.0.0.2 advertise-wan allow-write-http-from=10.0.0.0/8 alt-domain bind=10.0.0.1 bootstrap-expect=1
        check_output_max_size client=127.0.0.1 data-dir datacenter default-query-time dns-port=-1 domain encrypt grpc-port
        http-port=1 https-port=-1 log-file log-level=info log-rotate-bytes log-rotate-duration log-rotate-max-files
        max-query-time node node-id node-meta pid-file primary-gateway protocol raft-protocol recursor
        retry-interval retry-interval-wan retry-max retry-max-wan segment serf-lan-allowed-cidrs serf-lan-bind
        serf-lan-port serf-wan-allowed-cidrs serf-wan-bind serf-wan-port server-port=2 ui-content-path ui-dir"""
    switches = """bootstrap disable-host-node-id disable-keyring-file enable-local-script-checks enable-script-checks
        log-json non-voting-server server syslog ui"""
    words = [f"-{word}" if "=" in word else f"-{word}=x" for word in valued.split()]

    config = load(COMMANDS["agent"].parse([*words, *(f"-{word}" for word in switches.split())]), {})

    assert config.own_address == "10.0.0.2"
    assert [str(each) for each in config.http.write_from] == ["10.0.0.0/8"]
    assert config.warnings[-1].startswith("keys of Consul without a meaning here, ignored: ")
