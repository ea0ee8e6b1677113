"""TLS of the HTTPS listener as the configuration names it; the files are read by ``pki.tls``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from caserver.config.reading import Reading
from caserver.errors import InvalidConfig
from caserver.fields import Fields

# Consul's spellings -> whether it is offered.
_VERSIONS = {"tls10": False, "tls11": False, "tls12": True, "tls13": True}
_NEWER = {"TLSv1_0": "tls10", "TLSv1_1": "tls11", "TLSv1_2": "tls12", "TLSv1_3": "tls13"}  # since Consul 1.12
_MIN = "tls12"
# Of the suites that Consul knows those with forward secrecy and authenticated encryption -> their names in OpenSSL.
_SUITES = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305": "ECDHE-RSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
}


@dataclass(frozen=True, slots=True)
class TLSFiles:
    """PEM files of the public HTTPS listener, and how it speaks."""

    cert_file: Path
    key_file: Path
    ca_file: Path | None  # client certificates of these CAs are accepted
    verify_incoming: bool  # a client certificate is required
    min_version: str = _MIN  # or tls13
    ca_path: Path | None = None  # directory of further such CAs
    cipher_suites: tuple[str, ...] = ()  # of TLS 1.2, OpenSSL's names; none = all that are safe
    prefer_server_ciphers: bool = False


JudgeTLS = Callable[[TLSFiles], object]


_FILES = ("cert_file", "key_file", "ca_file", "ca_path")
_LAYERED = (*_FILES, "verify_incoming", "tls_min_version", "tls_cipher_suites")


class _Layers:
    """The keys of HTTPS: ``tls { https { } }`` over ``tls { defaults { } }``, as newer Consul has them, over the top level."""

    def __init__(self, reading: Reading, top: Fields) -> None:
        given = reading.section("tls", top.mapping("tls"))
        newer = [reading.section(f"tls.{name}", given.mapping(name)) for name in ("https", "defaults")]
        reading.done(given)
        for fields in newer:
            for key in _LAYERED:
                fields.raw(key)  # known, whichever of them counts
            reading.done(fields)
            fields.faults = top.faults  # what is found from here on is told with what the top level has
        self._layers = [*newer, top]

    def of(self, key: str) -> Fields:
        """The table that says what ``key`` is; the top level if none does."""
        found = [fields for fields in self._layers if fields.has(key)]
        self._layers[-1].raw(key)  # known there, whether it is overlaid or not
        return found[0] if found else self._layers[-1]


def read_tls(reading: Reading, top: Fields, judge_tls: JudgeTLS | None) -> TLSFiles | None:
    """The files, checked by ``judge_tls`` if all are there; None without a certificate, so without HTTPS."""
    layers, before = _Layers(reading, top), len(top.faults)
    cert, key, ca = (
        _path(layers.of(each), each, Path.is_file, "file") for each in ("cert_file", "key_file", "ca_file")
    )
    ca_path = _path(layers.of("ca_path"), "ca_path", Path.is_dir, "directory")
    sound = len(top.faults) == before
    # Each is asked for: the one that is left out would be unknown.
    asked = [each for each in ("verify_incoming_https", "verify_incoming") if layers.of(each).flag(each)]
    suites, prefer = _suites(reading, layers), top.flag("tls_prefer_server_cipher_suites")
    min_version = _min_version(layers)
    if (cert is None) != (key is None):
        missing = "key_file" if key is None else "cert_file"
        top.fault(missing, "missing", "HTTPS needs cert_file and key_file")
    if asked and (cert is None or (ca is None and ca_path is None)):
        problem = "needs cert_file, key_file and ca_file or ca_path"
        layers.of(asked[0]).fault(asked[0], problem, "set them, or leave it out")
    if cert is None or key is None:
        return None
    found = TLSFiles(cert, key, ca, bool(asked), min_version, ca_path, suites, prefer)
    if judge_tls is not None and sound:
        try:
            judge_tls(found)
        except InvalidConfig as exc:
            reading.judged(exc)
    return found


def _min_version(layers: _Layers) -> str:
    fields = layers.of("tls_min_version")
    given = fields.text("tls_min_version") or _MIN
    text = _NEWER.get(given, given)
    if text not in _VERSIONS:
        fields.fault("tls_min_version", f'"{given}" is no version of TLS', "use tls12 or tls13")
    elif not _VERSIONS[text]:
        fields.fault("tls_min_version", f"{given} is not offered: it is broken", "use tls12 or tls13")
    return text if _VERSIONS.get(text) else _MIN


def _suites(reading: Reading, layers: _Layers) -> tuple[str, ...]:
    """Those of the listed suites that are safe; the others are named in a warning, as long as any is left."""
    fields = layers.of("tls_cipher_suites")
    listed = [each for text in fields.texts("tls_cipher_suites") for each in re.split(r"[\s,]+", text) if each]
    safe = tuple(dict.fromkeys(_SUITES[each] for each in listed if each in _SUITES))
    left_out = [each for each in listed if each not in _SUITES]
    if listed and not safe:
        fields.fault(
            "tls_cipher_suites",
            f"none of them is offered ({', '.join(left_out)})",
            "list suites with ECDHE and AES-GCM or ChaCha20, or leave it out to have them all",
        )
    elif left_out:
        reading.warnings.append(f"tls_cipher_suites: not offered here: {', '.join(left_out)}")
    return safe


def _path(fields: Fields, key: str, exists: Callable[[Path], bool], kind: str) -> Path | None:
    text = fields.text(key)
    if not text:
        return None
    if not exists(Path(text)):
        fields.fault(key, f"{text} is not a {kind}", "check the path and its permissions")
    return Path(text)
