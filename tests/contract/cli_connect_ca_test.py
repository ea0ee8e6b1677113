"""The commands against a scripted server: what they send, print and return, as recorded from Consul's own."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from caserver.cli import main
from tests.testkit.scripted import Scripted, scripted_server

CONFIGURATION = (
    '{"Provider":"consul","Config":{"IntermediateCertTTL":"8760h","LeafCertTTL":"72h","RotationPeriod":"2160h"},'
    '"State":null,"ForceWithoutCrossSigning":false,"CreateIndex":5,"ModifyIndex":5}'
)
# What `consul connect ca get-config` printed for it.
PRINTED = (
    '{\n\t"Provider": "consul",\n\t"Config": {\n\t\t"IntermediateCertTTL": "8760h",\n\t\t"LeafCertTTL": "72h",\n'
    '\t\t"RotationPeriod": "2160h"\n\t},\n\t"State": null,\n\t"CreateIndex": 5,\n\t"ModifyIndex": 5\n}\n'
)
LEAF = {
    "SerialNumber": "08",
    "CertPEM": "-----BEGIN CERTIFICATE-----\nleaf\n-----END CERTIFICATE-----\n",
    "PrivateKeyPEM": "-----BEGIN EC PRIVATE KEY-----\nkey\n-----END EC PRIVATE KEY-----\n",
    "Service": "web",
    "ServiceURI": "spiffe://x.consul/ns/default/dc/dc1/svc/web",
    "ValidAfter": "2026-11-23T11:00:00Z",
    "ValidBefore": "2026-11-26T11:00:00Z",
    "CreateIndex": 9,
    "ModifyIndex": 9,
}
ROOTS = {
    "ActiveRootID": "b",
    "TrustDomain": "x.consul",
    "Roots": [
        {"ID": "aa", "Active": False, "PrivateKeyType": "rsa", "PrivateKeyBits": 2048, "NotAfter": "2026-11-23T11:00:00Z",
         "RootCert": "A", "IntermediateCerts": None},
        {"ID": "bb", "Active": True, "PrivateKeyType": "ec", "PrivateKeyBits": 256, "NotAfter": "2036-11-20T13:00:00Z",
         "RootCert": "B\n", "IntermediateCerts": ["x"]},
    ],
}  # fmt: skip


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted_server() as script:
        yield script


def run(server: Scripted, *words: str, **environ: str) -> int:
    return main([*words, f"-http-addr={server.address}"], environ)


def test_get_config_prints_what_consul_prints(server: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers(CONFIGURATION)

    code = run(server, "connect", "ca", "get-config")

    assert (code, capsys.readouterr().out) == (0, PRINTED)
    assert server.asked[0].target == "/v1/connect/ca/configuration"


def test_get_config_of_an_empty_config(server: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers('{"Provider":"consul","Config":{},"State":null,"CreateIndex":5,"ModifyIndex":24}')

    run(server, "connect", "ca", "get-config", "extra")

    assert capsys.readouterr().out == (
        '{\n\t"Provider": "consul",\n\t"Config": {},\n\t"State": null,\n\t"CreateIndex": 5,\n\t"ModifyIndex": 24\n}\n'
    )


def test_get_config_sends_token_and_query_options(server: Scripted) -> None:
    server.answers(CONFIGURATION)

    run(server, "connect", "ca", "get-config", "-stale", "-datacenter=dc1", CONSUL_HTTP_TOKEN="t")

    assert server.asked[0].target == "/v1/connect/ca/configuration?dc=dc1&stale="
    assert server.asked[0].headers["X-Consul-Token"] == "t"


def test_what_get_config_wrote_goes_back_with_its_index(
    server: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers(CONFIGURATION)
    run(server, "connect", "ca", "get-config")
    path = tmp_path / "ca.json"
    path.write_text(capsys.readouterr().out)

    code = run(server, "connect", "ca", "set-config", "-config-file", str(path))

    assert (code, capsys.readouterr().out) == (0, "Configuration updated!\n")
    assert server.asked[1].method == "PUT"
    assert server.asked[1].body == (
        '{"Provider":"consul","Config":{"IntermediateCertTTL":"8760h","LeafCertTTL":"72h","RotationPeriod":"2160h"},'
        '"State":null,"CreateIndex":5,"ModifyIndex":5}\n'
    )


def test_the_standing_wish_to_do_without_cross_signing_survives_get_and_set(
    server: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers(CONFIGURATION.replace('"ForceWithoutCrossSigning":false', '"ForceWithoutCrossSigning":true'))
    run(server, "connect", "ca", "get-config")
    printed = capsys.readouterr().out
    path = tmp_path / "ca.json"
    path.write_text(printed)

    run(server, "connect", "ca", "set-config", f"-config-file={path}")

    wish = '\t"ForceWithoutCrossSigning": true,\n'
    assert printed == PRINTED.replace('\t"CreateIndex"', wish + '\t"CreateIndex"')
    assert json.loads(server.asked[1].body)["ForceWithoutCrossSigning"] is True


@pytest.mark.parametrize(
    ("file", "body"),
    [
        (
            '{"Provider": "nope", "Config": {}}',
            '{"Provider":"nope","Config":{},"State":null,"CreateIndex":0,"ModifyIndex":0}\n',
        ),
        (
            '{"provider": "consul", "config": {"LeafCertTTL": "1m"}}',
            '{"Provider":"consul","Config":{"LeafCertTTL":"1m"},"State":null,"CreateIndex":0,"ModifyIndex":0}\n',
        ),
        (
            '{"Provider": "consul", "Config": {"b": 1, "a": 2.5}, "ModifyIndex": 7}',
            '{"Provider":"consul","Config":{"a":2.5,"b":1},"State":null,"CreateIndex":0,"ModifyIndex":7}\n',
        ),
        ("{}", '{"Provider":"","Config":null,"State":null,"CreateIndex":0,"ModifyIndex":0}\n'),
    ],
)
def test_set_config_sends_consuls_body(server: Scripted, tmp_path: Path, file: str, body: str) -> None:
    path = tmp_path / "ca.json"
    path.write_text(file)

    assert run(server, "connect", "ca", "set-config", f"-config-file={path}") == 0
    assert server.asked[0].body == body


def test_set_config_carries_the_wish_to_do_without_cross_signing(server: Scripted, tmp_path: Path) -> None:
    path = tmp_path / "ca.json"
    path.write_text('{"Provider": "consul", "force_without_cross_signing": true}')
    run(server, "connect", "ca", "set-config", f"-config-file={path}")
    path.write_text('{"Provider": "consul"}')
    run(server, "connect", "ca", "set-config", f"-config-file={path}", "-force-without-cross-signing")

    assert all(json.loads(each.body)["ForceWithoutCrossSigning"] is True for each in server.asked)


def test_set_config_names_the_keys_that_it_does_not_send(
    server: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ca.json"
    path.write_text('{"Provider": "consul", "Config": {}, "Confg": {"LeafCertTTL": "1h"}}')

    code = run(server, "connect", "ca", "set-config", f"-config-file={path}")

    assert code == 0
    assert capsys.readouterr().err == 'Ignoring the unknown key "Confg": did you mean Config?\n'
    assert server.asked[0].body == '{"Provider":"consul","Config":{},"State":null,"CreateIndex":0,"ModifyIndex":0}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"Provider": "consul"', "Error parsing config file: unexpected end of JSON input\n"),
        ("", "Error parsing config file: unexpected end of JSON input\n"),
        ("hello", "Error parsing config file: invalid character 'h' looking for beginning of value\n"),
        ("[]", "Error parsing config file: a CA configuration is a JSON object\n"),
    ],
)
def test_set_config_refuses_a_file_that_is_not_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    path = tmp_path / "ca.json"
    path.write_text(content)

    assert main(["connect", "ca", "set-config", f"-config-file={path}"], {}) == 1
    assert capsys.readouterr().err == message


def test_set_config_needs_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["connect", "ca", "set-config"], {}) == 1
    assert capsys.readouterr().err == "The -config-file flag is required\n"


def test_a_dash_is_not_standard_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["connect", "ca", "set-config", "-config-file=-"], {}) == 1

    error = capsys.readouterr().err
    assert error.startswith("Error reading config file: open -: no such file or directory\n")
    assert "/dev/stdin" in error


@pytest.mark.parametrize(
    ("words", "status", "body", "message"),
    [
        (
            ["get-config"],
            500,
            "No path to datacenter",
            "Error querying CA configuration: Unexpected response code: 500 (No path to datacenter)\n",
        ),
        (
            ["get-config"],
            403,
            "Permission denied",
            "Error querying CA configuration: Unexpected response code: 403 (Permission denied)\n",
        ),
        (
            ["set-config", "-config-file={file}"],
            403,
            "Permission denied",
            "Error setting CA configuration: Unexpected response code: 403 (Permission denied)\n",
        ),
        (["roots"], 500, "x", "Error querying CA roots: Unexpected response code: 500 (x)\n"),
        (["leaf", "web"], 500, "x", "Error getting the leaf certificate: Unexpected response code: 500 (x)\n"),
        (
            ["sign", "-csr-file={file}"],
            400,
            "x",
            "Error signing the certificate request: Unexpected response code: 400 (x)\n",
        ),
    ],
)
def test_a_refusal_is_reported_in_consuls_words(
    server: Scripted,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    status: int,
    body: str,
    message: str,
) -> None:
    file = tmp_path / "in"
    file.write_text("{}")
    server.answers(body, status)

    assert run(server, "connect", "ca", *(word.format(file=file) for word in words)) == 1
    assert capsys.readouterr() == ("", message)


def test_a_refused_connection_is_reported_with_what_to_try(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"

    assert main(["connect", "ca", "get-config"], {"CONSUL_HTTP_ADDR": address}) == 1

    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        f'Error querying CA configuration: Get "http://{address}/v1/connect/ca/configuration": '
        f"dial tcp {address}: connect: connection refused"
    )
    assert second.startswith("Is an agent running there? `caserver agent -dev` starts one")


def test_roots_shows_the_active_root_first_and_the_time_left(
    server: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers(json.dumps(ROOTS))

    assert run(server, "connect", "ca", "roots") == 0
    assert capsys.readouterr().out == (
        "Trust domain: x.consul\n"
        "\n"
        "ID  Active  Key       Not After             Left     Cross-signed\n"
        "bb  true    ec 256    2036-11-20T13:00:00Z  10y 0d   1\n"
        "aa  false   rsa 2048  2026-11-23T11:00:00Z  expired  0\n"
    )


def test_roots_as_a_bundle_or_as_json(server: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers(json.dumps(ROOTS))

    run(server, "connect", "ca", "roots", "-format=pem")
    assert capsys.readouterr().out == "A\nB\n"
    run(server, "connect", "ca", "roots", "-format=json")
    assert json.loads(capsys.readouterr().out) == ROOTS


def test_leaf_shows_what_was_issued_but_not_the_key(server: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers(json.dumps(LEAF))

    assert run(server, "connect", "ca", "leaf", "web") == 0

    shown = capsys.readouterr().out
    assert "Left        2d 23h\n" in shown
    assert "PRIVATE" not in shown
    assert server.asked[0].target == "/v1/agent/connect/ca/leaf/web"


def test_leaf_writes_files_that_only_the_owner_reads_the_key_of(
    server: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers(json.dumps(LEAF))
    certificate, key = tmp_path / "web.crt", tmp_path / "web.key"
    key.write_text("an old key, open to all")
    key.chmod(0o644)

    assert run(server, "connect", "ca", "leaf", f"-cert-out={certificate}", f"-key-out={key}", "web") == 0
    assert certificate.read_text() == LEAF["CertPEM"]
    assert key.read_text() == LEAF["PrivateKeyPEM"]
    assert key.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["web.crt", "web.key"]


def test_leaf_into_a_missing_directory_fails(
    server: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers(json.dumps(LEAF))

    assert run(server, "connect", "ca", "leaf", f"-key-out={tmp_path / 'none' / 'k'}", "web") == 1
    assert "No such file or directory" in capsys.readouterr().err


def test_leaf_needs_one_service(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["connect", "ca", "leaf"], {}) == 1
    assert "name one service" in capsys.readouterr().err


def test_sign_sends_the_request_and_prints_the_chain(
    server: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csr = tmp_path / "web.csr"
    csr.write_text("-----BEGIN CERTIFICATE REQUEST-----\n")
    server.answers(json.dumps({key: value for key, value in LEAF.items() if key != "PrivateKeyPEM"}))

    code = run(server, "connect", "ca", "sign", f"-csr-file={csr}", "-format=pem")

    assert (code, capsys.readouterr().out) == (0, LEAF["CertPEM"])
    assert (server.asked[0].method, server.asked[0].target) == ("PUT", "/v1/connect/ca/sign")
    assert server.asked[0].body == "-----BEGIN CERTIFICATE REQUEST-----\n"


def test_sign_refuses_der_with_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csr = tmp_path / "web.der"
    csr.write_bytes(b"\x30\x82\xff")

    assert main(["connect", "ca", "sign", str(csr)], {}) == 1
    assert "openssl req -inform DER" in capsys.readouterr().err


def test_an_unknown_format_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["connect", "ca", "roots", "-format=xml"], {}) == 1
    assert 'invalid value "xml" for -format: use table or json or pem' in capsys.readouterr().err
