"""Configurations: read as Consul reads them where it does well, refused with its words where it should have refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caserver.errors import Corrupt, InvalidConfig
from caserver.fields import REDACTED, Secret
from caserver.internode.keyring import Keyring
from caserver.state.configuration import (
    CAConfiguration,
    Update,
    open_stored,
    parse_bootstrap,
    parse_update,
    same_meaning,
    seal,
)
from caserver.state.model import HOUR, Effective

KEYRING = Keyring([b"k" * 32])
NONCE = b"n" * 12
KEY = "-----BEGIN EC PRIVATE KEY-----\nc2VjcmV0LWtleQ==\n-----END EC PRIVATE KEY-----\n"
CERT = "-----BEGIN CERTIFICATE-----\ncm9vdA==\n-----END CERTIFICATE-----\n"
OTHER_CERT = CERT.replace("cm9v", "b3Ro")
CLUSTER_ID = "4a2b8c1e-7c65-4a39-a1b2-0123456789ab"
PROVIDER = "error configuring provider: "
DECODE = PROVIDER + "error decoding config: 1 error(s) decoding:\n\n* "
BODY = "Bad request: Request decode failed: "


def update(
    config: object, *, stored: CAConfiguration | None = None, cluster_id: str | None = None, **top: object
) -> Update:
    return parse_update(
        json.dumps({"Provider": "consul", "Config": config, **top}), stored=stored, cluster_id=cluster_id
    )


def refusal(body: str, stored: CAConfiguration | None = None, cluster_id: str | None = None) -> str:
    with pytest.raises(InvalidConfig) as caught:
        parse_update(body, stored=stored, cluster_id=cluster_id)
    return caught.value.detail


def config_refusal(config: object, stored: CAConfiguration | None = None) -> str:
    return refusal(json.dumps({"Provider": "consul", "Config": config}), stored)


OWN_ROOT = update({"PrivateKey": KEY, "RootCert": CERT}).configuration
KEY_ALONE = update({"PrivateKey": KEY}).configuration
GENERATED = update({}).configuration


class TestAccepted:
    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({}, Effective()),
            (None, Effective()),
            ({"LeafCertTTL": None}, Effective()),
            ({"LeafCertTTL": "72h0m0s"}, Effective()),
            ({"LeafCertTTL": "1h"}, Effective(leaf_ttl=HOUR)),
            ({"leaf_cert_ttl": "26h"}, Effective(leaf_ttl=26 * HOUR)),
            ({"leafcertttl": "25h"}, Effective(leaf_ttl=25 * HOUR)),
            ({"LeafCertTTL": 3_600_000_000_000}, Effective(leaf_ttl=HOUR)),
            ({"LeafCertTTL": 3_600_000_000_000.0}, Effective(leaf_ttl=HOUR)),
            ({"LeafCertTTL": "8760h", "IntermediateCertTTL": "26280h"}, Effective(8760 * HOUR, 26280 * HOUR)),
            ({"IntermediateCertTTL": "87600h"}, Effective(intermediate_ttl=87600 * HOUR)),
            ({"RootCertTTL": "9000h"}, Effective(root_ttl=9000 * HOUR)),
            ({"RotationPeriod": 7_776_000_000_000_000}, Effective(rotation_period=2160 * HOUR)),
            ({"CSRMaxPerSecond": 1, "CSRMaxConcurrent": 2}, Effective(csr_max_per_second=1, csr_max_concurrent=2)),
            ({"CSRMaxPerSecond": "0.5"}, Effective(csr_max_per_second=0.5)),
            (
                {"PrivateKeyType": "rsa", "PrivateKeyBits": 4096},
                Effective(private_key_type="rsa", private_key_bits=4096),
            ),
            ({"PrivateKeyBits": "384"}, Effective(private_key_bits=384)),
            ({"SkipValidate": False}, Effective()),
        ],
    )
    def test_means(self, config: Any, expected: Effective):
        assert update(config).configuration.effective == expected

    def test_top_level_in_any_case_and_both_spellings_of_force(self):
        body = '{"provider":"consul","CONFIG":{},"State":null,"createIndex":1,"modifyindex":7,"force_without_cross_signing":true}'

        read = parse_update(body, stored=None)

        assert (read.modify_index, read.configuration.force_without_cross_signing) == (7, True)
        assert update({}, ForceWithoutCrossSigning=True).configuration.force_without_cross_signing
        assert not update({}, ForceWithoutCrossSigning=False).configuration.force_without_cross_signing

    def test_echoes_the_words_of_the_caller_in_order(self):
        config = {"RotationPeriod": "100h", "leaf_cert_ttl": "26h", "CSRMaxPerSecond": "50", "PrivateKeyBits": 384}

        assert list(update(config).configuration.given.items()) == list(config.items())

    def test_root_certificate_is_kept_byte_for_byte(self):
        odd = "text before\r\n" + CERT.rstrip()

        assert update({"PrivateKey": KEY, "RootCert": odd}).configuration.root_cert == odd

    def test_own_cluster_id(self):
        assert update({"ClusterID": CLUSTER_ID.upper()}, cluster_id=CLUSTER_ID).configuration.cluster_id == CLUSTER_ID


class TestSecrets:
    def test_are_cut_out_of_what_is_shown(self):
        for config in ({"PrivateKey": KEY}, {"private_key": KEY}):
            configuration = update(config).configuration

            assert configuration.private_key == Secret(KEY)
            assert list(configuration.given.values()) == [REDACTED]
            assert "c2VjcmV0" not in repr(configuration)

    def test_sealed_and_opened_again(self):
        sealed = seal(OWN_ROOT, KEYRING, NONCE)

        assert "c2VjcmV0" not in repr(sealed)
        assert [key for key, _ in sealed.secrets] == ["PrivateKey"]
        assert open_stored(sealed, KEYRING) == OWN_ROOT

    def test_need_their_key(self):
        with pytest.raises(Corrupt, match="cluster_secret"):
            open_stored(seal(OWN_ROOT, KEYRING, NONCE), Keyring([b"x" * 32]))

    @pytest.mark.parametrize("extra", [{}, {"PrivateKey": REDACTED}, {"PrivateKey": None}, {"PrivateKey": ""}])
    def test_redacted_or_absent_beside_the_same_certificate_keeps_the_stored_one(self, extra: dict[str, object]):
        changed = update({"RootCert": CERT.replace("\n", "\r\n"), "LeafCertTTL": "5h", **extra}, stored=OWN_ROOT)

        assert changed.configuration.private_key == Secret(KEY)
        assert changed.configuration.given["PrivateKey"] in (REDACTED, "", None)

    def test_redacted_alone_keeps_the_stored_one(self):
        assert update({"PrivateKey": REDACTED}, stored=KEY_ALONE).configuration == KEY_ALONE
        assert update({"private_key": REDACTED}, stored=OWN_ROOT).configuration.private_key == Secret(KEY)

    def test_both_absent_mean_a_generated_root(self):
        configuration = update({"LeafCertTTL": "5h"}, stored=OWN_ROOT).configuration

        assert (configuration.private_key, configuration.root_cert) == (None, None)

    @pytest.mark.parametrize("stored", [OWN_ROOT, KEY_ALONE, GENERATED, None])
    def test_certificate_without_its_key_is_refused(self, stored: CAConfiguration | None):
        assert config_refusal({"RootCert": OTHER_CERT}, stored).splitlines() == [
            PROVIDER + "must provide a private key when providing a root cert",
            "Config.PrivateKey: is missing beside RootCert; give the key of that certificate",
        ]

    def test_redacted_with_nothing_to_keep_is_refused(self):
        assert "no key is stored" in config_refusal({"PrivateKey": REDACTED}, GENERATED)
        assert "RootCert is not the stored one" in config_refusal(
            {"PrivateKey": REDACTED, "RootCert": OTHER_CERT}, OWN_ROOT
        )

    @given(st.sampled_from([OWN_ROOT, KEY_ALONE, GENERATED]))
    def test_what_is_shown_can_be_put_back(self, stored: CAConfiguration):
        shown = {
            "Provider": stored.provider,
            "Config": dict(stored.given),
            "State": None,
            "ForceWithoutCrossSigning": False,
            "CreateIndex": 5,
            "ModifyIndex": 9,
        }
        read = parse_update(json.dumps(shown), stored=stored)

        assert read.modify_index == 9
        assert same_meaning(stored, read.configuration)

    @given(
        st.text(min_size=5, max_size=40).map(lambda text: "S3CRET" + text),
        st.dictionaries(st.sampled_from(["LeafCertTTL", "X", "RootCert"]), st.integers(), min_size=1),
    )
    def test_never_show_in_a_refusal(self, secret: str, rest: dict[str, object]):
        with pytest.raises(InvalidConfig) as caught:
            update({**rest, "private_key": secret, "PrivateKey": secret})

        assert "S3CRET" not in caught.value.detail


class TestMeaning:
    def test_ignores_spelling(self):
        one = update({"LeafCertTTL": "72h", "PrivateKey": KEY, "RootCert": CERT}).configuration
        two = update({"leaf_cert_ttl": "72h0m0s", "private_key": KEY + "\n", "root_cert": CERT.strip()}).configuration

        assert same_meaning(one, two)

    @pytest.mark.parametrize(
        "other",
        [
            OWN_ROOT,
            KEY_ALONE,
            update({"LeafCertTTL": "5h"}).configuration,
            update({}, ForceWithoutCrossSigning=True).configuration,
        ],
    )
    def test_sees_every_difference(self, other: CAConfiguration):
        assert not same_meaning(GENERATED, other)
        assert same_meaning(other, other)


class TestBodyFaults:
    @pytest.mark.parametrize(
        ("body", "first_line"),
        [
            ("", BODY + "EOF"),
            ("hello", BODY + "invalid character 'h' looking for beginning of value"),
            ('{"Provider":', BODY + "unexpected EOF"),
            ("null", BODY + "the body is null"),
            ('{"Provider":"consul","Config":{}} junk', BODY + "invalid character 'j' after top-level value"),
            ('{"Provider":"consul","Provider":"consul"}', BODY + 'key "Provider" is given twice in one object'),
            ('{"Provider":"consul","provider":"consul"}', BODY + 'key "provider" is given twice'),
            ('{"Provider":5}', BODY + "json: cannot unmarshal number into Go struct field .Provider of type string"),
            (
                '{"Provider":"consul","Config":"x"}',
                BODY + "json: cannot unmarshal string into Go struct field .Config of type map[string]interface {}",
            ),
            ('{"Provider":"consul","Foo":1}', BODY + 'json: unknown field "Foo"'),
            (
                '{"Provider":"consul","ForceWithoutCrossSigning":"true"}',
                BODY + "json: cannot unmarshal string into Go struct field .ForceWithoutCrossSigning of type bool",
            ),
            (
                '{"Provider":"consul","ModifyIndex":-1}',
                BODY + "json: cannot unmarshal number -1 into Go struct field .ModifyIndex of type uint64",
            ),
            (
                '{"Provider":"consul","ModifyIndex":true}',
                BODY + "json: cannot unmarshal bool into Go struct field .ModifyIndex of type uint64",
            ),
            (
                '{"Provider":"consul","State":{"a":"b"}}',
                "Bad request: Provider State is read-only. It must be omitted or identical to the current value",
            ),
            ("{}", 'could not initialize provider: unknown CA provider ""'),
            ('{"Provider":null}', 'could not initialize provider: unknown CA provider ""'),
            ('{"Provider":"Consul"}', 'could not initialize provider: unknown CA provider "Consul"'),
        ],
    )
    def test_first_line(self, body: str, first_line: str):
        assert refusal(body).splitlines()[0] == first_line

    @pytest.mark.parametrize(("body", "kind"), [("[]", "array"), ('"x"', "string"), ("5", "number")])
    def test_body_that_is_no_object(self, body: str, kind: str):
        assert refusal(body) == (
            f"{BODY}json: cannot unmarshal {kind} into Go value of type struct "
            r'{ ForceWithoutCrossSigningSnake bool "json:\"force_without_cross_signing\""; *structs.Alias }'
        )

    def test_misplaced_option_is_told_where_to_go(self):
        assert "go inside Config" in refusal('{"Provider":"consul","LeafCertTTL":"1h"}')


class TestConfigFaults:
    @pytest.mark.parametrize(
        ("config", "text"),
        [
            ({"LeafCertTTL": "59m"}, PROVIDER + "leaf cert TTL must be greater or equal than 1h0m0s"),
            ({"LeafCertTTL": "0"}, PROVIDER + "leaf cert TTL must be greater or equal than 1h0m0s"),
            ({"LeafCertTTL": "-1h"}, PROVIDER + "leaf cert TTL must be greater or equal than 1h0m0s"),
            ({"LeafCertTTL": 3600}, PROVIDER + "leaf cert TTL must be greater or equal than 1h0m0s"),
            ({"LeafCertTTL": True}, PROVIDER + "leaf cert TTL must be greater or equal than 1h0m0s"),
            ({"LeafCertTTL": "8761h"}, PROVIDER + "leaf cert TTL must be less than 8760h0m0s"),
            ({"LeafCertTTL": "abc"}, DECODE + "error decoding 'LeafCertTTL': time: invalid duration \"abc\""),
            ({"LeafCertTTL": ""}, DECODE + "error decoding 'LeafCertTTL': time: invalid duration \"\""),
            ({"LeafCertTTL": "1d"}, DECODE + 'error decoding \'LeafCertTTL\': time: unknown unit "d" in duration "1d"'),
            ({"IntermediateCertTTL": "1m"}, PROVIDER + "Intermediate Cert TTL must be greater or equal than 3h"),
            (
                {"IntermediateCertTTL": "3h"},
                PROVIDER + "Intermediate Cert TTL must be greater or equal than 3 * LeafCertTTL (>=216h0m0s).",
            ),
            (
                {"RootCertTTL": "100h"},
                PROVIDER + "root cert TTL is set and is not greater than intermediate cert ttl. "
                "root cert ttl: 100h0m0s, intermediate cert ttl: 8760h0m0s",
            ),
            ({"RotationPeriod": ""}, DECODE + "error decoding 'RotationPeriod': time: invalid duration \"\""),
            ({"PrivateKeyType": "dsa"}, PROVIDER + "private key type must be either 'ec' or 'rsa'"),
            ({"PrivateKeyType": ""}, PROVIDER + "private key type must be either 'ec' or 'rsa'"),
            ({"PrivateKeyBits": -1}, PROVIDER + "EC key length must be one of (224, 256, 384, 521) bits"),
            ({"PrivateKeyType": "rsa"}, PROVIDER + "RSA key length must be 2048 or 4096 bits"),
            (
                {"CSRMaxPerSecond": "x"},
                DECODE + "cannot parse 'CSRMaxPerSecond' as float: strconv.ParseFloat: parsing \"x\": invalid syntax",
            ),
            (
                {"RootCert": ["x"]},
                DECODE + "'RootCert' expected type 'string', got unconvertible type '[]interface {}'",
            ),
        ],
    )
    def test_consul_has_the_first_word(self, config: object, text: str):
        assert config_refusal(config).startswith(text + "\nConfig.")

    @pytest.mark.parametrize(
        ("config", "line"),
        [
            ({"RotationPeriod": "-1h"}, "Config.RotationPeriod: -1h0m0s is out of range; use at least 1h"),
            ({"RotationPeriod": "0s"}, "Config.RotationPeriod: 0s is out of range; use at least 1h"),
            ({"CSRMaxPerSecond": -1}, "Config.CSRMaxPerSecond: -1.0 is negative; use 0 for no limit"),
            ({"CSRMaxConcurrent": -2}, "Config.CSRMaxConcurrent: -2 is negative; use 0 for no limit"),
            ({"SkipValidate": True}, "Config.SkipValidate: would switch the checks of lifetimes off; leave it out"),
            ({"LeafTTL": "1h"}, 'Config.LeafTTL: unknown key; did you mean "LeafCertTTL"?'),
            (
                {"LeafCertTTL": "2h", "leaf_cert_ttl": "3h"},
                'Config.leaf_cert_ttl: the same key is given as "LeafCertTTL" too; give it once',
            ),
            ({"ClusterID": "evil"}, 'Config.ClusterID: "evil" is not a UUID; leave it out to have one generated'),
        ],
    )
    def test_what_consul_lets_pass_is_refused(self, config: object, line: str):
        assert config_refusal(config).splitlines()[-1] == line

    def test_another_cluster_id_is_refused(self):
        body = json.dumps({"Provider": "consul", "Config": {"ClusterID": CLUSTER_ID.replace("4a", "5b", 1)}})

        assert "fixed at bootstrap" in refusal(body, cluster_id=CLUSTER_ID)

    def test_all_faults_come_at_once(self):
        config = {"LeafCertTTL": "1d", "CSRMaxPerSecond": "x", "PrivateKeyBits": 7, "rotation_period": 1, "Leaf": 0}

        assert config_refusal(config).splitlines() == [
            PROVIDER + "error decoding config: 2 error(s) decoding:",
            "",
            "* cannot parse 'CSRMaxPerSecond' as float: strconv.ParseFloat: parsing \"x\": invalid syntax",
            '* error decoding \'LeafCertTTL\': time: unknown unit "d" in duration "1d"',
            'Config.LeafCertTTL: time: unknown unit "d" in duration "1d"; use hours, minutes and seconds, such as "72h" or "1h30m"',
            'Config.CSRMaxPerSecond: "x" is not a number; give a number',
            "Config.rotation_period: 0s is out of range; use at least 1h",
            "Config.PrivateKeyBits: 7 does not fit an EC key; use 224, 256, 384 or 521",
            (
                "Config.Leaf: unknown key; known are CSRMaxConcurrent, CSRMaxPerSecond, ClusterID, IntermediateCertTTL, "
                "LeafCertTTL, PrivateKey, PrivateKeyBits, PrivateKeyType, RootCert, RootCertTTL, RotationPeriod, SkipValidate"
            ),
        ]

    @given(st.text(max_size=60))
    def test_no_body_does_more_than_fail(self, body: str):
        with pytest.raises(InvalidConfig):
            parse_update(body, stored=None)

    @given(
        st.dictionaries(
            st.sampled_from(
                [
                    "PrivateKey",
                    "RootCert",
                    "LeafCertTTL",
                    "CSRMaxConcurrent",
                    "PrivateKeyBits",
                    "ClusterID",
                    "SkipValidate",
                    "Z",
                ]
            ),
            st.one_of(
                st.none(),
                st.booleans(),
                st.integers(),
                st.floats(allow_nan=False, allow_infinity=False),
                st.text(max_size=4),
                st.just({}),
                st.just([1]),
            ),
        )
    )
    def test_no_value_does_more_than_fail(self, config: dict[str, object]):
        try:
            configuration = update(config, stored=OWN_ROOT).configuration
        except InvalidConfig:
            return
        assert open_stored(seal(configuration, KEYRING, NONCE), KEYRING) == configuration


class TestBootstrap:
    def test_defaults_in_the_order_that_consul_shows(self):
        assert list(parse_bootstrap(None, {}).given.items()) == [
            ("IntermediateCertTTL", "8760h"),
            ("LeafCertTTL", "72h"),
            ("RotationPeriod", "2160h"),
        ]

    def test_keys_of_the_file_get_their_proper_names(self):
        configuration = parse_bootstrap(
            "consul",
            {"leaf_cert_ttl": "24h", "private_key_type": "rsa", "private_key_bits": 2048, "CSRMaxPerSecond": 10},
        )

        assert dict(configuration.given) == {
            "CSRMaxPerSecond": 10,
            "IntermediateCertTTL": "8760h",
            "LeafCertTTL": "24h",
            "PrivateKeyBits": 2048,
            "PrivateKeyType": "rsa",
            "RotationPeriod": "2160h",
        }
        assert configuration.effective.leaf_ttl == 24 * HOUR

    def test_operator_root_and_cluster_id(self):
        configuration = parse_bootstrap(
            "consul", {"private_key": KEY, "root_cert": CERT, "cluster_id": CLUSTER_ID.upper()}
        )

        assert configuration.private_key == Secret(KEY)
        assert configuration.given["PrivateKey"] == REDACTED
        assert configuration.cluster_id == CLUSTER_ID
        assert open_stored(seal(configuration, KEYRING, NONCE), KEYRING) == configuration

    @pytest.mark.parametrize(
        ("provider", "ca_config", "text"),
        [
            ("nope", {}, "nope is not a valid CA provider\n"),
            (None, {"leaf_cert_ttl": "1s"}, "leaf cert TTL must be greater or equal than 1h0m0s\n"),
            (
                None,
                {"leaf_cert_ttl": "abc"},
                "error decoding config: 1 error(s) decoding:\n\n* error decoding 'LeafCertTTL': time: invalid duration \"abc\"\n",
            ),
            (None, {"root_cert": CERT}, "must provide a private key when providing a root cert\n"),
            (None, {"cluster_id": "x"}, "cluster_id was supplied but was not a valid UUID\n"),
            (None, {"foo": 1}, "ca_config.foo: unknown key"),
            (None, {"private_key": REDACTED}, "ca_config.private_key: is <redacted> and no key is stored to keep"),
        ],
    )
    def test_faults_in_the_words_of_consul_s_start(self, provider: str | None, ca_config: dict[str, object], text: str):
        with pytest.raises(InvalidConfig) as caught:
            parse_bootstrap(provider, ca_config)

        assert caught.value.detail.startswith(text)
