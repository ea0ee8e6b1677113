"""The Config of the provider vault: what may be left out, what is kept, what is refused and in which words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from caserver.errors import InvalidConfig
from caserver.fields import REDACTED, Secret
from caserver.internode.keyring import Keyring
from caserver.state.configuration import (
    CAConfiguration,
    not_in_force,
    open_stored,
    parse_bootstrap,
    parse_update,
    same_meaning,
    seal,
)
from caserver.state.model import HOUR
from caserver.state.vault_configuration import VaultAuthMethod, VaultConfiguration, VaultLocal
from tests.testkit.nodes import operator_root

KEYRING = Keyring([b"k" * 32])
TOKEN = "s.very-secret"
URL = "https://vault.example.com:8200"
PATHS = {"RootPKIPath": "connect-root", "IntermediatePKIPath": "connect-intermediate"}
PLAIN = {"Address": URL, "Token": TOKEN, **PATHS}
APPROLE = {"Type": "approle", "Params": {"role_id": "r1", "secret_id": "s1"}}
HOME = VaultLocal(address="http://127.0.0.1:8200", token=Secret("s.local"), file_dir=Path("/etc/caserver/vault"))
CA = str(operator_root("ec-256")["RootCert"])
PREFIX = "error configuring provider: "


def update(config: object, stored: CAConfiguration | None = None, local: VaultLocal | None = None) -> CAConfiguration:
    body = json.dumps({"Provider": "vault", "Config": config})
    return parse_update(body, stored=stored, local=local).configuration


def vault(config: object, stored: CAConfiguration | None = None, local: VaultLocal | None = None) -> VaultConfiguration:
    found = update(config, stored, local).vault
    assert found is not None
    return found


def refusal(config: object, stored: CAConfiguration | None = None, local: VaultLocal | None = None) -> str:
    with pytest.raises(InvalidConfig) as caught:
        update(config, stored, local)
    assert TOKEN not in caught.value.detail
    return caught.value.detail


def seeded(config: dict[str, Any], local: VaultLocal = HOME) -> CAConfiguration:
    return parse_bootstrap("vault", config, local=local)


STORED = update(PLAIN)
WITH_APPROLE = update({"Address": URL, **PATHS, "AuthMethod": APPROLE})
WITH_FILES = seeded(
    {"address": URL, "token_file": "token", "ca_file": "tls/ca.pem", "root_pki_path": "r", "intermediate_pki_path": "i"}
)


class TestMeaning:
    def test_the_documented_example_from_a_file(self):
        config = seeded(
            {"address": URL, "token": TOKEN, "root_pki_path": "/connect-root/", "intermediate_pki_path": "team/ca"}
        )

        assert config.vault == VaultConfiguration("connect-root", "team/ca", address=URL, token=Secret(TOKEN))
        assert config.given == {
            "Address": URL,
            "IntermediateCertTTL": "8760h",
            "IntermediatePKIPath": "team/ca",
            "LeafCertTTL": "72h",
            "RootPKIPath": "/connect-root/",
            "RotationPeriod": "2160h",
            "Token": REDACTED,
        }
        assert TOKEN not in repr(config)

    def test_every_key(self):
        found = update(
            {
                **PLAIN,
                "LeafCertTTL": "24h",
                "RootCertTTL": "9000h",
                "PrivateKeyType": "rsa",
                "PrivateKeyBits": 2048,
                "Namespace": "/ns1/",
                "RootPKINamespace": "roots",
                "IntermediatePKINamespace": "mesh/a",
                "CACert": CA,
                "TLSServerName": "vault.internal",
                "TLSSkipVerify": True,
            }
        )

        assert found.vault is not None
        assert (found.vault.root_namespace, found.vault.intermediate_namespace) == ("roots", "mesh/a")
        assert (found.vault.ca_cert, found.vault.tls_server_name, found.vault.tls_skip_verify) == (
            CA,
            "vault.internal",
            True,
        )
        assert (found.effective.leaf_ttl, found.effective.private_key_type) == (24 * HOUR, "rsa")

    @pytest.mark.parametrize("spelling", [lambda key: key, str.lower])
    def test_spellings_of_the_same_mean_the_same(self, spelling: Any):
        config = {spelling(key): value for key, value in PLAIN.items()}

        assert same_meaning(update(config), update({**PLAIN, "Address": URL + "/", "RootPKIPath": "connect-root/"}))

    @pytest.mark.parametrize(
        "other",
        [{"Token": "s.other"}, {"Address": "https://other:8200"}, {"RootPKIPath": "other"}, {"TLSSkipVerify": True}],
        ids=str,
    )
    def test_another_value_means_something_else(self, other: dict[str, object]):
        assert not same_meaning(STORED, update({**PLAIN, **other}))

    @pytest.mark.parametrize(
        ("auth", "params"),
        [
            (APPROLE, {"role_id": "r1", "secret_id": "s1"}),
            ({"type": "userpass", "params": {"Username": "u", "password": "p"}}, {"username": "u", "password": "p"}),
            ({"Type": "jwt", "Params": {"role": "r", "jwt": "j"}}, {"role": "r", "jwt": "j"}),
            ({"Type": "kubernetes", "Params": {"role": "r", "jwt": "j"}}, {"role": "r", "jwt": "j"}),
            ({"Type": "cert"}, {}),
        ],
        ids=str,
    )
    def test_ways_to_log_in(self, auth: dict[str, object], params: dict[str, str]):
        method = vault({"Address": URL, **PATHS, "AuthMethod": auth}).auth_method

        assert method is not None
        assert {name: method.param(name) for name, _ in method.params} == params
        assert method.mount_path == method.type

    def test_a_secret_parameter_shows_nowhere(self):
        assert WITH_APPROLE.given["AuthMethod"] == {
            "Type": "approle",
            "Params": {"role_id": "r1", "secret_id": REDACTED},
        }
        assert "s1" not in repr(WITH_APPROLE)


class TestSecrets:
    @pytest.mark.parametrize("config", [STORED, WITH_APPROLE, WITH_FILES], ids=["token", "approle", "files"])
    def test_sealed_and_opened_again(self, config: CAConfiguration):
        sealed = seal(config, KEYRING, b"n" * 12)

        assert open_stored(sealed, KEYRING) == config
        assert TOKEN not in sealed.given

    def test_those_that_were_erased_are_absent(self):
        sealed = replace(seal(WITH_APPROLE, KEYRING, b"n" * 12), secrets=())
        found = open_stored(sealed, KEYRING).vault

        assert found is not None
        assert found.auth_method == VaultAuthMethod("approle", "approle", (("role_id", "r1"),))

    @pytest.mark.parametrize("token", [{}, {"Token": REDACTED}, {"Token": ""}, {"Token": None}], ids=str)
    def test_a_token_is_kept_beside_the_same_address_and_paths(self, token: dict[str, object]):
        changed = update({"Address": URL + "/", **PATHS, "LeafCertTTL": "5h", **token}, STORED)

        assert changed.vault == STORED.vault
        assert open_stored(seal(changed, KEYRING, b"n" * 12), KEYRING).vault == STORED.vault

    @pytest.mark.parametrize(
        "other",
        [
            {"Address": "https://evil.example.com"},
            {"RootPKIPath": "other"},
            {"IntermediatePKIPath": "other"},
            {"Namespace": "other"},
            {"RootPKINamespace": "other"},
        ],
        ids=str,
    )
    def test_a_token_does_not_follow_to_another_place(self, other: dict[str, object]):
        told = refusal({**PLAIN, "Token": REDACTED, **other}, STORED)

        assert "Config.Token: is <redacted>, but address or paths are not those it is stored with" in told
        assert "must provide a Vault token" in refusal({"Address": URL, **PATHS, **other}, STORED)

    def test_a_redacted_token_needs_a_stored_one(self):
        assert "none is stored" in refusal({**PLAIN, "Token": REDACTED})

    def test_what_is_shown_may_be_written_back(self):
        for config in (STORED, WITH_APPROLE, WITH_FILES, seeded(dict(PATHS))):
            assert same_meaning(config, update(dict(config.given), config, HOME))

    def test_secret_parameters_are_kept_like_a_token(self):
        config: dict[str, Any] = {"Address": URL, **PATHS}
        for params in ({"role_id": "r1", "secret_id": REDACTED}, {"role_id": "r1"}):
            kept = update({**config, "AuthMethod": {"Type": "approle", "Params": params}}, WITH_APPROLE)
            assert kept.vault == WITH_APPROLE.vault
            assert open_stored(seal(kept, KEYRING, b"n" * 12), KEYRING).vault == WITH_APPROLE.vault
        redacted = {"Type": "approle", "Params": {"role_id": "r1", "secret_id": REDACTED}}
        assert "secret_id is <redacted>" in refusal(
            {**config, "RootPKIPath": "x", "AuthMethod": redacted}, WITH_APPROLE
        )
        assert "secret_id is <redacted>" in refusal(
            {**config, "AuthMethod": {**redacted, "MountPath": "other"}}, WITH_APPROLE
        )


class TestLocal:
    """What the servers know themselves stays among themselves."""

    def test_address_and_token_may_be_left_to_the_servers_together(self):
        found = update(PATHS, None, HOME)

        assert found.vault == VaultConfiguration("connect-root", "connect-intermediate")
        assert (found.given["AddressSource"], found.given["TokenSource"]) == ("VAULT_ADDR", "VAULT_TOKEN")
        assert "s.local" not in json.dumps(found.given)

    def test_a_local_token_never_travels_to_an_address_that_came_over_http(self):
        told = refusal({"Address": "https://evil.example.com", **PATHS}, None, HOME)

        assert told.startswith(PREFIX + "must provide a Vault token")
        assert "with its own VAULT_ADDR only" in told

    def test_a_token_of_the_configuration_may_go_to_the_servers_own_address(self):
        assert vault({"Token": TOKEN, **PATHS}, None, HOME).token == Secret(TOKEN)

    def test_sources_are_told_not_chosen(self):
        assert "AddressSource: only tells" in refusal({**PLAIN, "AddressSource": "VAULT_ADDR"})
        assert "TokenSource: only tells" in refusal({**PATHS, "TokenSource": "/etc/shadow"}, None, HOME)

    @pytest.mark.parametrize(
        ("key", "instead"), [("TokenFile", "Token"), ("CAFile", "CACert"), ("CAPath", "CACert"), ("CertFile", "")]
    )
    def test_files_are_not_named_over_http(self, key: str, instead: str):
        config = {**PLAIN, key: "x", **({"KeyFile": "y"} if key == "CertFile" else {})}
        if key == "TokenFile":
            del config["Token"]
        told = refusal(config, None, HOME)

        assert f"{key}: names a file of the servers, which is not taken over HTTP" in told
        assert instead in told

    def test_a_stored_file_may_be_named_again_but_its_secret_stays_with_its_address(self):
        given = dict(WITH_FILES.given)
        assert same_meaning(WITH_FILES, update(given, WITH_FILES))

        told = refusal({**given, "Address": "https://evil.example.com"}, WITH_FILES)
        assert "TokenFile: holds a secret of the servers, which goes to the stored Address only" in told
        assert "CAFile" not in told

    @pytest.mark.parametrize("name", ["/etc/passwd", "../token", "a/../../b", "a//b", "."])
    def test_a_file_is_named_below_its_directory(self, name: str):
        with pytest.raises(InvalidConfig, match="does not name a file below file_dir"):
            seeded({"address": URL, "token_file": name, "root_pki_path": "r", "intermediate_pki_path": "i"})

    def test_without_a_directory_there_are_no_files(self):
        local = replace(HOME, file_dir=None)
        auth = {"type": "kubernetes", "params": {"role": "r", "token_path": "token"}}
        with pytest.raises(InvalidConfig, match=r"connect \{ file_dir \} is not set"):
            seeded({"address": URL, "auth_method": auth, "root_pki_path": "r", "intermediate_pki_path": "i"}, local)

    def test_vaults_variables_count_only_together(self):
        environ = {
            "VAULT_ADDR": "http://127.0.0.1:8200/",
            "VAULT_TOKEN": "s.x\n",
            "VAULT_NAMESPACE": "ns/",
            "VAULT_CACERT": "/ca.pem",
            "VAULT_SKIP_VERIFY": "true",
        }
        assert VaultLocal.from_environ(environ, file_dir=None) == VaultLocal(
            address="http://127.0.0.1:8200",
            token=Secret("s.x"),
            namespace="ns",
            ca_cert=Path("/ca.pem"),
            skip_verify=True,
        )
        del environ["VAULT_ADDR"]
        assert VaultLocal.from_environ(environ, file_dir=Path("/x")) == VaultLocal(file_dir=Path("/x"))


class TestRefused:
    @pytest.mark.parametrize(
        ("config", "heading"),
        [
            ({}, "must provide a Vault token"),
            ({"Address": URL, "RootPKIPath": "r", "IntermediatePKIPath": "i"}, "must provide a Vault token"),
            ({**PLAIN, "RootPKIPath": "/"}, "must provide a valid path to a root PKI backend"),
            ({**PLAIN, "IntermediatePKIPath": ""}, "must provide a valid path for the intermediate PKI backend"),
            (
                {**PLAIN, "AuthMethod": APPROLE},
                "only one of Vault token or Vault auth method can be provided, but not both",
            ),
            ({**PLAIN, "IntermediateCertTTL": "2h"}, "Intermediate Cert TTL must be greater or equal than 3h"),
            ({"Address": URL, **PATHS, "AuthMethod": {"Type": "ldap"}}, 'auth method "ldap" is not supported'),
        ],
        ids=str,
    )
    def test_in_the_words_of_consul(self, config: dict[str, object], heading: str):
        assert refusal(config).splitlines()[0] == PREFIX + heading

    @pytest.mark.parametrize(
        ("config", "told"),
        [
            ({**PLAIN, "Adress": URL}, 'Config.Adress: unknown key; did you mean "Address"?'),
            ({**PLAIN, "PrivateKey": "x"}, "Config.PrivateKey: unknown key"),
            ({**PLAIN, "Address": "vault:8200"}, "Config.Address: does not begin with https:// or http://"),
            ({**PLAIN, "Address": "https://"}, "Config.Address: names no host"),
            ({**PLAIN, "Address": "https://h:99999"}, "Config.Address: is no URL"),
            ({**PLAIN, "Address": "https://h/?x=1"}, "Config.Address: has a query or a fragment"),
            ({**PLAIN, "Token": TOKEN + "\nX-Vault: 1"}, "Config.Token: holds white space or control characters"),
            ({**PLAIN, "Token": 5}, "'Token' expected type 'string'"),
            ({**PLAIN, "RootPKIPath": "a b"}, 'Config.RootPKIPath: "a b" is no path'),
            ({**PLAIN, "RootPKIPath": "a/../b"}, "is no path"),
            ({**PLAIN, "Namespace": "a?b"}, "is no namespace"),
            ({**PLAIN, "IntermediatePKIPath": "connect-root/"}, "IntermediatePKIPath: is RootPKIPath too"),
            ({**PLAIN, "CACert": "garbage"}, "CACert: holds no certificate"),
            ({"Address": URL, **PATHS, "AuthMethod": {"Type": "cert", "Pramas": {}}}, 'did you mean "Params"?'),
            (
                {"Address": URL, **PATHS, "AuthMethod": {"Type": "jwt", "Params": {"jwt": "j", "rolle": "x"}}},
                'Config.AuthMethod.Params.rolle: unknown key; did you mean "role"?',
            ),
            (
                {"Address": URL, **PATHS, "AuthMethod": {"Type": "approle", "Params": {}}},
                "Config.AuthMethod: Params lack role_id or role_id_file_path",
            ),
        ],
        ids=str,
    )
    def test_says_what_is_wrong(self, config: dict[str, object], told: str):
        assert told in refusal(config)

    def test_a_password_in_the_address_is_not_repeated(self):
        told = refusal({**PLAIN, "Address": "https://u:hunter2@h:8200"})

        assert "holds a user name or a password" in told
        assert "hunter2" not in told

    def test_everything_at_once(self):
        told = refusal({"Address": "x", "RootPKIPath": "a b", "LeafCertTTL": "1m", "Foo": 1})

        assert len(told.splitlines()) == 1 + 6

    def test_the_paths_may_be_the_same_in_different_namespaces(self):
        same = {"RootPKIPath": "pki", "IntermediatePKIPath": "pki", "RootPKINamespace": "a"}

        assert vault({**PLAIN, **same}).root_namespace == "a"


def test_what_a_file_sets_and_is_not_in_force_is_named() -> None:
    config = {"address": URL, "token": TOKEN, "root_pki_path": "connect-root", "intermediate_pki_path": "inter"}
    file = seeded(config)
    stored = open_stored(seal(file, KEYRING, bytes(12)), KEYRING)

    assert not_in_force(file, stored) == ()
    assert not_in_force(seeded({**config, "token": "s.newer"}), stored) == ("Token",)
    assert not_in_force(seeded({**config, "root_pki_path": "next", "leaf_cert_ttl": "24h"}), stored) == (
        "LeafCertTTL",
        "RootPKIPath",
    )
    assert not_in_force(file, parse_bootstrap(None, {})) == ("ca_provider",)
    assert not_in_force(parse_bootstrap(None, {}), stored) == ()
    assert not_in_force(file, update({**PLAIN, "IntermediatePKIPath": "inter"})) == ()
    for local in (HOME, VaultLocal(address="http://127.0.0.1:8200", token=Secret("s.other"))):
        bare = seeded({"root_pki_path": "connect-root", "intermediate_pki_path": "inter"}, local)
        assert not_in_force(bare, open_stored(seal(bare, KEYRING, bytes(12)), KEYRING)) == ()


def test_other_credentials_for_former_places_travel_as_they_were_given_to() -> None:
    skipping = {**PLAIN, "Token": "s.former", "IntermediatePKIPath": "former", "TLSSkipVerify": True}
    former = replace(vault(skipping), ca_file="old.pem")
    present = vault({**PLAIN, "CACert": CA, "TLSServerName": "vault", "RootPKIPath": "other-root"}, local=HOME)
    known = former.known_as(present)
    assert known is not None
    assert known.place == former.place
    assert (known.token, known.ca_cert, known.ca_file) == (Secret(TOKEN), present.ca_cert, None)
    assert (known.tls_server_name, known.tls_skip_verify) == ("vault", False)


def test_credentials_that_are_the_same_or_for_another_server_are_none_for_former_places() -> None:
    former = vault(PLAIN)
    assert former.known_as(vault({**PLAIN, "IntermediatePKIPath": "present"})) is None
    assert former.known_as(vault({**PLAIN, "Address": "https://elsewhere:8200", "Token": "s.other"})) is None
