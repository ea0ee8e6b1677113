"""Configurations whose JSON, names, types or values are wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from tests.contract.bad_input.case import CONFIGURATION, Case, put


def cases() -> Iterator[Case]:
    """All of them."""
    for name, document in documents().items():
        yield put(f"configuration-json-{name}", CONFIGURATION, document)
    for name, top in top_levels().items():
        yield put(f"configuration-top-{name}", CONFIGURATION, top)
    for key, values in settings().items():
        for number, value in enumerate(values):
            body = {"Provider": "consul", "Config": {key: value}}
            yield put(f"configuration-{key}-{number}", CONFIGURATION, body)
    for name, config in combinations().items():
        yield put(f"configuration-with-{name}", CONFIGURATION, {"Provider": "consul", "Config": config})
    for name, query in queries().items():
        yield put(f"configuration-query-{name}", f"{CONFIGURATION}?{query}", {"Provider": "consul", "Config": {}})


def documents() -> Mapping[str, str | bytes]:
    """Bodies that are no JSON, or not one value of it, or more than is read."""
    sound = json.dumps({"Provider": "consul", "Config": {"LeafCertTTL": "48h"}})
    return {
        "empty": "",
        "blank": " \n",
        "word": "hello",
        "null": "null",
        "true": "true",
        "number": "5",
        "text": '"consul"',
        "list": "[]",
        "list-of-object": f"[{sound}]",
        "cut": sound[:-1],
        "cut-in-text": sound[:-6],
        "junk-behind": sound + "x",
        "two-values": sound + sound,
        "comma": sound[:-1] + ",}",
        "comment": "/* */" + sound,
        "single-quotes": sound.replace('"', "'"),
        "unquoted": "{Provider: consul}",
        "nan": '{"Provider": "consul", "Config": {"CSRMaxPerSecond": NaN}}',
        "infinity": '{"Provider": "consul", "Config": {"CSRMaxPerSecond": Infinity}}',
        "overflow": '{"Provider": "consul", "Config": {"CSRMaxPerSecond": 1e999}}',
        "leading-zero": '{"Provider": "consul", "ModifyIndex": 01}',
        "hex": '{"Provider": "consul", "ModifyIndex": 0x10}',
        "twice": '{"Provider": "consul", "Provider": "consul"}',
        "twice-inside": '{"Provider": "consul", "Config": {"LeafCertTTL": "48h", "LeafCertTTL": "50h"}}',
        "twice-other-case": '{"Provider": "consul", "provider": "consul"}',
        "twice-inside-other-case": '{"Provider": "consul", "Config": {"LeafCertTTL": "48h", "leafCertTTL": "50h"}}',
        "twice-inside-snake": '{"Provider": "consul", "Config": {"LeafCertTTL": "48h", "leaf_cert_ttl": "50h"}}',
        "twice-by-escape": '{"Provider": "consul", "Config": {}, "\\u0043onfig": {}}',
        "nul-in-name": '{"Provider\\u0000": "consul"}',
        "control-in-text": '{"Provider": "con\nsul"}',
        "bad-escape": '{"Provider": "\\x63onsul"}',
        "lone-surrogate": '{"Provider": "\\ud800"}',
        "not-utf8": b'{"Provider": "\xff"}',
        "not-utf8-name": b'{"\xff": "consul"}',
        "bom": b"\xef\xbb\xbf" + sound.encode(),
        "utf16": sound.encode("utf-16"),
        "nul-behind": sound.encode() + b"\0",
        "zeros": bytes(64),
        "deep-lists": '{"Provider": "consul", "Config": ' + "[" * 30_000,
        "deep-closed": '{"Provider": "consul", "Config": {"a": ' + "[" * 2000 + "]" * 2000 + "}}",
        "deep-objects": '{"a":' * 10_000,
        "many-names": json.dumps({"Provider": "consul", "Config": {f"k{at}": at for at in range(4000)}}),
        "long-name": json.dumps({"Provider": "consul", "Config": {"k" * 60_000: 1}}),
        "too-large": json.dumps({"Provider": "consul", "Config": {"RootCert": "x" * (65 * 1024)}}),
        "far-too-large": b" " * (3 << 20),
        "form": "Provider=consul&Config=",
        "xml": "<Provider>consul</Provider>",
        "digits": '{"Provider": "consul", "Config": {"CSRMaxConcurrent": ' + "9" * 5000 + "}}",
    }


def top_levels() -> Mapping[str, object]:
    """Names and types of the top level."""
    return {
        "empty": {},
        "no-provider": {"Config": {}},
        "provider-null": {"Provider": None, "Config": {}},
        "provider-empty": {"Provider": "", "Config": {}},
        "provider-number": {"Provider": 5},
        "provider-list": {"Provider": ["consul"]},
        "provider-object": {"Provider": {"a": 1}},
        "provider-bool": {"Provider": True},
        "provider-unknown": {"Provider": "nope"},
        "provider-case": {"Provider": "Consul"},
        "provider-space": {"Provider": "consul "},
        "provider-nul": {"Provider": "consul\0"},
        "provider-path": {"Provider": "../consul"},
        "provider-long": {"Provider": "c" * 5000},
        "provider-aws": {"Provider": "aws-pca", "Config": {}},
        "config-text": {"Provider": "consul", "Config": "x"},
        "config-list": {"Provider": "consul", "Config": [{}]},
        "config-number": {"Provider": "consul", "Config": 5},
        "config-bool": {"Provider": "consul", "Config": True},
        "unknown-key": {"Provider": "consul", "Config": {}, "Foo": 1},
        "config-key-outside": {"Provider": "consul", "LeafCertTTL": "48h"},
        "misspelt": {"Provider": "consul", "Confg": {}},
        "cluster-id": {"Provider": "consul", "ClusterID": "11111111-2222-3333-4444-555555555555"},
        "state": {"Provider": "consul", "State": {"a": "b"}},
        "state-text": {"Provider": "consul", "State": "x"},
        "force-text": {"Provider": "consul", "ForceWithoutCrossSigning": "true"},
        "force-number": {"Provider": "consul", "ForceWithoutCrossSigning": 1},
        "index-negative": {"Provider": "consul", "ModifyIndex": -1},
        "index-fraction": {"Provider": "consul", "ModifyIndex": 1.5},
        "index-text": {"Provider": "consul", "ModifyIndex": "5"},
        "index-bool": {"Provider": "consul", "ModifyIndex": True},
        "index-too-large": {"Provider": "consul", "ModifyIndex": 2**64},
        "index-stale": {"Provider": "consul", "Config": {"LeafCertTTL": "48h"}, "ModifyIndex": 99999},
        "create-index-text": {"Provider": "consul", "CreateIndex": "5"},
    }


def settings() -> Mapping[str, tuple[object, ...]]:
    """Values that one key of Config cannot have."""
    lifetimes: tuple[object, ...] = (
        "abc",
        "1d",
        "72",
        "72 h",
        "h",
        "-72h",
        "0",
        0,
        1,
        -5,
        True,
        [],
        {},
        "59m",
        "1e3h",
        "９9h",
        "72h\0",
    )
    return {
        "LeafCertTTL": (*lifetimes, "8761h", "99999999999h", 1e300, ["72h"], "72h;", "0x48h"),
        "IntermediateCertTTL": (*lifetimes, "2h", "100h"),
        "RootCertTTL": ("abc", "10h", -1, [], True),
        "RotationPeriod": ("abc", "0", "-1h", "1s", [], False),
        "CSRMaxPerSecond": ("x", -1, "-0.1", [], {}, "1e999", "NaN"),
        "CSRMaxConcurrent": ("x", -1, 1.5, [], {}, "1.5"),
        "PrivateKeyType": ("dsa", "ed25519", "EC", 5, [], "rsa "),
        "PrivateKeyBits": (0, -1, 1, 255, 512, 2048, "x", [], 1.5, 1 << 70),
        "RootCert": (5, [], {}, True),
        "PrivateKey": (5, [], {}, True, "<redacted>"),
        "SkipValidate": (True, "true", 1),
        "ClusterID": ("x", 5, "11111111-2222-3333-4444-55555555555", "11111111-2222-3333-4444-555555555555"),
        "Foo": (1,),
        "LeafCertTLL": ("72h",),
        "privatekey ": ("x",),
        "": (1,),
    }


def combinations() -> Mapping[str, object]:
    """Values that do not go together."""
    return {
        "leaf-beyond-intermediate": {"LeafCertTTL": "4000h"},
        "intermediate-below-leaf": {"LeafCertTTL": "72h", "IntermediateCertTTL": "200h"},
        "intermediate-beyond-root": {"IntermediateCertTTL": "90000h"},
        "rsa-256": {"PrivateKeyType": "rsa", "PrivateKeyBits": 256},
        "rsa-1024": {"PrivateKeyType": "rsa", "PrivateKeyBits": 1024},
        "ec-2048": {"PrivateKeyType": "ec", "PrivateKeyBits": 2048},
        "everything-wrong": {"LeafCertTTL": "x", "RootCert": 5, "PrivateKeyBits": [], "Foo": None},
        "redacted-beside-another-root": {"PrivateKey": "<redacted>", "RootCert": "another"},
    }


def queries() -> Mapping[str, str]:
    """Parameters of a write."""
    return {
        "cas-text": "cas=x",
        "cas-negative": "cas=-1",
        "cas-fraction": "cas=1.5",
        "cas-huge": "cas=" + "9" * 40,
        "cas-stale": "cas=99999",
        "force-text": "force=maybe",
        "other-datacenter": "dc=dc2",
    }
