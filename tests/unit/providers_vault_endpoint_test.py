from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from caserver.errors import InvalidConfig
from caserver.fields import Secret
from caserver.providers.vault.endpoint import resolve
from caserver.state.vault_configuration import VaultAuthMethod, VaultConfiguration, VaultLocal

ADDRESS = "https://vault.example.com:8200"


def wanted(**settings: Any) -> VaultConfiguration:
    return VaultConfiguration(root_pki_path="root", intermediate_pki_path="intermediate", **settings)


def refused(configuration: VaultConfiguration, local: VaultLocal | None = None) -> str:
    with pytest.raises(InvalidConfig) as caught:
        resolve(configuration, local or VaultLocal())
    return caught.value.detail


def test_address_and_token_of_the_configuration() -> None:
    endpoint = resolve(wanted(address=f"{ADDRESS}/", token=Secret(" s.abc\n")), VaultLocal())
    assert endpoint.address == ADDRESS
    assert endpoint.token == Secret("s.abc")


def test_the_environment_fills_in_address_and_token_together() -> None:
    local = VaultLocal(
        address=ADDRESS, token=Secret("own"), namespace="team", ca_cert=Path("/own.pem"), skip_verify=True
    )
    endpoint = resolve(wanted(), local)
    assert (endpoint.address, endpoint.token, endpoint.namespace) == (ADDRESS, Secret("own"), "team")
    assert (endpoint.ca_file, endpoint.tls_skip_verify) == (Path("/own.pem"), True)


def test_a_nodes_own_token_goes_to_no_address_but_its_own() -> None:
    local = VaultLocal(address=ADDRESS, token=Secret("own-token"), ca_cert=Path("/own.pem"), skip_verify=True)
    told = refused(wanted(address="https://elsewhere.example.com:8200"), local)
    assert told.startswith("error configuring provider: must provide a Vault token\nToken: is missing, and this node's")
    assert "own-token" not in told
    endpoint = resolve(wanted(address="https://elsewhere.example.com:8200", token=Secret("given")), local)
    assert (endpoint.ca_file, endpoint.tls_skip_verify) == (None, False)


def test_a_given_token_goes_to_the_environments_address() -> None:
    endpoint = resolve(wanted(token=Secret("given")), VaultLocal(address=ADDRESS, token=Secret("own")))
    assert endpoint.token == Secret("given")


def test_nothing_at_all_names_everything_that_is_missing() -> None:
    told = refused(wanted())
    assert told.splitlines()[0] == "error configuring provider: must provide a Vault address"
    assert "Token: is missing" in told


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("vault.example.com:8200", "begins with neither"),
        ("ftp://vault.example.com", "begins with neither"),
        ("https://user:sesame@vault.example.com:8200", "holds a user name or a password"),
        ("https://sesame@vault.example.com:8200", "holds a user name or a password"),
        ("https://vault.example.com:8200/#sesame", "has a query or a fragment"),
        ("https://vault.example.com:8200?token=sesame", "has a query or a fragment"),
        ("https://vault.example.com:sesame", "is no URL"),
        ("https://vault.example.com:0", "names no host, or port 0"),
        ("https://", "names no host"),
        ("https://vault.example.com\r\nX-Sesame: 1", "holds white space"),
        ("https://[sesame", "is no URL"),
    ],
)
def test_an_address_that_cannot_be_used_is_not_shown(address: str, problem: str) -> None:
    for configuration, local in (
        (wanted(address=address, token=Secret("t")), VaultLocal()),
        (wanted(), VaultLocal(address=address, token=Secret("t"))),
    ):
        told = refused(configuration, local)
        assert problem in told
        assert "sesame" not in told.lower()


@pytest.mark.parametrize("token", ["sesame\nopen", "sesame open", "sésame", "sesame\x00"])
def test_a_token_that_cannot_travel_is_not_shown(token: str) -> None:
    told = refused(wanted(address=ADDRESS, token=Secret(token)))
    assert "Token: holds white space" in told
    assert "sesame" not in told
    assert "sésame" not in told


def test_files_lie_below_the_nodes_directory(tmp_path: Path) -> None:
    (tmp_path / "tls").mkdir()
    for name in ("ca.pem", "tls/cert.pem", "tls/key.pem", "token"):
        (tmp_path / name).write_text("x")
    configuration = wanted(
        address=ADDRESS, token_file="token", ca_file="ca.pem", cert_file="tls/cert.pem", key_file="tls/key.pem"
    )
    endpoint = resolve(configuration, VaultLocal(file_dir=tmp_path))
    assert endpoint.token_file == tmp_path / "token"
    assert (endpoint.ca_file, endpoint.cert_file) == (tmp_path / "ca.pem", tmp_path / "tls/cert.pem")
    assert endpoint.key_file == tmp_path / "tls/key.pem"
    assert "CAFile: names a file, and this node has no directory" in refused(configuration)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "link"])
def test_no_file_elsewhere_can_be_named(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "outside").write_text("sesame")
    (inside / "link").symlink_to(tmp_path / "outside")
    told = refused(wanted(address=ADDRESS, token_file=name), VaultLocal(file_dir=inside))
    assert "leads out of file_dir" in told


def test_a_file_that_is_not_there_and_half_an_identity_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("x")
    told = refused(wanted(address=ADDRESS, token_file="absent", cert_file="cert.pem"), VaultLocal(file_dir=tmp_path))
    assert 'TokenFile: "absent" does not exist on this node' in told
    assert "CertFile: CertFile and KeyFile belong together" in told


def test_login_parameters_and_their_files(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    method = VaultAuthMethod("approle", "approle", (("role_id", "r"), ("secret_id_file_path", "secret")))
    login = resolve(wanted(address=ADDRESS, auth_method=method), VaultLocal(file_dir=tmp_path)).login
    assert login is not None
    assert login.params == (("role_id", Secret("r")),)
    assert login.files == (("secret_id", tmp_path / "secret"),)


def test_equal_settings_are_equal_endpoints_and_show_no_secret() -> None:
    one, other = (resolve(wanted(address=ADDRESS, token=Secret("sesame")), VaultLocal()) for _ in range(2))
    assert (one, hash(one)) == (other, hash(other))
    assert "sesame" not in repr(one)
